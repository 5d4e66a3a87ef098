import json
import re
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
import tifffile
import torch
from commands import python
from rasterio.transform import Affine
from torch import nn

from e2e_utils.checkpoint import model_from_checkpoint, save_checkpoint
from e2e_utils.grid import tile_grid
from e2e_utils.models import build_model
from e2e_utils.predict import main, predict_image, predict_scene
from e2e_utils.scenes import open_scene
from e2e_utils.sliced import merge_tables, predict_tiles
from e2e_utils.stretch import Stretch

NAMES = ["background", "ship", "truck", "square", "tank", "plane"]


def area(box) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


class BrightSquares(nn.Module):
    """A test double for a detector: finds each separate bright square exactly."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))  # tells the device
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        outputs = []
        for image in images:
            mask = (image[0].numpy() > 0.5).astype(np.uint8)
            _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
            boxes = [[x, y, x + w, y + h] for x, y, w, h, _ in stats[1:]]
            outputs.append(
                {
                    "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                    "labels": torch.full((len(boxes),), 3),
                    # larger is surer, so that a cut part loses to the whole
                    "scores": torch.tensor([area(b) / 1000 for b in boxes]),
                }
            )
        return outputs


def square_scene(corners, size=20, shape=(700, 820)):
    image = np.zeros((*shape, 3), np.uint8)
    for x, y in corners:
        image[y : y + size, x : x + size] = 255
    return image


def test_a_scene_gives_each_object_once_at_its_place():
    # 250..270 lies in the overlap of two tiles, 690 in the last, shifted one
    corners = [(10, 10), (250, 40), (500, 250), (790, 670)]
    model = BrightSquares().eval()
    found = predict_scene(model, square_scene(corners), 300, 0.2, batch_size=5)
    assert model.batches == [5, 5, 2]  # a grid of 3 x 4
    boxes = sorted(map(tuple, found["boxes_xyxy"].astype(int).tolist()))
    assert boxes == sorted((x, y, x + 20, y + 20) for x, y in corners)
    assert found["labels"].tolist() == [3] * 4
    assert found["boxes_xyxy"].dtype == np.float32
    assert found["labels"].dtype == np.int64


def test_a_scene_smaller_than_a_tile_is_told_of():
    model, image = BrightSquares().eval(), square_scene([(10, 10)])[:200, :250]
    with pytest.warns(UserWarning, match="less than 300 px .* enlarges"):
        predict_scene(model, image, 300, 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict_scene(model, image, 250, 0.2)  # one side is as long as a tile


def test_a_part_at_a_border_gives_way_to_the_whole():
    # 270..345 is whole in the second tile, which begins at 240; the first ends at 300
    image = square_scene([(270, 30)], size=75)
    model = BrightSquares().eval()
    kept = predict_scene(model, image, 300, 0.2, border=0)
    assert sorted(kept["boxes_xyxy"][:, 2].tolist()) == [300, 345]
    found = predict_scene(model, image, 300, 0.2)
    assert found["boxes_xyxy"].tolist() == [[270, 30, 345, 105]]
    # the border of the scene is no border of a tile
    image = square_scene([(0, 0), (800, 680)])
    assert len(predict_scene(model, image, 300, 0.2)["scores"]) == 2
    found = predict_scene(model, square_scene([]), 300, 0.2)
    assert found["boxes_xyxy"].shape == (0, 4) and found["scores"].shape == (0,)


@pytest.mark.parametrize(
    "image",
    [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3))],
)
def test_what_is_no_rgb_picture_is_refused_with_its_shape(image):
    with pytest.raises(ValueError, match=rf"{image.dtype} \({image.shape[0]}"):
        predict_image(BrightSquares(), image)


def noise(height, width, seed=0):
    """Something to see at every scale, and no tile dark enough to be special."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def talkative_detector():
    """Untrained, but with class scores so far apart that it finds many boxes."""
    torch.manual_seed(0)
    model = build_model("fasterrcnn_small", len(NAMES), box_detections_per_img=40)
    model.roi_heads.box_predictor.cls_score.weight.data.mul_(30)
    return model.eval()


