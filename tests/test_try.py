"""The page of `make try` in a browser, in front of a real predictor.

    TRY_ARTEFACT=runs/demo/serving/artefact python -m pytest tests/test_try.py

takes a trained detector and renews notebooks/try.jpg, the picture of the page.
"""

import json
import os
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import rasterio
import uvicorn
from browser import browser, page  # noqa: F401
from rasterio.transform import from_origin
from serving import decode, jpeg

from kserve_utils import try_page
from kserve_utils.client import RemoteError, predict_remote
from kserve_utils.servers import predictor
from sample_data.dataset import draw_dataset

PICTURE = Path(__file__).parents[1] / "notebooks" / "try.jpg"
TRAINED = os.environ.get("TRY_ARTEFACT")
pytestmark = pytest.mark.slow


class Served:
    """The page in front of a server, in a thread."""

    def __init__(self, server: str, examples: list) -> None:
        ask = {"model_name": "xview-fasterrcnn", "protocol": "v2"}
        app = try_page.page(try_page.pictures(examples), server=server, **ask)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.uvicorn.started:
            assert self.thread.is_alive()
            time.sleep(0.05)
        (listener,) = self.uvicorn.servers[0].sockets
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def __exit__(self, *error) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A drawn scene where a trained detector looks at it, else blobs."""
    folder = tmp_path_factory.mktemp("try")
    if TRAINED:
        (scene,) = (draw_dataset(folder, 1, 7) / "train_images").glob("[!.]*.tif")
        return scene.rename(folder / "another_town.tif")
    (folder / "scene.jpg").write_bytes(jpeg(500, 700))
    return folder / "scene.jpg"


@pytest.fixture(scope="module")
def server(request):
    if not TRAINED:
        yield request.getfixturevalue("predicted")
        return
    with predictor(TRAINED, engine="openvino") as address:
        yield str(address)


@pytest.fixture(scope="module")
def address(server, example):
    with Served(server, [example]) as address:
        yield address


def shown(page) -> tuple[int, int]:  # noqa: F811
    """How many boxes the page draws, and of how many."""
    page.get_by_text("answered in").wait_for(timeout=120_000)
    words = page.locator("#status").inner_text().split(" px: ")[1].split()
    return int(words[0]), int(words[2])


def slide(page, score: float) -> None:  # noqa: F811
    page.locator("#score").evaluate("(slider, to) => { slider.value = to }", score)
    page.locator("#score").dispatch_event("input")


def test_boxes_of_a_scene_on_the_map_are_filtered_without_asking_and_downloaded(
    address,
    page,  # noqa: F811
    tmp_path,
):
    options = {"height": 320, "width": 400, "count": 3, "dtype": "uint8"}
    options |= {"crs": "EPSG:32631", "transform": from_origin(500_000, 5e6, 0.3, 0.3)}
    with rasterio.open(tmp_path / "town.tif", "w", driver="GTiff", **options) as file:
        file.write(np.moveaxis(decode(jpeg(320, 400)), 2, 0))
    page.goto(address)
    page.locator("#scene").uncheck()  # of a scene untrained boxes are left out: 0.05
    page.locator("#file").set_input_files(tmp_path / "town.tif")
    shown(page)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    counts = []
    for score in (1, 0.03, 0):
        slide(page, score)
        counts.append(shown(page)[0])
    assert counts[0] < counts[2] == shown(page)[1]
    assert sorted(counts) == counts
    page.locator("#classes input").first.uncheck()
    fewer, all_boxes = shown(page)
    assert 0 < fewer < all_boxes
    with page.expect_download() as download:
        page.get_by_text("Download as GeoJSON").click()
    assert download.value.suggested_filename == "town.geojson"
    content = json.loads(Path(download.value.path()).read_text())
    assert len(content["features"]) == fewer
    places = [f["geometry"]["coordinates"] for f in content["features"]]
    lon, lat = np.concatenate([np.array(rings[0]) for rings in places]).T
    assert (
        2.999 < lon.min() < lon.max() < 3.002 and 45.15 < lat.min() < lat.max() < 45.16
    )
    assert [url for url in asked if url.startswith("http")] == page.complaints == []


def huge() -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        sum_ = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + sum_

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = (
        chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(
    ("name", "content"),
    [("huge.png", huge()), ("notes.jpg", b"three cars, one boat")],
    ids=["huge", "text"],
)
def test_a_refusal_is_shown_in_the_words_of_the_server(
    server,
    address,
    page,  # noqa: F811
    name,
    content,
):
    with pytest.raises(RemoteError, match="answered 4") as refused:
        predict_remote(server, content, protocol="v2", scene=True)
    page.goto(address)
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    page.locator("#file").set_input_files([file])
    page.locator("#refusal").wait_for()
    assert page.locator("#refusal").inner_text() == str(refused.value)
    assert page.locator("#canvas").is_hidden()


def test_a_server_that_is_down_is_named(page, example):  # noqa: F811
    with Served("http://127.0.0.1:9", [example]) as address:
        page.goto(address)
        page.get_by_text(example.name).click()
        page.locator("#refusal").wait_for(timeout=60_000)
        text = page.locator("#refusal").inner_text()
        assert text.startswith("no answer from http://127.0.0.1:9/v2")


def test_an_example_is_drawn_and_the_page_fits_a_phone(
    address,
    page,  # noqa: F811
    example,
    tmp_path,
):
    page.goto(address)
    page.get_by_text(example.name).click()
    shown(page)
    slide(page, 0.5 if TRAINED else 0)
    target = PICTURE if TRAINED else tmp_path / "try.jpg"
    page.screenshot(path=target, type="jpeg", quality=60)
    coloured = """canvas => new Set(canvas.getContext('2d').getImageData(
      0, 0, canvas.width, canvas.height).data).size"""
    assert page.locator("#canvas").evaluate(coloured) > 50
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.complaints == []


def test_examples_that_are_not_there_are_named(capsys):
    with pytest.raises(SystemExit):
        try_page.main(["--server", "http://localhost:1", "--examples", "gone.tif"])
    assert (
        capsys.readouterr().err == "error: example gone.tif: no such file or folder\n"
    )
