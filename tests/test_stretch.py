"""Scenes of more than 8 bits: one stretch goes from their tiles to prediction."""

import io
import json

import cv2
import numpy as np
import pytest
import rasterio
from own_data import write_16_bit_scenes, write_scenes, write_tiff
from PIL import Image

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.config import TrainConfig
from e2e_utils.predict import predict_files, predict_scene
from e2e_utils.prepare import measure_stretch, prepare_tiles
from e2e_utils.stretch import Stretch
from e2e_utils.tile_set import read_tile_set
from e2e_utils.tiling import slice_coco
from e2e_utils.train import fit
from kserve_utils.artefact import read_tiles, write_artefact
from kserve_utils.engines import load_engine
from kserve_utils.export import strip_checkpoint

GRID = {"slice_size": 64, "overlap_ratio": 0.25}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A folder with 16-bit scenes and their tiles."""
    folder = tmp_path_factory.mktemp("deep")
    labels = write_16_bit_scenes(folder, side=96)
    options = {**GRID, "bands": (3, 2, 1), "percentile": 1}
    prepare_tiles(folder / "scenes", labels, folder / "tiles", **options)
    return folder


def read(path):
    """(H, W, 3) of red, green and blue, as stored."""
    with rasterio.open(path) as file:
        return file.read((3, 2, 1)).transpose(1, 2, 0)


def test_tiles_have_one_stretch_which_the_training_scenes_measure(deep):
    tiles = read_tile_set(deep / "tiles")
    names = {}
    for split in ("train", "val"):
        folder, labels = tiles.scenes(split)
        listed = json.loads(labels.read_text())["images"]
        names[split] = [folder / image["file_name"] for image in listed]
    pixels = np.concatenate([read(p).reshape(-1, 3) for p in names["train"]])
    low, high = np.percentile(pixels[pixels[:, 0] > 0], (1, 99), axis=0)
    assert np.allclose([tiles.stretch.low, tiles.stretch.high], [low, high])
    assert (tiles.stretch.bands, tiles.stretch.dtype) == ((3, 2, 1), "uint16")
    drawn = np.rint((read(names["val"][0]) - low) / (high - low) * 255).clip(0, 255)
    tile = next(tiles.split("val")[0].glob("*_0_0_64_64.jpg"))
    jpeg = io.BytesIO()
    Image.fromarray(drawn.astype(np.uint8)[:64, :64]).save(jpeg, "JPEG")
    assert tile.read_bytes() == jpeg.getvalue()


def test_a_folder_of_tiles_has_no_second_stretch(deep):
    given = deep / "scenes", deep / "labels.json", deep / "tiles"
    with pytest.raises(ValueError, match="train has the stretch None and val of .*rem"):
        slice_coco(*given, split="train", **GRID)
    assert len(read_tile_set(deep / "tiles").splits) == 2


def same(one, other):
    return all(np.array_equal(one[k], other[k]) for k in ("boxes_xyxy", "scores"))


def test_the_checkpoint_takes_the_record_along_to_prediction_and_artefact(
    deep, tmp_path
):
    settings = {"box_score_thresh": 0.01}
    given = {"steps": 1, "eval_steps": 1, "device": "cpu", "settings": settings}
    fit(TrainConfig(str(deep / "tiles"), str(tmp_path / "run"), **given), False)
    best = str(tmp_path / "run" / "last.pt")
    model, meta = model_from_checkpoint(best)
    tiles = read_tile_set(deep / "tiles")
    assert meta["stretch"] == tiles.stretch.to_dict()

    path = next((deep / "scenes").iterdir())
    png = cv2.cvtColor(tiles.stretch.apply(read(path), 0), cv2.COLOR_RGB2BGR)
    cv2.imwrite(str(tmp_path / "8 bit.png"), png)
    black = {**tiles.stretch.to_dict(), "low": [6e4] * 3, "high": [6e4] * 3}
    (tmp_path / "black.json").write_text(json.dumps(black))

    def predict(scene, **options):
        out = str(tmp_path / "boxes.json")
        done = predict_files([scene], best, out, score_threshold=0, **options)
        return next(iter(done.found.values()))

    wanted = predict(tmp_path / "8 bit.png")
    assert len(wanted["scores"]) and same(predict(path), wanted)
    assert not same(predict(path, stretch=str(tmp_path / "black.json")), wanted)

    stripped = strip_checkpoint(best, tmp_path / "stripped.pth")
    pictures = read_tiles(deep / "tiles")[:1]
    write_artefact(stripped, tmp_path / "artefact", ["torch"], tiles=pictures)
    served, meta = load_engine(tmp_path / "artefact", device="cpu")
    grid = meta["tile_size"], meta["overlap"]
    options = {"score_threshold": 0, "stretch": meta["stretch"]}
    assert same(predict_scene(served, path, *grid, **options), wanted)
    with pytest.raises(ValueError, match=r"4 band\(s\) of uint16.* no stretch says"):
        predict_scene(model, path, *grid)


def test_what_one_stretch_cannot_be_for_is_named(tmp_path):
    deep = np.arange(4 * 96, dtype=np.uint16).reshape(8, 12, 4)
    kinds = {"deep": deep, "eight": deep.astype(np.uint8), "two": deep[..., :2]}
    kinds["real"] = deep.astype(np.float32)
    paths = {k: write_tiff(tmp_path / f"{k}.tif", v) for k, v in kinds.items()}
    for names, percentile, said in (
        (["eight"], 2, "eight.tif.* 8 bits, which need no percentile"),
        (["deep", "real"], 2, "real.tif.* of float32, but .*deep.tif has .* of uint16"),
        (["two"], 2, r"2 band\(s\) of uint16: choose three"),
        (["deep"], 50, "percentile is 50"),
        ([], 2, "no scene"),
    ):
        with pytest.raises(ValueError, match=said):
            measure_stretch([paths[name] for name in names], percentile)
    record = measure_stretch([paths["deep"]], 0)
    assert record == Stretch((1, 2, 3), (0, 1, 2), (380, 381, 382), "uint16")
    for options, said in (
        ({"stretch": record, "bands": (3, 2, 1)}, "beside a stretch"),
        ({"stretch": record, "percentile": 2}, "percentile 2 beside a stretch"),
    ):
        with pytest.raises(ValueError, match=said):
            labels = write_scenes(tmp_path / str(len(said)) / "png", side=96)
            prepare_tiles(labels.parent / "png", labels, tmp_path / "out", **options)