def test_the_boxes_are_those_of_sahi():
    from sahi import AutoDetectionModel
    from sahi.predict import get_sliced_prediction

    model, image = talkative_detector(), noise(700, 820)
    peer = get_sliced_prediction(
        image,
        AutoDetectionModel.from_pretrained(
            "torchvision",
            model=model,
            category_mapping={str(i): name for i, name in enumerate(NAMES)},
            confidence_threshold=0.05,
            device="cpu",
        ),
        slice_height=300,
        slice_width=300,
        perform_standard_pred=False,
        postprocess_type="NMS",
        postprocess_match_metric="IOU",
        verbose=0,
    ).object_prediction_list
    found = predict_scene(model, image, 300, 0.2, border=0, class_names=NAMES)
    assert len(peer) == len(found["scores"]) > 100
    theirs = np.array([[*p.bbox.to_xyxy(), p.category.id, p.score.value] for p in peer])
    ours = np.column_stack([found[k] for k in ("boxes_xyxy", "labels", "scores")])
    for row in ours:  # in any order: equal scores have none
        assert np.abs(theirs - row).max(axis=1).min() < 1e-2
    assert sorted(found["names"]) == sorted(p.category.name for p in peer)


def test_the_model_is_left_as_it_was():
    model, image = talkative_detector(), noise(300, 300)
    before = {key: value.stride() for key, value in model.state_dict().items()}
    predict_scene(model, image, 300, 0.2)
    assert not model.backbone._forward_pre_hooks
    assert {k: v.stride() for k, v in model.state_dict().items()} == before
    with pytest.raises(ValueError, match="label"):
        predict_scene(model, image, 300, 0.2, class_names=["background"])
    assert not model.backbone._forward_pre_hooks


@pytest.mark.parametrize("kind", ["contig", "lzw", "separate", "png"])
def test_a_file_gives_the_boxes_of_its_pixels(tmp_path, kind):
    image = square_scene([(10, 10), (250, 40), (500, 250), (790, 670)])
    path = tmp_path / f"scene.{'png' if kind == 'png' else 'tif'}"
    if kind == "png":
        cv2.imwrite(str(path), image)
    else:
        bands = np.moveaxis(image, -1, 0) if kind == "separate" else image
        config = {"planarconfig": kind} if kind != "lzw" else {"compression": "lzw"}
        tifffile.imwrite(path, bands, photometric="rgb", **config)
    wanted = predict_scene(BrightSquares(), image, 200, 0.2)
    found = predict_scene(BrightSquares(), str(path), 200, 0.2)
    assert len(wanted["scores"]) == 4
    for key in wanted:
        np.testing.assert_array_equal(found[key], wanted[key])


def test_a_scene_of_16_bits_is_predicted_by_its_record_and_refused_without(tmp_path):
    image = square_scene([(10, 10), (250, 40), (500, 250), (790, 670)])
    deep = image[..., ::-1].astype(np.uint16) * 10 + 300
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb", compression="zlib")
    with pytest.raises(ValueError, match="a.tif: 3 band.* of uint16.*no stretch says"):
        predict_scene(BrightSquares(), tmp_path / "a.tif", size=200, overlap=0.2)
    stretch = Stretch((3, 2, 1), (300.0,) * 3, (2850.0,) * 3)
    found = predict_scene(
        BrightSquares(), tmp_path / "a.tif", size=200, overlap=0.2, stretch=stretch
    )
    wanted = predict_scene(BrightSquares(), image, size=200, overlap=0.2)
    np.testing.assert_array_equal(found["boxes_xyxy"], wanted["boxes_xyxy"])


def test_a_batch_of_no_tile_is_refused():
    with pytest.raises(ValueError, match="batch_size is -1; give 1 or more"):
        predict_scene(BrightSquares(), noise(64, 64), 64, 0.2, batch_size=-1)


def test_a_file_that_is_no_scene_is_named(tmp_path):
    (tmp_path / "notes.tif").write_text("no picture")
    with pytest.raises(ValueError, match="notes.tif"):
        predict_scene(BrightSquares(), tmp_path / "notes.tif", 300, 0.2)


