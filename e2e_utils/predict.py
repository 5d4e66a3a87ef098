"""A picture or a whole scene in, boxes out: as arrays, as GeoJSON, as COCO results.

Copy: this file, boxes.py, grid.py, scenes.py and files.py.

A scene does not fit into a detector, so it goes through in tiles that overlap, and
the boxes come back together: an object in an overlap is found twice, and per-class
non-maximum suppression keeps the better of the two. An object that a border cuts is
found whole in one tile and in part in another; the part gives way to the whole.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from .boxes import nms, parts_of_others
from .files import write_file
from .grid import tile_grid
from .scenes import read_rgb, read_window

_KEYS = ("boxes", "labels", "scores")


def _check(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"an image must be uint8 (H, W, 3), got {image.dtype} {image.shape}"
        )


def _tensors(tiles: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Tiles of one size as float (3, H, W) in 0..1; they travel in one piece."""
    batch = torch.from_numpy(np.stack(tiles)).to(device)
    return list(batch.permute(0, 3, 1, 2).float().div_(255))


def _detections(
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    class_names: Sequence[str] | None,
) -> dict:
    found: dict = {"boxes_xyxy": boxes, "labels": labels, "scores": scores}
    if class_names is not None:
        found["names"] = _names(labels, class_names)
    return found


def _names(labels: np.ndarray, class_names: Sequence[str]) -> list[str]:
    if len(labels) and labels.max() >= len(class_names):
        raise ValueError(
            f"label {labels.max()} has no name: class_names has {len(class_names)} "
            "entries; its index is the label, and the background comes first"
        )
    return [class_names[label] for label in labels]


@torch.inference_mode()
def predict_image(
    model: nn.Module,
    image: np.ndarray,
    score_threshold: float = 0.0,
    class_names: Sequence[str] | None = None,
) -> dict:
    """Detections on one tile.

    Args:
        model: a detector in evaluation mode; it runs where its weights are.
        image: uint8 (H, W, 3), RGB.
        score_threshold: drop boxes below, 0..1.
        class_names: index = label, the background first.

    Returns:
        "boxes_xyxy" float32 (N, 4) in pixels, "labels" int64 (N,), 1..60, "scores"
        float32 (N,) in 0..1, descending; with `class_names` also "names", N str.
    """
    _check(image)
    output = model(_tensors([image], next(model.parameters()).device))[0]
    keep = output["scores"] >= score_threshold
    boxes, labels, scores = (output[k][keep].cpu() for k in _KEYS)
    arrays = boxes.float().numpy(), labels.numpy(), scores.float().numpy()
    return _detections(*arrays, class_names)


@torch.inference_mode()
def predict_scene(
    model: nn.Module,
    image: np.ndarray | str | Path,
    size: int,
    overlap: float,
    batch_size: int = 4,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    border: float = 2.0,
    progress: bool = False,
    class_names: Sequence[str] | None = None,
    amp_dtype: torch.dtype | None = None,
) -> dict:
    """Detections on a whole scene by sliced inference.

    Args:
        model: a detector in evaluation mode; it runs where its weights are.
        image: uint8 (H, W, 3), RGB, of any size; or the path of a TIFF, PNG or JPEG.
            Of an uncompressed TIFF, bands last, only a row of tiles is in memory at a
            time; any other file is decoded whole, height x width x 3 bytes.
        size, overlap: of the tile grid; take those that the model was trained with.
        batch_size: tiles a forward pass.
        score_threshold: drop boxes below, 0..1.
        nms_threshold: of two boxes of one class whose IoU is above, the better stays.
        border: a box that ends within so many pixels of a border inside the scene is
            taken for a part, and dropped where a larger box of its class covers most
            of it. 0 keeps parts, as SAHI's NMS on IoU does.
        progress: show a bar.
        class_names: index = label, the background first.
        amp_dtype: torch.bfloat16 or float16 for autocast, None for the model's own.

    Returns:
        As `predict_image`, in pixels of the scene. `to_geojson` makes GeoJSON of it;
        `evaluate.to_coco(image_id, found)` makes COCO results, `save_json` a file of
        them.

    Raises:
        ValueError: `image` is not 8 bit RGB; the message names the file.
        FileNotFoundError: no such file.
    """
    device = next(model.parameters()).device
    height, width, rows = _rows(image)
    grid = tile_grid(height, width, size, overlap)
    edge = torch.tensor([0, 0, width, height], device=device)
    tiles, starts = _tiles(rows, grid), range(0, len(grid), batch_size)
    # One table. A list of small tensors would lie between the large ones of the forward
    # passes and keep their memory from use.
    table = np.empty((0, 7), np.float32)  # x1 y1 x2 y2 label score cut
    autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)
    with autocast, _channels_last(model):
        for start in tqdm(starts, desc="tiles", unit="batch", disable=not progress):
            outputs = model(_tensors(list(islice(tiles, batch_size)), device))
            corners = torch.from_numpy(grid[start : start + batch_size]).to(device)
            part = _in_scene(outputs, corners, edge, score_threshold, border)
            table = np.concatenate([table, part])
    table = table[nms(table[:, :4], table[:, 5], table[:, 4], nms_threshold)]
    boxes, labels, cut = table[:, :4], table[:, 4].astype(np.int64), table[:, 6] > 0
    whole = ~parts_of_others(boxes, labels, cut)
    return _detections(boxes[whole], labels[whole], table[whole, 5], class_names)


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
        torch.cat([output[key] for output in outputs]).float() for key in _KEYS
    )
    keep = scores >= score_threshold
    tile = corners.repeat_interleave(counts, dim=0)[keep]
    boxes = boxes[keep] + tile[:, :2].repeat(1, 2)
    cut = (tile != edge) & ((boxes - tile).abs() <= border) & (border > 0)
    last = torch.stack([labels[keep], scores[keep], cut.any(dim=1).float()], dim=1)
    return torch.cat([boxes, last], dim=1).cpu().numpy()


