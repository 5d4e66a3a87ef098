"""What goes wrong: a confusion matrix, and every mistake by its kind.

Copy: this file, boxes.py, truth.py, coco.py and files.py.

A score says how good a detector is; the kinds of its mistakes say what to do about it.
All functions agree on what is correct, which is COCO's matching: by descending score,
each detection takes the free object of its class that it overlaps most, if their IoU
reaches the threshold. Crowds (iscrowd 1) are no objects here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .boxes import iou_pairs, nearest
from .truth import (
    clip_to_images,
    columns,
    content,
    listed,
    read_ground_truth,
    to_labels,
)

KINDS = (
    "correct",
    "localisation",
    "confusion",
    "duplicate",
    "both",
    "background",
    "missed",
)


def _select(
    ground_truth: str | Path | dict, detections: list[dict], score_threshold: float
) -> tuple[dict, np.ndarray, np.ndarray, list[dict]]:
    """Ground truth cut to its images, without crowds; indices of its objects in the
    file's annotations, of the detections by descending score, and those."""
    ground_truth = content(ground_truth)
    of_file = listed(ground_truth)
    ground_truth, detections = read_ground_truth(ground_truth, detections, clip=False)
    index = _by_score([row["score"] for row in detections], score_threshold)
    rows, (cut, kept) = ground_truth["annotations"], clip_to_images(ground_truth)
    objects = [i for i, row in enumerate(kept) if not rows[row].get("iscrowd")]
    cut = {**cut, "annotations": [cut["annotations"][i] for i in objects]}
    return cut, of_file[kept[objects]], index, [detections[i] for i in index]


def _by_score(scores: Sequence[float] | np.ndarray, threshold: float) -> np.ndarray:
    """Indices of the scores from the threshold up, highest first."""
    values = np.asarray(scores)
    order = np.argsort(-values, kind="stable")
    return order[values[order] >= threshold]


