import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from e2e_utils.data import (
    CocoTiles,
    RandomTranspose,
    default_augment,
    eval_loader,
    train_loader,
)
from e2e_utils.sampling import StepSampler, aspect_ratio_groups, repeat_factors


@pytest.fixture
def train_set(tiles):
    return CocoTiles(tiles / "train", tiles / "train.json")


def boxes_lie_on_objects(image, target, at_least):
    for x1, y1, x2, y2 in target["boxes"].int().tolist():
        assert image[:, y1:y2, x1:x2].float().amax(0).mean() > at_least


def test_an_item_has_the_shapes_and_types_that_torchvision_wants(train_set):
    image, target = train_set[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 96, 96)
    assert target["boxes"].dtype == torch.float32 and target["boxes"].shape == (4, 4)
    assert target["labels"].dtype == torch.int64
    assert set(target["labels"].tolist()) <= {1, 2}
    assert train_set.class_names == ["background", "square", "bar", "dot"]
    assert [train_set.size(i) for i in range(12)] == [(96, 96)] * 12
    boxes_lie_on_objects(image, target, 150)  # they are bright, the ground below 60
    _, target = train_set[len(train_set) - 1]  # a tile without objects
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_a_wrong_coco_file_and_a_missing_folder_are_named(tiles, tmp_path, train_set):
    coco = json.loads(train_set.json_path.read_text())
    coco["annotations"][0]["category_id"] = 99
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match=r"1 of .*bad\.json: category_id 99"):
        CocoTiles(train_set.image_dir, path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CocoTiles(tmp_path / "nowhere", path)


def test_a_corrupt_and_a_missing_tile_are_named(tiles, tmp_path):
    coco = json.loads((tiles / "train.json").read_text())
    (tmp_path / coco["images"][0]["file_name"]).write_bytes(b"\xff\xd8 no jpeg")
    dataset = CocoTiles(tmp_path, tiles / "train.json")
    with pytest.raises(ValueError, match=r"train_1\.jpg: cannot be read"):
        dataset[0]
    with pytest.raises(ValueError, match=r"train_2\.jpg is missing"):
        dataset[1]


@pytest.mark.parametrize(
    ("bbox", "said"),
    [
        (
            [10, 10, 1e-6, 5],
            "annotation 1 of .*own.json: its box has no area in float32",
        ),
        ([1e8, 10, 1, 5], "annotation 1 of .*has no area in float32"),
    ],
)
def test_a_box_that_vanishes_in_float32_is_named(tiles, tmp_path, bbox, said):
    coco = json.loads((tiles / "train.json").read_text())
    coco["annotations"][0]["bbox"] = bbox
    (tmp_path / "own.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match=said):
        CocoTiles(tiles / "train", tmp_path / "own.json")


def test_sizes_of_a_resized_set_are_not_believed(tiles, tmp_path):
    coco = json.loads((tiles / "train.json").read_text())
    coco["images"][0] |= {"width": 192, "height": 191}
    (tmp_path / "own.json").write_text(json.dumps(coco))
    dataset = CocoTiles(tiles / "train", tmp_path / "own.json")
    with pytest.raises(ValueError, match=r"train_1.jpg has 96 x 96 px.*says 192 x 191"):
        dataset[0]


def test_ids_of_any_kind_become_labels_and_a_crowd_is_not_learned(tiles, tmp_path):
    coco = json.loads((tiles / "train.json").read_text())
    coco["categories"] = [{"id": i, "name": str(i)} for i in (9, 1, 5)]
    for row in coco["images"]:
        row["id"] = f"img_{row['id']}"
    for row, category in zip(coco["annotations"], [9, 1, 5, 9] * 11, strict=True):
        row |= {"image_id": f"img_{row['image_id']}", "category_id": category}
    coco["annotations"][0]["iscrowd"] = 1
    (tmp_path / "own.json").write_text(json.dumps(coco))
    dataset = CocoTiles(tiles / "train", tmp_path / "own.json")
    assert dataset.category_ids == [1, 5, 9]
    assert dataset[0][1]["labels"].tolist() == [1, 2, 3]  # the first is a crowd
    assert dataset[1][1]["labels"].tolist() == [3, 1, 2, 3]
    assert dataset[1][1]["image_id"] == "img_2"
    assert dataset.coco["annotations"][0]["iscrowd"] == 1


def test_transpose_swaps_the_axes_of_image_and_boxes(train_set):
    image, target = train_set[0]
    boxes = target["boxes"].clone()
    turned, target = RandomTranspose(p=1.0)(image, target)
    assert torch.equal(turned, image.transpose(1, 2))
    assert torch.equal(
        target["boxes"].as_subclass(torch.Tensor), boxes[:, [1, 0, 3, 2]]
    )


def test_the_augmentation_is_a_function_of_its_seed_and_moves_the_boxes(train_set):
    train_set.augment = default_augment()
    for seed in range(8):
        boxes_lie_on_objects(*train_set[(1, seed)], 110)
    first, again, other = train_set[(0, 5)], train_set[(0, 5)], train_set[(0, 6)]
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("repeats", [None, [1.0] * 10])
def test_each_epoch_sees_each_tile_once(repeats):
    sampler = StepSampler(10, 2, 10, repeats=repeats)
    flat = [index for batch in sampler for index, _ in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_loaders_cover_the_tiles(train_set):
    batches = list(train_loader(train_set, 4, steps=3))
    assert [len(images) for images, _ in batches] == [4, 4, 4]
    repeated = train_loader(train_set, 2, 6, repeats=[1.0] * 11 + [2.0], groups=None)
    assert sum(len(targets) for _, targets in repeated) == 12
    seen = [
        target["image_id"]
        for rank in (0, 1)
        for _, targets in eval_loader(train_set, rank=rank, world_size=2)
        for target in targets
    ]
    assert sorted(seen) == list(range(1, 13))


def test_a_cached_tile_is_decoded_once(train_set):
    cached = CocoTiles(train_set.image_dir, train_set.json_path, cache=True)
    assert torch.equal(cached.read(3), train_set.read(3))
    assert cached.read(3) is cached.read(3)
    with pytest.raises(ValueError, match="cache must be True or False, got 'disk'"):
        CocoTiles(train_set.image_dir, train_set.json_path, cache="disk")


class Table:
    """Labels and sizes without tiles, as the samplers ask for them."""

    def __init__(self, labels=(), sizes=()):
        self._labels, self._sizes = list(labels), list(sizes)

    def __len__(self):
        return max(len(self._labels), len(self._sizes))

    def labels(self, index):
        return torch.tensor(self._labels[index], dtype=torch.int64)

    def size(self, index):
        return self._sizes[index]


def test_repeat_factors_are_those_of_lvis():
    # class 1 in 8 of 10 tiles, class 2 in one, class 3 in two; a tile without objects
    labels = [[1]] * 6 + [[1, 2, 2], [1, 3], [3], []]
    factors = repeat_factors(Table(labels), 0.4)
    assert factors[:6] == [1.0] * 6 and factors[9] == 1.0
    assert factors[6] == pytest.approx(math.sqrt(0.4 / 0.1))
    assert factors[7] == factors[8] == pytest.approx(math.sqrt(0.4 / 0.2))
    assert repeat_factors(Table(labels), 0.0) is None
    with pytest.raises(ValueError, match="repeat_threshold must be in 0..1, got 2"):
        repeat_factors(Table(labels), 2)


REPEATS = [1.0, 1.0, 2.4, 1.0, 3.0, 1.5, 1.0]  # together 10.9


def epochs(sampler, count):
    flat = [index for batch in sampler for index, _ in batch]
    size = sampler.epoch_length
    return [Counter(flat[i * size : (i + 1) * size]) for i in range(count)]


def test_tiles_are_repeated_by_their_factors():
    sampler = StepSampler(7, 1, 11 * 300, repeats=REPEATS)
    assert sampler.epoch_length == 11
    counts = epochs(sampler, 300)
    for index, factor in enumerate(REPEATS):
        times = [epoch[index] for epoch in counts]
        # ceil(10.9) tiles share the 0.1 that rounding adds
        low, high = math.floor(factor), math.ceil(factor * 11 / 10.9)
        assert low <= min(times) and max(times) <= high
        assert sum(times) / 300 == pytest.approx(factor * 11 / 10.9, abs=0.1)


GROUPS = [0, 1, 0, 0, 1, 0, 2]


@pytest.mark.parametrize("repeats", [None, REPEATS, [1.0] * 7])
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_an_order_is_resumed_at_any_step_and_shared_among_ranks(repeats, groups):
    options = {"repeats": repeats, "groups": groups}
    whole = list(StepSampler(7, 2, 40, seed=3, **options))
    assert list(StepSampler(7, 2, 40, 17, seed=3, **options)) == whole[17:]
    assert list(StepSampler(7, 2, 40, seed=4, **options)) != whole
    if groups is None:
        parts = [list(StepSampler(7, 1, 40, 0, 3, r, 2, **options)) for r in (0, 1)]
        assert [a + b for a, b in zip(*parts, strict=True)] == whole
    else:  # a batch is of one group, so ranks take whole batches in turn
        batches = [[index for index, _ in batch] for batch in whole]
        assert all(len({groups[i] for i in batch}) == 1 for batch in batches)
        assert {i for batch in batches for i in batch} == set(range(7))
        parts = [list(StepSampler(7, 2, 20, 0, 3, r, 2, **options)) for r in (0, 1)]
        assert [b for pair in zip(*parts, strict=True) for b in pair] == whole


def test_aspect_ratio_groups_have_the_borders_of_the_references():
    sizes = [(300, 300), (150, 300), (149, 300), (300, 170), (300, 150), (300, 100)]
    # oracle: 2 ** np.linspace(-1, 1, 2 * k + 1), bisect_right
    borders = 2 ** np.linspace(-1, 1, 7)
    expected = [int(np.searchsorted(borders, h / w, side="right")) for h, w in sizes]
    assert aspect_ratio_groups(Table(sizes=sizes), 3) == expected
    assert aspect_ratio_groups(Table(sizes=sizes), 0) == [1, 0, 0, 1, 1, 1]
    assert aspect_ratio_groups(Table(sizes=sizes), -1) is None
    assert aspect_ratio_groups(Table(sizes=[(300, 300)] * 4), 3) is None
    with pytest.raises(ValueError, match="aspect_ratio_group_factor.*got -2"):
        aspect_ratio_groups(Table(sizes=sizes), -2)


def test_a_grouped_epoch_shows_every_tile_and_few_twice():
    groups = [0, 1, 0, 0, 1, 0, 2, 0, 1, 0, 0]
    sampler = StepSampler(11, 3, 25, groups=groups)
    assert sampler.epoch_length == 15  # batches of the groups: 3, 1 and 1
    for epoch in epochs(sampler, 5):
        assert set(epoch) == set(range(11)) and sum(epoch.values()) == 15
        assert all(epoch[i] <= 2 for i in range(11) if i != 6)  # 6 is alone
