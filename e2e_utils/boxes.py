"""Which boxes overlap: for matching, non-maximum suppression, parts at borders.

Copy: this file. (It needs numpy only.)

Boxes meet boxes in `neighbours` alone. Neither its time nor its memory grows with the
square of the boxes of a dense scene.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CHUNK = 1_000_000  # pairs compared at a time, which bounds the memory


def area(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Of each box, in the dtype of the boxes.

    Example:
        >>> area(np.array([[0.0, 0, 13, 13], [2, 2, 5, 4]])).tolist()
        [169.0, 6.0]
    """
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)


def intersection(one_xyxy: np.ndarray, other_xyxy: np.ndarray) -> np.ndarray:
    """Area that each box of (N, 4) shares with that of the same row, (N,).

    Example:
        >>> car, found = np.array([[0.0, 0, 13, 13]]), np.array([[2.0, 2, 15, 15]])
        >>> intersection(car, found).tolist()
        [121.0]
    """
    low = np.maximum(one_xyxy[:, :2], other_xyxy[:, :2])
    sides = np.minimum(one_xyxy[:, 2:], other_xyxy[:, 2:]) - low
    return sides.clip(min=0).prod(axis=1)


def neighbours(
    a_xyxy: np.ndarray, a_group: np.ndarray, b_xyxy: np.ndarray, b_group: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of a box in `a` and one in `b`: all of one group that overlap, and more.

    The boxes of `b` are sorted by group, by bands as high as the tallest box, and by
    x1. What can overlap a box then stands in three stretches, one each in its own band
    and the two next to it.

    Args:
        a_xyxy, b_xyxy: float (N, 4) and (M, 4); they may be the same.
        a_group, b_group: int (N,) and (M,): the image, the class; others never meet.

    Yields:
        Piece by piece, indices into `a` and into `b`, int64 (P,) each; P is about
        `CHUNK` at most.

    Raises:
        ValueError: a coordinate is not finite.

    Example:
        >>> a = np.array([[0.0, 0, 10, 10]])
        >>> b = np.array([[5.0, 5, 9, 9], [80, 80, 90, 90]])
        >>> pairs = neighbours(a, np.array([1]), b, np.array([1, 1]))
        >>> [(i.tolist(), j.tolist()) for i, j in pairs if len(i)]
        [([0], [0])]
    """
    if not len(a_xyxy) or not len(b_xyxy):
        return
    every = np.concatenate([a_xyxy, b_xyxy]).astype(np.float64)
    if not np.isfinite(every).all():
        raise ValueError(f"a box is {every[~np.isfinite(every).all(axis=1)][0]}")
    wide, high = (every[:, 2:] - every[:, :2]).max(axis=0).clip(min=0) + 1
    x1, y1, x2, _ = (every - every.min(axis=0)[[0, 1, 0, 1]]).T
    band = (y1 // high).astype(np.int64) + 1
    group = np.unique(np.concatenate([a_group, b_group]), return_inverse=True)[1]
    span = x2.max() + 2 * wide
    start = (group * (band.max() + 2) + band) * span
    key_b = (start + x1)[len(a_xyxy) :]
    order = np.argsort(key_b)
    key_b = key_b[order]
    start, x1, x2 = (of[: len(a_xyxy)] for of in (start, x1, x2))
    one_by_one = np.argsort(start + x1)  # neighbours look up neighbours: faster
    for shift in (-span, 0, span):
        near = start[one_by_one] + shift
        low = np.searchsorted(key_b, near + x1[one_by_one] - wide)
        count = np.searchsorted(key_b, near + x2[one_by_one] + 1, "right") - low
        ends = np.cumsum(count)
        stops = np.searchsorted(ends, np.arange(CHUNK, ends[-1], CHUNK))
        for part in np.split(np.arange(len(ends)), np.unique(stops)):
            n = count[part]
            first = np.repeat(low[part] - np.cumsum(n) + n, n)
            yield np.repeat(one_by_one[part], n), order[first + np.arange(n.sum())]


def iou_pairs(
    a_xyxy: np.ndarray,
    a_group: np.ndarray,
    b_xyxy: np.ndarray,
    b_group: np.ndarray,
    at_least: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of a box in `a` and one in `b` of its group that overlap enough.

    Args:
        a_xyxy, a_group, b_xyxy, b_group: as for `neighbours`.
        at_least: least IoU of a pair, 0..1, more than 0.

    Returns:
        Indices into `a` and `b`, int64 (P,) each, and the IoU, (P,), in any order.

    Example:
        >>> car, found = np.array([[0.0, 0, 13, 13]]), np.array([[2.0, 2, 15, 15]])
        >>> image = np.array([7])  # both are in image 7
        >>> a, b, iou = iou_pairs(car, image, found, image, at_least=0.5)
        >>> a.tolist(), b.tolist(), iou.round(3).tolist()
        ([0], [0], [0.558])
    """
    area_a, area_b = area(a_xyxy), area(b_xyxy)
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, a_xyxy.dtype))]
    for a, b in neighbours(a_xyxy, a_group, b_xyxy, b_group):
        shared = intersection(a_xyxy[a], b_xyxy[b])
        met = np.flatnonzero(shared)  # leaves out boxes without an area as well
        a, b, shared = a[met], b[met], shared[met]
        iou = shared / (area_a[a] + area_b[b] - shared)
        keep = iou >= at_least
        parts.append((a[keep], b[keep], iou[keep]))
    a, b, iou = (np.concatenate(part) for part in zip(*parts, strict=True))
    return a, b, iou


