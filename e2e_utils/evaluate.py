"""COCO average precision with caps that fit dense scenes.

Copy: this file.

COCO's own cap of 100 detections an image hides every object beyond the hundredth,
and a satellite tile can hold hundreds. The caps are an argument here. The matching
runs in faster_coco_eval, whose figures equal pycocotools' and which is several times
faster.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import nn

AREAS = ("all", "small", "medium", "large")


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
        amp_dtype: torch.bfloat16 for autocast, None for the model's own precision.

    Returns:
        COCO results: {"image_id", "category_id", "bbox" (xywh, pixels of the tile),
        "score" (0..1)}.
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
    image_id: int, output: dict, category_ids: list[int] | None = None
) -> list[dict]:
    """One image's {"boxes" or "boxes_xyxy", "labels", "scores"} as COCO results."""
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


def coco_metrics(
    ground_truth: str | Path | dict,
    detections: list[dict],
    max_dets: tuple[int, int, int] = (1, 100, 500),
    image_ids: Iterable[int] | None = None,
) -> dict:
    """COCO's figures for boxes.

    Args:
        ground_truth: a COCO file or its content.
        detections: COCO results, see `detect`.
        max_dets: caps of detections an image; AP uses the last.
        image_ids: only these images; all by default.

    Returns:
        "AP" (mean over IoU 0.50:0.95), "AP50", "AP75", "AP_small" (area < 32^2
        pixels), "AP_medium", "AP_large" (> 96^2), "AR_<cap>" for each cap, and
        "per_class": {name: AP50} of the classes that occur. All in 0..1; None where
        no ground truth exists. An AP is the mean over the classes that occur.

    Raises:
        ValueError: a detection names an image that the ground truth does not have.
    """
    if not isinstance(ground_truth, dict):
        ground_truth = json.loads(Path(ground_truth).read_text())
    known = {image["id"] for image in ground_truth["images"]}
    foreign = sorted({d["image_id"] for d in detections} - known)
    if foreign:
        raise ValueError(
            f"detections for images not in the ground truth: {foreign[:5]}"
        )
    truth = COCO(copy.deepcopy(ground_truth))
    run = COCOeval_faster(truth, truth.loadRes(copy.deepcopy(detections)), "bbox")
    run.params.maxDets = list(max_dets)
    if image_ids is not None:
        run.params.imgIds = sorted(image_ids)
    run.evaluate()
    run.accumulate()
    precision = np.asarray(run.eval["precision"])  # (IoU, recall, class, area, cap)
    recall = np.asarray(run.eval["recall"])  # (IoU, class, area, cap)

    def mean(values: np.ndarray) -> float | None:
        values = values[values > -1]  # -1 marks classes without ground truth
        return float(values.mean()) if values.size else None

    metrics = {
        "AP": mean(precision[:, :, :, 0, -1]),
        "AP50": mean(precision[0, :, :, 0, -1]),
        "AP75": mean(precision[5, :, :, 0, -1]),
    }
    for index, area in enumerate(AREAS[1:], start=1):
        metrics[f"AP_{area}"] = mean(precision[:, :, :, index, -1])
    for index, cap in enumerate(max_dets):
        metrics[f"AR_{cap}"] = mean(recall[:, :, 0, index])
    names = {c["id"]: c["name"] for c in ground_truth["categories"]}
    per_class = {
        names[category]: mean(precision[0, :, index, 0, -1])
        for index, category in enumerate(run.params.catIds)
    }
    metrics["per_class"] = {k: v for k, v in per_class.items() if v is not None}
    return metrics
