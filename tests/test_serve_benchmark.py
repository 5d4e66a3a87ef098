"""What benchmarks/serve.py says at its end, and with which exit code."""

import importlib.util
import json

import numpy as np
import pytest
from serving import ROOT

from e2e_utils.data import CocoTiles


@pytest.fixture(scope="module")
def serve():
    spec = importlib.util.spec_from_file_location("serve", ROOT / "benchmarks/serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KEY = ("openvino", "bf16")
KEPT = {"AP_fp32": 0.5, "AP_bf16": 0.498, "approved": True, "tiles": 16}
LOST = {**KEPT, "AP_bf16": 0.4, "approved": False}


def test_boxes_that_differ_in_fp32_fail_it_whatever_bf16_costs(serve):
    for outcome in (KEPT, LOST, None):
        with pytest.raises(SystemExit) as end:
            serve.verdict(["torch fp32"], {KEY: outcome})
        assert end.value.code.startswith("the servers differ: torch fp32")


def test_bf16_is_compared_by_ap_and_not_by_boxes(serve):
    said = serve.verdict([], {KEY: KEPT})
    assert "bf16 of openvino: AP 0.4980, fp32 0.5000, approved" in said
    with pytest.raises(SystemExit) as end:
        serve.verdict([], {KEY: LOST})
    assert "costs more than 0.005 of AP: AP 0.4000, fp32 0.5000" in end.value.code
    assert serve.ap_claim("openvino bf16", LOST)["equal"] is False


def test_what_bf16_costs_an_untrained_detector_is_not_compared(serve, capsys):
    assert "not compared, the detector is untrained" in serve.verdict([], {KEY: None})
    row = {"claim": "a", "unit": "ms", "ours": 1.0, "peer": 2.0, "ratio": 2.0}
    serve.show_claims([{**row, "equal": None}])
    assert capsys.readouterr().out.splitlines()[-1].endswith("not compared")


def test_its_tiles_are_labelled_with_what_they_show(serve, tmp_path):
    serve.draw_tiles(tmp_path / "val.json", tmp_path / "val", 2, seed=1)
    tiles = CocoTiles(tmp_path / "val", tmp_path / "val.json")
    assert tiles.class_names == ["background", "square", "bar", "disc"]
    image, _ = tiles[0]
    rows = json.loads((tmp_path / "val.json").read_text())["annotations"]
    inside = np.zeros((serve.SIZE, serve.SIZE), bool)
    for row in rows[:12]:
        x, y, width, height = row["bbox"]
        assert row["area"] == width * height
        inside[y : y + height, x : x + width] = True
    brightness = image.float().mean(dim=0).numpy()
    assert brightness[inside].mean() > brightness[~inside].mean() + 50
