"""A picture or a whole scene in, boxes out.

Copy: this file, tiling.py (for the one tile grid) and scenes.py.

A scene does not fit into a detector, so it goes through in tiles that overlap, and
the boxes come back together: an object in an overlap is found twice, and per-class
non-maximum suppression keeps the better of the two. An object that a border cuts is
found whole in one tile and in part in another; the part gives way to the whole.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torchvision.ops import batched_nms
from tqdm.auto import tqdm

from e2e_utils.tiling import tile_grid


def _tensor(image: np.ndarray, device: torch.device) -> torch.Tensor:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"an image must be uint8 (H, W, 3), got {image.dtype} {image.shape}"
        )
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return tensor.to(device).float() / 255


@torch.inference_mode()
def predict_image(
    model: nn.Module, image: np.ndarray, score_threshold: float = 0.0
) -> dict[str, np.ndarray]:
    """Detections on one tile.

    Args:
        model: a detector in evaluation mode; it runs where its weights are.
        image: uint8 (H, W, 3), RGB.
        score_threshold: drop boxes below, 0..1.

    Returns:
        "boxes_xyxy" float32 (N, 4) in pixels, "labels" int64 (N,), 1..60, "scores"
        float32 (N,) in 0..1, descending.
    """
    device = next(model.parameters()).device
    return _select(model([_tensor(image, device)])[0], score_threshold)


def _select(output: dict, score_threshold: float) -> dict[str, np.ndarray]:
    keep = output["scores"] >= score_threshold
    return {
        "boxes_xyxy": output["boxes"][keep].cpu().numpy().astype(np.float32),
        "labels": output["labels"][keep].cpu().numpy(),
        "scores": output["scores"][keep].cpu().numpy().astype(np.float32),
    }


@torch.inference_mode()
def predict_scene(
    model: nn.Module,
    image: np.ndarray,
    size: int = 300,
    overlap: float = 0.2,
    batch_size: int = 4,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    border: float = 2.0,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Detections on a whole scene by sliced inference.

    Args:
        model: a detector in evaluation mode; it runs where its weights are.
        image: uint8 (H, W, 3), RGB, of any size. A numpy.memmap stays on disk but
            for the tiles in work.
        size, overlap: of the tile grid; take those that the model was trained with.
        batch_size: tiles a forward pass.
        score_threshold: drop boxes below, 0..1.
        nms_threshold: of two boxes of one class whose IoU is above, the better stays.
        border: a box that ends within so many pixels of a border inside the scene is
            taken for a part, and dropped where a box of its class from another tile
            covers most of it. 0 keeps parts, as SAHI's NMS on IoU does.
        progress: show a bar.

    Returns:
        As `predict_image`, in pixels of the scene.
    """
    device = next(model.parameters()).device
    height, width = image.shape[:2]
    grid = tile_grid(height, width, size, overlap)
    edge = torch.tensor([0, 0, width, height], device=device)
    found: dict[str, list] = {"boxes": [], "labels": [], "scores": [], "cut": []}
    starts = range(0, len(grid), batch_size)
    for start in tqdm(starts, desc="tiles", unit="batch", disable=not progress):
        corners = grid[start : start + batch_size]
        tiles = [_tensor(image[y1:y2, x1:x2], device) for x1, y1, x2, y2 in corners]
        for corner, output in zip(corners, model(tiles), strict=True):
            keep = output["scores"] >= score_threshold
            tile = torch.as_tensor(corner, device=device)
            boxes = output["boxes"][keep] + tile[:2].repeat(2)
            inside = (tile != edge) & ((boxes - tile).abs() <= border) & (border > 0)
            found["boxes"].append(boxes)
            found["cut"].append(inside.any(dim=1))
            found["labels"].append(output["labels"][keep])
            found["scores"].append(output["scores"][keep])
    merged = {key: torch.cat(parts) for key, parts in found.items()}
    keep = batched_nms(
        merged["boxes"], merged["scores"], merged["labels"], nms_threshold
    )
    merged = {key: value[keep] for key, value in merged.items()}
    whole = ~_parts(merged["boxes"], merged["labels"], merged["cut"])
    return _select({key: value[whole] for key, value in merged.items()}, 0.0)


def _parts(
    boxes_xyxy: torch.Tensor, labels: torch.Tensor, cut: torch.Tensor
) -> torch.Tensor:
    """Which boxes are cut and lie for the most part in a larger one of their class."""
    part = cut.nonzero().flatten()
    low = torch.maximum(boxes_xyxy[part, None, :2], boxes_xyxy[None, :, :2])
    high = torch.minimum(boxes_xyxy[part, None, 2:], boxes_xyxy[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(dim=1)
    covers = shared > 0.6 * area[part, None]
    covers &= (area[None] > area[part, None]) & (labels[None] == labels[part, None])
    dropped = torch.zeros_like(cut)
    dropped[part] = covers.any(dim=1)
    return dropped
