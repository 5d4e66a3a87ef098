"""Pictures of what a detector found right, found falsely, and missed.

Copy: this file, visualize.py, mistakes.py, boxes.py, truth.py, coco.py, files.py,
scenes.py, images.py and stretch.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .mistakes import KINDS, box_array, mistakes, right_false_missed
from .scenes import read_rgb
from .visualize import (
    COLORS,
    Color,
    as_hex,
    axes,
    close_up,
    rectangles,
    scaled,
    show,
    show_boxes,
)

WORDS = {"right": "found right", "false": "false", "missed": "missed"}
OF_MISTAKES = {
    "labelled": COLORS["labelled"],
    "false": COLORS["false"],
    "the object's right box": COLORS["right"],
}


def draw_matches(
    image: np.ndarray,
    truth: Mapping[str, Any],
    found: Mapping[str, Any],
    *,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
    window: Sequence[int] | None = None,
    scale: float = 1.0,
    thickness: int = 2,
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
        scale: enlarge (> 1) or shrink the picture first.
        thickness: see `visualize.draw_boxes`.

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
    canvas, labels = scaled(image[y1:y2, x1:x2], scale), {}
    drawn: list[list[int]] = []
    colors: list[Color] = []
    for kind, pairs in kinds.items():
        boxes, index = (truth, 1) if kind == "missed" else (found, 0)
        corners = box_array(boxes)[pairs[:, index]] - [x1, y1, x1, y1]
        near = (corners[:, 2:] > 0) & (corners[:, :2] < [x2 - x1, y2 - y1])
        inside = near.all(axis=1)
        labels[kind] = np.asarray(boxes["labels"])[pairs[inside, index]].tolist()
        corners = np.round(corners[inside] * scale).astype(int)
        drawn += corners.tolist()
        colors += [COLORS[kind]] * len(corners)
    rectangles(canvas, np.reshape(drawn, (-1, 4)), colors, thickness)
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
    alt: str = "",
    **options: Any,
) -> tuple[Figure, dict[str, int]]:
    """Pictures with what was found right, found falsely and missed, and how many.

    Args:
        images: one or more uint8 (H, W, 3) pictures, RGB.
        truth, found: of each picture, see `draw_matches`.
        class_names: name of each label, the background first. With them the legend
            names the classes that are false or missed, most often first, three at most.
        titles: one for each picture, before its counts.
        columns, width, alt: see `visualize.show`.
        options: of `draw_matches`.

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
        heads.append(", ".join(f"{len(labels[kind])} {kind}" for kind in WORDS))
        for kind, of_kind in labels.items():
            total[kind].update(of_kind)
    if titles is not None:
        heads = [f"{a}: {b}" for a, b in zip(titles, heads, strict=True)]
    legend = {}
    for kind, word in WORDS.items():
        most = total[kind].most_common(3) if class_names and kind != "right" else []
        one = len(pictures) == 1  # of several the counts stand in the titles
        names = ", ".join(
            f"{n} {class_names[i]}" if one else class_names[i] for i, n in most
        )
        if len(total[kind]) > len(most) > 0:
            names = f"mostly {names}"
        legend[f"{word} ({names})" if names else word] = COLORS[kind]
    how: dict = {"columns": columns, "width": width, "legend": legend, "alt": alt}
    figure = show(pictures, heads, **how)
    return figure, {kind: sum(counts.values()) for kind, counts in total.items()}


def show_found(
    image: np.ndarray,
    truth: Mapping[str, Any] | None,
    found: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    score_threshold: float = 0.5,
    scale: float = 1.0,
    width: float = 9.0,
    alt: str = "",
) -> Figure:
    """A picture with what was found, against its labels where there are any.

    Args:
        truth: of `image`, see `draw_matches`; None: the boxes in the colours of their
            classes.
        image, found, score_threshold, scale: see `draw_matches`.
        class_names: name of each label, the background first.
        width, alt: see `visualize.show`.
    """
    how: dict = {"score_threshold": score_threshold, "scale": scale}
    how |= {"width": width, "alt": alt}
    if truth is None:
        return show_boxes(image, found, class_names, **how)
    return show_matches(image, truth, found, class_names, **how)[0]


