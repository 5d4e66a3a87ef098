"""The client's requests, scenes, retries and errors, against a stand-in for a server.

Real servers are asked in the tests of TorchServe and of the predictor.
"""

import base64
import http.server
import json
import socket
import threading

import numpy as np
import pytest
from commands import python
from kserve import InferRequest
from serving import NAMES, ROOT, jpeg

from kserve_utils.client import RemoteError, predict_remote, scene_geojson

FOUND = {
    "boxes_xyxy": [1.5, 2, 3, 4, 5, 6, 7, 8],
    "labels": [18, 3],
    "scores": [0.75, 0.5],
    "names": ["any name", "another"],
}
TYPES = {"boxes_xyxy": "FP32", "labels": "INT64", "scores": "FP32", "names": "BYTES"}


def v2(**columns) -> str:
    outputs = [
        {"name": name, "datatype": TYPES[name], "shape": [len(data)], "data": data}
        for name, data in {**FOUND, **columns}.items()
        if data is not None
    ]
    return json.dumps({"model_name": "xview-fasterrcnn", "outputs": outputs})


@pytest.fixture
def double():
    """A stand-in for a model server: keeps what comes, answers what a test says."""
    seen, answers = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, dict(self.headers), body))
            status, headers, content = answers[min(len(seen), len(answers)) - 1]
            if status is None:
                return  # hang up without an answer
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


def v1(*rows) -> str:
    return json.dumps({"predictions": [list(rows)]})


ROW = {NAMES[18]: [1.5, 2, 3, 4], "score": 0.75}
ANSWERS = {"v1": v1(ROW), "v2": v2()}


def check_arrays(found: dict) -> None:
    assert found["boxes_xyxy"].dtype == found["scores"].dtype == np.float32
    assert found["labels"].dtype == np.int64


@pytest.mark.parametrize("form", ["bytes", "path"])
def test_a_v1_request_is_base64_in_json(double, tmp_path, form):
    url, seen, answers = double
    answers.append((200, {}, v1(ROW)))
    (tmp_path / "tile.jpg").write_bytes(jpeg())
    image = jpeg() if form == "bytes" else tmp_path / "tile.jpg"
    host = "torchserve-default.example.com"
    found = predict_remote(url, image, host=host)
    path, headers, body = seen[0]
    assert path == "/v1/models/xview-fasterrcnn:predict" and headers["Host"] == host
    assert headers["Content-Type"] == "application/json"
    (instance,) = json.loads(body)["instances"]
    assert base64.b64decode(instance["data"]) == jpeg()
    check_arrays(found)
    assert found["names"] == [NAMES[18]] and found["labels"].tolist() == [18]
    assert found["boxes_xyxy"].tolist() == [[1.5, 2, 3, 4]]
    with pytest.raises(ValueError, match="names classes that class_names lacks: "):
        predict_remote(url, image, class_names=["background", "car"])


@pytest.mark.parametrize("form", ["bytes", "path"])
def test_kserves_own_parser_reads_a_v2_request(double, tmp_path, form):
    """The SDK is the oracle of the binary form."""
    url, seen, answers = double
    answers.append((200, {}, v2()))
    (tmp_path / "tile.jpg").write_bytes(jpeg())
    image = jpeg() if form == "bytes" else str(tmp_path / "tile.jpg")
    host = "xview-predictor-default.example.com"
    found = predict_remote(url, image, "m", host=host, protocol="v2", scene=True)
    path, headers, body = seen[0]
    assert path == "/v2/models/m/infer" and headers["Host"] == host
    assert headers["Content-Type"] == "application/octet-stream"
    cut = int(headers["Inference-Header-Content-Length"])
    request = InferRequest.from_bytes(body, cut, "m")
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype) == ("image", "UINT8")
    assert tensor.as_numpy().tobytes() == jpeg()
    assert request.parameters["scene"] is True
    check_arrays(found)
    assert found["boxes_xyxy"].tolist() == [[1.5, 2, 3, 4], [5, 6, 7, 8]]
    assert found["labels"].tolist() == [18, 3] and found["scores"].tolist() == [
        0.75,
        0.5,
    ]
    assert found["names"] == ["any name", "another"]  # no class table is needed


def test_a_scene_and_a_threshold_are_parameters_of_the_request(double):
    url, seen, answers = double
    answers.append((200, {}, v2()))
    found = predict_remote(url, jpeg(), protocol="v2", scene=True, score_threshold=0.6)
    cut = int(seen[0][1]["Inference-Header-Content-Length"])
    assert json.loads(seen[0][2][:cut])["parameters"] == {
        "scene": True,
        "score_threshold": 0.6,
    }
    assert found["names"] == ["any name"]  # dropped here if a server does not
    assert found["boxes_xyxy"].shape == (1, 4)
    answers[0] = (200, {}, '{"predictions": [[]], "scene": true}')
    found = predict_remote(url, jpeg(), scene=True)
    assert found["boxes_xyxy"].shape == (0, 4)
    assert json.loads(seen[1][2])["parameters"] == {"scene": True}
    answers[0] = (200, {}, v1(ROW, {NAMES[3]: [0, 0, 1, 1], "score": 0.25}))
    found = predict_remote(url, jpeg(), score_threshold=0.3)
    assert found["scores"].tolist() == [0.75] and found["labels"].tolist() == [18]
    assert set(json.loads(seen[2][2])) == {"instances"}  # as TorchServe knows it
    with pytest.raises(RemoteError, match="took the scene for one picture, as Torch"):
        predict_remote(url, jpeg(), scene=True)


