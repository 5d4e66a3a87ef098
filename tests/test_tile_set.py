"""What a folder of tiles says of itself, who is refused, and the road on own data."""

import json
import shutil

import pytest
from own_data import write_scenes

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.config import TrainConfig
from e2e_utils.data import CocoTiles
from e2e_utils.describe_tiles import describe_split
from e2e_utils.evaluate import coco_metrics, to_coco
from e2e_utils.prepare import prepare_tiles, split_coco
from e2e_utils.scenes import FailedScenes
from e2e_utils.storage import sync, upload
from e2e_utils.tile_set import read_tile_set
from e2e_utils.tiling import slice_coco
from e2e_utils.train import fit
from sample_data.noise import write_noise_tiles


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with scenes, labels.json, and the tiles of both."""
    folder = tmp_path_factory.mktemp("own data")
    labels = write_scenes(folder / "scenes")
    grid = {"slice_size": 512.0, "overlap_ratio": 0.25}  # papermill passes floats
    prepare_tiles(folder / "scenes", labels, folder / "tiles", pixel_size=0.5, **grid)
    return folder


def test_a_folder_of_tiles_tells_all_that_comes_after(own, tmp_path):
    shutil.copytree(own, tmp_path / "moved")  # scenes and tiles together
    tiles = read_tile_set(tmp_path / "moved" / "tiles")
    assert (tiles.tile_size, tiles.overlap, tiles.pixel_size) == (512, 0.25, 0.5)
    assert tiles.class_names == ["background", "hut", "crane", "ship"]
    assert tiles.category_ids == [1, 5, 9]
    assert tiles.splits["train"].settings["min_area_ratio"] == 0.1
    names = []
    for split, scenes in (("train", 2), ("val", 1)):
        dataset = CocoTiles(*tiles.split(split))
        assert dataset.class_names == tiles.class_names
        folder, labels = tiles.scenes(split)
        assert folder == tmp_path / "moved" / "scenes"
        listed = [i["file_name"] for i in json.loads(labels.read_text())["images"]]
        assert len(listed) == scenes and all(
            (folder / name).exists() for name in listed
        )
        names += listed
    assert len(set(names)) == 3  # no scene is in both
    labels.write_text(labels.read_text() + " ")
    with pytest.raises(ValueError, match="scenes_val.json is not the file that val"):
        tiles.scenes("val")
    shutil.rmtree(tmp_path / "moved" / "scenes")
    with pytest.raises(FileNotFoundError, match="moved/scenes is not there"):
        tiles.scenes("val")


def change(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda f: (f / "tiles.json").unlink(),
            "has no tiles.json: train_512_025_man",
        ),
        (change("tiles.json", '{"tile_size": 300}'), "is of format 0, and format 1 is"),
        (change("tiles.json", '{"format": 1}'), "missing required field `tile_size`"),
        (change("val_512_025.json", "{}"), "val_512_025.json is not the file that"),
        (change("train_300_02_manifest.json", "{}"), "another run.*train_300_02_man"),
        (lambda f: next(f.glob("*/*.jpg")).unlink(), r"holds \d+ of the \d+ tiles"),
        (
            lambda f: shutil.rmtree(f / "val_images_512_025"),
            "val_images_512_025 is mis",
        ),
        (shutil.rmtree, "has no tiles.json: make tiles there with"),
    ],
)
def test_a_folder_that_is_not_what_was_made_is_refused(own, tmp_path, damage, said):
    folder = tmp_path / "tiles"
    shutil.copytree(own / "tiles", folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as failure:
        read_tile_set(folder)
    assert str(folder) in str(failure.value)


def test_tiles_of_other_sizes_or_classes_do_not_enter_a_folder(own, tmp_path):
    tiles = tmp_path / "tiles"
    shutil.copytree(own / "tiles", tiles)
    given = own / "scenes", own / "labels.json", tiles
    before = read_tile_set(tiles)
    with pytest.raises(
        ValueError, match="512 px with overlap 0.25, not 400 px with 0.2"
    ):
        slice_coco(*given, split="train", slice_size=400)
    coco = json.loads((own / "labels.json").read_text())
    coco["categories"][2]["name"] = "bridge"
    (tmp_path / "other.json").write_text(json.dumps(coco))
    grid = {"slice_size": 512, "overlap_ratio": 0.25}
    with pytest.raises(ValueError, match="category 5 is 'bridge' in train and 'crane'"):
        slice_coco(given[0], tmp_path / "other.json", tiles, split="train", **grid)
    assert read_tile_set(tiles) == before
    with pytest.raises(ValueError, match="has no split 'test'; it has train, val"):
        before.split("test")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"slice_size": 400}, "512 px with overlap 0.25, not 400 px"),
        ({"slice_size": float("inf")}, "slice_size is inf; give a whole number"),
        ({"min_area_ratio": 5}, "min_area_ratio is 5"),
        ({"pixel_size": -0.3}, "pixel_size is -0.3; give metres"),
        ({"val_coco": "boats"}, "category 5 is 'boat' in train and 'crane'"),
    ],
)
def test_what_prepare_refuses_leaves_the_folder_as_it_was(own, tmp_path, option, said):
    shutil.copytree(own, tmp_path / "own")
    tiles, labels = tmp_path / "own" / "tiles", tmp_path / "own" / "labels.json"
    grid = {"slice_size": 512, "overlap_ratio": 0.25, "seed": 1, **option}
    if "val_coco" in option:
        labels.write_text(labels.read_text().replace("crane", "boat"))
        grid.pop("val_coco")
    with pytest.raises(ValueError, match=said):
        prepare_tiles(tmp_path / "own" / "scenes", labels, tiles, **grid)
    for split in ("train", "val"):
        read_tile_set(tiles).scenes(split)  # it is the file that was described
    given = tiles / "scenes_train.json"
    with pytest.raises(ValueError, match="scenes_train.json would be replaced by a"):
        split_coco(given, tiles)


def test_a_split_that_is_being_made_is_not_listed(own, tmp_path, monkeypatch):
    shutil.copytree(own / "tiles", tmp_path / "tiles")
    monkeypatch.setattr("e2e_utils.tiling.write_tiles", lambda *_: 1 / 0)
    given = {"split": "val", "slice_size": 512, "overlap_ratio": 0.25}
    with pytest.raises(ZeroDivisionError):
        slice_coco(own / "scenes", own / "labels.json", tmp_path / "tiles", **given)
    with pytest.raises(ValueError, match="another run"):
        read_tile_set(tmp_path / "tiles")


def test_a_description_goes_through_a_bucket_with_its_tiles(own, tmp_path):
    upload(own / "tiles", tmp_path / "bucket")
    sync(tmp_path / "bucket", tmp_path / "back")
    back = read_tile_set(tmp_path / "back")
    assert back.describe() == read_tile_set(own / "tiles").describe()
    assert len(CocoTiles(*back.split("val"))) == back.splits["val"].tiles
    with pytest.raises(FileNotFoundError, match="scenes is not there; by .*back/tiles"):
        back.scenes("val")


def test_tiles_of_another_tool_are_described_and_trained_on(tmp_path):
    for split in ("train", "valid"):  # as Roboflow lays them out
        labels = write_scenes(tmp_path / split, side=96)
        labels.rename(tmp_path / split / "_annotations.coco.json")
    for name, split in (("train", "train"), ("val", "valid")):
        files = tmp_path / split, tmp_path / split / "_annotations.coco.json"
        tiles = describe_split(tmp_path, name, *files, tile_size=96, overlap=0)
    assert tiles == read_tile_set(tmp_path)
    with pytest.raises(ValueError, match="does not say where the scenes of val are"):
        tiles.scenes("val")
    assert len(CocoTiles(*tiles.split("val"))) == 3


def test_scenes_are_split_by_a_seed_and_what_cannot_be_split_is_refused(tmp_path):
    labels = write_scenes(tmp_path / "scenes", count=6, side=64)
    out, first = tmp_path / "out", []
    for rate, seed, trains in ((0.5, 0, 3), (0.5, 0, 3), (0.5, 1, 3), (0.99, 0, 5)):
        train, val = map(
            json.loads, (p.read_text() for p in split_coco(labels, out, rate, seed))
        )
        assert (len(train["images"]), len(val["images"])) == (trains, 6 - trains)
        assert len(train["annotations"]) == 6 * trains
        first.append([row["file_name"] for row in train["images"]])
    assert first[0] == first[1] != first[2]
    with pytest.raises(ValueError, match="train_split_rate is 1; give a share between"):
        split_coco(labels, out, 1)
    pair = out / "scenes_train.json", out / "scenes_val.json"
    assert split_coco(pair[0], tmp_path / "none", val_coco=pair[1]) == pair
    assert not (tmp_path / "none").exists()
    scenes = tmp_path / "scenes"
    with pytest.raises(ValueError, match="'Straße 0 ü.png' is in .* and in"):
        prepare_tiles(scenes, labels, out, val_coco=labels)
    coco = json.loads((out / "scenes_val.json").read_text())
    coco["categories"][0]["name"] = "boat"
    (tmp_path / "other.json").write_text(json.dumps(coco))
    with pytest.raises(
        ValueError, match="category 9, 'boat', is in .*scenes_train.json"
    ):
        prepare_tiles(
            scenes, out / "scenes_train.json", out, val_coco=tmp_path / "other.json"
        )
    coco = json.loads(labels.read_text())
    coco["images"] = coco["images"][:1]
    (tmp_path / "one.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="one.json lists 1 scene.*one each"):
        prepare_tiles(scenes, tmp_path / "one.json", out)
    coco["annotations"] = []
    (tmp_path / "none.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="no tile of train is left: none of the 0 box"):
        prepare_tiles(
            scenes, tmp_path / "none.json", out, val_coco=out / "scenes_val.json"
        )


def test_scenes_that_fail_are_named_after_both_splits_are_done(tmp_path):
    labels = write_scenes(tmp_path / "scenes", side=96)
    next((tmp_path / "scenes").iterdir()).write_bytes(b"no picture")
    with pytest.raises(FailedScenes, match="no TIFF, PNG or JPEG"):
        prepare_tiles(tmp_path / "scenes", labels, tmp_path / "tiles", slice_size=96)
    assert {*read_tile_set(tmp_path / "tiles").splits} == {"train", "val"}


def test_scenes_smaller_than_a_tile_are_told_of(tmp_path):
    labels, out = write_scenes(tmp_path / "scenes", side=96), tmp_path / "tiles"
    with pytest.warns(UserWarning, match=r"2 of 2 .* 200 px .*smallest 156 px"):
        prepare_tiles(tmp_path / "scenes", labels, out, slice_size=200)


def test_own_data_goes_from_scenes_to_a_served_prediction(own, tmp_path, one_thread):
    from e2e_utils.predict import predict_scene
    from kserve_utils.artefact import read_tiles, write_artefact
    from kserve_utils.engines import load_engine
    from kserve_utils.export import strip_checkpoint

    settings = {"box_score_thresh": 0.01}  # three steps teach nothing
    given = {"steps": 3.0, "eval_steps": 3, "device": "cpu", "settings": settings}
    config = TrainConfig(str(own / "tiles"), str(tmp_path / "run"), **given)
    fit(config, progress=False)
    model, meta = model_from_checkpoint(tmp_path / "run" / "last.pt")
    assert model.transform.min_size == (512,)  # a tile enters as it is
    stripped = strip_checkpoint(tmp_path / "run" / "last.pt", tmp_path / "stripped.pth")
    pictures = read_tiles(own / "tiles")[:1]
    write_artefact(stripped, tmp_path / "artefact", ["torch"], tiles=pictures)
    model, meta = load_engine(tmp_path / "artefact", device="cpu")
    assert (meta["tile_size"], meta["overlap"]) == (512, 0.25)
    assert meta["category_ids"] == [1, 5, 9]

    folder, labels = read_tile_set(own / "tiles").scenes("val")
    (scene,) = json.loads(labels.read_text())["images"]
    grid = meta["tile_size"], meta["overlap"]
    found = predict_scene(model, folder / scene["file_name"], *grid, score_threshold=0)
    results = to_coco(scene["id"], found, meta["category_ids"])
    assert {row["category_id"] for row in results} <= {1, 5, 9}
    assert results and {row["image_id"] for row in results} == {scene["id"]}
    assert coco_metrics(labels, results)["per_class"].keys() == {"hut", "crane", "ship"}


def test_noise_describes_itself(tmp_path):
    write_noise_tiles(tmp_path, 64)
    assert read_tile_set(tmp_path).tile_size == 64
