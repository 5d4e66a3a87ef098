import json

import pytest
import torch

from e2e_utils.data import (
    CocoTiles,
    RandomTranspose,
    StepSampler,
    default_augment,
    eval_loader,
    train_loader,
)


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
