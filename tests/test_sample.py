"""The embedded data set: xView's files, fields and defects, and boxes on objects."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile

import e2e_utils
from sample_data import dataset as sample
from sample_data import scene as scenery

CLASSES = Path(e2e_utils.__file__).with_name("xview_classes.json")
PROPERTIES = [
    "bounds_imcoords", "edited_by", "cat_id", "type_id", "ingest_time",
    "index_right", "image_id", "point_geom", "feature_id", "grid_file",
]  # fmt: skip
DRAWN = {12, 13, 18, 19, 25, 40, 41, 73, 86, 91}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four scenes, the fourth without labels."""
    return sample.draw_dataset(tmp_path_factory.mktemp("sample") / "xview", scenes=4)


@pytest.fixture(scope="module")
def features(four):
    return json.loads((four / sample.GEOJSON).read_text())["features"]


@pytest.fixture(scope="module")
def rows(features):
    """(image_id, type_id, box or None) of every label."""
    found = []
    for feature in features:
        p = feature["properties"]
        text = p["bounds_imcoords"]
        box = [int(v) for v in text.split(",")] if text else None
        found.append((p["image_id"], p["type_id"], box))
    return found


def images_of(folder):
    paths = (folder / "train_images").glob("[0-9]*.tif")
    return {p.name: tifffile.imread(p) for p in paths}


def test_scenes_are_contiguous_uint8_rgb(four):
    for path in (four / "train_images").glob("[0-9]*.tif"):
        image = tifffile.memmap(path, mode="r")
        assert image.dtype == np.uint8 and image.shape[2] == 3
        assert all(900 <= side <= 1500 for side in image.shape[:2])
    assert len(images_of(four)) == 4


def test_a_scene_does_not_depend_on_how_many_are_drawn(four, tmp_path, features):
    one = sample.draw_dataset(tmp_path / "one", scenes=1)
    name = f"{sample.scene_number(0)}.tif"
    first = (one / "train_images" / name).read_bytes()
    assert first == (four / "train_images" / name).read_bytes()
    alone = json.loads((one / sample.GEOJSON).read_text())["features"]
    mine = [f for f in alone if f["properties"]["image_id"] == name]
    assert mine == features[: len(mine)] and len(mine) > 100


def test_the_seed_alone_decides_the_picture(four):
    index = 3  # the quickest
    again, _ = scenery.draw_scene(index, seed=0)
    assert np.array_equal(again, images_of(four)[f"{sample.scene_number(index)}.tif"])
    other, _ = scenery.draw_scene(index, seed=1)
    assert not np.array_equal(again, other)


def test_pixels_do_not_depend_on_threads_or_vector_instructions(four):
    """As on another processor: no IPP, no dispatch to wider vectors, other threads."""
    code = (
        "import cv2; cv2.setUseOptimized(False); cv2.setNumThreads(3);"
        "import hashlib; from sample_data import scene as scenery;"
        "image, objects = scenery.draw_scene(1, 0);"
        "print(hashlib.sha256(image.tobytes()).hexdigest())"
    )
    plain = {**os.environ, "OPENCV_IPP": "disabled", "OPENCV_CPU_DISABLE": "AVX2"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=plain
    )
    image = images_of(four)[f"{sample.scene_number(1)}.tif"]
    assert run.stdout.strip() == hashlib.sha256(image.tobytes()).hexdigest()


def test_a_complete_folder_is_left_as_it_is(four):
    before = {p: p.stat().st_mtime_ns for p in four.rglob("*")}
    sample.draw_dataset(four, scenes=4)
    assert before == {p: p.stat().st_mtime_ns for p in four.rglob("*")}


def test_a_folder_that_lost_a_file_is_drawn_again_and_old_scenes_go(
    tmp_path, monkeypatch
):
    picture, objects = np.zeros((200, 200, 3), np.uint8), [(18, 10, 10, 25, 17)]
    monkeypatch.setattr(scenery, "draw_scene", lambda index, seed: (picture, objects))
    sample.draw_dataset(tmp_path, scenes=3)
    (tmp_path / sample.GEOJSON).unlink()
    sample.draw_dataset(tmp_path, scenes=2)
    assert sorted(images_of(tmp_path)) == sorted(
        f"{sample.scene_number(i)}.tif" for i in (0, 1)
    )
    named = json.loads((tmp_path / sample.GEOJSON).read_text())["features"]
    assert len({f["properties"]["image_id"] for f in named}) == 3  # and 1395.tif


