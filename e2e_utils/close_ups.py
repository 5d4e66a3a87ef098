"""Squares around single objects: what was labelled there, and what was found.

Copy: this file, drawing.py, scenes.py, images.py and stretch.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from .drawing import COLORS
from .scenes import read_rgb


def close_up(
    image: np.ndarray,
    labelled_xyxy: Sequence[float] | None = None,
    found_xyxy: Sequence[float] | None = None,
    right_xyxy: Sequence[float] | None = None,
    size: int = 240,
    least: int = 64,
) -> np.ndarray:
    """A square around an object, labelled in white, and what was found there.

    Args:
        image: uint8 (H, W, 3), RGB.
        labelled_xyxy, found_xyxy, right_xyxy: one at least; white, red and blue.
        size: side of the result in pixels.
        least: least side of the square in pixels of `image`; it grows with the boxes.

    Returns:
        uint8 (size, size, 3), RGB; black beyond the borders of the image.

    Example:
        >>> scene = np.full((300, 300, 3), 128, np.uint8)
        >>> square = close_up(scene, labelled_xyxy=[100, 100, 113, 113])
        >>> square.shape, square[120, 120].tolist()  # the middle of the object
        ((240, 240, 3), [128, 128, 128])
    """
    given = (
        (labelled_xyxy, COLORS["labelled"], 3),
        (right_xyxy, COLORS["right"], 2),
        (found_xyxy, COLORS["false"], 2),
    )
    drawn = [(np.array(b, float), c, w) for b, c, w in given if b is not None]
    if not drawn:
        raise ValueError("close_up needs a box; all are None")
    low = np.min([box[:2] for box, _, _ in drawn], axis=0)
    high = np.max([box[2:] for box, _, _ in drawn], axis=0)
    side = max(float(least), 1.5 * float((high - low).max()))
    corner, scale = (low + high - side) / 2, size / side
    matrix = np.array([[scale, 0, -corner[0] * scale], [0, scale, -corner[1] * scale]])
    canvas = cv2.warpAffine(np.ascontiguousarray(image), matrix, (size, size))
    for box, color, width in drawn:
        corners = np.round((box - np.tile(corner, 2)) * scale).astype(int).tolist()
        cv2.rectangle(canvas, corners[:2], corners[2:], color, width)
    return canvas


def mistake_close_up(
    pair: np.ndarray,
    kinds: Mapping[str, np.ndarray],
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    image_dir: str | Path,
    stretch: Any,
    least: int,
) -> tuple[np.ndarray, str]:
    """A mistake close up, with its object and the right box that this has, if any.

    Args:
        pair: a row of `kinds`: indices of the detection and of the annotation, or -1.
        kinds, ground_truth, detections, image_dir, stretch, least: see
            `compare.show_mistakes`.

    Returns:
        The picture of `close_up`, and the class that was found, or missed; "called bus"
        of an object that is no bus.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> car = {"image_id": 1, "category_id": 3, "bbox": [10, 20, 13, 13]}
        >>> truth = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [car]}
        >>> truth["categories"] = [{"id": 3, "name": "car"}]
        >>> kinds = {"correct": np.zeros((0, 2), int), "missed": np.array([[-1, 0]])}
        >>> with TemporaryDirectory() as folder:
        ...     _ = cv2.imwrite(f"{folder}/1.png", np.zeros((100, 100, 3), np.uint8))
        ...     picture, name = mistake_close_up(
        ...         kinds["missed"][0], kinds, truth, [], folder, stretch=None, least=64
        ...     )
        >>> picture.shape, name
        ((240, 240, 3), 'car')
    """
    of_found, of_label = pair.tolist()
    right = dict(kinds["correct"][:, ::-1].tolist())
    found = detections[of_found] if of_found >= 0 else None
    label = ground_truth["annotations"][of_label] if of_label >= 0 else None
    better = detections[right[of_label]] if of_label in right else None
    either = found or label or {}
    files = {row["id"]: row["file_name"] for row in ground_truth["images"]}
    names = {row["id"]: row["name"] for row in ground_truth["categories"]}
    pixels = read_rgb(Path(image_dir, files[either["image_id"]]), stretch=stretch)
    boxes = _corners(label), _corners(found), _corners(better)
    name = names[either["category_id"]]
    if found and label and found["category_id"] != label["category_id"]:
        name = f"called {name}"
    return close_up(pixels, *boxes, least=least), name


def _corners(row: Mapping[str, Any] | None) -> list[float] | None:
    if row is None:
        return None
    x, y, width, height = row["bbox"]
    return [x, y, x + width, y + height]
