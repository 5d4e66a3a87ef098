"""Pictures of how a scene is cut: the grid with one tile, the tiles of one object.

Copy: this file, grid.py and visualize.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from matplotlib.figure import Figure

from .grid import clip_to_tiles
from .visualize import COLORS, class_color, draw_boxes, rectangles, scaled, show


def show_grid(
    image: np.ndarray, grid: np.ndarray, tile: int, width: int = 800
) -> Figure:
    """A scene with its grid, one tile of it bright, and darker what it shares.

    Args:
        image: uint8 (H, W, 3), RGB.
        grid: int (N, 4), xyxy of the tiles, of `grid.tile_grid`.
        tile: index of the bright one.
        width: of the picture in pixels.
    """
    scale = width / image.shape[1]
    canvas = scaled(image, scale)
    x1, y1, x2, y2 = np.round(grid[tile] * scale).astype(int).tolist()
    bright = canvas[y1:y2, x1:x2].copy()
    shared = np.zeros(bright.shape[:2], bool)
    for index, other in enumerate(np.round(grid * scale).astype(int)):
        a, b, c, d = (other - [x1, y1, x1, y1]).tolist()
        if index != tile and min(c, d) > 0:
            shared[max(0, b) : d, max(0, a) : c] = True
    bright[shared] = bright[shared] * 0.6 + np.array(COLORS["score"]) * 0.4
    canvas = cv2.addWeighted(canvas, 0.55, np.full_like(canvas, 255), 0.45, 0)
    canvas[y1:y2, x1:x2] = bright
    corners = np.round(grid * scale).astype(int)
    rectangles(canvas, corners, [COLORS["labelled"]] * len(grid), 1)
    rectangles(canvas, corners[tile : tile + 1], [COLORS["score"]])
    legend = {"one tile, and what it shares with its neighbours": COLORS["score"]}
    alt = f"a scene cut into {len(grid)} tiles, one of them bright, its borders shaded"
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