def show_mistakes(
    kinds: Mapping[str, np.ndarray],
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    image_dir: str | Path,
    *,
    columns: int = 3,
    most: int = 1,
    least: int = 64,
    stretch: Any = None,
) -> Figure:
    """The surest mistakes of each kind, with their object and its right box, if any.

    Args:
        kinds: of `mistakes.mistakes`.
        ground_truth: content of the COCO file that it was given.
        detections: the COCO results that it was given.
        image_dir: folder of the file's scenes.
        columns: pictures in a row.
        most: so many of each kind, first one of each, then the next.
        least: least side of what a picture shows, in pixels of the scene.
        stretch: of scenes of more than 8 bits, see `scenes.open_scene`.
    """
    given = kinds, ground_truth, detections, image_dir, stretch, least
    every = [(n, kind) for n in range(most) for kind in KINDS[1:]]
    shown = [(kind, pair) for n, kind in every for pair in kinds[kind][n : n + 1]]
    views = [_of_mistake(pair, *given) for _, pair in shown]
    titles = [f"{k}: {name}" for (k, _), (_, name) in zip(shown, views, strict=True)]
    how: dict = {"columns": columns, "legend": OF_MISTAKES}
    alt = f"mistakes close up: {', '.join(titles)}"
    return show([view for view, _ in views], titles, **how, alt=alt)


def show_false(
    kinds: Mapping[str, np.ndarray],
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    image_dir: str | Path,
    class_name: str,
    *,
    most: int = 4,
    stretch: Any = None,
) -> Figure | None:
    """The surest false boxes of a class, each with its kind; None if there are none.

    Args:
        kinds, ground_truth, detections, image_dir, stretch: see `show_mistakes`.
        class_name: of the detections.
        most: so many of them.
    """
    given = kinds, ground_truth, detections, image_dir, stretch, 120
    categories = ground_truth["categories"]
    ids = {row["id"] for row in categories if row["name"] == class_name}
    rows = [
        (detections[pair[0]]["score"], kind, pair)
        for kind in KINDS[1:]
        for pair in kinds[kind]
        if pair[0] >= 0 and detections[pair[0]]["category_id"] in ids
    ]
    rows = sorted(rows, key=lambda row: -row[0])[:most]
    pictures = [_of_mistake(pair, *given)[0] for _, _, pair in rows]
    titles = [f"{kind}, score {score:.2f}" for score, kind, _ in rows]
    alt = f"false boxes of {class_name}: {', '.join(titles)}"
    return show(pictures, titles, alt=alt, legend=OF_MISTAKES) if pictures else None


def _of_mistake(
    pair: np.ndarray,
    kinds: Mapping[str, np.ndarray],
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    image_dir: str | Path,
    stretch: Any,
    least: int,
) -> tuple[np.ndarray, str]:
    """A mistake close up with its object and the right box that this has, if any; and
    the name of the class that was found, or missed."""
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
    return close_up(pixels, *boxes, least=least), names[either["category_id"]]


def _corners(row: Mapping[str, Any] | None) -> list[float] | None:
    if row is None:
        return None
    x, y, width, height = row["bbox"]
    return [x, y, x + width, y + height]


def precision_recall(
    ground_truth: str | Path | dict,
    detections: list[dict],
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
) -> Figure:
    """Precision over recall of all classes together, with score thresholds marked.

    Args:
        ground_truth: a COCO file or its content.
        detections: COCO results, from a low score up.
        score_threshold: that of the large mark, 0..1; 0.3 and 0.7 get a small one.
        iou_threshold: from which on a detection of the right class is right.
    """
    kinds = mistakes(ground_truth, detections, 0.0, iou_threshold)
    scores = np.array([row["score"] for row in detections])
    right = np.zeros(len(scores), bool)
    right[kinds["correct"][:, 0]] = True
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order])
    precision = hits / np.arange(1, len(order) + 1)
    recall = hits / max(1, _objects(ground_truth))
    figure, (axis,) = axes(5.5, 3.6)
    axis.plot(recall, precision, color=as_hex(COLORS["plain"]))
    for other in (0.3, 0.7):  # how far a lower or a higher threshold goes
        at = int((scores >= other).sum()) - 1
        if at >= 0 and abs(other - score_threshold) > 0.05:
            axis.plot(recall[at], precision[at], ".", color=as_hex(COLORS["plain"]))
            axis.annotate(f"{other:g}", (recall[at], precision[at]), **_beside(4, 4))
    at = int((scores >= score_threshold).sum()) - 1
    said = "no box reaches it"
    if at >= 0:
        x, y = recall[at], precision[at]
        said = f"recall {x:.2f}, precision {y:.2f}"
        axis.plot([x], [y], "o", color=as_hex(COLORS["score"]))
        where = _beside(-8, -8) | {"ha": "right", "va": "top"}
        axis.annotate(f"score {score_threshold:g}\n{said}", (x, y), **where)
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    figure.set_label(f"precision over recall; at a score of {score_threshold:g} {said}")
    return figure


def _beside(x: float, y: float) -> dict:
    """Of matplotlib's annotate: so many points from the place that it names."""
    return {"xytext": (x, y), "textcoords": "offset points"}


def _objects(ground_truth: str | Path | dict) -> int:
    """How many objects can be found: crowds, and labels outside, are none."""
    none = mistakes(ground_truth, [])
    return len(none["missed"])
