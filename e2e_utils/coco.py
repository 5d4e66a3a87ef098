"""COCO files of boxes: one strict reader, one writer.

Copy: this file and files.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import astuple

from .files import write_file

MIN_SIDE = 1e-3  # px; a flip or a resize in float32 can make a narrower box vanish


class Image(msgspec.Struct, gc=False):
    """A picture: its size in pixels, and its name in the folder of the pictures."""

    height: int
    width: int
    id: int | str
    file_name: str


class Box(msgspec.Struct, gc=False, array_like=True, forbid_unknown_fields=True):
    """Upper left corner and size in pixels; in JSON a list of four numbers."""

    x: float
    y: float
    width: float
    height: float


class Annotation(msgspec.Struct, gc=False, kw_only=True):
    """An object; the fields stand in SAHI's order."""

    iscrowd: int = 0  # 1: many objects in one box, not to learn and not to score
    image_id: int | str
    bbox: Box
    segmentation: Any = ()  # polygons or a mask: handed on, not looked at
    category_id: int
    id: int | str
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
            there) and categories (id, name). Ids of images and annotations may be
            strings. Other fields are left out.
        strict: there must be images, and every annotation must name an image and a
            category of the file and have a box of 0.001 px or more a side, in float32
            as detectors compute. False leaves that to the caller.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a field is missing or of another type, an id or a picture stands
            twice, an image has no pixels, or what `strict` asks does not hold. The
            message names the file and the value.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "labels.json").write_text('{"images": []}')
        ...     read_coco(f"{folder}/labels.json")
        Traceback (most recent call last):
            ...
        ValueError: ...: not a COCO file: Object missing required field `annotations`
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
    names = Counter(image.file_name for image in coco.images)
    if names and max(names.values()) > 1:
        twice = names.most_common(1)[0][0]
        raise ValueError(f"{path}: {twice!r} stands twice in images: join the two")
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
    boxes = boxes_xyxy(coco)
    narrow = np.min(boxes[:, 2:] - boxes[:, :2], axis=1, initial=1) < MIN_SIDE
    for row, no_box in zip(coco.annotations, narrow.tolist(), strict=True):
        wrong = None
        if row.category_id not in categories:
            wrong = f"category_id {row.category_id} is not listed"
        elif row.image_id not in images:
            wrong = f"image_id {row.image_id!r} is not listed"
        elif no_box:
            wrong = f"its box has no area in float32: {row.bbox}"
        if wrong:
            raise ValueError(
                f"annotation {row.id} of {path}: {wrong}; mend or remove it"
            )


def _corners(coco: Coco) -> np.ndarray:
    """Boxes of the annotations: float64 (N, 4), xyxy in pixels."""
    numbers = chain.from_iterable(astuple(row.bbox) for row in coco.annotations)
    boxes = np.fromiter(numbers, np.float64, 4 * len(coco.annotations)).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def boxes_xyxy(coco: Coco) -> np.ndarray:
    """Boxes of the annotations as detectors see them: float32 (N, 4) in pixels.

    Example:
        >>> car = Annotation(id=1, image_id=1, category_id=3, bbox=Box(10, 20, 13, 13))
        >>> boxes_xyxy(Coco([], [car], [])).tolist()
        [[10.0, 20.0, 23.0, 33.0]]
    """
    return _corners(coco).astype(np.float32)


def count_defects(defects: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, int]]:
    """Which of N rows have no defect.

    Args:
        defects: by reason, bool (N,), True where a row has it.

    Returns:
        int64 (K,), indices of the rows without any; and how many rows each reason
        costs, where a row counts for the first that holds.

    Example:
        >>> none, small = np.array([True, False, False]), np.array([True, True, False])
        >>> kept, dropped = count_defects({"no class": none, "too small": small})
        >>> kept.tolist(), dropped
        ([2], {'no class': 1, 'too small': 1})
    """
    kept, dropped = np.array(True), {}
    for reason, bad in defects.items():
        dropped[reason] = int((kept & bad).sum())
        kept = kept & ~bad
    return np.flatnonzero(kept), dropped


def usable_boxes(coco: Coco) -> tuple[list[np.ndarray], dict[str, int]]:
    """The annotations of a file that was not read strictly, without what is no box.

    Returns:
        [index of the image int64 (N,), ascending; category id int64 (N,); iscrowd
        int64 (N,); boxes_xyxy float64 (N, 4) in pixels], and how many were left out
        by each reason. A negative width or height counts as absolute, as in SAHI.

    Example:
        >>> image, car = Image(100, 100, 1, "1.png"), Category(3, "car")
        >>> sizes = [13, 13], [0, 13]
        >>> rows = [
        ...     Annotation(id=i, image_id=1, category_id=3, bbox=Box(10, 20, *size))
        ...     for i, size in enumerate(sizes)
        ... ]
        >>> (_, _, _, boxes), dropped = usable_boxes(Coco([image], rows, [car]))
        >>> boxes.tolist(), dropped["zero area"]
        ([[10.0, 20.0, 23.0, 33.0]], 1)
    """
    rows, xyxy = coco.annotations, _corners(coco)
    position = {image.id: i for i, image in enumerate(coco.images)}
    known = [row.id for row in coco.categories]
    image = np.array([position.get(row.image_id, -1) for row in rows], np.int64)
    category = np.array([row.category_id for row in rows], np.int64)
    crowd = np.array([row.iscrowd for row in rows], np.int64)
    xyxy = np.sort(xyxy.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    area = np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1)
    order, dropped = count_defects(
        {
            "image not listed": image < 0,
            "category not listed": ~np.isin(category, known),
            "zero area": area == 0,
            "area below 1 pixel": ~(area >= 1),
        }
    )
    order = order[np.argsort(image[order], kind="stable")]
    return [image[order], category[order], crowd[order], xyxy[order]], dropped


def to_annotations(
    boxes_xywh: np.ndarray,
    image_ids: np.ndarray,
    category_ids: np.ndarray,
    *,
    outlines: bool = False,
    crowd: np.ndarray | None = None,
) -> list[Annotation]:
    """Boxes as annotations with ids from 1 up.

    Args:
        boxes_xywh: float64 (N, 4) in pixels.
        image_ids, category_ids: int64 (N,).
        outlines: `segmentation` is the box's four corners in whole pixels; else empty.
        crowd: int64 (N,), `iscrowd` of each; 0 by default.

    Example:
        >>> xywh, ids = np.array([[10.0, 20, 13, 13]]), np.array([1])
        >>> to_annotations(xywh, ids, ids)[0].bbox
        Box(x=10.0, y=20.0, width=13.0, height=13.0)
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
        repeat(0) if crowd is None else crowd.tolist(),
    )
    return [
        Annotation(
            iscrowd=m, image_id=i, bbox=b, segmentation=s, category_id=c, id=n, area=a
        )
        for i, b, s, c, n, a, m in rows
    ]


def write_coco(path: str | Path, coco: Coco) -> None:
    """Write a COCO file whole or not at all.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> coco = Coco([Image(600, 800, 1, "1.tif")], [], [Category(1, "car")])
        >>> with TemporaryDirectory() as folder:
        ...     write_coco(f"{folder}/labels.json", coco)
        ...     read_coco(f"{folder}/labels.json").categories[0].name
        'car'
    """
    write_file(path, [msgspec.json.encode(coco)])
