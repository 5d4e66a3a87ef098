"""The one tile grid of the repository, and boxes clipped to its tiles.

Copy: this file. (It needs numpy only, so that prediction does not need what cutting a
data set needs.)
"""

import warnings
from collections.abc import Sequence

import numpy as np


def _starts(length: int, size: int, overlap: int) -> np.ndarray:
    """Tile starts along one side: steps of size - overlap, the last one shifted in."""
    if length <= size:
        return np.zeros(1, np.int64)
    steps = -(-(length - size) // (size - overlap))
    return np.minimum(np.arange(steps + 1) * (size - overlap), length - size)


def tile_grid(height: int, width: int, size: int, overlap: float) -> np.ndarray:
    """Cover a scene with overlapping square tiles, row by row.

    Neighbours share `int(overlap * size)` pixels. A last tile that would pass the
    border is shifted back inside, so every tile has the full size unless the scene
    itself is smaller. Same tiles, same order as `sahi.slicing.get_slice_bboxes`.

    Args:
        height: scene height in pixels, 1 or more.
        width: scene width in pixels, 1 or more.
        size: side of a tile in pixels, 1 or more.
        overlap: shared fraction of a tile's side, 0 <= overlap < 1.

    Returns:
        int64 (T, 4), x1, y1, x2, y2 in scene pixels, ends exclusive.

    Raises:
        ValueError: a size or the overlap is out of range.

    Example:
        >>> tile_grid(300, 700, size=300, overlap=0.2).tolist()
        [[0, 0, 300, 300], [240, 0, 540, 300], [400, 0, 700, 300]]
    """
    if size < 1:
        raise ValueError(f"tile size is {size}; give a number of pixels from 1 up")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; give a fraction with 0 <= overlap < 1")
    if height < 1 or width < 1:
        raise ValueError(f"scene is {height} x {width} pixels; it needs at least 1 x 1")
    x1 = _starts(width, size, int(overlap * size))
    y1 = _starts(height, size, int(overlap * size))
    y, x = (side.ravel() for side in np.meshgrid(y1, x1, indexing="ij"))
    ends = np.minimum(x + size, width), np.minimum(y + size, height)
    return np.stack([x, y, *ends], axis=1)


def warn_if_small(scenes: Sequence[tuple[int, int]], size: int) -> None:
    """A warning of scenes without room for a tile: detectors enlarge them to its size.

    Args:
        scenes: (height, width) of each in pixels.
        size: side of a tile in pixels.

    Example:
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warn_if_small([(400, 400), (1230, 1240)], size=512)
        >>> str(told[0].message)
        '1 of 2 scenes have less than 512 px a side, the size of a tile ...'
    """
    longest = [max(sides) for sides in scenes if max(sides) < size]
    if longest:
        warnings.warn(
            f"{len(longest)} of {len(scenes)} scenes have less than {size} px a side, "
            f"the size of a tile (the smallest {min(longest)} px): a detector enlarges "
            "them, and their objects with them. Train and predict in smaller tiles",
            stacklevel=3,
        )


def clip_to_tiles(
    boxes_xyxy: np.ndarray, grid: np.ndarray, min_area_ratio: float = 0.1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clip every box to every tile it overlaps; SAHI's rule for which to keep.

    A clipped box is kept if int(clipped area) / int(full area) >= min_area_ratio, where
    the full area counts parts outside the scene. Cost is linear in boxes: the grid is
    separable, so each box finds its columns and rows by bisection.

    Args:
        boxes_xyxy: float64 (N, 4), scene pixels, each of area 1 or more.
        grid: int64 (T, 4) from `tile_grid`.
        min_area_ratio: 0..1.

    Returns:
        tile int64 (P,) ascending, box int64 (P,) ascending within a tile, and
        clipped_xyxy float64 (P, 4) in scene pixels.

    Example:
        >>> grid = tile_grid(300, 540, size=300, overlap=0.2)  # two tiles, 60 px shared
        >>> car = np.array([[290.0, 100, 303, 113]])  # cut by the first
        >>> tile, box, clipped = clip_to_tiles(car, grid)
        >>> tile.tolist(), clipped.tolist()
        ([0, 1], [[290.0, 100.0, 300.0, 113.0], [290.0, 100.0, 303.0, 113.0]])
    """
    x1, x2 = grid[grid[:, 1] == grid[0, 1]][:, [0, 2]].T  # the first row's columns
    y1, y2 = grid[grid[:, 0] == grid[0, 0]][:, [1, 3]].T
    left, top, right, bottom = boxes_xyxy.T
    column = np.searchsorted(x2, left, "right")
    columns = np.maximum(np.searchsorted(x1, right, "left") - column, 0)
    row = np.searchsorted(y2, top, "right")
    pairs = columns * np.maximum(np.searchsorted(y1, bottom, "left") - row, 0)
    box = np.repeat(np.arange(len(boxes_xyxy)), pairs)
    nth = np.arange(len(box)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    tile = (row[box] + nth // columns[box]) * len(x1) + column[box] + nth % columns[box]
    clipped = np.concatenate(
        [
            np.maximum(boxes_xyxy[box, :2], grid[tile, :2]),
            np.minimum(boxes_xyxy[box, 2:], grid[tile, 2:]),
        ],
        axis=1,
    )
    full = np.floor((right - left) * (bottom - top))[box]
    area = np.floor(np.prod(clipped[:, 2:] - clipped[:, :2], axis=1))
    kept = np.flatnonzero(area / full >= min_area_ratio)
    narrow = tile[kept].astype(np.min_scalar_type(len(grid)))  # 16 bits sort by radix
    kept = kept[np.argsort(narrow, kind="stable")]
    return tile[kept], box[kept], clipped[kept]
