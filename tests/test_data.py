import json
import math
import pickle
from collections import Counter

import cv2
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
    return CocoTiles(tiles / "train_images_300_02", tiles / "train_300_02.json")


def test_an_item_has_the_shapes_and_types_that_torchvision_wants(train_set):
    image, target = train_set[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 96, 96)
    assert target["boxes"].dtype == torch.float32 and target["boxes"].shape == (4, 4)
    assert target["labels"].dtype == torch.int64
    assert set(target["labels"].tolist()) <= {1, 2}
    assert train_set.class_names == ["background", "square", "bar", "dot"]


def test_boxes_lie_on_the_objects(train_set):
    image, target = train_set[0]
    for x1, y1, x2, y2 in target["boxes"].int().tolist():
        inside = image[:, y1:y2, x1:x2].float().amax(0).mean()
        assert inside > 150  # objects are bright, the ground stays below 60


def test_a_tile_without_objects_has_empty_boxes(train_set):
    _, target = train_set[len(train_set) - 1]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=99), "category_id 99"),
        (lambda c: c["annotations"][0].update(image_id=99), "image_id 99"),
        (lambda c: c["annotations"][0].update(bbox=[1, 1, 0, 5]), "no area"),
        (lambda c: c.pop("categories"), "lacks"),
        (lambda c: c.update(images=[]), "no images"),
    ],
)
def test_a_wrong_coco_file_is_named_with_the_value(tiles, tmp_path, change, message):
    coco = json.loads((tiles / "train_300_02.json").read_text())
    change(coco)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match=message) as error:
        CocoTiles(tiles / "train_images_300_02", path)
    assert "bad.json" in str(error.value)


