import tracemalloc

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms, box_iou

from e2e_utils import boxes
from e2e_utils.boxes import iou_pairs, nms, parts_of_others

NONE = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)


def random_boxes(count, extent, groups, seed=0):
    """Boxes of which many lie in others, as parts at tile borders do."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, extent, (count, 2))
    side = np.exp(rng.normal(3, 0.8, (count, 2))).clip(2, 290)
    xyxy = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    third = count // 3  # inside another one, sharing a border
    xyxy[:third] = xyxy[third : 2 * third]
    xyxy[:third, 0] += (xyxy[:third, 2] - xyxy[:third, 0]) * 0.4
    group = rng.integers(1, groups + 1, count)
    group[:third] = group[third : 2 * third]
    return xyxy, group, rng.random(count) < 0.5


# from one heap of boxes to a scene of many classes
SCENES = [(20, 2), (300, 1), (300, 6), (4000, 1), (4000, 60)]


@pytest.mark.parametrize("chunk", [10, 1_000_000])
@pytest.mark.parametrize(("extent", "groups"), SCENES)
def test_pairs_and_parts_are_those_of_a_comparison_of_all_boxes(
    monkeypatch, chunk, extent, groups
):
    monkeypatch.setattr(boxes, "CHUNK", chunk)
    a, of_a, cut = random_boxes(400, extent, groups, seed=extent + groups)
    b, of_b, _ = random_boxes(400, extent, groups, seed=extent + groups)
    b, of_b = b[:300] + 1, of_b[:300]
    of_b[::2] -= 1  # without a partner some groups
    iou = box_iou(*map(torch.from_numpy, (a, b))).numpy()
    iou[of_a[:, None] != of_b] = 0
    pairs = iou_pairs(a, of_a, b, of_b, 0.1)
    table = {(i, j): v for i, j, v in zip(*pairs, strict=True)}
    assert table.keys() == set(zip(*np.nonzero(iou >= 0.1), strict=True)) != set()
    assert all(v == pytest.approx(iou[i, j]) for (i, j), v in table.items())

    low = np.maximum(a[:, None, :2], a[None, :, :2])
    shared = (np.minimum(a[:, None, 2:], a[None, :, 2:]) - low).clip(min=0).prod(axis=2)
    area = boxes.area(a)
    within = (shared > 0.6 * area[:, None]) & (area[None] > area[:, None])
    within &= of_a[:, None] == of_a
    parts = parts_of_others(a, of_a, cut)
    np.testing.assert_array_equal(parts, cut & within.any(axis=1))
    assert 0 < parts.sum() < cut.sum()


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("extent", "groups"), [(300, 1), (900, 5), (4000, 60)])
def test_suppression_is_batched_nms(extent, groups, threshold):
    xyxy, group, _ = random_boxes(3_000, extent, groups, seed=extent)
    scores = np.random.default_rng(0).random(len(xyxy)).astype(np.float32)
    scores[::3] = scores[1::3]  # of equal scores the first wins
    ours = nms(xyxy, scores, group, threshold)
    theirs = batched_nms(*map(torch.from_numpy, (xyxy, scores, group)), threshold)
    assert sorted(ours.tolist()) == sorted(theirs.tolist())
    assert (np.diff(scores[ours]) <= 0).all()


def test_merging_100_000_boxes_takes_bounded_memory():
    xyxy, group, cut = random_boxes(100_000, 12_000, 2)
    tracemalloc.start()
    kept = nms(xyxy, xyxy[:, 0], group, 0.5)
    parts = parts_of_others(xyxy, group, cut)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert 10_000 < parts.sum() and len(kept) < 80_000
    assert peak < 250  # all pairs would take 40,000 MB for one array of float32


def test_no_boxes_and_boxes_without_an_area_overlap_nothing():
    flat = np.array([[5.0, 5, 5, 9], [0, 0, 9, 9]]), np.zeros(2, np.int64)
    for a, b in ((NONE, flat), (flat, NONE), (NONE, NONE)):
        assert [len(side) for side in iou_pairs(*a, *b, 0.5)] == [0, 0, 0]
    assert [side.tolist() for side in iou_pairs(*flat, *flat, 0.1)] == [[1], [1], [1]]
    assert nms(*NONE, NONE[1], 0.5).tolist() == []
    assert parts_of_others(*NONE, np.zeros(0, bool)).shape == (0,)


def test_a_box_that_is_no_number_is_an_error():
    xyxy = np.array([[0.0, 0, 9, 9], [0, np.nan, 9, 9]])
    with pytest.raises(ValueError, match=r"a box is \[ *0. +nan"):
        nms(xyxy, np.ones(2), np.zeros(2, np.int64), 0.5)
