"""How a scene is cut: the grid, what shrinking loses, one object's tiles, sizes.

Copy: this file, grid.py, truth.py, coco.py, files.py, drawing.py and visualize.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from .drawing import COLORS, rectangles, scaled
from .grid import clip_to_tiles, tile_grid
from .truth import image_truth
from .visualize import class_color, draw_boxes, show, table


def fullest_tile(grid: np.ndarray, boxes_xyxy: np.ndarray) -> int:
    """The index of the tile that holds at least half of each of the most boxes.

    Args:
        grid: int (N, 4), xyxy of the tiles, of `grid.tile_grid`.
        boxes_xyxy: (M, 4) in pixels of the scene, each of area 1 or more.

    Example:
        >>> grid = np.array([[0, 0, 300, 300], [240, 0, 540, 300]])
        >>> fullest_tile(grid, np.array([[500, 10, 520, 30]]))
        1
    """
    tile, _, _ = clip_to_tiles(np.asarray(boxes_xyxy, float), grid, 0.5)
    return int(np.bincount(tile, minlength=1).argmax())


def show_shrunk(
    image: np.ndarray, tile: np.ndarray, side: int, to: int = 640
) -> Figure:
    """A tile as a detector sees it that shrinks its scene first, and at its own size.

    Args:
        image: uint8 (H, W, 3), RGB.
        tile: int (4,), xyxy of the tile.
        side: of the scene, in pixels.
        to: what that side is shrunk to.

    Example:
        >>> scene, tile = np.zeros((400, 540, 3), np.uint8), np.array([0, 0, 300, 300])
        >>> figure = show_shrunk(scene, tile, side=3000)
        >>> [axis.get_title() for axis in figure.axes]
        ['3,000 px shrunk to 640', 'at its own size']
    """
    x1, y1, x2, y2 = tile
    spot = image[y1:y2, x1:x2]
    size = 600, round(600 * (y2 - y1) / (x2 - x1))
    small = cv2.resize(scaled(spot, to / side), size, interpolation=cv2.INTER_NEAREST)
    pictures = [small, cv2.resize(spot, size, interpolation=cv2.INTER_LINEAR)]
    return show(pictures, [f"{side:,} px shrunk to {to}", "at its own size"])


def size_table(
    coco: dict, tile_size: int, overlap: float, min_area_ratio: float = 0.1
) -> Any:
    """Of each class how large its objects are and what the tiles cut, as Markdown.

    A size is the square root of a box's area, in pixels; *90th* is the percentile. Of
    the boxes in tiles the table has the share that a border cuts, and of the objects
    the share that lies whole in no tile.

    Args:
        coco: content of a COCO file of scenes.
        tile_size, overlap, min_area_ratio: as `prepare_tiles` cuts them.

    Example:
        >>> car = {"image_id": 1, "category_id": 1, "bbox": [200, 20, 64, 16]}
        >>> scene = {"id": 1, "width": 540, "height": 300}
        >>> classes = [{"id": 1, "name": "car"}]
        >>> coco = {"images": [scene], "annotations": [car], "categories": classes}
        >>> size_table(coco, 300, 0.2).data.splitlines()[2]  # cut by the second tile
        '| car | 1 | 32 | 32 | 50% | 0% |'
    """
    classes = sorted(coco["categories"], key=lambda category: category["id"])
    of_class: list[tuple] = [([], [], []) for _ in classes]
    for image in coco["images"]:
        truth = image_truth(coco, image["id"])
        boxes, labels = truth["boxes_xyxy"].astype(float), truth["labels"]
        grid = tile_grid(image["height"], image["width"], tile_size, overlap)
        _, held, parts = clip_to_tiles(boxes, grid, min_area_ratio)
        cut = (parts != boxes[held]).any(axis=1)
        whole = np.isin(np.arange(len(boxes)), held[~cut])
        sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
        for label, (of_sides, of_whole, of_cut) in enumerate(of_class, start=1):
            of_sides.extend(sides[labels == label])
            of_whole.extend(whole[labels == label])
            of_cut.extend(cut[labels[held] == label])
    lines = []
    for category, (of_sides, of_whole, of_cut) in zip(classes, of_class, strict=True):
        if of_sides:
            row = [category["name"], len(of_sides), *np.percentile(of_sides, (50, 90))]
            shares = np.mean(of_cut), 1 - np.mean(of_whole)
            lines.append([*row, *(f"{share:.0%}" for share in shares)])
    lines.sort(key=lambda row: row[2])
    head = ["class", "objects", "median side", "90th", "boxes in tiles that are cut"]
    return table([*head, "objects whole in no tile"], lines, "{:.0f}")


def show_grid(
    image: np.ndarray, grid: np.ndarray, tile: int, width: int = 800
) -> Figure:
    """A scene with what its tiles share, and one tile of it bright.

    Args:
        image: uint8 (H, W, 3), RGB.
        grid: int (N, 4), xyxy of the tiles, of `grid.tile_grid`.
        tile: index of the bright one.
        width: of the picture in pixels.

    Example:
        >>> scene = np.zeros((300, 540, 3), np.uint8)
        >>> grid = np.array([[0, 0, 300, 300], [240, 0, 540, 300]])
        >>> show_grid(scene, grid, 0).axes[0].images[0].get_array().shape
        (444, 800, 3)
    """
    scale = width / image.shape[1]
    canvas = scaled(image, scale)
    corners = np.round(grid * scale).astype(int)
    x1, y1, x2, y2 = corners[tile].tolist()
    inside = np.zeros(canvas.shape[:2], bool)
    inside[y1:y2, x1:x2] = True
    held = np.zeros(canvas.shape[:2], int)  # by how many tiles
    for a, b, c, d in corners.tolist():
        held[b:d, a:c] += 1
    pale = cv2.addWeighted(canvas, 0.55, np.full_like(canvas, 255), 0.45, 0)
    canvas[~inside] = pale[~inside]
    for where, color in ((inside, "score"), (~inside, "plain")):
        shared = where & (held > 1)
        canvas[shared] = canvas[shared] * 0.6 + np.array(COLORS[color]) * 0.4
    rectangles(canvas, corners[tile : tile + 1], [COLORS["score"]])
    legend = {
        "one tile, and what it shares with its neighbours": COLORS["score"],
        "what the others share": COLORS["plain"],
    }
    alt = f"a scene of {len(grid)} tiles; what they share is shaded, and one is bright"
    return show(canvas, width=6, legend=legend, alt=alt)


def show_shared(
    image: np.ndarray,
    grid: np.ndarray,
    boxes_xyxy: np.ndarray,
    labels: Sequence[int],
    class_names: Sequence[str],
    min_area_ratio: float = 0.1,
    most: int = 4,
) -> Figure:
    """The tiles that share one object, each with its part of the object's box.

    It is the largest object of which some tile has a part of 10 to 60 %; where no
    border cuts one so, the largest of all.

    Args:
        image: uint8 (H, W, 3), RGB.
        grid: int (N, 4), xyxy of the tiles, of `grid.tile_grid`.
        boxes_xyxy: (M, 4) in pixels of the image.
        labels: (M,) of 1..C.
        class_names: name of each label, the background first.
        min_area_ratio: least part of a box, by area, that a tile must hold, 0..1.
        most: pictures at most.

    Raises:
        ValueError: there is no object.

    Example:
        >>> scene = np.zeros((300, 540, 3), np.uint8)
        >>> grid = np.array([[0, 0, 300, 300], [240, 0, 540, 300]])
        >>> roof = np.array([[200, 50, 330, 150]]), np.array([1])
        >>> figure = show_shared(scene, grid, *roof, ["background", "roof"])
        >>> [axis.get_title() for axis in figure.axes]
        ['roof, 77% of it', 'roof, 69% of it']
    """
    boxes = np.asarray(boxes_xyxy, float).reshape(-1, 4)
    tile, which, parts = clip_to_tiles(boxes, grid, min_area_ratio)
    areas = np.prod(parts[:, 2:] - parts[:, :2], axis=1)
    shares = areas / np.prod(boxes[which, 2:] - boxes[which, :2], axis=1)
    cut = [b for b in np.unique(which) if 0.1 < shares[which == b].min() < 0.6]
    if not len(which):
        raise ValueError(
            f"none of {len(boxes)} objects lies in a tile: nothing to show"
        )
    chosen = max(cut or np.unique(which), key=lambda b: areas[which == b].sum())
    label = int(labels[chosen])
    pictures, titles = [], []
    for index in np.flatnonzero(which == chosen)[:most]:
        x1, y1, x2, y2 = grid[tile[index]]
        box = parts[index] - [x1, y1, x1, y1]
        pictures.append(
            draw_boxes(image[y1:y2, x1:x2], box[None], [label], class_names)
        )
        titles.append(f"{class_names[label]}, {shares[index]:.0%} of it")
    legend = {class_names[label]: class_color(label)}
    if len(pictures) == 4:  # around a corner, as they lie
        return show(pictures, titles, columns=2, width=6, legend=legend)
    return show(pictures, titles, legend=legend)