def nearest(
    a: np.ndarray, b: np.ndarray, iou: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the pairs of `iou_pairs` the best of each `a`, of equal ones the first `b`.

    Example:
        >>> a, b = np.array([0, 0, 1]), np.array([4, 5, 5])
        >>> iou = np.array([0.6, 0.8, 0.7])
        >>> [part.tolist() for part in nearest(a, b, iou)]
        [[0, 1], [5, 5], [0.8, 0.7]]
    """
    order = np.lexsort((b, -iou, a))
    first = order[np.unique(a[order], return_index=True)[1]]
    return a[first], b[first], iou[first]


def nms(
    boxes_xyxy: np.ndarray, scores: np.ndarray, groups: np.ndarray, threshold: float
) -> np.ndarray:
    """Non-maximum suppression: what torchvision's `batched_nms` keeps, best first.

    torchvision compares all pairs, which takes minutes for 100,000 boxes of a class,
    and for few boxes sets the classes apart by shifting them, which costs a tenth of a
    pixel in float32 on a large scene with 60 classes. Here only neighbours meet.

    Args:
        boxes_xyxy: float (N, 4).
        scores: (N,); of equal ones the first wins.
        groups: int (N,), the class.
        threshold: of two boxes of a group whose IoU is above, the better stays.

    Returns:
        Indices of the boxes that stay, int64, by descending score.

    Example:
        >>> boxes = np.array([[0.0, 0, 13, 13], [1, 1, 14, 14], [50, 50, 63, 63]])
        >>> nms(boxes, np.array([0.7, 0.9, 0.8]), np.array([1, 1, 1]), 0.5).tolist()
        [1, 2]
    """
    best_first = np.argsort(-scores, kind="stable")
    rank = np.empty_like(best_first)
    rank[best_first] = np.arange(len(rank))
    areas = area(boxes_xyxy)
    pairs = [(best_first[:0], best_first[:0])]
    for a, b in neighbours(boxes_xyxy, groups, boxes_xyxy, groups):
        lower = rank[b] < rank[a]
        a, b = a[lower], b[lower]
        shared = intersection(boxes_xyxy[a], boxes_xyxy[b])
        close = shared > threshold * (areas[a] + areas[b] - shared)
        pairs.append((a[close], b[close]))
    worse, better = (np.concatenate(side) for side in zip(*pairs, strict=True))
    dropped, stays = np.zeros(len(rank), bool), np.ones(len(rank), bool)
    while len(worse):
        stays[:] = True
        stays[worse] = False  # something better is near and not dropped yet
        dropped[worse[stays[better]]] = True
        undecided = ~dropped[worse] & ~dropped[better]
        worse, better = worse[undecided], better[undecided]
    return best_first[~dropped[best_first]]


def parts_of_others(
    boxes_xyxy: np.ndarray, groups: np.ndarray, cut: np.ndarray, covered: float = 0.6
) -> np.ndarray:
    """Which boxes are cut by a border and lie in a larger one of their group.

    Args:
        boxes_xyxy: float (N, 4).
        groups: int (N,), the class.
        cut: bool (N,), whether a border of a tile cuts the box.
        covered: the share of its area that lies in the larger one is above, 0..1.

    Returns:
        bool (N,).

    Example:
        >>> boxes = np.array([[90.0, 0, 130, 20], [100, 0, 130, 20]])
        >>> groups, cut = np.array([1, 1]), np.array([False, True])
        >>> parts_of_others(boxes, groups, cut).tolist()
        [False, True]
    """
    part, areas = np.zeros(len(cut), bool), area(boxes_xyxy)
    which = np.flatnonzero(cut)
    for a, b in neighbours(boxes_xyxy[which], groups[which], boxes_xyxy, groups):
        a = which[a]
        inside = intersection(boxes_xyxy[a], boxes_xyxy[b]) > covered * areas[a]
        part[a[inside & (areas[b] > areas[a])]] = True
    return part