def test_a_file_that_is_no_json_and_a_missing_folder_are_named(tiles, tmp_path):
    path = tmp_path / "no.json"
    path.write_text("not json")
    with pytest.raises(ValueError, match=r"no\.json is not a JSON file"):
        CocoTiles(tiles / "train_images_300_02", path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CocoTiles(tmp_path / "nowhere", path)


def test_a_corrupt_and_a_missing_tile_are_named(tiles, tmp_path):
    coco = json.loads((tiles / "train_300_02.json").read_text())
    (tmp_path / coco["images"][0]["file_name"]).write_bytes(b"\xff\xd8 no jpeg")
    dataset = CocoTiles(tmp_path, tiles / "train_300_02.json")
    with pytest.raises(ValueError, match=r"train_1\.jpg is not a readable image"):
        dataset[0]
    with pytest.raises(ValueError, match=r"train_2\.jpg is missing"):
        dataset[1]


def test_transpose_swaps_the_axes_of_image_and_boxes(train_set):
    image, target = train_set[0]
    boxes = target["boxes"].clone()
    turned, target = RandomTranspose(p=1.0)(image, target)
    assert torch.equal(turned, image.transpose(1, 2))
    assert torch.equal(
        target["boxes"].as_subclass(torch.Tensor), boxes[:, [1, 0, 3, 2]]
    )


def test_augmented_boxes_still_lie_on_the_objects(train_set):
    train_set.augment = default_augment()
    for seed in range(8):
        image, target = train_set[(1, seed)]
        for x1, y1, x2, y2 in target["boxes"].int().tolist():
            assert image[:, y1:y2, x1:x2].float().amax(0).mean() > 110


def test_the_augmentation_is_a_function_of_its_seed(train_set):
    train_set.augment = default_augment()
    first, again, other = train_set[(0, 5)], train_set[(0, 5)], train_set[(0, 6)]
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_a_resumed_sampler_yields_the_rest_of_the_run():
    whole = list(StepSampler(10, 3, 20, seed=4))
    assert list(StepSampler(10, 3, 20, start=7, seed=4)) == whole[7:]
    assert whole != list(StepSampler(10, 3, 20, seed=5))


def test_each_epoch_sees_each_tile_once():
    flat = [index for batch in StepSampler(10, 2, 10) for index, _ in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_ranks_share_each_global_batch():
    alone = list(StepSampler(12, 4, 6))
    parts = [list(StepSampler(12, 2, 6, rank=r, world_size=2)) for r in (0, 1)]
    together = [a + b for a, b in zip(*parts, strict=True)]
    assert together == alone


def test_loaders_cover_the_tiles(train_set):
    batches = list(train_loader(train_set, 4, steps=3))
    assert [len(images) for images, _ in batches] == [4, 4, 4]
    seen = [
        target["image_id"]
        for rank in (0, 1)
        for _, targets in eval_loader(train_set, rank=rank, world_size=2)
        for target in targets
    ]
    assert sorted(seen) == list(range(1, 13))


def test_the_cache_returns_the_same_tile(tiles, train_set):
    cached = CocoTiles(train_set.image_dir, train_set.json_path, cache=True)
    assert torch.equal(cached.read(3), train_set.read(3))
    assert cached.read(3) is cached.read(3)


def test_the_cache_on_disk_returns_the_same_tiles(tiles, tmp_path, train_set):
    file = tmp_path / "train_300_02.json"
    file.write_text((tiles / "train_300_02.json").read_text())
    made = CocoTiles(train_set.image_dir, file, cache="disk")
    for index in range(len(made)):
        assert torch.equal(made.read(index), train_set.read(index))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and names[0].startswith("train_300_02-decoded-")
    assert (tmp_path / names[0]).stat().st_size == 12 * 3 * 96 * 96
    assert len(pickle.dumps(made)) < 3 * 96 * 96 * 12  # workers get its name only
    before = (tmp_path / names[0]).stat().st_mtime_ns
    CocoTiles(train_set.image_dir, file, cache="disk")
    assert (tmp_path / names[0]).stat().st_mtime_ns == before  # not made again


def test_the_cache_on_disk_follows_a_tile_that_changed(tiles, tmp_path):
    for file in (tiles / "val_images_300_02").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "val_300_02.json"
    file.write_text((tiles / "val_300_02.json").read_text())
    CocoTiles(tmp_path, file, cache="disk")
    picture = np.full((96, 96, 3), 77, np.uint8)
    cv2.imwrite(str(tmp_path / "val_2.jpg"), picture)
    changed = CocoTiles(tmp_path, file, cache="disk")
    assert changed.read(1).unique().tolist() == [77]
    assert len(list(tmp_path.glob("*.u8"))) == 1  # the old one is gone

    cv2.imwrite(str(tmp_path / "val_2.jpg"), picture[:50])
    with pytest.raises(ValueError, match=r"val_2\.jpg is \(50, 96\), and .*\(96, 96\)"):
        CocoTiles(tmp_path, file, cache="disk")
    (tmp_path / "val_3.jpg").write_bytes(b"no jpeg")
    (tmp_path / "val_2.jpg").unlink()
    with pytest.raises(ValueError, match=r"val_2\.jpg is missing"):
        CocoTiles(tmp_path, file, cache="disk")
    assert not list(tmp_path.glob("*.part"))


def test_an_unknown_cache_is_quoted(tiles, train_set):
    with pytest.raises(ValueError, match="'off', 'memory' or 'disk', got 'ram'"):
        CocoTiles(train_set.image_dir, train_set.json_path, cache="ram")


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


def test_a_repeated_order_is_resumed_and_shared_among_ranks():
    whole = list(StepSampler(7, 2, 40, seed=3, repeats=REPEATS))
    assert list(StepSampler(7, 2, 40, 17, seed=3, repeats=REPEATS)) == whole[17:]
    parts = [
        list(StepSampler(7, 1, 40, 0, 3, rank, 2, repeats=REPEATS)) for rank in (0, 1)
    ]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_factors_of_one_change_only_the_lot():
    counts = epochs(StepSampler(7, 1, 21, repeats=[1.0] * 7), 3)
    assert all(epoch == Counter(range(7)) for epoch in counts)


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


GROUPS = [0, 1, 0, 0, 1, 0, 2, 0, 1, 0, 0]


@pytest.mark.parametrize("repeats", [None, [1.0] * 5 + [2.5] * 6])
def test_each_batch_is_of_one_group(repeats):
    sampler = StepSampler(11, 3, 60, seed=2, repeats=repeats, groups=GROUPS)
    batches = [[index for index, _ in batch] for batch in sampler]
    assert all(len({GROUPS[i] for i in batch}) == 1 for batch in batches)
    assert {i for batch in batches for i in batch} == set(range(11))
    resumed = StepSampler(11, 3, 60, 25, seed=2, repeats=repeats, groups=GROUPS)
    assert list(resumed) == list(sampler)[25:]
    parts = [
        list(StepSampler(11, 3, 30, 0, 2, rank, 2, repeats, GROUPS)) for rank in (0, 1)
    ]
    together = [batch for pair in zip(*parts, strict=True) for batch in pair]
    assert together == list(sampler)


def test_a_grouped_epoch_shows_every_tile_and_few_twice():
    sampler = StepSampler(11, 3, 25, groups=GROUPS)
    assert sampler.epoch_length == 15  # batches of the groups: 3, 1 and 1
    for epoch in epochs(sampler, 5):
        assert set(epoch) == set(range(11)) and sum(epoch.values()) == 15
        assert all(epoch[i] <= 2 for i in range(11) if i != 6)  # 6 is alone


def test_loaders_take_repeats_and_groups(train_set):
    loader = train_loader(train_set, 2, 6, repeats=[1.0] * 11 + [2.0], groups=None)
    seen = [t["image_id"] for _, targets in loader for t in targets]
    assert len(seen) == 12
    sizes = [train_set.size(i) for i in range(len(train_set))]
    assert set(sizes) == {(96, 96)}
    del train_set.images[0]["height"]
    with pytest.raises(ValueError, match=r"image 1 of .*_02\.json has no height"):
        train_set.size(0)
