"""COCO files of boxes: one strict reader, one writer.

Copy: this file and files.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import count, repeat
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .files import write_file


class Image(msgspec.Struct, gc=False):
    """A picture: its size in pixels, and its name in the folder of the pictures."""

    height: int
    width: int
    id: int
    file_name: str


class Box(msgspec.Struct, gc=False, array_like=True, forbid_unknown_fields=True):
    """Upper left corner and size in pixels; in JSON a list of four numbers."""

    x: float
    y: float
    width: float
    height: float


class Annotation(msgspec.Struct, gc=False, kw_only=True):
    """An object; the fields stand in SAHI's order."""

    iscrowd: int = 0
    image_id: int
    bbox: Box
    segmentation: Any = ()  # polygons or a mask: handed on, not looked at
    category_id: int
    id: int
    area: int | float | msgspec.UnsetType = msgspec.UNSET  # square pixels


class Category(msgspec.Struct):
    """A class of objects."""

    id: int
    name: str
    supercategory: str | None | msgspec.UnsetType = msgspec.UNSET


class Coco(msgspec.Struct):
    """A COCO file: pictures, the objects in them, and the classes of objects."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]

    def to_dict(self) -> dict:
        """The same in plain dicts and lists, as COCO's evaluators take it."""
        return msgspec.to_builtins(self)


def read_coco(path: str | Path, *, strict: bool = True) -> Coco:
    """Read a COCO file and check it.

    Args:
        path: JSON with images (id, file_name, height, width), annotations (id,
            image_id, category_id, bbox; iscrowd, area and segmentation if they are
            there) and categories (id, name). Other fields are left out.
        strict: there must be images, and every annotation must name an image and a
            category of the file and have an area. False leaves that to the caller.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a field is missing or of another type, an id stands twice, an image
            has no pixels, or what `strict` asks does not hold. The message names the
            file and the value.
    """
    path = Path(path)
    try:
        coco = msgspec.json.decode(path.read_bytes(), type=Coco)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: not a COCO file: {error}") from error
    for what in ("images", "annotations", "categories"):
        ids = Counter(row.id for row in getattr(coco, what))
        if ids and max(ids.values()) > 1:
            twice = ids.most_common(1)[0][0]
            raise ValueError(f"{path}: id {twice} stands twice in {what}")
    for image in coco.images:
        if image.height < 1 or image.width < 1:
            size = f"{image.width} x {image.height} pixels"
            raise ValueError(f"{path}: image {image.file_name!r} is {size}")
    if strict:
        _check_annotations(coco, path)
    return coco


def _check_annotations(coco: Coco, path: Path) -> None:
    if not coco.images:
        raise ValueError(f"{path} lists no images")
    images = {image.id for image in coco.images}
    categories = {category.id for category in coco.categories}
    for row in coco.annotations:
        wrong = None
        if row.category_id not in categories:
            wrong = f"category_id {row.category_id} is not listed"
        elif row.image_id not in images:
            wrong = f"image_id {row.image_id} is not listed"
        elif row.bbox.width <= 0 or row.bbox.height <= 0:
            wrong = f"its box has no area: {row.bbox}"
        if wrong:
            raise ValueError(f"annotation {row.id} of {path}: {wrong}")


def count_defects(defects: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, int]]:
    """Which of N rows have no defect.

    Args:
        defects: by reason, bool (N,), True where a row has it.

    Returns:
        int64 (K,), indices of the rows without any; and how many rows each reason
        costs, where a row counts for the first that holds.
    """
    kept, dropped = np.array(True), {}
    for reason, bad in defects.items():
        dropped[reason] = int((kept & bad).sum())
        kept = kept & ~bad
    return np.flatnonzero(kept), dropped


def to_annotations(
    boxes_xywh: np.ndarray,
    image_ids: np.ndarray,
    category_ids: np.ndarray,
    *,
    outlines: bool = False,
) -> list[Annotation]:
    """Boxes as annotations with ids from 1 up.

    Args:
        boxes_xywh: float64 (N, 4) in pixels.
        image_ids, category_ids: int64 (N,).
        outlines: `segmentation` is the box's four corners in whole pixels; else empty.
    """
    x, y, w, h = boxes_xywh.T
    polygons: Iterable = repeat(())
    if outlines:
        corners = np.stack([x + w, y, x + w, y + h, x, y + h, x, y], axis=1)
        polygons = ([row] for row in corners.astype(np.int64).tolist())
    rows = zip(
        image_ids.tolist(),
        map(Box, x.tolist(), y.tolist(), w.tolist(), h.tolist()),
        polygons,
        category_ids.tolist(),
        count(1),
        (w * h).astype(np.int64).tolist(),
    )
    return [
        Annotation(image_id=i, bbox=b, segmentation=s, category_id=c, id=n, area=a)
        for i, b, s, c, n, a in rows
    ]


def write_coco(path: str | Path, coco: Coco) -> None:
    """Write a COCO file whole or not at all."""
    write_file(path, [msgspec.json.encode(coco)])
