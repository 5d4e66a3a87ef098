"""COCO average precision with caps that fit dense scenes.

Copy: this file, truth.py, coco.py and files.py.

COCO's own cap of 100 detections hides every object beyond the hundredth, and a
satellite scene can hold thousands. The caps are an argument here. The matching runs in
faster_coco_eval, whose figures equal pycocotools' and which is several times faster.
The xView score and whole scenes are in xview_score.py; what goes wrong is in
mistakes.py.

A figure that `coco_metrics` returns reaches metrics.jsonl, the checkpoint and whoever
reports, on every road; `METRICS` gives it the name that a searcher asks for.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import nn

from .truth import read_ground_truth

AREAS = ("all", "small", "medium", "large")
# What searchers and dashboards call a metric -> its key in `coco_metrics`
METRICS = {
    "mAP": "AP",
    "mAP_50": "AP50",
    "mAP_75": "AP75",
    "mAP_small": "AP_small",
    "mAP_medium": "AP_medium",
    "mAP_large": "AP_large",
}


def searcher_metrics(metrics: dict) -> dict[str, float]:
    """The figures of `coco_metrics` that have a value, by the names of `METRICS`.

    Example:
        >>> searcher_metrics({"AP": 0.5, "AP50": 0.9, "AP_large": None, "step": 250})
        {'mAP': 0.5, 'mAP_50': 0.9}
    """
    values = {name: metrics.get(key) for name, key in METRICS.items()}
    return {name: value for name, value in values.items() if value is not None}


@torch.inference_mode()
def detect(
    model: nn.Module,
    loader: Iterable,
    device: str | torch.device = "cpu",
    category_ids: list[int] | None = None,
    amp_dtype: torch.dtype | None = None,
) -> list[dict]:
    """Run a detector over a loader of tiles.

    Args:
        model: in torchvision's convention; put into evaluation mode for the time.
        loader: yields (images, targets) of `e2e_utils.data`: uint8 (3, H, W) images.
        device: where the model is.
        category_ids: COCO id of label 1, 2, ...; the label minus one by default.
        amp_dtype: torch.bfloat16 or float16 for autocast, None for the model's own.

    Returns:
        COCO results: {"image_id", "category_id", "bbox" (xywh, pixels of the tile),
        "score" (0..1)}.

    Example:
        >>> class Fixed(nn.Module):  # finds the same car everywhere
        ...     def forward(self, images):
        ...         car = {"boxes": [[10, 20, 23, 33]], "labels": [1], "scores": [0.5]}
        ...         return [car for _ in images]
        >>> loader = [([torch.zeros(3, 64, 64, dtype=torch.uint8)], [{"image_id": 7}])]
        >>> detect(Fixed(), loader)
        [{'image_id': 7, 'category_id': 0, 'bbox': [10.0, 20.0, 13.0, 13.0], ...
    """
    was_training, results = model.training, []
    device = torch.device(device)
    model.eval()
    try:
        for images, targets in loader:
            batch = [i.to(device, non_blocking=True).float() / 255 for i in images]
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                outputs = model(batch)
            for target, output in zip(targets, outputs, strict=True):
                results += to_coco(target["image_id"], output, category_ids)
    finally:
        model.train(was_training)
    return results


def to_coco(
    image_id: int | str, output: dict, category_ids: list[int] | None = None
) -> list[dict]:
    """One image's {"boxes" or "boxes_xyxy", "labels", "scores"} as COCO results.

    Example:
        >>> output = {"boxes": [[10, 20, 23, 33]], "labels": [2], "scores": [0.5]}
        >>> to_coco(7, output, category_ids=[11, 18])
        [{'image_id': 7, 'category_id': 18, 'bbox': [10.0, 20.0, 13.0, 13.0], ...
    """
    boxes = output.get("boxes", output.get("boxes_xyxy"))
    boxes = torch.as_tensor(boxes).float().cpu().reshape(-1, 4)
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    labels = torch.as_tensor(output["labels"]).tolist()
    scores = torch.as_tensor(output["scores"]).tolist()
    ids = [category_ids[i - 1] if category_ids else i - 1 for i in labels]
    return [
        {"image_id": image_id, "category_id": c, "bbox": b, "score": s}
        for c, b, s in zip(ids, boxes.tolist(), scores, strict=True)
    ]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector, which would walk all new dicts time and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _matched(
    ground_truth: dict,
    detections: list[dict],
    max_dets: tuple[int, int, int],
) -> COCOeval_faster:
    """Detections matched with the ground truth, precision and recall accumulated."""
    images = [{"id": image["id"]} for image in ground_truth["images"]]
    rest = {"images": images, "categories": ground_truth["categories"]}

    def area(row: dict) -> float:
        return row["bbox"][2] * row["bbox"][3]

    # Annotation ids from 1: the matching takes an id of 0 for "not matched".
    truth = [
        {"area": area(row), "iscrowd": 0, **row, "id": index}
        for index, row in enumerate(ground_truth["annotations"], start=1)
    ]
    # What loadRes adds, but for a polygon of each box, which boxes do not need.
    found = [
        {**row, "id": index, "area": area(row), "iscrowd": 0}
        for index, row in enumerate(detections, start=1)
    ]
    sides = (COCO({**rest, "annotations": rows}) for rows in (truth, found))
    run = COCOeval_faster(*sides, "bbox")
    run.params.maxDets = list(max_dets)
    run.evaluate()
    run.accumulate()
    return run


def _mean(values: np.ndarray) -> float | None:
    values = values[values > -1]  # -1 marks classes without ground truth
    return float(values.mean()) if values.size else None


@_no_collection()
def coco_metrics(
    ground_truth: str | Path | dict,
    detections: list[dict],
    max_dets: tuple[int, int, int] = (1, 100, 500),
    image_ids: Iterable[int | str] | None = None,
    tables: bool = False,
) -> dict:
    """COCO's figures for boxes; what is found on a crowd (iscrowd 1) is not counted.

    Args:
        ground_truth: a COCO file or its content.
        detections: COCO results, see `detect`.
        max_dets: caps of detections of one class in one image; AP uses the last.
        image_ids: only these images; all by default.
        tables: add "per_class_AP" {name: AP}, and "per_class_size" {"small", "medium",
            "large": {name: AP50}}.

    Returns:
        "AP" (mean over IoU 0.50:0.95), "AP50", "AP75", "AP_small" (area < 32^2
        pixels), "AP_medium", "AP_large" (> 96^2), "AR_<cap>" for each cap, and
        "per_class": {name: AP50} of the classes that occur. All in 0..1; None where
        no ground truth exists. An AP is the mean over the classes that occur.

    Raises:
        ValueError: a detection's image or category is not in the ground truth.

    Example:
        >>> car = {"image_id": 1, "category_id": 3, "bbox": [10, 20, 13, 13]}
        >>> truth = {
        ...     "images": [{"id": 1}],
        ...     "annotations": [{"id": 1, **car}],
        ...     "categories": [{"id": 3, "name": "car"}],
        ... }
        >>> found = {**car, "bbox": [12, 22, 13, 13], "score": 0.9}  # IoU 0.56
        >>> metrics = coco_metrics(truth, [found])
        >>> metrics["AP50"], metrics["AP75"], round(metrics["AP"], 3)
        (1.0, 0.0, 0.2)
    """
    ground_truth, found = read_ground_truth(ground_truth, detections, image_ids)
    run = _matched(ground_truth, found, max_dets)
    # (IoU, recall, class, area) of the last cap, and (IoU, class, area, cap)
    precision = np.asarray(run.eval["precision"])[..., -1]
    recall = np.asarray(run.eval["recall"])
    names = {c["id"]: c["name"] for c in ground_truth["categories"]}

    def by_class(values: np.ndarray) -> dict[str, float]:
        means = ((c, _mean(values[..., i])) for i, c in enumerate(run.params.catIds))
        return {names[c]: value for c, value in means if value is not None}

    every = precision[..., 0]
    figures = {"AP": every, "AP50": every[0], "AP75": every[5]}
    figures |= {f"AP_{AREAS[i]}": precision[..., i] for i in (1, 2, 3)}
    figures |= {f"AR_{cap}": recall[..., 0, i] for i, cap in enumerate(max_dets)}
    metrics: dict = {name: _mean(values) for name, values in figures.items()}
    metrics["per_class"] = by_class(every[0])
    if tables:
        metrics["per_class_AP"] = by_class(every)
        metrics["per_class_size"] = {
            AREAS[i]: by_class(precision[0, ..., i]) for i in (1, 2, 3)
        }
    return metrics


def recall_ceiling(
    ground_truth: str | Path | dict,
    caps: Iterable[int] = (100, 300, 500, 1000),
    per_class: bool = False,
) -> dict[int, float]:
    """The recall that a perfect detector reaches with so many detections an image.

    Args:
        ground_truth: a COCO file or its content, of tiles or of scenes.
        caps: most detections an image, 1 or more.
        per_class: the cap holds for each class of an image, as COCO's maxDets does,
            and not for the image, as a detector's `box_detections_per_img` does.

    Returns:
        {cap: sum of min(objects, cap) / sum of objects, 0..1}.

    Raises:
        ValueError: there is no object, or a cap is below 1.

    Example:
        >>> car = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 13, 13]}
        >>> cars = [{"id": i, **car} for i in range(400)]
        >>> classes = [{"id": 3, "name": "car"}]
        >>> truth = {"images": [{"id": 1}], "annotations": cars, "categories": classes}
        >>> recall_ceiling(truth, caps=[100, 300])
        {100: 0.25, 300: 0.75}
    """
    keys = ("image_id", "category_id") if per_class else ("image_id",)
    rows = read_ground_truth(ground_truth, [])[0]["annotations"]
    truth = [row for row in rows if not row.get("iscrowd")]
    counts = Counter(tuple(row[key] for key in keys) for row in truth)
    caps = list(caps)
    if not counts or min(caps, default=1) < 1:
        raise ValueError(
            f"{len(truth)} objects and caps {caps}: need an object, and caps from 1 up"
        )
    sizes = np.array(list(counts.values()))
    return {cap: float(np.minimum(sizes, cap).sum() / sizes.sum()) for cap in caps}
