"""Tiles of noise with bright rectangles: prove that a training runs, and no more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from e2e_utils.classes import class_names
from e2e_utils.describe_tiles import describe_split


def write_noise_tiles(folder: str | Path, size: int = 300, tiles: int = 8) -> None:
    """Write COCO tiles with two of xView's classes that mean nothing here.

    Args:
        folder: gets "train", "val" and their description, see `tile_set.TileSet`.
        size: side of a tile in pixels, 41 or more.
        tiles: of "train"; "val" has half as many.
    """
    rng = np.random.default_rng(0)
    names = class_names()[1:]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    for split in ("train", "val"):
        image_dir, json_path = Path(folder, split), Path(folder, f"{split}.json")
        image_dir.mkdir(parents=True)
        images: list[dict] = []
        annotations: list[dict] = []
        for image_id in range(tiles if split == "train" else max(2, tiles // 2)):
            picture = rng.integers(60, 120, (size, size, 3), dtype=np.uint8)
            annotations += _rectangles(rng, picture, image_id, len(annotations) + 1)
            name = f"fake_{split}_{image_id}.jpg"
            cv2.imwrite(str(image_dir / name), picture)
            row = {"id": image_id, "file_name": name, "width": size, "height": size}
            images.append(row)
        coco = {"images": images, "annotations": annotations, "categories": categories}
        json_path.write_text(json.dumps(coco))
        describe_split(folder, split, image_dir, json_path, tile_size=size, overlap=0.0)


def _rectangles(
    rng: np.random.Generator, picture: np.ndarray, image_id: int, first: int
) -> Iterator[dict]:
    """Draw four rectangles into a picture; their annotations, numbered from `first`."""
    for number in range(first, first + 4):
        w, h = (int(v) for v in rng.integers(12, 40, 2))
        x, y = (int(v) for v in rng.integers(0, len(picture) - 40, 2))
        category = int(rng.integers(0, 2))
        picture[y : y + h, x : x + w] = (40, 40, 230) if category else 220
        yield {
            "id": number,
            "image_id": image_id,
            "category_id": category,
            "bbox": [x, y, w, h],
            "area": w * h,
            "iscrowd": 0,
        }