def test_a_map_of_a_scene_is_asked_by_v2_and_anything_else_is_an_error(double):
    url, seen, answers = double
    on_map = {"type": "FeatureCollection", "features": []}
    output = {"name": "geojson", "data": [json.dumps(on_map)]}
    answers.append((200, {}, json.dumps({"outputs": [output]})))
    host = "a.example.com"
    assert scene_geojson(url, jpeg(), "m", host=host, score_threshold=0.5) == on_map
    path, headers, body = seen[0]
    assert path == "/v2/models/m/infer" and headers["Host"] == host
    head = json.loads(body[: int(headers["Inference-Header-Content-Length"])])
    asked = {"scene": True, "geojson": True, "score_threshold": 0.5}
    assert head["parameters"] == asked
    answers[:] = [(200, {}, v2())]
    with pytest.raises(RemoteError, match="infer gave no GeoJSON: "):
        scene_geojson(url, jpeg())


@pytest.mark.parametrize("busy", [503, 429])
@pytest.mark.parametrize("protocol", ANSWERS)
def test_a_busy_server_gets_the_whole_body_again(
    double, protocol, busy, tmp_path, monkeypatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    url, seen, answers = double
    (tmp_path / "tile.jpg").write_bytes(jpeg())
    answers += [(busy, {"Retry-After": "0"}, "busy"), (200, {}, ANSWERS[protocol])]
    predict_remote(url, tmp_path / "tile.jpg", protocol=protocol)
    assert len(seen) == 2 and len(seen[0][2]) > len(jpeg())
    assert seen[0][2] == seen[1][2]
    answers[:] = [(busy, {"Retry-After": "0"}, "no worker")]
    with pytest.raises(RemoteError, match=f"{busy}: no worker") as error:
        predict_remote(url, jpeg(), protocol=protocol)
    assert len(seen) == 6 and error.value.status == busy


def test_waiting_is_what_the_server_says_and_some_more_or_doubles(double, monkeypatch):
    url, seen, answers = double
    waits = []
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    monkeypatch.setattr("time.sleep", waits.append)
    for hours in ("7", "3600"):
        answers.append((429, {"Retry-After": hours}, ""))
    answers += [(503, {}, ""), (200, {}, v2())]
    predict_remote(url, jpeg(), protocol="v2")
    assert waits == [10.5, 45, 2] and len(seen) == 4


FAILURES = [
    ((400, {}, '{"error": "input image: cut short"}'), "400: input image: cut short"),
    ((500, {}, '{"message": "inside"}'), "answered 500: inside"),
    ((404, {}, ""), "404: Not Found .wrong model name, or the gateway .* host None"),
    ((413, {}, '{"error": "65 MiB"}'), "413: 65 MiB .the picture is larger"),
    ((None, {}, ""), "no answer from .* of this size.*without response"),
    ((200, {}, "<html>"), "not with boxes: '<html>'"),
    ((200, {}, "[]"), "not with boxes"),
]
OF_V1 = [
    ((200, {}, '{"predictions": []}'), "not with boxes"),
    ((200, {}, v1({"a": [1], "score": 1})), "not with boxes"),
    ((200, {}, v1({"a": [1, 2, 3, None], "score": 1})), "not with boxes"),
    ((200, {}, v1({"a": [1, 2, 3, 4], "score": None})), "not with boxes"),
]
OF_V2 = [
    ((200, {}, '{"outputs": []}'), "not with boxes"),
    ((200, {}, v2(scores=None)), "not with boxes"),
    ((200, {}, v2(scores=[0.5])), "not with boxes"),
    ((200, {}, v2(boxes_xyxy=[1, 2, 3])), "not with boxes"),
    ((200, {}, v2(labels=["car", "bus"])), "not with boxes"),
]


@pytest.mark.parametrize(
    ("protocol", "answer", "message"),
    [("v1", *row) for row in FAILURES + OF_V1]
    + [("v2", *row) for row in FAILURES + OF_V2],
    ids=lambda value: "",
)
def test_every_failure_says_what_the_server_said(double, protocol, answer, message):
    url, seen, answers = double
    answers.append(answer)
    with pytest.raises(RemoteError, match=message) as error:
        predict_remote(url, jpeg(), protocol=protocol)
    assert error.value.status == answer[0] and len(seen) == 1


@pytest.mark.parametrize("protocol", ANSWERS)
def test_what_cannot_be_asked_is_an_error_before_asking(tmp_path, protocol):
    url = "http://127.0.0.1:9"
    with pytest.raises(ValueError, match="no protocol 'grpc'; valid: v1, v2"):
        predict_remote(url, jpeg(), protocol="grpc")
    with pytest.raises(ValueError, match="in 0..1, got 40"):
        predict_remote(url, jpeg(), score_threshold=40, protocol=protocol)
    with pytest.raises(FileNotFoundError, match="absent"):
        predict_remote(url, tmp_path / "absent.jpg", protocol=protocol)
    with pytest.raises(RemoteError, match=f"no answer from {url}/{protocol}/.*refused"):
        predict_remote(url, jpeg(), protocol=protocol)


def test_a_server_that_says_nothing_is_an_error_after_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RemoteError, match="no answer .*timed out.*0.2"):
            predict_remote(url, jpeg(), timeout=0.2)


# In a process of its own: a machine that asks needs no torch.
ASK = """
import sys
sys.modules["torch"] = None
from kserve_utils.client import RemoteError, predict_remote
try:
    predict_remote("http://127.0.0.1:9", b"")
except RemoteError as error:
    print(error)
"""


def test_the_client_needs_no_torch():
    said = python("-c", ASK, cwd=ROOT)
    assert said.startswith("no answer from http://127.0.0.1:9")
