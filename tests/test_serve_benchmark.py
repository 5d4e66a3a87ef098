"""What benchmarks/serve.py says at its end, and with which exit code."""

import itertools
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from servers import MODEL
from serving import ROOT, jpeg

from e2e_utils.data import CocoTiles

sys.path.append(str(ROOT / "benchmarks"))  # at the end: tests have the same names

import serve  # noqa: E402
from served import claims, load, subject  # noqa: E402

KEY = ("openvino", "bf16")
KEPT = {"AP_fp32": 0.5, "AP_bf16": 0.498, "approved": True, "tiles": 16}
LOST = {**KEPT, "AP_bf16": 0.4, "approved": False}


def test_boxes_that_differ_in_fp32_fail_it_whatever_bf16_costs():
    for outcome in (KEPT, LOST, None):
        with pytest.raises(SystemExit) as end:
            claims.verdict(["torch fp32"], {KEY: outcome})
        assert end.value.code.startswith("the servers differ: torch fp32")


def test_bf16_is_compared_by_ap_and_not_by_boxes():
    said = claims.verdict([], {KEY: KEPT})
    assert "bf16 of openvino: AP 0.4980, fp32 0.5000, approved" in said
    with pytest.raises(SystemExit) as end:
        claims.verdict([], {KEY: LOST})
    assert "costs more than 0.005 of AP: AP 0.4000, fp32 0.5000" in end.value.code
    assert claims.ap_claim("openvino bf16", LOST)["equal"] is False


def test_what_bf16_costs_an_untrained_detector_is_not_compared(capsys):
    assert "not compared, the detector is untrained" in claims.verdict([], {KEY: None})
    row = {"claim": "a", "unit": "ms", "ours": 1.0, "peer": 2.0, "ratio": 2.0}
    claims.show_claims([{**row, "equal": None}])
    assert capsys.readouterr().out.splitlines()[-1].endswith("not compared")


def test_its_tiles_are_labelled_with_what_they_show(tmp_path):
    subject.draw_tiles(tmp_path / "val.json", tmp_path / "val", 2, seed=1)
    tiles = CocoTiles(tmp_path / "val", tmp_path / "val.json")
    assert tiles.class_names == ["background", "square", "bar", "disc"]
    image, _ = tiles[0]
    rows = json.loads((tmp_path / "val.json").read_text())["annotations"]
    inside = np.zeros((subject.SIZE, subject.SIZE), bool)
    for row in rows[:12]:
        x, y, width, height = row["bbox"]
        assert row["area"] == width * height
        inside[y : y + height, x : x + width] = True
    brightness = image.float().mean(dim=0).numpy()
    assert brightness[inside].mean() > brightness[~inside].mean() + 50


class Turns(BaseHTTPRequestHandler):
    """Answers in turns: boxes, 429, and a connection closed without an answer."""

    turns = itertools.cycle((200, 429, None))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if status := next(self.turns):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, *_):
        pass


def test_a_load_counts_errors_by_kind_and_waits_of_answers_alone():
    with HTTPServer(("127.0.0.1", 0), Turns) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        found = load.load(url, MODEL, [b"a", b"b"], clients=1, each=9)
        server.shutdown()
    assert found["errors"] == {"429": 3, "ConnectionError": 3}
    assert found["answered"] == 3 and 0 < found["p50"] <= found["p99"]
    assert found["rate"] == pytest.approx(3 / found["seconds"])
    said = load.show(found, 1)
    assert said.startswith("9 requests of 1 client(s)")
    assert said.endswith("errors             429 3, ConnectionError 3")


@pytest.mark.slow
def test_load_is_put_to_a_predictor_by_its_url(
    predicted, tmp_path, monkeypatch, capsys
):
    def put_load(url, *flags):
        monkeypatch.setattr(sys, "argv", ["serve.py", "--url", url, *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            serve.main()
        return end.value.code

    picture = tmp_path / "tile.jpg"
    picture.write_bytes(jpeg())
    flags = ["--picture", picture, "--clients", 2, "--requests", 3]
    flags += ["--host", "xview-predictor-default.example.com"]
    assert put_load(predicted, *flags, "--json", tmp_path / "load.json") == 0
    said = capsys.readouterr().out
    assert said.startswith("6 requests of 2 client(s)")
    assert re.search(r"^pictures a second +[\d.]+$", said, re.MULTILINE)
    assert said.endswith("errors             none\n")
    rows = json.loads((tmp_path / "load.json").read_text())
    assert [row["unit"] for row in rows] == ["images/s", "ms", "ms", ""]
    assert rows[-1]["ours"] == 0 and rows[0]["ours"] > 0
    # each an error of one line, before any load
    nope = put_load(predicted, "--model-name", "nope")
    assert re.search("^error: .*/nope:predict answered 404, no boxes: .*'nope'", nope)
    none = put_load(predicted, "--picture", tmp_path / "none.jpg")
    assert none == f"error: {tmp_path}/none.jpg: No such file or directory"
    assert put_load("localhost:8080").startswith("error: no answer from localhost:8080")
    assert "\n" not in nope + none
