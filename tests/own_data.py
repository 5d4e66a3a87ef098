"""A data set as a stranger may have it: other classes, ids, names, kinds of files."""

import json
from pathlib import Path

import cv2
import numpy as np
import rasterio

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


def write_tiff(path, stored, **options):
    """(H, W, bands) by GDAL."""
    height, width, count = stored.shape
    size = {"height": height, "width": width, "count": count, "dtype": stored.dtype}
    with rasterio.open(path, "w", driver="GTiff", **size, **options) as file:
        file.write(stored.transpose(2, 0, 1))
    return path


def write_16_bit_scenes(folder: Path, side=600) -> Path:
    """TIFF scenes of blue, green, red, infrared, and their COCO file.

    Values are 500 to 10,700, and 0, which is nodata, in a corner.
    """
    labels = write_scenes(folder / "png", side=side)
    coco = json.loads(labels.read_text())
    (folder / "scenes").mkdir()
    for image in coco["images"]:
        bgr = cv2.imread(str(folder / "png" / image["file_name"]))
        stored = np.dstack([bgr, bgr[..., 0] // 2]).astype(np.uint16) * 40 + 500
        stored[:5, :5] = 0
        image["file_name"] = image["file_name"].replace(".png", ".tif")
        write_tiff(folder / "scenes" / image["file_name"], stored, nodata=0)
    labels.write_text(json.dumps(coco))
    return labels
