"""What a detector gives from one score on: boxes right and false, objects missed.

Copy: this file, mistakes.py, boxes.py, truth.py, coco.py and files.py.

Average precision sums over all scores; whoever uses the boxes needs one threshold.
"""

from __future__ import annotations

from pathlib import Path

from .mistakes import mistakes


def operating_point(
    ground_truth: str | Path | dict,
    detections: list[dict],
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
) -> dict[str, float]:
    """Counts, precision, recall and F1 from a score on, of all classes together.

    Args:
        ground_truth: a COCO file or its content.
        detections: COCO results, from a lower score up.
        score_threshold: detections below are left out, 0..1.
        iou_threshold: from which on a box of the right class is right, above 0.1.

    Returns:
        "score" and "IoU", the two thresholds; "right", "false" and "missed", int, by
        the matching of `mistakes`; "precision", the share of the boxes that are right,
        "recall", that of the objects that were found, and "F1", their harmonic mean,
        float in 0..1, each 0.0 where nothing is right.

    Raises:
        ValueError: a detection's image or category is not in the ground truth, or
            `iou_threshold` is out of range.

    Example:
        >>> car = {"image_id": 1, "category_id": 18, "bbox": [10, 20, 13, 13]}
        >>> truth = {
        ...     "images": [{"id": 1}],
        ...     "annotations": [car, {**car, "bbox": [60, 20, 13, 13]}],
        ...     "categories": [{"id": 18, "name": "car"}],
        ... }
        >>> point = operating_point(truth, [{**car, "score": 0.9}])
        >>> point["precision"], point["recall"], round(point["F1"], 2)
        (1.0, 0.5, 0.67)
    """
    kinds = mistakes(ground_truth, detections, score_threshold, iou_threshold)
    right = len(kinds.pop("correct"))
    false = sum(len(pairs) for kind, pairs in kinds.items() if kind != "missed")
    # "missed" of `mistakes` are fewer: objects with a box near them are none there
    missed = len(mistakes(ground_truth, [])["missed"]) - right
    return {
        "score": score_threshold,
        "IoU": iou_threshold,
        "right": right,
        "false": false,
        "missed": missed,
        "precision": right / max(1, right + false),
        "recall": right / max(1, right + missed),
        "F1": 2 * right / max(1, 2 * right + false + missed),
    }