PEAK = """
import sys
from pathlib import Path
import rasterio, tifffile, torch  # the readers come with the first TIFF: no pixels
from e2e_utils.predict import predict_scene

class Blind(torch.nn.Module):  # a test double: finds nothing, so the pixels are all
    def __init__(self):
        super().__init__()
        self.device = torch.nn.Parameter(torch.zeros(1))
    def forward(self, images):
        nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
        return [{**nothing, "labels": torch.zeros(0, dtype=torch.int64)}] * len(images)

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3

before = peak()
found = predict_scene(Blind(), sys.argv[1], 600, 0.2)
print(len(found["scores"]), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells it")
@pytest.mark.parametrize(("compress", "most"), [(None, 130), ("lzw", 180)])
def test_a_large_tiff_needs_the_memory_of_some_rows_of_tiles(tmp_path, compress, most):
    shape = (12_000, 12_000, 3)  # 432 MB, sparse: takes no room on the disk
    path = tmp_path / "large.tif"
    if compress:
        size = {"height": shape[0], "width": shape[1], "count": 3, "dtype": "uint8"}
        options = {"driver": "GTiff", "tiled": True, "sparse_ok": True, **size}
        with rasterio.open(path, "w", compress=compress, **options) as file:
            file.write(
                np.ones((3, 256, 12_000), np.uint8), window=((0, 256), (0, 12_000))
            )
    else:
        tifffile.memmap(path, shape=shape, dtype=np.uint8, photometric="rgb")
    # glibc moves its threshold by what was freed before, and leaves none or six holes
    # of 17 MB by chance; with a fixed one the peak is what is held
    fixed = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    boxes, megabytes = python("-c", PEAK, path, env=fixed).split()
    assert boxes == "0" and float(megabytes) < most


def test_autocast_reaches_the_model():
    class Asks(BrightSquares):
        def forward(self, images):
            self.dtype = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
            return super().forward(images)

    for dtype in (None, torch.bfloat16):
        model = Asks()
        found = predict_scene(
            model, square_scene([(10, 10)]), 300, 0.2, amp_dtype=dtype
        )
        assert model.dtype == (dtype or torch.float32)
        assert found["scores"].dtype == np.float32


def test_names_come_with_the_boxes_above_the_threshold():
    tile = square_scene([(9, 9)], shape=(300, 300))
    assert predict_image(BrightSquares(), tile, 0.3, NAMES)["names"] == ["square"]
    assert predict_image(BrightSquares(), tile, 0.5, NAMES)["names"] == []
    with pytest.raises(ValueError, match="label 3 has no name.* 2 entries"):
        predict_image(BrightSquares(), tile, 0, NAMES[:2])


# ---- the command line


def checkpoint(path, **content):
    model, names = talkative_detector(), {"class_names": NAMES}
    settings = {"box_detections_per_img": 40}
    kind = {"architecture": "fasterrcnn_small", "settings": settings, "tile_size": 200}
    content = {"model": model.state_dict(), **kind, "overlap": 0.2, **names, **content}
    save_checkpoint(path, content)
    return path


def georeferenced(path, pixels, west=9.0, **kind):
    path.parent.mkdir(exist_ok=True)
    height, width, _ = pixels.shape
    options = {"height": height, "width": width, "count": 3, "dtype": "uint8"}
    options |= {"crs": "EPSG:4326", "transform": Affine(2e-6, 0, west, 0, -2e-6, 50)}
    with rasterio.open(path, "w", **options, **kind) as file:
        file.write(np.moveaxis(pixels, -1, 0))


def test_a_scene_in_blocks_of_whole_batches_has_the_same_boxes_bit_by_bit(tmp_path):
    model = talkative_detector()
    georeferenced(tmp_path / "a.tif", noise(700, 420), tiled=True, compress="deflate")
    with open_scene(tmp_path / "a.tif") as scene:
        grid, tables, bottoms = tile_grid(700, 420, 200, 0.2), [], []

        def window(x1, y1, x2, y2):
            bottoms.append(y2)
            return scene.window(x1, y1, x2, y2)

        noted = replace(scene, window=window)
        for start in range(0, len(grid), 6):
            block = grid[start : start + 6]
            part = predict_tiles(model, noted, grid, start, start + 6, batch_size=3)
            tables.append(part)
            assert max(bottoms) == block[:, 3].max()  # and reads no further
    assert len(tables) > 2 and min(map(len, tables)) > 10
    found = merge_tables(tables)
    alone = predict_scene(model, tmp_path / "a.tif", 200, 0.2, batch_size=3)
    for key in ("boxes_xyxy", "labels", "scores"):
        np.testing.assert_array_equal(found[key], alone[key])


@pytest.fixture
def two(tmp_path):
    """A checkpoint, and two scenes of one name in two folders, with other files."""
    for west, folder in enumerate("ab"):
        georeferenced(tmp_path / folder / "5.TIF", noise(210, 220, west), west)
        (tmp_path / folder / "._5.tif").write_bytes(b"of macOS")
        (tmp_path / folder / "labels.csv").write_text("")
    return checkpoint(tmp_path / "best.pt")


@pytest.mark.parametrize("given", [["a", "b"], ["*/*.TIF", "a/5.TIF"]])
def test_one_line_writes_the_boxes_of_many_scenes_and_says_what_it_found(
    tmp_path, two, given, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = ["--checkpoint", "best.pt", "--output", "out/boxes.geojson"]
    main([*given, *arguments, "--score_threshold", "0.1"])
    features = json.loads(Path("out/boxes.geojson").read_text())["features"]
    by_scene = {name: [] for name in ("a/5.TIF", "b/5.TIF")}
    for feature in features:
        by_scene[feature["properties"]["scene"]].append(feature)
    model = model_from_checkpoint(two)[0]
    for west, (name, some) in enumerate(by_scene.items()):
        options = {"score_threshold": 0.1, "class_names": NAMES}
        local = predict_scene(model, noise(210, 220, west), 200, 0.2, **options)
        assert [f["properties"]["class_name"] for f in some] == local["names"] != []
        x = [f["geometry"]["coordinates"][0][0][0] for f in some]
        assert west <= min(x) and max(x) <= west + 220 * 2e-6, name
    told = capsys.readouterr().out
    for name, count in Counter(f["properties"]["class_name"] for f in features).items():
        assert re.search(rf"^ *{count} {name}$", told, re.M)
    assert f"{len(features)} boxes in 2 scene(s)\nwrote out/boxes.geojson" in told


@pytest.mark.parametrize(
    "scene, output, reason",
    [
        ("nowhere/*.tif", "b.gpkg", r"nowhere/\*.tif: no file there"),
        ("empty", "b.gpkg", r"empty: no file there \(.tif, .tiff"),
        ("a", "b.kml", "b.kml: no ending '.kml'; valid: .geojson"),
        ("a plain.png", "b.gpkg", "plain.png has none, a/5.TIF has one"),
        ("a --score_threshold=7", "b.gpkg", "score_threshold must be in 0..1, got 7"),
        ("a --checkpoint=old.pt", "b.gpkg", "old.pt has no tile_size"),
        ("a --checkpoint=no.pt", "/proc/b.gpkg", "/proc"),  # before the long work
    ],
)
def test_what_cannot_be_done_is_one_line_and_no_file(
    tmp_path, two, scene, output, reason, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    cv2.imwrite("plain.png", noise(210, 220))
    checkpoint("old.pt", tile_size=None)
    given = ["--checkpoint=best.pt", *scene.split(), f"--output={output}"]
    with pytest.raises(SystemExit, match=reason) as error:
        main(given)
    assert len(str(error.value).splitlines()) == 1 and not Path(output).exists()


@pytest.mark.parametrize("damaged", [0, 20_000])  # its header, or behind it
def test_a_scene_that_cannot_be_read_does_not_cost_the_boxes_of_the_others(
    tmp_path, two, damaged, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    georeferenced(tmp_path / "b" / "5.TIF", noise(210, 220), compress="deflate")
    with open(tmp_path / "b" / "5.TIF", "r+b") as file:
        file.seek(damaged)
        file.write(bytes(20_000))
    with pytest.raises(SystemExit, match="1 scene.*\n.*b/5.TIF: cannot be read"):
        main(["a", "b", "--checkpoint=best.pt", "--output=b.json"])
    scenes = {row["file_name"] for row in json.loads(Path("b.json").read_text())}
    assert scenes == {"a/5.TIF"}
