"""The xView score, and three scores of one detector side by side.

Copy: this file, boxes.py, evaluate.py, truth.py, coco.py and files.py.

The xView score is that of the challenge's own score.py, so that a result can be set
beside published ones. The three scores show what is left of a figure on tiles when
empty tiles count, and when the boxes of whole scenes count, merged across tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from .boxes import iou_pairs, nearest
from .evaluate import coco_metrics
from .truth import columns, read_ground_truth

# xView's type ids by size and frequency of the class, from score.py and the README of
# https://github.com/DIUx-xView/xView1_baseline
_SMALL = (17, 18, 19, 20, 21, 23, 24, 26, 27, 28, 32, 41, 60, *range(62, 67), 91)
_LARGE = (13, 40, 45, 49, 51, 52, 54, 55, 57, 74, 77, 79, 83, 89)
_MEDIUM = (11, 12, 15, 25, 29, *range(33, 39), 42, 44, 47, 50, 53, 56, 59, 61, 71, 72)
_MEDIUM += (73, 76, 84, 86, 93, 94)
_COMMON = (13, *range(17, 22), *range(23, 29), 34, 35, 41, 47, 60, 63, 64, 71, 72, 73)
_COMMON += (76, 77, 79, 83, 86, 89, 91)
XVIEW_TYPE_IDS = tuple(sorted(_SMALL + _MEDIUM + _LARGE))  # the 60 classes
_RARE = tuple(set(XVIEW_TYPE_IDS) - set(_COMMON))
# the same as category ids 0..59, the position of the type id
XVIEW_GROUPS = {
    name: frozenset(map(XVIEW_TYPE_IDS.index, ids))
    for name, ids in (
        ("small", _SMALL),
        ("medium", _MEDIUM),
        ("large", _LARGE),
        ("common", _COMMON),
        ("rare", _RARE),
    )
}


def voc_ap(hit: np.ndarray, objects: int) -> float:
    """PASCAL VOC's AP, the area below the monotone precision-recall curve.

    Args:
        hit: bool (N,), whether each detection is right, by descending score.
        objects: how many there are to find, 1 or more.

    Example:
        >>> round(voc_ap(np.array([True, False, True]), objects=2), 3)
        0.833
    """
    precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hit].sum() / objects)  # recall grows by 1/objects a hit


def xview_score(
    ground_truth: str | Path | dict,
    detections: list[dict],
    iou_threshold: float = 0.5,
    every_object: bool = False,
    image_ids: Iterable[int | str] | None = None,
    groups: Mapping[str, Iterable[int]] | None = None,
) -> dict:
    """The score of the xView challenge: VOC's AP at one IoU, mean over the classes.

    By descending score, each detection is held against the one object of its class and
    image that it overlaps most: right if their IoU reaches the threshold and no
    better detection had the object. Unlike in COCO's matching it gets no second choice.

    Args:
        ground_truth: a COCO file or its content, of scenes for the official score.
        detections: COCO results; those with a score of 0 are left out.
        iou_threshold: 0..1.
        every_object: False scores as the official code does, and only such figures
            compare with published ones: it forgets the objects of a class in an image
            where nothing of that class was detected, so they do not lower the recall,
            and labels keep what reaches beyond the image. True counts every object, cut
            to its image by `truth.clip_to_images`.
        image_ids: only these images; all by default.
        groups: category ids of each group of classes. By default `XVIEW_GROUPS` if the
            categories are xView's 60, ids 0..59; else none.

    Returns:
        "mAP", "mAP_<group>" for small, medium, large, common and rare classes,
        "precision" and "recall" (mean over the classes, all detections), "f1" of the
        two, "per_class": {name: AP} of the classes that occur. In 0..1, None where no
        ground truth exists.

    Raises:
        ValueError: a detection's image or category is not in the ground truth.

    Source: scoring/score.py and matching.py of DIUx-xView/xView1_baseline, commit
    8efe340. Detections of equal score keep the order given, which is left open there.

    Example:
        >>> car = {"image_id": 1, "category_id": 3, "bbox": [10, 20, 13, 13]}
        >>> truth = {
        ...     "images": [{"id": 1}],
        ...     "annotations": [car, {**car, "bbox": [60, 20, 13, 13]}],
        ...     "categories": [{"id": 3, "name": "car"}],
        ... }
        >>> scores = xview_score(truth, [{**car, "score": 0.9}])
        >>> scores["mAP"], scores["precision"], scores["recall"]
        (0.5, 1.0, 0.5)
    """
    ground_truth, found = read_ground_truth(
        ground_truth, detections, image_ids, clip=every_object
    )
    truth = [row for row in ground_truth["annotations"] if not row.get("iscrowd")]
    found = sorted((r for r in found if r["score"] > 0), key=lambda row: -row["score"])
    image, truth_class, truth_boxes = columns(truth)
    found_image, found_class, found_boxes = columns(found)
    step = 1 + max(truth_class.max(initial=0), found_class.max(initial=0))
    truth_key, found_key = image * step + truth_class, found_image * step + found_class
    pairs = iou_pairs(found_boxes, found_key, truth_boxes, truth_key, iou_threshold)
    claims, objects, _ = nearest(*pairs)
    hit = np.zeros(len(found), bool)
    hit[claims[np.unique(objects, return_index=True)[1]]] = True
    counted = every_object | np.isin(truth_key, found_key)

    ap, precision, recall = {}, [], []
    for category in np.unique(truth_class).tolist():
        mine = hit[found_class == category]
        count = int(counted[truth_class == category].sum())
        ap[category] = voc_ap(mine, count) if count else 0.0
        if count:
            recall.append(mine.sum() / count)
        if count and len(mine):
            precision.append(mine.mean())

    names = {c["id"]: c["name"] for c in ground_truth["categories"]}
    if groups is None:
        groups = XVIEW_GROUPS if sorted(names) == list(range(60)) else {}
    scores = {"mAP": _mean(list(ap.values()))}
    for group, ids in groups.items():
        scores[f"mAP_{group}"] = _mean([ap[i] for i in sorted(ids) if i in ap])
    p, r = _mean(precision), _mean(recall)
    f1 = 2 * p * r / (p + r) if p and r else (0.0 if ap else None)
    per_class = {names[category]: value for category, value in ap.items()}
    return scores | {"precision": p, "recall": r, "f1": f1, "per_class": per_class}


def _mean(values: list) -> float | None:
    return float(np.mean(values)) if values else None


def three_scores(
    tile_truth: str | Path | dict,
    tile_detections: list[dict],
    scene_truth: str | Path | dict,
    scene_detections: list[dict],
    max_dets: tuple[int, int, int] = (1, 100, 500),
    scene_max_dets: tuple[int, int, int] = (1, 500, 5000),
) -> dict[str, dict]:
    """One detector scored three times, from the kindest way to the one that counts.

    Tiles without objects can only show false positives: leaving them out flatters.
    Scenes show what the user gets, objects merged across tile borders.

    Args:
        tile_truth, tile_detections: COCO file of the tiles and results of `detect`.
        scene_truth, scene_detections: COCO file of the scenes, before they were cut,
            and `to_coco(image_id, predict_scene(...), category_ids)` of all scenes.
        max_dets, scene_max_dets: see `coco_metrics`.

    Returns:
        "tiles with objects", "all tiles", "whole scenes": each the figures of
        `coco_metrics`, and "xview" and "xview_every_object", mAP of `xview_score`.

    Example:
        >>> car = {"image_id": 1, "category_id": 3, "bbox": [10, 20, 13, 13]}
        >>> truth = {"images": [{"id": 1}, {"id": 2}], "annotations": [car]}
        >>> truth["categories"] = [{"id": 3, "name": "car"}]
        >>> false = {**car, "image_id": 2, "score": 0.9}  # on a tile without cars
        >>> scores = three_scores(truth, [false, {**car, "score": 0.5}], truth, [])
        >>> {name: row["AP50"] for name, row in scores.items()}
        {'tiles with objects': 1.0, 'all tiles': 0.5, 'whole scenes': 0.0}
    """
    # cut to the image, or not, by each score
    tiles = read_ground_truth(tile_truth, tile_detections, clip=False)
    scenes = read_ground_truth(scene_truth, scene_detections, clip=False)
    filled = sorted({row["image_id"] for row in tiles[0]["annotations"]})
    scores = {}
    for name, pair, caps, ids in (
        ("tiles with objects", tiles, max_dets, filled),
        ("all tiles", tiles, max_dets, None),
        ("whole scenes", scenes, scene_max_dets, None),
    ):
        scores[name] = coco_metrics(*pair, caps, ids)
        for key, every in (("xview", False), ("xview_every_object", True)):
            xview = xview_score(*pair, every_object=every, image_ids=ids)
            scores[name][key] = xview["mAP"]
    return scores