def _correct(
    pairs: tuple[np.ndarray, ...],
    found_class: np.ndarray,
    object_class: np.ndarray,
    iou_threshold: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The detections that are correct and their objects, int64 (K,) each."""
    own = found_class[pairs[0]] == object_class[pairs[1]]
    return _greedy(*(p[own & (pairs[2] >= iou_threshold)] for p in pairs))


def _greedy(
    found: np.ndarray, objects: np.ndarray, iou: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Match by descending score, each detection with the free object nearest to it.

    Args:
        found: int64 (P,), detections numbered by descending score.
        objects, iou: the object of each pair, and their IoU.

    Returns:
        The matched detections and their objects, int64 (K,) each.
    """
    order = np.lexsort((objects, -iou, found))
    match: dict[int, int] = {}
    taken: set[int] = set()
    pairs = zip(found[order].tolist(), objects[order].tolist(), strict=True)
    for detection, target in pairs:
        if detection not in match and target not in taken:
            match[detection] = target
            taken.add(target)
    return np.array([*match], np.int64), np.array([*match.values()], np.int64)


def confusion_matrix(
    ground_truth: str | Path | dict,
    detections: list[dict],
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
) -> np.ndarray:
    """Which class was taken for which.

    The diagonal counts what `mistakes` calls "correct". What is left of detections and
    objects is matched again, by descending score and whatever the class, each object
    once. So the other cells say which class an object was taken for, and do not sum to
    the "confusion" of `mistakes`, which looks at each wrong detection by itself.

    Args:
        ground_truth: a COCO file or its content.
        detections: COCO results.
        score_threshold: detections below are left out, 0..1.
        iou_threshold: 0..1, more than 0.

    Returns:
        int64 (C + 1, C + 1), [label of the object, label found]. Label 1 is the
        category of the lowest id, 2 the next, as in `CocoTiles.class_names`; 0 is
        background: row 0 counts detections where nothing is labelled, column 0 objects
        that nothing was found on. The row of a class sums to its objects, the column to
        its detections.

    Raises:
        ValueError: a detection's image or category is not in the ground truth.

    Example:
        >>> plane = {"image_id": 1, "category_id": 11, "bbox": [10, 20, 30, 30]}
        >>> truth = {
        ...     "images": [{"id": 1}],
        ...     "annotations": [plane],
        ...     "categories": [{"id": 11, "name": "plane"}, {"id": 18, "name": "car"}],
        ... }
        >>> found = {**plane, "category_id": 18, "score": 0.9}
        >>> confusion_matrix(truth, [found]).tolist()
        [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    """
    ground_truth, _, _, kept = _select(ground_truth, detections, score_threshold)
    image, category, boxes = columns(ground_truth["annotations"])
    found_image, found_category, found_boxes = columns(kept)
    pairs = iou_pairs(found_boxes, found_image, boxes, image, iou_threshold)
    right, its_object = _correct(pairs, found_category, category, iou_threshold)
    free = ~np.isin(pairs[0], right) & ~np.isin(pairs[1], its_object)
    wrong, other = _greedy(*(p[free] for p in pairs))
    found, objects = np.append(right, wrong), np.append(its_object, other)
    of_object = to_labels(ground_truth, category)
    of_found = to_labels(ground_truth, found_category)
    size = len(ground_truth["categories"]) + 1
    matrix = np.zeros((size, size), np.int64)
    np.add.at(matrix, (of_object[objects], of_found[found]), 1)
    matrix[0] += np.bincount(np.delete(of_found, found), minlength=len(matrix))
    matrix[:, 0] += np.bincount(np.delete(of_object, objects), minlength=len(matrix))
    return matrix


def _nearest(count: int, *pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest IoU of each of `count` detections and its object; 0, -1 for none."""
    best, objects = np.zeros(count), np.full(count, -1)
    which, its_object, iou = nearest(*pairs)
    best[which], objects[which] = iou, its_object
    return best, objects


def mistakes(
    ground_truth: str | Path | dict,
    detections: list[dict],
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
    background_iou: float = 0.1,
) -> dict[str, np.ndarray]:
    """Every detection and every missed object by kind.

    A detection is "correct" if it is matched with an object of its class. What is left
    is the first of these that holds:

        "localisation": near an object of its class, IoU from background_iou
        "confusion": on an object of another class
        "duplicate": on an object of its class that was found already
        "both": near an object of another class
        "background": near nothing
        "missed": an object that is neither found nor the one of a confusion or a
            localisation

    Args:
        ground_truth: a COCO file or its content.
        detections: COCO results.
        score_threshold: detections below are left out, 0..1.
        iou_threshold, background_iou: 0 < background_iou < iou_threshold <= 1.

    Returns:
        {kind: int64 (N, 2)} for each of `KINDS`: the index in `detections`, and that in
        the ground truth's "annotations" of the object concerned; -1 for none. By
        descending score, missed objects in the order of the file.

    Raises:
        ValueError: a detection's image or category is not in the ground truth, or the
            thresholds are out of order.

    Source: TIDE (Bolya et al., 2020, arXiv:2008.08115), its kinds, thresholds, and the
    order of the tests in its tidecv.

    Example:
        >>> car = {"image_id": 1, "category_id": 18, "bbox": [10, 20, 13, 13]}
        >>> truth = {
        ...     "images": [{"id": 1}],
        ...     "annotations": [car, {**car, "bbox": [60, 20, 13, 13]}],
        ...     "categories": [{"id": 18, "name": "car"}],
        ... }
        >>> near = {**car, "bbox": [13, 23, 13, 13], "score": 0.9}  # IoU 0.42
        >>> kinds = mistakes(truth, [near])
        >>> {kind: rows.tolist() for kind, rows in kinds.items() if len(rows)}
        {'localisation': [[0, 0]], 'missed': [[-1, 1]]}
    """
    if not 0 < background_iou < iou_threshold <= 1:
        raise ValueError(
            f"background_iou is {background_iou} and iou_threshold {iou_threshold}; "
            "give 0 < background_iou < iou_threshold <= 1"
        )
    ground_truth, of_file, index, kept = _select(
        ground_truth, detections, score_threshold
    )
    image, category, boxes = columns(ground_truth["annotations"])
    found_image, found_category, found_boxes = columns(kept)
    pairs = iou_pairs(found_boxes, found_image, boxes, image, background_iou)
    own = found_category[pairs[0]] == category[pairs[1]]
    matched, objects = _correct(pairs, found_category, category, iou_threshold)
    own_iou, own_object = _nearest(len(kept), *(p[own] for p in pairs))
    other_iou, other_object = _nearest(len(kept), *(p[~own] for p in pairs))
    own_object[matched] = objects
    correct = np.zeros(len(kept), bool)
    correct[matched] = True
    rules = {
        "correct": (correct, own_object),
        "localisation": ((0 < own_iou) & (own_iou < iou_threshold), own_object),
        "confusion": (other_iou >= iou_threshold, other_object),
        "duplicate": (own_iou >= iou_threshold, own_object),
        "both": (other_object >= 0, other_object),
        "background": (np.ones(len(kept), bool), np.full(len(kept), -1)),
    }
    left, kinds = np.ones(len(kept), bool), {}
    for kind, (applies, concerned) in rules.items():
        chosen = np.flatnonzero(left & applies)
        target = np.append(of_file, -1)[concerned[chosen]]  # -1, for none, stays
        kinds[kind] = np.stack([index[chosen], target], axis=1)
        left[chosen] = False
    explained = [kinds[k][:, 1] for k in ("correct", "confusion", "localisation")]
    missed = np.setdiff1d(of_file, np.concatenate(explained))
    kinds["missed"] = np.stack([np.full(len(missed), -1), missed], axis=1)
    return kinds


def right_false_missed(
    truth: Mapping[str, Any],
    found: Mapping[str, Any],
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
) -> dict[str, np.ndarray]:
    """The boxes of one image: what is right, what is false, what was missed.

    Args:
        truth: "boxes_xyxy" or "boxes" (N, 4) in pixels, "labels" (N,), as of
            `truth.image_truth` or a target of `CocoTiles`.
        found: the same (M, 4) and (M,), and "scores" (M,), as of `predict_scene`.
        score_threshold: detections below are left out, 0..1.
        iou_threshold: 0..1, more than 0.

    Returns:
        {"right", "false", "missed": int64 (K, 2)}: the index in `found`, by descending
        score, and that in `truth`; -1 for none. "right" is what `mistakes` calls
        "correct", "false" are all other detections, "missed" all other objects.

    Example:
        >>> truth = {"boxes": [[0, 0, 13, 13], [60, 0, 73, 13]], "labels": [1, 1]}
        >>> found = {"boxes": [[2, 2, 15, 15]], "labels": [1], "scores": [0.9]}
        >>> boxes = right_false_missed(truth, found)
        >>> {what: rows.tolist() for what, rows in boxes.items()}
        {'right': [[0, 0]], 'false': [], 'missed': [[-1, 1]]}
    """
    index = _by_score(found["scores"], score_threshold)
    found_class = np.asarray(found["labels"])[index]
    object_class = np.asarray(truth["labels"])
    pairs = iou_pairs(
        box_array(found)[index],
        found_class,
        box_array(truth),
        object_class,
        iou_threshold,
    )
    right, objects = _correct(pairs, found_class, object_class, iou_threshold)
    false = np.delete(index, right)
    missed = np.delete(np.arange(len(object_class)), objects)
    return {
        "right": np.stack([index[right], objects], axis=1),
        "false": np.stack([false, np.full(len(false), -1)], axis=1),
        "missed": np.stack([np.full(len(missed), -1), missed], axis=1),
    }


def box_array(boxes: Mapping[str, Any]) -> np.ndarray:
    """The boxes of a target or of detections, float64 (N, 4) x1, y1, x2, y2.

    Example:
        >>> box_array({"boxes": [[0, 0, 13, 13]]}).tolist()
        [[0.0, 0.0, 13.0, 13.0]]
    """
    given = boxes["boxes_xyxy"] if "boxes_xyxy" in boxes else boxes["boxes"]
    return np.asarray(given, np.float64).reshape(-1, 4)
