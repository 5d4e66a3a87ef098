"""The boxes of some tiles of a scene, and those of the scene out of them.

Copy: this file, boxes.py, scenes.py, images.py and stretch.py.

`predict.predict_scene` does both at once. Whoever shares the tiles of a scene out cuts
them at multiples of the batch size: then every forward pass sees what it sees there,
and the boxes are the same bit by bit (on equal hardware, with as many threads).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from .boxes import nms, parts_of_others
from .scenes import Scene

KEYS = ("boxes", "labels", "scores")  # of what a detector gives for a tile
COLUMNS = 7  # of a table: x1 y1 x2 y2 label score cut


def tensors(tiles: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Tiles of one size as float (3, H, W) in 0..1; they travel in one piece.

    Example:
        >>> white = np.full((300, 300, 3), 255, np.uint8)
        >>> (tensor,) = tensors([white], torch.device("cpu"))
        >>> tuple(tensor.shape), float(tensor.max())
        ((3, 300, 300), 1.0)
    """
    batch = torch.from_numpy(np.stack(tiles)).to(device)
    return list(batch.permute(0, 3, 1, 2).float().div_(255))


def detections(
    boxes_xyxy: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    class_names: Sequence[str] | None,
) -> dict:
    """As `predict.predict_image` returns them.

    Raises:
        ValueError: a label without a name.

    Example:
        >>> box, label = np.array([[1.0, 2, 14, 15]]), np.array([1])
        >>> detections(box, label, np.array([0.9]), ["background", "car"])["names"]
        ['car']
    """
    found: dict = {"boxes_xyxy": boxes_xyxy, "labels": labels, "scores": scores}
    if class_names is not None:
        if len(labels) and labels.max() >= len(class_names):
            raise ValueError(
                f"label {labels.max()} has no name: class_names has {len(class_names)} "
                "entries; its index is the label, and the background comes first"
            )
        found["names"] = [class_names[label] for label in labels]
    return found


@torch.inference_mode()
def predict_tiles(
    model: nn.Module,
    scene: Scene,
    grid: np.ndarray,
    start: int = 0,
    stop: int | None = None,
    *,
    batch_size: int = 4,
    score_threshold: float = 0.05,
    border: float = 2.0,
    amp_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> np.ndarray:
    """The boxes of some tiles of a scene, unmerged: what overlaps is there twice.

    Args:
        model, batch_size, score_threshold, border, amp_dtype, progress: as for
            `predict.predict_scene`.
        scene: open.
        grid: all its tiles, of `grid.tile_grid`.
        start, stop: which of them, as in grid[start:stop].

    Returns:
        float32 (N, 7) for `merge_tables`: x1, y1, x2, y2 in pixels of the scene, label,
        score, and 1 for a box that a border inside the scene cuts, else 0.

    Raises:
        ValueError: batch_size, or what `Scene.read` raises.

    Example:
        >>> from e2e_utils.grid import tile_grid
        >>> from e2e_utils.models import build_model
        >>> from e2e_utils.scenes import open_scene
        >>> model = build_model("fasterrcnn_small", 2).eval()  # has learned nothing
        >>> grid = tile_grid(300, 540, size=300, overlap=0.2)
        >>> with open_scene(np.zeros((300, 540, 3), np.uint8)) as scene:
        ...     whole = predict_tiles(model, scene, grid, batch_size=1)
        ...     tables = [predict_tiles(model, scene, grid, i, i + 1) for i in (0, 1)]
        >>> np.array_equal(np.concatenate(tables), whole)  # shared out, or at once
        True
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give 1 or more")
    device, some = next(model.parameters()).device, grid[start:stop]
    # One table. A list of small tensors would lie between the large ones of the forward
    # passes and keep their memory from use.
    table = np.empty((0, COLUMNS), np.float32)
    autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)
    with autocast, _channels_last(model):
        edge = torch.tensor([0, 0, scene.width, scene.height], device=device)
        within = replace(scene, height=int(some[:, 3].max()))  # is read no further
        tiles, starts = within.tiles(some.tolist()), range(0, len(some), batch_size)
        bar = tqdm(starts, "tiles", leave=None, unit="batch", disable=not progress)
        for first in bar:
            outputs = model(tensors(list(islice(tiles, batch_size)), device))
            corners = torch.from_numpy(some[first : first + batch_size]).to(device)
            part = _in_scene(outputs, corners, edge, score_threshold, border)
            table = np.concatenate([table, part])
    return table


def merge_tables(
    tables: Sequence[np.ndarray],
    nms_threshold: float = 0.5,
    class_names: Sequence[str] | None = None,
) -> dict:
    """The boxes of a scene out of those of its tiles.

    Args:
        tables: of `predict_tiles`, together all tiles of the grid in its order.
        nms_threshold, class_names: as for `predict.predict_scene`.

    Returns:
        As `predict.predict_image`, in pixels of the scene.

    Raises:
        ValueError: a label without a name.

    Example:
        >>> part = [290, 100, 300, 113, 1, 0.9, 1]  # a car, cut by the first tile
        >>> whole = [290, 100, 303, 113, 1, 0.8, 0]  # the same one in the second
        >>> tables = [np.array([row], np.float32) for row in (part, whole)]
        >>> merge_tables(tables, nms_threshold=0.9)["boxes_xyxy"].tolist()
        [[290.0, 100.0, 303.0, 113.0]]
    """
    table = np.concatenate(tables)
    table = table[nms(table[:, :4], table[:, 5], table[:, 4], nms_threshold)]
    boxes, labels, cut = table[:, :4], table[:, 4].astype(np.int64), table[:, 6] > 0
    whole = ~parts_of_others(boxes, labels, cut)
    return detections(boxes[whole], labels[whole], table[whole, 5], class_names)


@contextmanager
def _channels_last(model: nn.Module) -> Iterator[None]:
    """Let a detector's convolutions run channels last, a tenth faster on a CPU.

    Its pictures are laid out so on their way in; the model itself stays as it is.
    """
    backbone, hook = getattr(model, "backbone", None), None
    if isinstance(backbone, nn.Module):
        hook = backbone.register_forward_pre_hook(
            lambda _, args: (args[0].contiguous(memory_format=torch.channels_last),)
        )
    try:
        yield
    finally:
        if hook:
            hook.remove()


def _in_scene(
    outputs: list[dict],
    corners: torch.Tensor,
    edge: torch.Tensor,
    score_threshold: float,
    border: float,
) -> np.ndarray:
    """The boxes of some tiles, float32 (N, 7): xyxy in the scene, label, score, cut."""
    counts = torch.tensor([len(o["scores"]) for o in outputs], device=edge.device)
    boxes, labels, scores = (
        torch.cat([output[key] for output in outputs]).float() for key in KEYS
    )
    keep = scores >= score_threshold
    tile = corners.repeat_interleave(counts, dim=0)[keep]
    boxes = boxes[keep] + tile[:, :2].repeat(1, 2)
    cut = (tile != edge) & ((boxes - tile).abs() <= border) & (border > 0)
    last = torch.stack([labels[keep], scores[keep], cut.any(dim=1).float()], dim=1)
    return torch.cat([boxes, last], dim=1).cpu().numpy()
