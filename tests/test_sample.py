"""The embedded data set: xView's files, fields and defects, and boxes on objects."""

import hashlib
import json
import random
import runpy
from collections import Counter

import geopandas
import numpy as np
import pytest
import tifffile
from commands import python
from test_predict import NAMES, BrightSquares

from e2e_utils.classes import read_classes
from e2e_utils.georeference import write_boxes
from e2e_utils.predict import predict_scene
from sample_data import canvas, dataset, open_land, quarters, scene, vehicles

PROPERTIES = (
    "bounds_imcoords edited_by cat_id type_id ingest_time index_right image_id "
    "point_geom feature_id grid_file"
).split()
DRAWN = {12, 13, 18, 19, 25, 40, 41, 73, 86, 91}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four scenes, the fourth without labels."""
    return dataset.draw_dataset(tmp_path_factory.mktemp("sample") / "xview", scenes=4)


def features_of(folder):
    return json.loads((folder / dataset.GEOJSON).read_text())["features"]


@pytest.fixture(scope="module")
def rows(four):
    """(image_id, type_id, box or None) of every label."""
    found = []
    for feature in features_of(four):
        p = feature["properties"]
        text = p["bounds_imcoords"]
        box = [int(v) for v in text.split(",")] if text else None
        found.append((p["image_id"], p["type_id"], box))
    return found


def scene_name(index):
    return f"{dataset.scene_number(index)}.tif"


def images_of(folder):
    paths = (folder / "train_images").glob("[0-9]*.tif")
    return {p.name: tifffile.imread(p) for p in paths}


# ---- pixels


def test_a_scene_depends_on_its_index_and_the_seed_alone(four, tmp_path):
    one = dataset.draw_dataset(tmp_path / "one", scenes=1)
    name = scene_name(0)
    first = (one / "train_images" / name).read_bytes()
    assert first == (four / "train_images" / name).read_bytes()
    mine = [f for f in features_of(one) if f["properties"]["image_id"] == name]
    assert mine == features_of(four)[: len(mine)] and len(mine) > 100
    other, _ = scene.draw_scene(3, seed=1)  # the quickest
    assert not np.array_equal(other, images_of(four)[scene_name(3)])


def test_haze_veils_the_same_scene_and_moves_no_label():
    clear, objects = scene.draw_scene(3, seed=1)  # the quickest
    hazy, of_hazy = scene.draw_scene(3, seed=1, haze=0.4)
    assert of_hazy == objects
    assert hazy.std() < 0.75 * clear.std() and hazy.mean() > clear.mean()


def test_pixels_do_not_depend_on_threads_or_vector_instructions(four):
    """As on another processor: no IPP, no dispatch to wider vectors, other threads."""
    code = (
        "import cv2; cv2.setUseOptimized(False); cv2.setNumThreads(3);"
        "import hashlib; from sample_data import scene;"
        "image, objects = scene.draw_scene(1, 0);"
        "print(hashlib.sha256(image.tobytes()).hexdigest())"
    )
    plain = {"OPENCV_IPP": "disabled", "OPENCV_CPU_DISABLE": "AVX2"}
    image = images_of(four)[scene_name(1)]
    drawn = python("-c", code, env=plain).strip()
    assert drawn == hashlib.sha256(image.tobytes()).hexdigest()


@pytest.mark.parametrize(
    "make",
    [
        vehicles.car,
        vehicles.box_truck,
        vehicles.container,
        vehicles.cargo_plane,
        vehicles.small_aircraft,
        vehicles.vessel,
    ],
)
def test_boxes_are_tight_around_what_is_drawn(make):
    """A lone sprite changes pixels up to each side of its box and not beyond.

    Without sun height there is no shadow, so the changed pixels are the object's.
    """
    rng = np.random.default_rng(3)
    ground = np.full((160, 160, 3), -1, np.float32)
    flat = np.zeros((160, 160), np.float32)
    page = canvas.Canvas(ground.copy(), flat, (0.0, 0.0), np.ones(3))
    assert canvas.place(page, make(rng), rng.uniform(70, 90, 2), rng.uniform(0, 6), 18)
    canvas.flush(page)
    ((_, *box),) = page.objects
    y, x = np.nonzero(np.abs(page.image - ground).max(2) > 0.2)
    assert box == pytest.approx([x.min(), y.min(), x.max() + 1, y.max() + 1], abs=1)


# ---- labels


def test_features_have_the_fields_of_the_real_file(four):
    document = json.loads((four / dataset.GEOJSON).read_text())
    crs = document["crs"]["properties"]["name"]
    assert crs == "urn:ogc:def:crs:OGC:1.3:CRS84"
    ids, strips, west = Counter(), {}, {}
    for feature in document["features"]:
        properties = feature["properties"]
        assert list(properties) == PROPERTIES
        assert len(properties["cat_id"]) == 16
        (ring,) = feature["geometry"]["coordinates"]
        assert len(ring) == 5 and ring[0] == ring[-1]
        assert all(-180 < lon < 180 and -90 < lat < 90 for lon, lat in ring)
        ids[properties["feature_id"]] += 1
        strips.setdefault(properties["cat_id"], set()).add(properties["image_id"])
        west.setdefault(properties["image_id"], ring[0][0])
    assert set(ids.values()) == {1}
    neighbours = {scene_name(0), scene_name(1)}  # in one strip, and apart in it
    assert any(neighbours <= scenes for scenes in strips.values())
    assert len({west[name] for name in neighbours}) == 2


def test_predicted_polygons_are_those_of_the_labels_in_degrees(tmp_path, monkeypatch):
    """Bright boxes, a detector that finds just these, and GDAL, which reads both."""
    boxes = np.array([[20, 30, 61, 50], [90, 7, 104, 33], [150, 140, 199, 171]])
    picture = np.full((200, 220, 3), 40, np.uint8)
    for x1, y1, x2, y2 in boxes:
        picture[y1:y2, x1:x2] = 255
    drawn = picture, [(18, *box) for box in boxes.tolist()]
    monkeypatch.setattr(scene, "draw_scene", lambda index, seed, haze: drawn)
    root = dataset.draw_dataset(tmp_path / "xview", scenes=2)
    found = {}
    for name in (scene_name(0), scene_name(1)):
        path = root / "train_images" / name
        found[name] = predict_scene(BrightSquares(), path, 300, 0.2, class_names=NAMES)
        with tifffile.TiffFile(path) as tiff:  # read by windows
            assert tiff.pages[0].is_memmappable
    (path,) = write_boxes(tmp_path / "boxes.geojson", found)
    predicted = geopandas.read_file(path).set_index("scene")
    labels = geopandas.read_file(root / dataset.GEOJSON).set_index("image_id")
    for name in found:
        wanted = labels.loc[[name]].geometry.normalize().iloc[:3]
        ours = predicted.loc[[name]].geometry.normalize()
        assert len(ours) == 3
        for polygon in wanted:
            assert ours.geom_equals_exact(polygon, 2e-8).sum() == 1


def test_every_defect_of_the_real_file_is_there(four, rows):
    images = images_of(four)
    assert len(images) == 4
    for image in images.values():
        assert image.dtype == np.uint8 and image.shape[2] == 3
        assert all(900 <= side <= 1500 for side in image.shape[:2])
    names = Counter(image for image, _, _ in rows)
    assert len(names.keys() & images.keys()) == 3  # one scene without labels
    assert names["1395.tif"] == 3 and "1395.tif" not in images
    kinds = Counter()
    for image, type_id, box in rows:
        kinds[type_id] += image in images
        if image not in images or box is None:
            kinds["empty"] += image in images
            continue
        height, width = images[image].shape[:2]
        x1, y1, x2, y2 = box
        outside = x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0
        over = x1 < 0 or y1 < 0 or x2 > width or y2 > height
        kinds["zero"] += x1 == x2 or y1 == y2
        kinds["outside"] += outside
        kinds["overhang"] += over and not outside
    assert all(kinds[k] == 3 for k in (75, 82, "empty", "zero", "outside"))
    assert kinds["overhang"] >= 3
    apple = four / "train_images" / f"._{scene_name(0)}"
    assert apple.read_bytes()[:4] == bytes.fromhex("00051607")


@pytest.mark.slow
def test_the_default_set_has_enough_of_every_class_in_both_splits(monkeypatch):
    """Only what is placed counts here, so the drawing of pixels is left out."""
    for owner, name in (
        (scene, "paint"),
        (scene, "flush"),
        (open_land, "paint"),
        (open_land, "blend"),
        (quarters, "paint"),
        (scene.Scene, "material"),
        (scene.Scene, "finish"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, **__: None)
    drawn = [scene.draw_scene(index, 0)[1] for index in range(12)]
    labelled = [[label[0] for label in labels] for labels in drawn if labels]
    assert len(labelled) == 11
    random.seed(0)
    random.shuffle(labelled)
    train, val = (Counter(sum(part, [])) for part in (labelled[:8], labelled[8:]))
    assert set(train) == DRAWN <= set(read_classes())
    for type_id in DRAWN:
        assert train[type_id] >= 40 and val[type_id] >= 6, type_id
    assert 2000 <= sum((train + val).values()) <= 5500
    assert [type_id for type_id, _ in train.most_common(2)] == [18, 73]


def test_the_default_set_is_small_and_never_meets_the_missing_scene():
    sizes = [height * width * 3 for height, width, _ in scene.PLANS]
    assert len(sizes) == 12 and sum(sizes) < 60e6
    numbers = [dataset.scene_number(i) for i in range(200)]
    assert numbers == sorted(set(numbers)) and 1395 not in numbers


# ---- the folder


@pytest.fixture
def quick(monkeypatch):
    """Scenes that cost nothing; a run is cut off at the index put into the set."""
    fails = set()

    def draw(index, seed, haze):
        if index in fails:
            raise KeyboardInterrupt
        return np.zeros((200, 200, 3), np.uint8), [(18, 10, 10, 25, 17)]

    monkeypatch.setattr(scene, "draw_scene", draw)
    return fails


def test_a_folder_is_completed_once_and_old_scenes_go(tmp_path, quick):
    dataset.draw_dataset(tmp_path, scenes=3)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    dataset.draw_dataset(tmp_path, scenes=3)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    (tmp_path / dataset.GEOJSON).unlink()
    dataset.draw_dataset(tmp_path, scenes=2)
    assert set(images_of(tmp_path)) == {scene_name(0), scene_name(1)}
    named = {f["properties"]["image_id"] for f in features_of(tmp_path)}
    assert named == {scene_name(0), scene_name(1), "1395.tif"}


def test_a_run_that_was_cut_off_is_completed_by_the_next(tmp_path, quick):
    quick.add(1)
    with pytest.raises(KeyboardInterrupt):
        dataset.draw_dataset(tmp_path, scenes=2)
    assert not (tmp_path / dataset.GEOJSON).exists()
    quick.clear()
    dataset.draw_dataset(tmp_path, scenes=2)
    assert len(images_of(tmp_path)) == 2
    assert not list(tmp_path.rglob(".part*"))


def test_the_command_line_draws_and_says_what_it_is(
    tmp_path, quick, capsys, monkeypatch
):
    monkeypatch.setattr(
        "sys.argv", ["sample_data", "--output_dir", f"{tmp_path}/d", "--scenes", "1"]
    )
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_module("sample_data")
    assert "none of it is xView" in capsys.readouterr().out
    assert len(images_of(tmp_path / "d")) == 1


def test_what_cannot_be_drawn_or_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    for target in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert dataset.main(["--output_dir", str(target)]) == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert str(target) in message
    for argument, value in (("scenes", 0), ("seed", -1), ("haze", 0.7)):
        with pytest.raises(ValueError, match=f"{argument} must be .*, not {value}"):
            dataset.draw_dataset(tmp_path / "x", **{argument: value})
    assert not (tmp_path / "x").exists()


def test_a_data_set_that_was_not_drawn_here_is_not_touched(tmp_path):
    real = tmp_path / dataset.GEOJSON
    real.write_text("{}")
    with pytest.raises(FileExistsError, match="not drawn by this program"):
        dataset.draw_dataset(tmp_path)
    assert real.read_text() == "{}"
