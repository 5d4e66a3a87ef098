"""Pictures of what a detector found right, found falsely, and missed.

Copy: this file, visualize.py, mistakes.py, boxes.py, truth.py, coco.py and files.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from .mistakes import box_array, right_false_missed
from .visualize import COLORS, scaled, show

WORDS = {"right": "found right", "false": "false", "missed": "missed"}


def draw_matches(
    image: np.ndarray,
    truth: Mapping[str, Any],
    found: Mapping[str, Any],
    *,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
    window: Sequence[int] | None = None,
    scale: float = 1.0,
) -> tuple[np.ndarray, dict[str, list[int]]]:
    """A copy of a picture with right and false detections and missed objects.

    Of a missed object its label is drawn, of all others the box that was found. Boxes
    are matched on the whole picture by `mistakes.right_false_missed`.

    Args:
        image: uint8 (H, W, 3), RGB.
        truth, found: in pixels of `image`, as `right_false_missed` takes them; labelled
            boxes are cut to the picture, and those with nothing left are no objects.
        score_threshold, iou_threshold: of the matching.
        window: x1, y1, x2, y2: show and count only what reaches into this part.
        scale: enlarge (> 1) or shrink the picture first; lines are 2 pixels wide.

    Returns:
        uint8 RGB, and the labels of what was drawn as {"right", "false", "missed"}.

    Raises:
        ValueError: the window does not lie in the picture.
    """
    height, width = image.shape[:2]
    x1, y1, x2, y2 = window or (0, 0, width, height)
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise ValueError(
            f"window {window} does not lie in a picture of {width} x {height} pixels; "
            "give x1, y1, x2, y2"
        )
    labelled = box_array(truth).clip(0, [width, height] * 2)
    seen = (labelled[:, 2:] > labelled[:, :2]).all(axis=1)
    truth = {"boxes": labelled[seen], "labels": np.asarray(truth["labels"])[seen]}
    kinds = right_false_missed(truth, found, score_threshold, iou_threshold)
    canvas, drawn, labels = scaled(image[y1:y2, x1:x2], scale), [], {}
    for kind, pairs in kinds.items():
        boxes, index = (truth, 1) if kind == "missed" else (found, 0)
        corners = box_array(boxes)[pairs[:, index]] - [x1, y1, x1, y1]
        near = (corners[:, 2:] > 0) & (corners[:, :2] < [x2 - x1, y2 - y1])
        inside = near.all(axis=1)
        labels[kind] = np.asarray(boxes["labels"])[pairs[inside, index]].tolist()
        corners = np.round(corners[inside] * scale).astype(int)
        drawn += [(box[:2], box[2:], COLORS[kind]) for box in corners.tolist()]
    for low, high, _ in drawn:  # dark edges first: no ground hides a line
        cv2.rectangle(canvas, low, high, (0, 0, 0), 4)
    for low, high, color in drawn:
        cv2.rectangle(canvas, low, high, color, 2)
    return canvas, labels


def show_matches(
    images: np.ndarray | Sequence[np.ndarray],
    truth: Any,
    found: Any,
    class_names: Sequence[str] = (),
    titles: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    width: float = 9.0,
    **options: Any,
) -> tuple[Figure, dict[str, int]]:
    """Pictures with what was found right, found falsely and missed, and how many.

    Args:
        images: one or more uint8 (H, W, 3) pictures, RGB.
        truth, found: of each picture, see `draw_matches`.
        class_names: name of each label, the background first. With them the legend
            names the classes that are false or missed most often.
        titles: one for each picture, before its counts.
        columns, width: see `visualize.show`.
        options: score_threshold, iou_threshold, window, scale of `draw_matches`.

    Returns:
        The figure, the counts of each picture in its title; and the counts of all as
        {"right", "false", "missed"}.
    """
    if isinstance(images, np.ndarray):
        images, truth, found = [images], [truth], [found]
    pictures, heads = [], []
    total: dict[str, Counter[int]] = {kind: Counter() for kind in WORDS}
    for picture in zip(images, truth, found, strict=True):
        canvas, labels = draw_matches(*picture, **options)
        pictures.append(canvas)
        heads.append(", ".join(f"{len(labels[k])} {WORDS[k]}" for k in WORDS))
        for kind, of_kind in labels.items():
            total[kind].update(of_kind)
    if titles is not None:
        heads = [f"{a}: {b}" for a, b in zip(titles, heads, strict=True)]
    legend = {}
    for kind, word in WORDS.items():
        most = total[kind].most_common(3) if class_names and kind != "right" else []
        names = ", ".join(f"{class_names[label]} {n}" for label, n in most)
        legend[f"{word} ({names})" if names else word] = COLORS[kind]
    figure = show(pictures, heads, columns=columns, width=width, legend=legend)
    return figure, {kind: sum(counts.values()) for kind, counts in total.items()}