def test_a_run_that_was_cut_off_leaves_no_half_file_and_is_completed_by_the_next(
    tmp_path, monkeypatch
):
    picture, objects = np.zeros((200, 200, 3), np.uint8), [(18, 10, 10, 25, 17)]

    def fails_at_the_second(index, seed):
        if index == 1:
            raise KeyboardInterrupt
        return picture, objects

    monkeypatch.setattr(scenery, "draw_scene", fails_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        sample.draw_dataset(tmp_path, scenes=2)
    assert not (tmp_path / sample.GEOJSON).exists()
    monkeypatch.setattr(scenery, "draw_scene", lambda index, seed: (picture, objects))
    sample.draw_dataset(tmp_path, scenes=2)
    assert len(images_of(tmp_path)) == 2
    assert not list(tmp_path.rglob(".part*"))


def test_features_have_the_fields_of_the_real_file(four, features):
    document = json.loads((four / sample.GEOJSON).read_text())
    assert document["type"] == "FeatureCollection"
    crs = document["crs"]["properties"]["name"]
    assert crs == "urn:ogc:def:crs:OGC:1.3:CRS84"
    for feature in features:
        assert list(feature) == ["type", "properties", "geometry"]
        assert list(feature["properties"]) == PROPERTIES
        assert isinstance(feature["properties"]["type_id"], int)
        ring = feature["geometry"]["coordinates"][0]
        assert feature["geometry"]["type"] == "Polygon"
        assert len(ring) == 5 and ring[0] == ring[-1]
        assert all(-180 < lon < 180 and -90 < lat < 90 for lon, lat in ring)
    ids = [f["properties"]["feature_id"] for f in features]
    assert len(set(ids)) == len(ids)


def test_neighbouring_scenes_share_a_strip_and_lie_apart_on_the_ground(features):
    strips, west = {}, {}
    for f in features:
        p = f["properties"]
        strips.setdefault(p["cat_id"], set()).add(p["image_id"])
        west.setdefault(p["image_id"], f["geometry"]["coordinates"][0][0][0])
    first, second = (f"{sample.scene_number(i)}.tif" for i in (0, 1))
    assert {first, second} in [scenes & {first, second} for scenes in strips.values()]
    assert all(len(cat_id) == 16 for cat_id in strips)
    assert west[first] != west[second]


def test_every_defect_of_the_real_file_is_there(four, rows):
    images = images_of(four)
    labelled = {image for image, _, _ in rows} & set(images)
    assert len(labelled) == 3 and len(images) == 4  # one scene without labels
    assert sum(image == "1395.tif" for image, _, _ in rows) == 3
    assert "1395.tif" not in images
    kinds = Counter()
    for image, type_id, box in rows:
        if image not in images:
            continue
        height, width = images[image].shape[:2]
        kinds[type_id] += type_id in (75, 82)
        if box is None:
            kinds["empty"] += 1
            continue
        x1, y1, x2, y2 = box
        outside = x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0
        over = x1 < 0 or y1 < 0 or x2 > width or y2 > height
        kinds["zero"] += x1 == x2 or y1 == y2
        kinds["outside"] += outside
        kinds["overhang"] += over and not outside
    assert all(kinds[k] == 3 for k in (75, 82, "empty", "zero", "outside"))
    assert kinds["overhang"] >= 3
    apple = four / "train_images" / f"._{sample.scene_number(0)}.tif"
    assert apple.read_bytes()[:4] == bytes.fromhex("00051607")


def test_class_ids_are_those_of_xview(rows):
    known = {c["type_id"] for c in json.loads(CLASSES.read_text())["classes"]}
    used = {type_id for _, type_id, _ in rows}
    assert used - {75, 82} == DRAWN and DRAWN <= known


def test_boxes_are_tight_around_what_is_drawn():
    """A lone sprite changes pixels up to each side of its box and not beyond.

    Without sun height there is no shadow, so the changed pixels are the object's.
    """
    from sample_data import buildings, canvas, vehicles

    rng = np.random.default_rng(3)
    makers = [
        vehicles.car, vehicles.bus, vehicles.box_truck, vehicles.container,
        vehicles.cargo_plane, vehicles.small_aircraft, vehicles.vessel,
        vehicles.motorboat,
    ]  # fmt: skip
    for make in makers * 3:
        ground = np.full((160, 160, 3), -1, np.float32)
        page = canvas.Canvas(
            ground.copy(), np.zeros((160, 160), np.float32), (0.0, 0.0), np.ones(3)
        )
        centre, heading = rng.uniform(70, 90, 2), rng.uniform(0, 6.28)
        assert canvas.place(page, make(rng), centre, heading, 18)
        canvas.flush(page)
        ((_, x1, y1, x2, y2),) = page.objects
        changed = np.abs(page.image - ground).max(2) > 0.2
        columns, lines = np.flatnonzero(changed.any(0)), np.flatnonzero(changed.any(1))
        drawn = [columns[0], lines[0], columns[-1] + 1, lines[-1] + 1]
        assert np.abs(np.array(drawn) - (x1, y1, x2, y2)).max() <= 1, make.__name__
    assert buildings.BUILDING == 73


def test_no_car_stands_in_another(rows):
    name = f"{sample.scene_number(1)}.tif"
    mine = [box for image, type_id, box in rows if (image, type_id) == (name, 18)]
    cars = np.array([box for box in mine if box and box[0] < box[2]])
    middles = (cars[:, :2] + cars[:, 2:]) / 2
    apart = np.linalg.norm(middles[:, None] - middles[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    assert apart.min() > 5.5  # a car is 5.8 px wide or more


@pytest.mark.slow
def test_the_default_set_has_enough_of_every_class_in_both_splits(monkeypatch):
    """Only what is placed counts here, so the drawing of pixels is left out."""
    from sample_data import open_land, quarters, scene

    def nothing(*_, **__):
        return None

    for module in (scene, open_land, quarters):
        monkeypatch.setattr(module, "paint", nothing)
    monkeypatch.setattr(open_land, "blend", nothing)
    monkeypatch.setattr(scene, "flush", nothing)
    monkeypatch.setattr(scene.Scene, "material", nothing)
    monkeypatch.setattr(scene.Scene, "finish", nothing)
    drawn = {i: scenery.draw_scene(i, 0)[1] for i in range(12)}
    labelled = [i for i in drawn if drawn[i]]
    assert len(labelled) == 11
    random.seed(0)
    random.shuffle(labelled)
    cut = int(len(labelled) * 0.75)
    counts = [
        Counter(o[0] for i in part for o in drawn[i])
        for part in (labelled[:cut], labelled[cut:])
    ]
    for type_id in DRAWN:
        assert counts[0][type_id] >= 40 and counts[1][type_id] >= 6, type_id
    assert 2000 <= sum(counts[0].values()) + sum(counts[1].values()) <= 5500
    assert counts[0].most_common(2)[0][0] == 18 and counts[0].most_common(2)[1][0] == 73


def test_the_default_set_stays_under_60_megabytes():
    sizes = [height * width * 3 for height, width, _ in scenery.PLANS]
    assert len(sizes) == 12 and sum(sizes) < 60e6


def test_numbers_ascend_and_never_meet_the_missing_scene():
    numbers = [sample.scene_number(i) for i in range(200)]
    assert numbers == sorted(set(numbers)) and 1395 not in numbers


def test_the_command_line_draws_and_says_what_it_is(tmp_path):
    command = [sys.executable, "-m", "sample_data", "--output_dir", tmp_path / "d"]
    run = subprocess.run(
        [*command, "--scenes", "1", "--seed", "5"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "none of it is xView" in run.stdout
    assert (tmp_path / "d" / sample.GEOJSON).is_file()


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_folder_that_cannot_be_written_is_one_message_that_names_it(
    tmp_path, capsys, below
):
    (tmp_path / "file").write_text("not a folder")
    target = tmp_path / "file" / below
    assert sample.main(["--output_dir", str(target)]) == 2
    message = capsys.readouterr().err.strip()
    assert str(target) in message and len(message.splitlines()) == 1


def test_a_data_set_that_was_not_drawn_here_is_not_touched(tmp_path):
    real = tmp_path / sample.GEOJSON
    real.write_text("{}")
    with pytest.raises(FileExistsError, match="not drawn by this program"):
        sample.draw_dataset(tmp_path)
    assert real.read_text() == "{}"


@pytest.mark.parametrize("arguments", [{"scenes": 0}, {"seed": -1}])
def test_a_wrong_number_is_quoted(tmp_path, arguments):
    (value,) = arguments.values()
    with pytest.raises(ValueError, match=str(value)):
        sample.draw_dataset(tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()
