"""A picture or a whole scene in, boxes out: as arrays, as GeoJSON, as COCO results.

Copy: this file, grid.py (the one tile grid), scenes.py and files.py.

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

from .files import write_file
from .grid import tile_grid
from .scenes import read_rgb, read_window

PAIRS = 1_000_000  # boxes compared at a time: bounds the memory of merging


def _check(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"an image must be uint8 (H, W, 3), got {image.dtype} {image.shape}"
        )


def _tensors(tiles: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Tiles of one size as float (3, H, W) in 0..1; they travel in one piece."""
    batch = torch.from_numpy(np.stack(tiles)).to(device)
    return list(batch.permute(0, 3, 1, 2).float().div_(255))


def _found(
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    class_names: Sequence[str] | None,
) -> dict:
    found: dict = {
        "boxes_xyxy": boxes.astype(np.float32),
        "labels": labels,
        "scores": scores.astype(np.float32),
    }
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
    boxes, labels, scores = (
        output[key][keep].cpu().numpy() for key in ("boxes", "labels", "scores")
    )
    return _found(boxes, labels, scores, class_names)


@torch.inference_mode()
def predict_scene(
    model: nn.Module,
    image: np.ndarray | str | Path,
    size: int = 300,
    overlap: float = 0.2,
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
    # One table that grows, x1 y1 x2 y2 label score cut. A list of small tensors would
    # lie between the large ones of the forward passes and keep their memory from use.
    table, count = np.empty((4096, 7), np.float32), 0
    autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)
    with autocast, _channels_last(model):
        for start in tqdm(starts, desc="tiles", unit="batch", disable=not progress):
            outputs = model(_tensors(list(islice(tiles, batch_size)), device))
            corners = torch.from_numpy(grid[start : start + batch_size]).to(device)
            part = _in_scene(outputs, corners, edge, score_threshold, border)
            if count + len(part) > len(table):
                table = np.concatenate([table, np.empty_like(table), part])
            table[count : count + len(part)] = part
            count += len(part)
    found = table[:count]
    boxes, scores, cut = found[:, :4], found[:, 5], found[:, 6] > 0
    labels = found[:, 4].astype(np.int64)
    keep = _nms(boxes, scores, labels, nms_threshold)
    keep = keep[~_parts(boxes[keep], labels[keep], cut[keep])]
    return _found(boxes[keep], labels[keep], scores[keep], class_names)


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
        torch.cat([output[key] for output in outputs]).float()
        for key in ("boxes", "labels", "scores")
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


def _near(
    boxes_xyxy: np.ndarray, labels: np.ndarray, of: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of a box in `of` and any box of its class that may overlap, piece by piece.

    Boxes are sorted by class, by bands as high as the tallest box, and by x1. What can
    overlap a box then stands in three stretches, one each in its own band and the two
    beside it, so that neither time nor memory grows with the square of the boxes.
    """
    if not len(of):
        return
    widest, tallest = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).max(axis=0) + 1.0
    x1, y1, x2, _ = (boxes_xyxy - boxes_xyxy.min(axis=0)[[0, 1, 0, 1]]).astype(float).T
    band = (y1 // tallest).astype(np.int64) + 1
    row, span = labels * (band.max() + 2) + band, x2.max() + 2 * float(widest)
    order = np.argsort(row * span + x1)
    key = (row * span + x1)[order]
    for beside in (-1, 0, 1):
        start = (row[of] + beside) * span
        low = np.searchsorted(key, start + x1[of] - widest)
        count = np.searchsorted(key, start + x2[of], "right") - low
        ends = np.cumsum(count)
        stops = np.searchsorted(ends, np.arange(PAIRS, ends[-1], PAIRS))
        for chunk in np.split(np.arange(len(of)), np.unique(stops)):
            n = count[chunk]
            first = np.repeat(low[chunk] - np.cumsum(n) + n, n)
            yield np.repeat(of[chunk], n), order[first + np.arange(n.sum())]


def _shared(boxes_xyxy: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Area that the boxes of each pair have in common."""
    sides = np.minimum(boxes_xyxy[one, 2:], boxes_xyxy[other, 2:])
    sides -= np.maximum(boxes_xyxy[one, :2], boxes_xyxy[other, :2])
    return sides.clip(min=0).prod(axis=1)


def _nms(
    boxes_xyxy: np.ndarray, scores: np.ndarray, labels: np.ndarray, threshold: float
) -> np.ndarray:
    """Indices that stay, best first: what torchvision's `batched_nms` keeps.

    torchvision compares all pairs, which takes minutes for 100,000 boxes of a class,
    and for few boxes sets the classes apart by shifting them, which costs a tenth of a
    pixel in float32 on a large scene with 60 classes. Here only neighbours meet.
    """
    best_first = np.argsort(-scores, kind="stable")
    rank = np.empty_like(best_first)
    rank[best_first] = np.arange(len(rank))
    area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    pairs = [(best_first[:0], best_first[:0])]
    for one, other in _near(boxes_xyxy, labels, best_first):
        better = rank[other] < rank[one]
        one, other = one[better], other[better]
        shared = _shared(boxes_xyxy, one, other)
        close = shared > threshold * (area[one] + area[other] - shared)
        pairs.append((one[close], other[close]))
    worse, better = (np.concatenate(side) for side in zip(*pairs, strict=True))
    dropped, stays = np.zeros(len(rank), bool), np.ones(len(rank), bool)
    while len(worse):
        stays[:] = True
        stays[worse] = False  # something better is near and not dropped yet
        dropped[worse[stays[better]]] = True
        open_ = ~dropped[worse] & ~dropped[better]
        worse, better = worse[open_], better[open_]
    return best_first[~dropped[best_first]]


def _parts(boxes_xyxy: np.ndarray, labels: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Which boxes are cut and lie for the most part in a larger one of their class."""
    dropped = np.zeros(len(cut), bool)
    area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    for one, other in _near(boxes_xyxy, labels, np.flatnonzero(cut)):
        covers = _shared(boxes_xyxy, one, other) > 0.6 * area[one]
        dropped[one[covers & (area[other] > area[one])]] = True
    return dropped


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
        type_ids: xView's id of label 1, 2, ...: `list(convert.read_classes())`.
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
        properties = {"bounds_imcoords": ",".join(map(str, bounds)), "label": label}
        properties |= {"class_name": name, "score": score}
        if image_id is not None:
            properties["image_id"] = image_id
        if type_ids is not None:
            properties["type_id"] = type_ids[label - 1]
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
