"""Tiles against SAHI, the reader against files it must refuse, and interrupted runs."""

import contextlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from sahi.slicing import get_slice_bboxes, process_coco_annotations
from sahi.slicing import slice_coco as sahi_slice_coco
from sahi.utils.coco import CocoAnnotation

from e2e_utils.grid import clip_to_tiles, tile_grid
from e2e_utils.scenes import FailedScenes, open_scene, read_rgb
from e2e_utils.tiling import slice_coco

CATEGORIES = [{"id": i, "name": f"class {i}"} for i in range(3)]


def scene(height, width, seed=0):
    """Random colours, smoothed so that JPEG has something to do."""
    rng = np.random.default_rng(seed)
    return cv2.blur(rng.integers(0, 256, (height, width, 3), np.uint8), (5, 5))


def write_data_set(folder, sizes, boxes):
    """Scenes 0.tif.. of sizes (h, w); boxes are (image_id, category_id, [xywh])."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for i, (height, width) in enumerate(sizes):
        tifffile.imwrite(
            folder / f"{i}.tif", scene(height, width, i), photometric="rgb"
        )
        size = {"height": height, "width": width}
        images.append({**size, "id": i + 1, "file_name": f"{i}.tif"})
    annotations = [
        {"id": n, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0}
        for n, (image, category, box) in enumerate(boxes, 1)
    ]
    coco = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    path = folder / "train.json"
    path.write_text(json.dumps(coco))
    return path


def sahi(coco_json, image_dir, out, **options):
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        return sahi_slice_coco(
            coco_annotation_file_path=str(coco_json),
            image_dir=str(image_dir),
            output_coco_annotation_file_name="",
            output_dir=out and str(out),
            out_ext=".jpg",
            **options,
        )[0]


def without_vertex_order(coco):
    """GEOS starts a clipped rectangle at any of its corners."""
    for row in coco["annotations"]:
        corners = np.array(row.pop("segmentation")).reshape(-1, 2)
        row["corners"] = sorted(map(tuple, corners.tolist()))
    return coco


def ours(report):
    return json.loads(report.coco_json.read_text())


def files_in(folder):
    return {f.name: f.read_bytes() for f in Path(folder).iterdir()}


@st.composite
def grids(draw):
    size = draw(st.integers(1, 700))
    overlap = draw(st.floats(0, 0.99) | st.sampled_from([0, 0.1, 0.2, 0.25, 0.5]))
    step = size - int(overlap * size)
    side = st.integers(1, size + 8 * step)
    return draw(side), draw(side), size, overlap


@settings(max_examples=2000, deadline=None)
@given(grids())
def test_grid_is_that_of_sahi(case):
    height, width, size, overlap = case
    theirs = get_slice_bboxes(height, width, size, size, False, overlap, overlap)
    grid = tile_grid(height, width, size, overlap)
    assert grid.dtype == np.int64 and grid.tolist() == theirs


@st.composite
def boxes(draw, most=12):
    number = st.integers(-40, 260) | st.integers(-160, 1040).map(lambda n: n / 4)
    side = st.integers(1, 90) | st.integers(4, 360).map(lambda n: n / 4)
    rows = draw(st.lists(st.tuples(number, number, side, side), max_size=most))
    return [list(row) for row in rows if int(row[2] * row[3]) >= 1]


@settings(max_examples=400, deadline=None)
@given(
    st.data(),
    st.integers(1, 220),
    st.integers(1, 220),
    st.integers(10, 120),
    st.sampled_from([0.0, 0.1, 0.2, 0.5]),
    st.sampled_from([0.01, 0.1, 0.5, 1.0]),
)
def test_clipping_is_that_of_sahi(data, height, width, size, overlap, min_area_ratio):
    source = data.draw(boxes())
    grid = tile_grid(height, width, size, overlap)
    xywh = np.array(source, float).reshape(-1, 4)
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    tile, box, clipped = clip_to_tiles(xyxy, grid, min_area_ratio)
    source = [CocoAnnotation(category_id=i, bbox=b) for i, b in enumerate(source)]
    theirs = [
        (t, row.category_id, *row.bbox)
        for t, rectangle in enumerate(grid.tolist())
        for row in process_coco_annotations(source, rectangle, min_area_ratio)
    ]
    corner = clipped[:, :2] - grid[tile, :2]
    side = clipped[:, 2:] - clipped[:, :2]
    rows = zip(tile.tolist(), box.tolist(), corner.tolist(), side.tolist(), strict=True)
    assert [(t, b, *xy, *wh) for t, b, xy, wh in rows] == theirs


@pytest.mark.slow
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.data(),
    st.lists(
        st.tuples(st.integers(8, 220), st.integers(8, 220)), min_size=1, max_size=3
    ),
    st.integers(10, 120),
    st.sampled_from([0.0, 0.2, 0.5]),
    st.sampled_from([0.1, 0.5]),
    st.booleans(),
)
def test_data_set_is_that_of_sahi_byte_for_byte(
    tmp_path_factory, data, sizes, size, overlap, min_area_ratio, ignore
):
    folder = tmp_path_factory.mktemp("case")
    rows = [
        (i, data.draw(st.integers(0, 2)), box)
        for i in range(1, len(sizes) + 1)
        for box in data.draw(boxes(most=5))
    ]
    assume(sum(len(tile_grid(*hw, size, overlap)) for hw in sizes) < 150)
    coco_json = write_data_set(folder / "in", sizes, rows)
    theirs = sahi(
        coco_json,
        folder / "in",
        folder / "sahi",
        slice_height=size,
        slice_width=size,
        overlap_height_ratio=overlap,
        overlap_width_ratio=overlap,
        min_area_ratio=min_area_ratio,
        ignore_negative_samples=ignore,
    )
    report = slice_coco(
        folder / "in",
        coco_json,
        folder / "ours",
        slice_size=size,
        overlap_ratio=overlap,
        min_area_ratio=min_area_ratio,
        ignore_negative_samples=ignore,
    )
    mine = ours(report)
    assert without_vertex_order(mine) == without_vertex_order(theirs)
    tiles = files_in(report.image_dir)
    assert tiles.keys() == {row["file_name"] for row in mine["images"]}
    assert tiles.items() <= files_in(folder / "sahi").items()


@pytest.fixture
def small(tmp_path):
    """Three scenes of 100 x 130; the boxes lie in the corner tiles of the first two."""
    boxes = [(1, 0, [2, 2, 10, 10]), (1, 1, [90, 80, 30, 30]), (2, 2, [5, 5, 20, 8])]
    return tmp_path, write_data_set(tmp_path / "in", [(100, 130)] * 3, boxes)


def cut(folder, coco_json, out="out", **options):
    options = {"slice_size": 50, **options}
    return slice_coco(folder / "in", coco_json, folder / out, **options)


def test_outputs_have_the_names_and_the_order_of_fields_of_sahi(small):
    report = cut(*small)
    assert report.coco_json == small[0] / "out" / "train_50_02.json"
    assert report.image_dir == small[0] / "out" / "train_images_50_02"
    mine = ours(report)
    theirs = sahi(small[1], small[0] / "in", None, slice_height=50, slice_width=50)
    assert list(mine) == list(theirs)
    for what in ("images", "annotations"):
        assert list(mine[what][0]) == list(theirs[what][0])
    names = {row["file_name"] for row in mine["images"]}
    assert names == set(files_in(report.image_dir)) and "0_0_0_0_50_50.jpg" in names


def test_negatives_are_left_out_kept_by_ratio_or_all_kept(small):
    total = 3 * len(tile_grid(100, 130, 50, 0.2))
    none, all_ = cut(*small), cut(*small, out="all", ignore_negative_samples=False)
    assert none.negatives == 0 and all_.tiles == total
    assert (none.empty_tiles, all_.empty_tiles) == (total - none.tiles, 0)
    half = cut(*small, out="half", negative_ratio=0.5)
    assert half.negatives == round(0.5 * none.tiles)
    again = cut(*small, out="again", negative_ratio=0.5)
    assert ours(half) == ours(again)
    assert len(files_in(half.image_dir)) == half.tiles
    other = cut(*small, out="other", negative_ratio=0.5, seed=1)
    assert ours(other)["images"] != ours(half)["images"]
    every = cut(*small, out="every", negative_ratio=1000)
    assert every.tiles == total


def test_what_crashes_sahi_is_dropped_and_counts_add_up(tmp_path):
    boxes = [
        (1, 0, [10, 10, 20, 20]),
        (1, 0, [10, 10, 0, 20]),
        (1, 0, [10, 10, 0.5, 0.5]),
        (1, 7, [10, 10, 20, 20]),
        (9, 0, [10, 10, 20, 20]),
        (1, 0, [500, 10, 20, 20]),
        (1, 0, [40, 40, -20, -20]),
    ]
    report = cut(tmp_path, write_data_set(tmp_path / "in", [(100, 100)], boxes))
    assert report.dropped == {
        "image not listed": 1,
        "category not listed": 1,
        "zero area": 1,
        "area below 1 pixel": 1,
    }
    assert report.in_no_tile == 1 and report.boxes == 7
    assert {"bbox": [20, 20, 20, 20]}.items() <= ours(report)["annotations"][1].items()
    assert "dropped: zero area" in str(report)


def test_a_crowd_stays_one_and_parts_that_no_detector_can_take_are_dropped(tmp_path):
    narrow = [39.9999, 60, 10.0001, 10]  # 0.0001 px of it in the tile on the left
    boxes = [(1, 0, [2, 2, 10, 10]), (1, 1, narrow)]
    path = write_data_set(tmp_path / "in", [(80, 80)], boxes)
    coco = json.loads(path.read_text())
    coco["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(coco))
    options = {"slice_size": 40, "overlap_ratio": 0, "min_area_ratio": 0}
    report = cut(tmp_path, path, **options)
    rows = ours(report)["annotations"]
    assert report.small_parts == 1
    assert [(row["iscrowd"], row["bbox"]) for row in rows] == [
        (1, [2, 2, 10, 10]),
        (0, [0, 20, 10, 10]),
    ]


def test_manifest_maps_every_tile_to_the_pixels_of_its_scene(small):
    report = cut(*small, ignore_negative_samples=False)
    manifest = json.loads(report.manifest.read_text())
    for i, row in enumerate(manifest["scenes"]):
        scene = {"file_name": f"{i}.tif", "id": i + 1, "height": 100, "width": 130}
        stat = (small[0] / "in" / f"{i}.tif").stat()
        assert row == {**scene, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    names = [row["file_name"] for row in ours(report)["images"]]
    assert [row["file_name"] for row in manifest["tiles"]] == names
    for row in manifest["tiles"]:
        jpeg, (x1, y1, x2, y2) = io.BytesIO(), row["xyxy"]
        pixels = read_rgb(small[0] / "in" / row["scene"])[y1:y2, x1:x2]
        Image.fromarray(pixels).save(jpeg, "JPEG")
        assert (report.image_dir / row["file_name"]).read_bytes() == jpeg.getvalue()


def test_second_run_writes_no_tile_again(small):
    first = cut(*small, ignore_negative_samples=False)
    before = {f.name: f.stat().st_mtime_ns for f in first.image_dir.iterdir()}
    second = cut(*small, ignore_negative_samples=False)
    after = {f.name: f.stat().st_mtime_ns for f in second.image_dir.iterdir()}
    assert (first.resumed, second.resumed) == (0, 3) and before == after
    assert "3 (3 already tiled)" in str(second)


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda f: f.write_bytes(b"short"), lambda f: f.write_bytes(b"")],
)
def test_damaged_tile_is_written_again(small, damage):
    first = cut(*small, ignore_negative_samples=False)
    whole = files_in(first.image_dir)
    damage(next(first.image_dir.iterdir()))
    second = cut(*small, ignore_negative_samples=False)
    assert second.resumed == 2 and files_in(second.image_dir) == whole


def test_changed_settings_or_scenes_never_mix_with_old_tiles(small):
    folder, coco_json = small
    many = cut(*small, ignore_negative_samples=False)
    (many.image_dir / "not ours.jpg").write_bytes(b"x")
    few, fresh = cut(*small), cut(*small, out="fresh")
    left = {**files_in(fresh.image_dir), "not ours.jpg": b"x"}
    assert left == files_in(few.image_dir)
    tifffile.imwrite(folder / "in" / "1.tif", scene(100, 130, 99), photometric="rgb")
    coco = json.loads(coco_json.read_text())
    coco["images"].pop(0)
    coco["annotations"] = coco["annotations"][2:]
    coco_json.write_text(json.dumps(coco))
    changed, fresh = cut(*small), cut(*small, out="fresh 2")
    assert changed.resumed == 0
    left = {**files_in(fresh.image_dir), "not ours.jpg": b"x"}
    assert left == files_in(changed.image_dir)


def test_other_bands_give_other_tiles_and_are_cut_anew(tmp_path):
    boxes = [(1, 0, [2, 2, 10, 10])]
    data = tmp_path, write_data_set(tmp_path / "in", [(100, 130)], boxes)
    four = np.dstack([scene(100, 130), scene(100, 130, 9)[..., 0]])
    path, options = tmp_path / "in" / "0.tif", {"photometric": "minisblack"}
    tifffile.imwrite(path, four, planarconfig="contig", **options)
    for bands, order in (((3, 2, 1), [2, 1, 0]), (None, [0, 1, 2])):
        report = cut(*data, bands=bands)
        assert report.resumed == 0
        (tile,) = report.image_dir.iterdir()
        jpeg = io.BytesIO()
        Image.fromarray(four[:50, :50, order]).save(jpeg, "JPEG")
        assert tile.read_bytes() == jpeg.getvalue()


KILLED = """
import os, signal, sys
from e2e_utils import tiling
os.cpu_count = lambda: 1
replace, left = os.replace, int(sys.argv[4])
def dying(source, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dying
tiling.slice_coco(*sys.argv[1:4], slice_size=50, ignore_negative_samples=False)
"""


@pytest.mark.parametrize(
    "renames, ignore", [(1, False), (2, False), (15, False), (15, True), (29, False)]
)
def test_killed_run_is_continued_and_equals_a_fresh_one(small, renames, ignore):
    folder, coco_json = small
    arguments = [folder / "in", coco_json, folder / "out", renames]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)])
    assert killed.returncode == -signal.SIGKILL
    assert not (folder / "out" / "train_50_02.json").exists()
    continued = cut(*small, ignore_negative_samples=ignore)
    fresh = cut(*small, out="fresh", ignore_negative_samples=ignore)
    assert files_in(continued.image_dir) == files_in(fresh.image_dir)
    assert ours(continued) == ours(fresh)
    if not ignore:  # the manifest, 9 tiles a scene, the JSON
        assert continued.resumed == max(0, renames - 2) // 9


def test_bad_scenes_are_named_and_the_rest_goes_on(small):
    folder, coco_json = small
    truncated, missing = folder / "in" / "0.tif", folder / "in" / "1.tif"
    cut(*small)
    tifffile.imwrite(folder / "in" / "2.tif", scene(99, 130), photometric="rgb")
    with pytest.raises(FailedScenes, match="130 x 99 pixels, but .* says 130 x 100"):
        cut(*small)
    tifffile.imwrite(folder / "in" / "2.tif", scene(100, 130), photometric="rgb")
    truncated.write_bytes(truncated.read_bytes()[:9000])
    missing.unlink()
    with pytest.raises(FailedScenes) as failure:
        cut(*small, ignore_negative_samples=False)
    assert "0.tif: cannot be read as a scene: truncated: 9000 of" in str(failure.value)
    assert str(missing) in str(failure.value)
    report = failure.value.report
    listed = {row["file_name"] for row in ours(report)["images"]}
    assert {name[0] for name in listed} == {"2"}
    assert set(files_in(report.image_dir)) == listed


def test_full_disk_stops_the_run_and_leaves_no_half_tile(small, monkeypatch):
    real = open

    def full(path, mode="r", *rest, **options):
        if "w" in mode and "1_1_0_0_50_50.jpg" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return real(path, mode, *rest, **options)

    whole = files_in(cut(*small, out="whole").image_dir)
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="No space left"):
        cut(*small)
    monkeypatch.undo()
    tiles = files_in(small[0] / "out" / "train_images_50_02")
    assert "1_1_0_0_50_50.jpg" not in tiles and tiles.items() <= whole.items()
    assert not (small[0] / "out" / "train_50_02.json").exists()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"min_area_ratio": 2}, "min_area_ratio is 2"),
        ({"negative_ratio": -1}, "negative_ratio is -1"),
        ({"slice_size": 0}, "tile size is 0"),
        ({"overlap_ratio": 1.0}, "overlap is 1.0"),
        ({"overlap_ratio": -0.1}, "overlap is -0.1"),
    ],
)
def test_bad_arguments_are_quoted(small, options, said):
    with pytest.raises(ValueError, match=said):
        cut(*small, **options)
    with pytest.raises(ValueError, match="scene is 0 x 100"):
        tile_grid(0, 100, 300, 0.2)


def test_scenes_without_a_box_make_an_empty_file_and_a_broken_file_is_named(tmp_path):
    path = write_data_set(tmp_path / "in", [], [])
    assert ours(cut(tmp_path, path)) == {
        "images": [],
        "annotations": [],
        "categories": CATEGORIES,
    }
    path.write_text("{")
    with pytest.raises(ValueError, match="train.json: not a COCO file"):
        cut(tmp_path, path)


# The reader


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "lzw"},
        {"compression": "lzw", "predictor": True},
        {"compression": "zlib"},
        {"compression": "zstd"},
        {"tile": (64, 64)},
        {"rowsperstrip": 7},
        {"bigtiff": True},
        {"byteorder": ">"},
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "compression": "lzw"},
    ],
    ids=str,
)
def test_every_layout_of_a_tiff_reads_the_same(tmp_path, options):
    pixels, path = scene(90, 70), tmp_path / "a.tif"
    stored = pixels.transpose(2, 0, 1) if "planarconfig" in options else pixels
    tifffile.imwrite(path, stored, photometric="rgb", **options)
    read = read_rgb(path)
    assert read.dtype == np.uint8 and np.array_equal(read, pixels)
    with open_scene(path) as opened:
        assert np.array_equal(opened.read(10, 20, 50, 900), pixels[20:, 10:50])


def test_png_and_jpeg_read_as_pillow_reads_them_without_a_fourth_band(tmp_path):
    rgba = np.dstack([scene(40, 50), np.full((40, 50), 7, np.uint8)])
    tifffile.imwrite(tmp_path / "4.tif", rgba, photometric="rgb", extrasamples=[1])
    Image.fromarray(rgba).save(tmp_path / "4.png")
    for name in ("4.tif", "4.png"):  # left out, not multiplied in
        assert np.array_equal(read_rgb(tmp_path / name), rgba[..., :3])
    for name in ("a.png", "a.jpg"):
        Image.fromarray(scene(40, 50)).save(tmp_path / name)
        pillow = np.asarray(Image.open(tmp_path / name))
        assert np.array_equal(read_rgb(tmp_path / name), pillow)


@pytest.mark.parametrize(
    "name, shape, dtype, said",
    [
        ("odd.tif", (40, 50, 3), np.uint16, "3 band.s. of uint16"),
        ("odd.tif", (40, 50, 3), np.float32, "3 band.s. of float32"),
        ("odd.tif", (40, 50), np.int8, "1 band.s. of int8"),
        ("odd.tif", (40, 50, 2), np.uint8, "2 band.s. of uint8"),
        ("odd.tif", (40, 50, 8), np.uint8, "8 band.s. of uint8.*bands=.3, 2, 1."),
        ("odd.png", (9, 9, 3), np.uint16, "3 band.s. of uint16"),
    ],
)
def test_what_is_not_8_bit_rgb_is_refused_by_name(tmp_path, name, shape, dtype, said):
    path, pixels = tmp_path / name, np.ones(shape, dtype)
    if name.endswith("png"):
        cv2.imwrite(str(path), pixels)
    else:
        options = {"planarconfig": "contig"} if len(shape) == 3 else {}
        kind = "rgb" if shape[2:] == (3,) else "minisblack"
        tifffile.imwrite(path, pixels, photometric=kind, **options)
    with pytest.raises(ValueError, match=f"{name}: {said}"):
        read_rgb(path)


@pytest.mark.parametrize("kind", ["tif", "lzw.tif", "png", "jpg"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.97])
def test_truncated_scene_is_never_read_as_whole(tmp_path, kind, part):
    path, pixels = tmp_path / f"short.{kind}", scene(300, 300)
    if kind.endswith("tif"):
        compression = "lzw" if kind.startswith("lzw") else None
        tifffile.imwrite(path, pixels, photometric="rgb", compression=compression)
    else:
        Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match="short"):
        read_rgb(path)


def test_corrupt_turned_foreign_and_missing_files_are_named(tmp_path):
    path = tmp_path / "corrupt.tif"  # cv2 returns a picture
    tifffile.imwrite(path, scene(300, 300), photometric="rgb", compression="lzw")
    content = bytearray(path.read_bytes())
    content[100_000:102_000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="corrupt.tif"):
        read_rgb(path)
    path, tag = tmp_path / "turned.tif", (274, "H", 1, 6, True)
    tifffile.imwrite(path, scene(30, 40), photometric="rgb", extratags=[tag])
    with pytest.raises(ValueError, match="turned.tif.*orientation"):
        read_rgb(path)
    (tmp_path / "a.tif").write_text("not an image")
    with pytest.raises(ValueError, match="a.tif.*no TIFF, PNG or JPEG"):
        read_rgb(tmp_path / "a.tif")
    with pytest.raises(FileNotFoundError, match="b.tif"):
        read_rgb(tmp_path / "b.tif")


# The command


def run_cli(folder):
    flags = {
        "image_dir": folder / "in",
        "train_dataset_json_path": folder / "in" / "train.json",
        "val_dataset_json_path": folder / "in" / "val.json",
        "slice_size": 50,
        "overlap_ratio": 0.2,
        "ignore_negative_samples": True,
        "min_area_ratio": 0.1,
        "output_train_dir": folder / "out",
        "output_val_dir": folder / "out",
    }
    line = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "e2e_utils.tiling", *line]
    root = Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)


def test_command_takes_the_original_flags_and_names_a_truncated_scene(small):
    folder, coco_json = small
    (folder / "in" / "val.json").write_bytes(coco_json.read_bytes())
    done = run_cli(folder)
    assert done.returncode == 0, done.stderr
    assert "train_50_02.json" in done.stdout and "boxes in tiles" in done.stdout
    direct = cut(*small, out="direct")
    for split in ("train", "val"):
        written = json.loads((folder / "out" / f"{split}_50_02.json").read_text())
        assert written == ours(direct)
        tiles = files_in(folder / "out" / f"{split}_images_50_02")
        assert tiles == files_in(direct.image_dir)
    path = folder / "in" / "1.tif"
    path.write_bytes(path.read_bytes()[:5000])
    done = run_cli(folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "1.tif: cannot be read as a scene: truncated" in done.stderr
    for split in ("train", "val"):  # each is done, without that scene
        written = json.loads((folder / "out" / f"{split}_50_02.json").read_text())
        assert {row["file_name"][0] for row in written["images"]} == {"0"}
