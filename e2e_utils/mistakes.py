"""What goes wrong: a confusion matrix, and every mistake by its kind.

Copy: this file, boxes.py, evaluate.py, coco.py and files.py.

A score says how good a detector is; the kinds of its mistakes say what to do about it.
Both functions give counts and lead back to the boxes, so that they can be looked at.
Crowds (iscrowd 1) are no objects here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .boxes import iou_pairs, nearest
from .evaluate import columns, read_ground_truth

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
    """Ground truth without crowds, indices of its objects in the file's annotations;
    indices of the detections by descending score, those."""
    ground_truth, detections = read_ground_truth(ground_truth, detections)
    rows = ground_truth["annotations"]
    objects = [i for i, row in enumerate(rows) if not row.get("iscrowd")]
    ground_truth = {**ground_truth, "annotations": [rows[i] for i in objects]}
    known = {category["id"] for category in ground_truth["categories"]}
    foreign = sorted({row["category_id"] for row in detections} - known)
    if foreign:
        raise ValueError(
            f"detections of categories not in the ground truth: {foreign[:5]}"
        )
    scores = np.array([row["score"] for row in detections])
    order = np.argsort(-scores, kind="stable")
    index = order[scores[order] >= score_threshold]
    kept = [detections[i] for i in index]
    return ground_truth, np.array(objects, np.int64), index, kept


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

    By descending score, each detection takes the free object, of whatever class, that
    it overlaps most, if their IoU reaches the threshold.

    Args:
        ground_truth: a COCO file or its content.
        detections: COCO results.
        score_threshold: detections below are left out, 0..1.
        iou_threshold: 0..1, more than 0.

    Returns:
        int64 (C + 1, C + 1), [label of the object, label found]. Label i is the i-th
        category by ascending id, as in `CocoTiles`; 0 is background: row 0 counts
        detections where nothing is labelled, column 0 objects that nothing was found
        on. The row of a class sums to its objects, the column to its detections.

    Raises:
        ValueError: a detection's image or category is not in the ground truth.
    """
    ground_truth, _, _, kept = _select(ground_truth, detections, score_threshold)
    image, category, boxes = columns(ground_truth["annotations"])
    found_image, found_category, found_boxes = columns(kept)
    found, objects = _greedy(
        *iou_pairs(found_boxes, found_image, boxes, image, iou_threshold)
    )
    ids = sorted(category["id"] for category in ground_truth["categories"])
    label = {category_id: i for i, category_id in enumerate(ids, start=1)}
    of_object = np.array([label[i] for i in category.tolist()], np.int64)
    of_found = np.array([label[i] for i in found_category.tolist()], np.int64)
    matrix = np.zeros((len(label) + 1, len(label) + 1), np.int64)
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

    By descending score, a detection is "correct" if a free object of its class overlaps
    it with iou_threshold or more. What is left is the first of these that holds:

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
    matched, objects = _greedy(*(p[own & (pairs[2] >= iou_threshold)] for p in pairs))
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