def _rows(image: np.ndarray | str | Path) -> tuple[int, int, Callable]:
    """(height, width, function of y1 and y2 that gives these rows of pixels)."""
    if isinstance(image, np.ndarray):
        _check(image)
        return *image.shape[:2], lambda y1, y2: image[y1:y2]
    pixels = read_rgb(image)
    owner: object = pixels
    height, width = pixels.shape[:2]
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap):
        # opened anew for each row: a mapping keeps every page that it has touched
        return height, width, lambda y1, y2: read_window(image, 0, y1, width, y2)
    return height, width, lambda y1, y2: pixels[y1:y2]


def _tiles(rows: Callable, grid: np.ndarray) -> Iterator[np.ndarray]:
    """The grid's tiles, in its order, each row of them read once."""
    last = None
    for x1, y1, x2, y2 in grid.tolist():
        if y1 != last:
            strip, last = rows(y1, y2), y1
        yield strip[:, x1:x2]


def to_geojson(
    found: dict,
    class_names: Sequence[str],
    path: str | Path | None = None,
    transform: Sequence[float] | None = None,
    image_id: str | None = None,
    type_ids: Sequence[int] | None = None,
    crs: str | None = None,
) -> dict:
    """Detections as a GeoJSON FeatureCollection, with the field names of xView.

    Args:
        found: from `predict_scene`.
        class_names: index = label, the background first.
        path: file to write; it appears whole or not at all.
        transform: (a, b, c, d, e, f), x = a * column + b * row + c and
            y = d * column + e * row + f, as rasterio's `dataset.transform`. Without it
            the polygons are in pixels of the scene, y downwards.
        image_id: the scene's file name.
        type_ids: xView's id of label 1, 2, ...: `list(classes.read_classes())`.
        crs: of the coordinates after `transform`, such as
            "urn:ogc:def:crs:EPSG::32616". GeoJSON without it means longitude, latitude.

    Returns:
        {"type": "FeatureCollection", "features": [...]}. A feature is a polygon and
        its properties "bounds_imcoords" ("x1,y1,x2,y2", whole pixels), "label",
        "class_name", "score", and "image_id" and "type_id" if they are given.
    """
    a, b, c, d, e, f = (float(v) for v in tuple(transform or (1, 0, 0, 0, 1, 0))[:6])
    boxes = np.asarray(found["boxes_xyxy"], np.float64).reshape(-1, 4)
    corners = [0, 1, 2, 1, 2, 3, 0, 3, 0, 1]  # closed, x1 y1 first
    if a * e < b * d:  # the outer ring of a polygon runs counterclockwise
        corners = [0, 1, 0, 3, 2, 3, 2, 1, 0, 1]
    column, row = boxes[:, corners[::2]], boxes[:, corners[1::2]]
    rings = np.stack([a * column + b * row + c, d * column + e * row + f], axis=2)
    features = []
    for ring, bounds, label, name, score in zip(
        rings.tolist(),
        boxes.round().astype(int).tolist(),
        found["labels"].tolist(),
        _names(found["labels"], class_names),
        found["scores"].tolist(),
        strict=True,
    ):
        properties = {
            "bounds_imcoords": ",".join(map(str, bounds)),
            "label": label,
            "class_name": name,
            "score": score,
            "image_id": image_id,
            "type_id": type_ids[label - 1] if type_ids is not None else None,
        }
        properties = {key: v for key, v in properties.items() if v is not None}
        polygon = {"type": "Polygon", "coordinates": [ring]}
        features.append(
            {"type": "Feature", "properties": properties, "geometry": polygon}
        )
    content: dict = {"type": "FeatureCollection"}
    if crs is not None:
        content["crs"] = {"type": "name", "properties": {"name": crs}}
    content["features"] = features
    if path is not None:
        save_json(content, path)
    return content


def save_json(content: dict | list, path: str | Path) -> Path:
    """Write GeoJSON or COCO results to a file that appears whole or not at all."""
    path = Path(path)
    write_file(path, [json.dumps(content).encode()])
    return path
