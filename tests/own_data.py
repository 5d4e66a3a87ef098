"""A data set as a stranger may have it: other classes, ids, names, kinds of files."""

import json
from pathlib import Path

import cv2
import numpy as np

CLASSES = {
    9: "ship",
    1: "hut",
    5: "crane",
}  # neither from 0 nor without gaps nor sorted


def write_scenes(folder: Path, count=3, side=600, categories=CLASSES) -> Path:
    """PNG scenes with bright squares, and their COCO file with string ids."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    images, objects = [], []
    for n in range(count):
        pixels = rng.integers(20, 60, (side, side + 60, 3), dtype=np.uint8)
        name = f"Straße {n} ü.png"
        for category in list(categories) * 2:
            x, y = (int(v) for v in rng.integers(0, side - 60, 2))
            pixels[y : y + 40, x : x + 40] = 40 + 20 * category
            row = {"id": f"a{len(objects)}", "image_id": f"img_{n}", "iscrowd": 0}
            objects.append({**row, "category_id": category, "bbox": [x, y, 40, 40]})
        cv2.imwrite(str(folder / name), pixels)
        size = {"height": side, "width": side + 60}
        images.append({"id": f"img_{n}", "file_name": name, **size})
    listed = [{"id": i, "name": name} for i, name in categories.items()]
    coco = {"images": images, "annotations": objects, "categories": listed}
    path = folder.parent / "labels.json"
    path.write_text(json.dumps(coco))
    return path
