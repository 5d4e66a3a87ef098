"""xView labels against the original script's way, defects by reason, PNG copies."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from e2e_utils.classes import read_classes
from e2e_utils.convert import geojson_to_coco, tif_to_rgb
from e2e_utils.scenes import FailedScenes, read_rgb
from e2e_utils.stretch import read_stretch
from e2e_utils.xview_labels import satellite_passes, shared_passes

HEIGHT, WIDTH = 60, 80


def feature(image_id, bounds, type_id=18, cat_id="A", **more):
    ring = [[36.0, 51.0], [36.1, 51.0], [36.1, 51.1], [36.0, 51.0]]
    return {
        "type": "Feature",
        "properties": {
            "bounds_imcoords": bounds,
            "edited_by": "someone",
            "cat_id": cat_id,
            "type_id": type_id,
            "ingest_time": "2017/07/24 12:49:09.118+00",
            "index_right": 2356,
            "image_id": image_id,
            "point_geom": "01010000",
            "feature_id": 374410,
            "grid_file": "Grid2.shp",
            **more,
        },
        "geometry": {"type": "Polygon", "coordinates": [ring]},
    }


def write_xview(folder, numbers, features):
    scenes = folder / "train_images"
    scenes.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        pixels = np.full((HEIGHT, WIDTH, 3), number % 256, np.uint8)
        tifffile.imwrite(scenes / f"{number}.tif", pixels, photometric="rgb")
    (scenes / "._5.tif").write_bytes(b"\0\5\x16\7 macOS metadata")
    path = folder / "xView_train.geojson"
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}
    collection = {"type": "FeatureCollection", "crs": crs, "features": features}
    path.write_text(json.dumps(collection))
    return scenes, path


def convert(folder, numbers, features, out="coco", **options):
    scenes, labels = write_xview(folder, numbers, features)
    report = geojson_to_coco(scenes, labels, folder / out, **options)
    splits = [json.loads((folder / out / f"{s}.json").read_text()) for s in SPLITS]
    return report, *splits


SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def prep():
    path = Path(__file__).parents[1] / "benchmarks" / "prep.py"
    spec = importlib.util.spec_from_file_location("prep", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bounds = st.tuples(*[st.integers(-30, 110)] * 4).map(lambda b: ",".join(map(str, b)))
labels = st.lists(
    st.tuples(
        st.sampled_from(["1.tif", "2.tif", "10.tif", "33.tif", "1395.tif"]),
        bounds | st.just([]),
        st.sampled_from([11, 18, 73, 75, 82, 94]),
    ),
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(labels, st.sampled_from([0.0, 0.5, 0.75, 1.0]))
def test_files_are_those_of_the_original_script(tmp_path_factory, prep, rows, rate):
    folder, state = tmp_path_factory.mktemp("case"), random.getstate()
    features = [feature(*row) for row in rows]
    numbers = [1, 2, 10, 33]
    try:
        report, *splits = convert(folder, numbers, features, train_split_rate=rate)
    except ValueError as error:
        assert f"none of {len(rows)} labels is kept" in str(error)
        assert not (folder / "coco").exists()
        return
    prep.convert_original(folder, folder / "theirs", rate)()
    random.setstate(state)
    assert prep.same_labels(folder / "theirs", folder / "coco")
    for split, mine in zip(SPLITS, splits, strict=True):
        other = json.loads((folder / "theirs" / f"{split}.json").read_text())
        assert list(mine) == list(other)
        for what in ("images", "annotations", "categories"):
            fields = {tuple(row) for row in mine[what]}
            assert fields <= {tuple(row) for row in other[what]}  # in their order
            ids = [row["id"] for row in mine[what]]
            assert ids == list(range(ids[0], ids[0] + len(ids))) if ids else not fields
    assert report.features == report.kept + sum(report.dropped.values()) == len(rows)
    assert report.kept == sum(report.annotations.values())


def test_every_defect_is_dropped_and_counted_by_its_reason(tmp_path):
    defects = {
        "empty bounds": ["", [], None],
        "malformed bounds": ["1,2,3", "1,2,3,4,5", "a,2,3,4", "1,,3,4", "1.5,2,3,4"]
        + ["1.0,2,3,4", "1_0,2,3,4", "1,2,3,4],[5,6,7,8", f"{2**70},2,3,4", [1, 2, 3]],
        "zero area": ["5,5,5,9", "5,5,9,5"],
        "outside the scene": ["80,0,90,9", "0,60,9,70", "-9,0,0,9", "0,-9,9,0"],
    }
    features = [feature("1.tif", b) for rows in defects.values() for b in rows]
    features += [feature("1.tif", "1,2,3,4", type_id) for type_id in (75, 82)]
    features += [feature("1395.tif", "1,2,3,4"), feature("._5.tif", "1,2,3,4")]
    kept = ["-5,-5,9,9", "70,50,100,90", "9,9,4,4", " 1, 2, 3, 4 "]
    features += [feature("1.tif", b) for b in kept]
    report, train, _ = convert(tmp_path, [1, 2], features, train_split_rate=1)
    assert report.dropped == {
        **{reason: len(rows) for reason, rows in defects.items()},
        "scene missing": 2,
        "unknown class": 2,
    }
    assert report.features == len(features) and report.kept == len(kept)
    assert report.unlabelled == 1
    boxes = [row["bbox"] for row in train["annotations"]]
    assert boxes == [[-5, -5, 14, 14], [70, 50, 30, 40], [4, 4, 5, 5], [1, 2, 2, 2]]
    for line in (f"features read{len(features):>23}", "dropped: unknown class"):
        assert line in str(report)


def test_a_scene_whose_labels_are_all_dropped_stays_and_all_classes_are_listed(
    tmp_path,
):
    features = [feature("1.tif", "1,2,3,4", 75), feature("2.tif", "1,2,3,4", 94)]
    random.seed(5)
    state = random.getstate()
    report, train, val = convert(tmp_path, [1, 2], features, train_split_rate=0)
    assert random.getstate() == state  # the split has a generator of its own
    assert report.images == {"train": 0, "val": 2}
    assert [row["category_id"] for row in val["annotations"]] == [59]
    assert [row["id"] for row in train["categories"]] == list(range(60))
    assert train["categories"] == val["categories"]
    assert train["categories"][0]["name"] == "Fixed-wing Aircraft"
    assert sorted(read_classes()) == list(read_classes())
    assert {75, 82}.isdisjoint(read_classes())


def test_remapping_and_label_files_replace_the_table(tmp_path):
    names, mapping = tmp_path / "labels.txt", tmp_path / "map.json"
    names.write_text("11:Plane\n18:Car\n73:House\n")
    mapping.write_text('{"18": "0", "73": "1"}')
    features = [feature("1.tif", "1,2,3,4", t) for t in (11, 18, 73)]
    report, train, _ = convert(
        tmp_path,
        [1],
        features,
        train_split_rate=1,
        category_id_remapping=mapping,
        xview_class_labels=names,
    )
    assert report.dropped["unknown class"] == 1
    assert [(c["id"], c["name"]) for c in train["categories"]] == [
        (0, "Car"),
        (1, "House"),
    ]
    assert [row["category_id"] for row in train["annotations"]] == [0, 1]
    names.write_text("no colon here")
    with pytest.raises(ValueError, match="labels.txt: not a class table"):
        read_classes(mapping, names)
    mapping.write_text('{"99": "0"}')
    with pytest.raises(ValueError, match="map.json: type_id 99 is no class of xView"):
        read_classes(mapping)


def test_rgb_copies_are_named_in_the_files_if_given(tmp_path):
    scenes, labels = write_xview(tmp_path, [1, 2], [feature("2.tif", "1,2,3,4")])
    rgb = tmp_path / "rgb"
    rgb.mkdir()
    with pytest.raises(FileNotFoundError, match="2.png is missing.*tif_to_rgb"):
        geojson_to_coco(scenes, labels, tmp_path, train_images_dir_rgb=rgb)
    tif_to_rgb(scenes, rgb)
    geojson_to_coco(scenes, labels, tmp_path, train_images_dir_rgb=rgb)
    val = json.loads((tmp_path / "val.json").read_text())
    size = {"height": HEIGHT, "width": WIDTH}
    assert val["images"] == [{**size, "id": 1, "file_name": "2.png"}]


def test_grouped_split_keeps_passes_together_and_balances_classes(tmp_path):
    rng = random.Random(0)
    features = []
    for number in range(1, 61):
        of_pass = f"catalog {number % 20}"
        for _ in range(rng.randint(1, 30)):
            type_id = rng.choices([18, 73, 11], [8, 4, 1])[0]
            features.append(feature(f"{number}.tif", "1,2,3,4", type_id, of_pass))
    of_pass = {f["properties"]["image_id"]: f["properties"]["cat_id"] for f in features}
    # a label of another pass, or without bounds, does not make the scene one of it
    often = [name for name in of_pass if str(features).count(f"'{name}'") > 2]
    assert len(often) > 40
    features += [feature(name, "1,2,3,4", 18, "a stray") for name in often]
    features += [feature(name, "", 18, "another") for name in of_pass]
    report, train, val = convert(tmp_path, range(1, 61), features, split="grouped")
    labels = write_xview(tmp_path, [], features)[1]
    assert satellite_passes(labels) == of_pass
    passes = [
        {of_pass[i["file_name"]] for i in part["images"]} for part in (train, val)
    ]
    assert passes[0].isdisjoint(passes[1])
    grouped = [tmp_path / "coco" / f"{split}.json" for split in SPLITS]
    assert shared_passes(labels, *grouped) == []
    one, other = (part["images"][0]["file_name"] for part in (train, val))
    scenes = [{"file_name": name.replace(".tif", ".png")} for name in (one, other)]
    (tmp_path / "png.json").write_text(json.dumps({"images": scenes}))
    shared = shared_passes(labels, grouped[0], tmp_path / "png.json")
    assert shared == [scenes[0]["file_name"]]
    assert abs(report.images["train"] / 60 - 0.75) <= 0.1
    for category in (read_classes()[t][0] for t in (18, 73, 11)):
        n = [
            sum(row["category_id"] == category for row in part["annotations"])
            for part in (train, val)
        ]
        assert abs(n[0] / sum(n) - 0.75) < 0.1
    again = convert(tmp_path, range(1, 61), features, out="b", split="grouped")
    assert again[1:] == (train, val)
    one_place = [feature(f"{n}.tif", "1,2,3,4") for n in (1, 2)]
    with pytest.raises(ValueError, match=r"the cat_ids \['A'\]"):
        convert(tmp_path, [1, 2], one_place, split="grouped")


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "empty file"),
        ("not json", "malformed"),
        ('{"type": "FeatureCollection", "features": [', "truncated"),
        ('{"type": "Feature", "features": []}', r"'Feature' - at `\$.type`"),
        ('{"type": "FeatureCollection"}', "missing required field `features`"),
        (
            '{"type": "FeatureCollection", "features": [{"properties":'
            ' {"bounds_imcoords": "1,2,3,4", "type_id": 18}}]}',
            r"missing required field `image_id` - at `\$.features\[0\].properties`",
        ),
        (
            '{"type": "FeatureCollection", "features": [{"properties":'
            ' {"bounds_imcoords": "1", "type_id": "car", "image_id": "1.tif"}}]}',
            r"Expected `int`, got `str` - at `\$.features\[0\].properties.type_id`",
        ),
    ],
)
def test_broken_label_file_is_named_with_the_field(tmp_path, content, said):
    scenes, labels = write_xview(tmp_path, [1], [])
    labels.write_text(content)
    with pytest.raises(ValueError, match=said) as failure:
        geojson_to_coco(scenes, labels, tmp_path / "coco")
    assert str(labels) in str(failure.value)
    assert not (tmp_path / "coco").exists()


def test_missing_folder_bad_arguments_and_a_broken_scene_are_quoted(tmp_path):
    scenes, labels = write_xview(tmp_path, [1], [feature("1.tif", "1,2,3,4")])
    with pytest.raises(OSError, match="nowhere is no folder"):
        geojson_to_coco(tmp_path / "nowhere", labels, tmp_path)
    with pytest.raises(ValueError, match="train_split_rate is 75"):
        geojson_to_coco(scenes, labels, tmp_path, 75)
    with pytest.raises(ValueError, match="split is 'random'"):
        geojson_to_coco(scenes, labels, tmp_path, split="random")
    (scenes / "1.tif").write_text("no image")
    with pytest.raises(ValueError, match="1.tif: cannot be read as a scene"):
        geojson_to_coco(scenes, labels, tmp_path)


# TIFF to PNG


@pytest.fixture
def scenes(tmp_path):
    folder = tmp_path / "tif"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("1.tif", "22.TIF", "3.tif"):
        pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
        tifffile.imwrite(folder / name, pixels, photometric="rgb")
    (folder / "._1.tif").write_bytes(b"\0\5\x16\7")
    return folder


def png(path):
    return cv2.cvtColor(cv2.imread(str(path), -1), cv2.COLOR_BGR2RGB)


def test_png_has_the_pixels_and_is_written_again_only_if_it_is_not_intact(
    scenes, tmp_path
):
    out = tmp_path / "png"
    report = tif_to_rgb(scenes, out)
    assert (report.converted, report.skipped) == (3, 0)
    assert sorted(f.name for f in out.iterdir()) == ["1.png", "22.png", "3.png"]
    report = tif_to_rgb(scenes, out)
    assert (report.converted, report.skipped) == (0, 3)
    (out / "1.png").write_bytes((out / "1.png").read_bytes()[:-20])
    cv2.imwrite(str(out / "3.png"), np.zeros((9, 9, 3), np.uint8))
    newer = (out / "22.png").stat().st_mtime + 10
    os.utime(scenes / "22.TIF", (newer, newer))
    assert tif_to_rgb(scenes, out).converted == 3
    for name in ("1.tif", "22.TIF", "3.tif"):
        stored = tifffile.imread(scenes / name)
        assert np.array_equal(png(out / f"{Path(name).stem}.png"), stored)


def test_what_is_not_8_bit_is_named_with_its_dtype_and_the_rest_goes_on(
    scenes, tmp_path
):
    deep = np.ones((40, 50, 3), np.uint16)
    tifffile.imwrite(scenes / "4.tif", deep, photometric="rgb")
    (scenes / "5.tif").write_bytes((scenes / "1.tif").read_bytes()[:999])
    with pytest.raises(FailedScenes) as failure:
        tif_to_rgb(scenes, tmp_path / "png")
    assert "4.tif: 3 band(s) of uint16" in str(failure.value)
    assert "5.tif: cannot be read as a scene: truncated" in str(failure.value)
    assert failure.value.report.converted == 3


def test_16_bit_is_scaled_by_an_explicit_percentile(scenes, tmp_path):
    ramp = np.linspace(1000, 3000, 40 * 50).reshape(40, 50)
    deep = np.stack([ramp, ramp * 2, ramp * 0 + 7], axis=2).astype(np.uint16)
    tifffile.imwrite(scenes / "4.tif", deep, photometric="rgb")
    out = tmp_path / "png"
    tif_to_rgb(scenes, out, percentile=2)
    scaled = png(out / "4.png")
    assert scaled.dtype == np.uint8
    assert abs(int((scaled[..., 0] == 0).sum()) - 40) <= 12
    assert np.abs(scaled[..., 0].astype(int) - scaled[..., 1]).max() <= 1
    assert not scaled[..., 2].any()
    tif_to_rgb(scenes, out, percentile=20)  # written anew, since it is another picture
    assert (png(out / "4.png")[..., 0] == 0).sum() > 300
    stored = tifffile.imread(scenes / "1.tif")
    assert np.array_equal(png(out / "1.png"), stored)
    with pytest.raises(ValueError, match="percentile is 50"):
        tif_to_rgb(scenes, out, percentile=50)


@pytest.mark.parametrize("dtype", [">u2", "<u2", ">f4", "<i4", ">f8"])
def test_every_byte_order_and_range_is_stretched_to_all_of_8_bits(tmp_path, dtype):
    ramp = np.linspace(0.02, 0.30, 40 * 50).reshape(40, 50)
    deep = np.dstack([ramp, ramp * 2, ramp[::-1]]) * (1 if "f" in dtype else 1e4)
    (tmp_path / "tif").mkdir()
    options = {"photometric": "rgb", "byteorder": dtype[0]}
    tifffile.imwrite(tmp_path / "tif" / "1.tif", deep.astype(dtype[1:]), **options)
    tif_to_rgb(tmp_path / "tif", tmp_path, percentile=2)
    low, high = np.percentile(deep, (2, 98), axis=(0, 1))
    wanted = np.clip((deep - low) / (high - low) * 255, 0, 255)
    assert np.abs(png(tmp_path / "1.png") - wanted).max() <= 1
    record = read_stretch(tmp_path / "1.stretch.json")
    assert record.bands == (1, 2, 3) and np.allclose(record.low, low, rtol=1e-3)


@pytest.mark.parametrize("empty", [-9999, np.nan])
def test_nodata_and_nan_are_left_out_of_the_percentiles_and_drawn_as_0(tmp_path, empty):
    scene = np.linspace(100, 300, 3 * 40 * 50, dtype=np.float32).reshape(3, 40, 50)
    scene[:, :10] = empty
    for name, values in (("1", scene), ("2", np.full_like(scene, empty))):
        size = {"height": 40, "width": 50, "count": 3, "dtype": "float32"}
        options = {"driver": "GTiff", "nodata": -9999, **size}
        with rasterio.open(tmp_path / f"{name}.tif", "w", **options) as file:
            file.write(values)
    with pytest.raises(FailedScenes, match="2.tif: band 1 has nothing but nodata"):
        tif_to_rgb(tmp_path, tmp_path, percentile=0)
    drawn = png(tmp_path / "1.png")
    assert not drawn[:11, 0].any() and (drawn[-1, -1] == 255).all()
    assert not drawn[:10].any() and drawn[10, 25:].all()


def test_a_constant_scene_is_named(tmp_path):
    seven = np.full((40, 50, 3), 7, np.uint16)
    tifffile.imwrite(tmp_path / "1.tif", seven, photometric="rgb")
    with pytest.raises(FailedScenes, match="1.tif: its percentiles 2 and 98 are both"):
        tif_to_rgb(tmp_path, tmp_path, percentile=2)
    assert not list(tmp_path.glob("*.png"))


def test_chosen_bands_are_recorded_and_a_later_run_without_them_converts_anew(tmp_path):
    four = np.random.default_rng(0).integers(0, 256, (40, 50, 4), np.uint8)
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "1.tif", four, **options)
    for bands, order in (((3, 2, 1), [2, 1, 0]), (None, [0, 1, 2])):
        assert tif_to_rgb(tmp_path, tmp_path, bands=bands).converted == 1
        assert np.array_equal(png(tmp_path / "1.png"), four[..., order])
        record = tmp_path / "1.stretch.json"
        assert record.exists() == bool(bands)
        if bands:
            stretched = read_rgb(tmp_path / "1.tif", stretch=record)
            assert np.array_equal(stretched, png(tmp_path / "1.png"))


@pytest.mark.parametrize("ending", [".TIF", ".tiff", ".Tif"])
def test_labels_find_their_scene_whatever_the_ending_of_a_tiff(tmp_path, ending):
    scenes, labels = write_xview(tmp_path, [1, 2], [feature("1.tif", "1,2,30,40")])
    (scenes / "1.tif").rename(scenes / f"1{ending}")
    report = geojson_to_coco(scenes, labels, tmp_path, 1.0)
    assert report.kept == 1 and report.dropped["scene missing"] == 0
    train = json.loads((tmp_path / "train.json").read_text())
    assert train["images"][0]["file_name"] == f"1{ending}"
    tifffile.imwrite(scenes / "1.tif", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ValueError, match="are scenes of one name"):
        geojson_to_coco(scenes, labels, tmp_path, 1.0)


def test_no_scene_no_folder_and_scenes_of_other_bands_are_errors(tmp_path):
    with pytest.raises(OSError, match="nowhere is no folder"):
        tif_to_rgb(tmp_path / "nowhere", tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no .tif or .tiff scene"):
        tif_to_rgb(tmp_path, tmp_path / "out")
    two = np.ones((40, 50, 2), np.uint16)
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "1.tif", two, **options)
    with pytest.raises(FailedScenes, match=r"2 band\(s\) of uint16: choose three"):
        tif_to_rgb(tmp_path, tmp_path / "out", percentile=2)


# The commands


def run_cli(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "e2e_utils.convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[1],
    )


def test_commands_take_the_flags_of_the_original_and_end_with_one_line(tmp_path):
    features = [feature(f"{n}.tif", "1,2,30,40", 73) for n in (1, 2, 3, 4)]
    scenes, labels = write_xview(tmp_path, [1, 2, 3, 4], features)
    rgb = tmp_path / "rgb"
    done = run_cli("tif_to_rgb", "--input_dir", scenes, "--out_dir", rgb)
    assert done.returncode == 0, done.stderr
    assert "converted 4" in done.stdout
    (tmp_path / "map.json").write_text('{"73": "0"}')
    (tmp_path / "labels.txt").write_text("73:Building\n")
    done = run_cli(
        "geojson_to_coco",
        *("--train_images_dir", scenes),
        *("--train_images_dir_rgb", rgb),
        *("--train_geojson_path", labels),
        *("--output_dir", tmp_path / "coco"),
        *("--train_split_rate", "0.75"),
        *("--category_id_remapping", tmp_path / "map.json"),
        *("--xview_class_labels", tmp_path / "labels.txt"),
    )
    assert done.returncode == 0, done.stderr
    assert "3 scenes, 3 boxes" in done.stdout
    train = json.loads((tmp_path / "coco" / "train.json").read_text())
    assert train["images"][0]["file_name"].endswith(".png")
    labels.write_text("{}")
    arguments = ["--train_images_dir", scenes, "--train_geojson_path", labels]
    done = run_cli("geojson_to_coco", *arguments, "--output_dir", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: {labels}: not xView's label file")
