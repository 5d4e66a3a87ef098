"""The predictor as a real server: the boxes of local prediction by every protocol."""

import ast
import asyncio
import contextlib
import gzip
import importlib.metadata
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import grpc
import numpy as np
import psutil
import pytest
import rasterio
import requests
import tifffile
import torch
import yaml
from fastapi import FastAPI
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from PIL import Image
from rasterio.transform import Affine
from servers import (
    MODEL,
    ask_v1,
    ask_v2,
    boxes_grpc,
    boxes_v1,
    boxes_v2,
    double_model,
    gone,
    grpc_request,
    in_process,
    instance,
    listening,
    png,
    stub,
)
from serving import NAMES, ROOT, decode, jpeg

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.georeference import read_georeference, to_geojson
from e2e_utils.predict import predict_image, predict_scene
from kserve_utils import engines
from kserve_utils.client import RemoteError, predict_grpc, predict_remote
from kserve_utils.engines import read_artefact
from kserve_utils.predictor import rest
from kserve_utils.predictor.__main__ import main, parse
from kserve_utils.predictor.admission import Admission, Limits
from kserve_utils.predictor.model import QueuedDetector
from kserve_utils.predictor.pictures import check_scene, check_sides
from kserve_utils.predictor.pictures import decode as decode_picture
from kserve_utils.predictor.protocol import Job, parse_grpc, parse_v1, parse_v2
from kserve_utils.predictor.refusal import Refusal
from kserve_utils.predictor.rest import add_routes
from kserve_utils.predictor.server import Server
from kserve_utils.servers import predictor

TILE = jpeg(300, 300, seed=3)
FOLDER = ROOT / "kserve_utils" / "predictor"
LONG = b"x" * 100_000
FINE = {"scene": True, "score_threshold": 0.017}  # untrained scores are low


@pytest.fixture(scope="module")
def eager(stripped):
    """The detector as torch runs it."""
    return model_from_checkpoint(stripped)[0]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A scene of 700 x 500 px as an uncompressed TIFF."""
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    tifffile.imwrite(path, decode(jpeg(500, 700, seed=5)), photometric="rgb")
    return path


def same(found: dict, local: dict) -> None:
    """At most 0.05 px and 1e-4 apart; near ties may have changed places."""
    assert len(found["scores"]) == len(local["scores"]) > 10
    free = np.ones(len(found["scores"]), bool)
    for box, label, score in zip(
        local["boxes_xyxy"], local["labels"], local["scores"], strict=True
    ):
        off = np.abs(found["boxes_xyxy"] - box).max(axis=1)
        off[~free | (found["labels"] != label)] = np.inf
        nearest = int(off.argmin())
        free[nearest] = False
        assert off[nearest] <= 0.05
        assert abs(found["scores"][nearest] - score) <= 1e-4


def by_grpc(address: str, request) -> dict:
    with stub(address.grpc) as client:
        return boxes_grpc(client.ModelInfer(request, timeout=120))


def by_every_protocol(address: str) -> list[dict]:
    v1, v2 = ask_v1(address, instance(TILE)), ask_v2(address, TILE)
    one = by_grpc(address, grpc_request(TILE))
    return [boxes_v1(v1.json()), boxes_v2(v2.json()), one]


@pytest.mark.slow
def test_the_boxes_are_those_of_torch_and_torchserve_by_every_protocol(
    predicted, torchserved, eager
):
    local = predict_image(eager, decode(TILE))
    theirs = ask_v1(torchserved, instance(TILE)).json()
    for found in [boxes_v1(theirs), *by_every_protocol(predicted)]:
        same(found, local)
    ours = ask_v1(predicted, instance(TILE)).json()  # word for word
    assert [list(row) for row in ours["predictions"][0]] == [
        list(row) for row in theirs["predictions"][0]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_so_are_those_of_the_other_engines(artefact, eager, engine):
    local = predict_image(eager, decode(TILE))
    with predictor(artefact, engine=engine, device="cpu") as address:
        for found in by_every_protocol(address):
            same(found, local)
        log = Path(psutil.Process(address.pid).environ()["TMPDIR"], "server.log")
        assert f"{engine} computes in fp32 on cpu" in log.read_text()
    assert gone({address.pid}) and not log.parent.exists()


@pytest.mark.slow
def test_the_version_of_the_weights_is_in_every_answer_of_v2(predicted, artefact):
    version = read_artefact(artefact)["files"]["model.pth"][:12]
    assert len(version) == 12
    assert ask_v2(predicted, TILE).json()["model_version"] == version
    about = requests.get(f"{predicted}/v2/models/{MODEL}", timeout=60).json()
    assert about["versions"] == [version]
    with stub(predicted.grpc) as client:
        answer = client.ModelInfer(grpc_request(TILE), timeout=60)
        asked = client.ModelMetadata(pb.ModelMetadataRequest(name=MODEL), timeout=60)
    assert answer.model_version == version and asked.name == MODEL


@pytest.mark.slow
def test_every_form_of_a_v2_picture_gives_the_same_boxes(predicted):
    binary = boxes_v2(ask_v2(predicted, TILE).json())
    pixels = decode(TILE)
    text = instance(TILE)["instances"][0]["data"]
    for datatype, shape, data in (
        ("BYTES", [1], [text]),
        ("UINT8", [len(TILE)], list(TILE)),
        ("UINT8", list(pixels.shape), pixels.tolist()),
    ):
        tensor = {"name": "image", "datatype": datatype, "shape": shape, "data": data}
        answer = ask_v2(predicted, {"inputs": [tensor], "id": "42"}).json()
        assert answer["id"] == "42" and answer["model_name"] == MODEL
        same(boxes_v2(answer), binary)
    forms = [pb.ModelInferRequest(model_name=MODEL) for _ in range(3)]
    one = forms[0].inputs.add(name="image", datatype="BYTES", shape=[1])
    one.contents.bytes_contents.append(TILE)
    one = forms[1].inputs.add(name="image", datatype="UINT8", shape=[len(TILE)])
    one.contents.uint_contents.extend(TILE)
    forms[2].inputs.add(name="image", datatype="UINT8", shape=pixels.shape)
    forms[2].raw_input_contents.append(pixels.tobytes())
    for request in forms:
        same(by_grpc(predicted, request), binary)
    forms[2].outputs.add(name="scores")
    assert list(by_grpc(predicted, forms[2])) == ["scores"]


@pytest.mark.slow
def test_kserves_client_and_ours_by_grpc_get_the_same_boxes(predicted):
    async def ask() -> dict:
        client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=120))
        tensor = InferInput("image", [len(TILE)], "UINT8")
        tensor.set_data_from_numpy(np.frombuffer(TILE, np.uint8))
        request = InferRequest(MODEL, [tensor], parameters={"binary_data_output": True})
        answer = await client.infer(predicted, request, model_name=MODEL)
        await client.close()
        return {row.name: row.as_numpy() for row in answer.outputs}

    found, expected = asyncio.run(ask()), boxes_v2(ask_v2(predicted, TILE).json())
    same(found, expected)
    ours = predict_grpc(predicted.grpc, TILE)
    same(ours, expected)
    assert ours["names"] == [NAMES[label] for label in ours["labels"]]
    with pytest.raises(RemoteError, match="NOT_FOUND: no model 'other'"):
        predict_grpc(predicted.grpc, TILE, "other")
    names = [n.decode() if isinstance(n, bytes) else n for n in found["names"]]
    assert names == [NAMES[label] for label in found["labels"]]


@pytest.mark.slow
def test_a_scene_gives_the_boxes_of_predict_scene_in_every_form(
    predicted, eager, scene
):
    local = predict_scene(
        eager, scene, 300, 0.2, score_threshold=0.017, class_names=NAMES
    )
    pixels, content = decode(jpeg(500, 700, seed=5)), scene.read_bytes()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    for form in (content, file.getvalue()):
        same(boxes_v2(ask_v2(predicted, form, parameters=FINE).json()), local)
    answer = ask_v1(predicted, {**instance(content), "parameters": FINE}).json()
    assert answer["scene"] is True
    same(boxes_v1(answer), local)
    for protocol in ("v1", "v2"):
        same(predict_remote(predicted, scene, protocol=protocol, **FINE), local)
    request = grpc_request(content, scene=True, score_threshold="0.017")
    same(by_grpc(predicted, request), local)
    # more than tiles: a scene without the parameter is one large picture
    whole = boxes_v2(ask_v2(predicted, content).json())
    assert len(whole["scores"]) < len(local["scores"])


def test_a_scene_is_merged_by_the_threshold_of_the_server():
    boxes = torch.tensor([[10.0, 10, 110, 110], [10, 48, 110, 148]])  # IoU 0.45
    two = {"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64)}
    two["scores"] = torch.tensor([0.9, 0.8])
    body = {**instance(TILE), "parameters": {"scene": True}}
    for threshold, count in ((0.5, 2), (0.4, 1)):
        model = double_model(nms_threshold=threshold)
        model.detector.register_forward_hook(lambda *of: [two for _ in of[1][0]])
        how = {"nms_threshold": threshold, "class_names": ["background", "car"]}
        local = predict_scene(model.detector, decode(TILE), 300, 0.2, **how)
        answer = in_process(model, lambda client: client.post(URL, json=body)).json()
        found = [row["car"] for row in answer["predictions"][0]]
        assert found == local["boxes_xyxy"].tolist() and len(found) == count


@pytest.mark.parametrize("value", ["0", "1.1", "nan"])
def test_a_threshold_that_is_none_is_one_line_and_no_server(value, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # main sets both
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    loaded = torch.nn.Identity(), {"model_name": MODEL}
    monkeypatch.setattr(engines, "load_engine", lambda *a, **k: loaded)
    monkeypatch.setattr(sys, "argv", ["predictor", "--nms_threshold", value])
    with pytest.raises(SystemExit, match=f"predictor: nms_threshold is {value}"):
        main()


@pytest.mark.slow
@pytest.mark.parametrize("placed", [False, True])
def test_geojson_is_in_degrees_if_the_file_tells_its_place_else_says_pixels(
    predicted, scene, tmp_path, placed
):
    if placed:
        pixels, crs = np.moveaxis(tifffile.imread(scene), -1, 0), "EPSG:32616"
        kind = {"count": 3, "height": 500, "width": 700, "dtype": "uint8", "crs": crs}
        transform = Affine(0.3, 0, 500_000, 0, -0.3, 4_000_000)
        scene = tmp_path / "placed.tif"
        with rasterio.open(scene, "w", transform=transform, **kind) as file:
            file.write(pixels)
    content, parameters = scene.read_bytes(), {**FINE, "geojson": True}
    answer = boxes_v2(ask_v2(predicted, content, parameters=parameters).json())
    of_scene = json.loads(answer.pop("geojson")[0])
    place = read_georeference(scene)
    assert of_scene == to_geojson({**answer, "georeference": place})
    assert len(of_scene["features"]) > 10 and (place is not None) == placed
    body = {**instance(content), "parameters": {"geojson": True}}  # as one picture
    (first,) = ask_v1(predicted, body).json()["predictions"]
    for collection in (of_scene, first):
        assert collection.get("unit") == (None if placed else "pixel")
        ring = np.array(collection["features"][0]["geometry"]["coordinates"][0])
        assert (abs(ring - (-87, 36.14)).max() < 0.01) == placed


@pytest.mark.slow
def test_a_threshold_of_the_request_wins(predicted):
    scores = boxes_v2(ask_v2(predicted, TILE).json())["scores"]
    cut = float(np.median(scores))
    fewer = ask_v2(predicted, TILE, parameters={"score_threshold": cut}).json()
    assert len(boxes_v2(fewer)["scores"]) == (scores >= cut).sum()
    body = {**instance(TILE), "parameters": {"score_threshold": 1}}
    assert ask_v1(predicted, body).json() == {"predictions": [[]]}
    none = ask_v2(predicted, TILE, parameters={"score_threshold": 1.0}).json()
    assert boxes_v2(none)["boxes_xyxy"].shape == (0, 4)


@pytest.mark.slow
def test_metrics_and_a_line_of_the_log_count_what_was_refused(predicted):
    def value(name: str) -> float:
        text = requests.get(f"{predicted}/metrics", timeout=60).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    names = (
        'predictor_requests_total{code="200",protocol="v1"}',
        'predictor_requests_total{code="400",protocol="v2"}',
        'predictor_pictures_total{kind="tile"}',
        'predictor_latency_seconds_count{kind="tile",protocol="v1"}',
    )
    log = Path(psutil.Process(predicted.pid).environ()["TMPDIR"], "server.log")
    text, before = log.read_text(), [value(name) for name in names]
    body = {"instances": instance(TILE)["instances"] * 3}
    assert len(ask_v1(predicted, body).json()["predictions"]) == 3
    assert ask_v2(predicted, bytes(10_000)).status_code == 400
    assert requests.get(f"{predicted}/v1/models/nope", timeout=60).status_code == 404
    assert [value(n) - b for n, b in zip(names, before, strict=True)] == [1, 1, 3, 1]
    assert value("predictor_queue_length") == 0
    ours, kserves = log.read_text().removeprefix(text).splitlines()
    assert ours.endswith(
        "v2 400 input image: 10000 bytes that are not a picture (JPEG, PNG or TIFF)"
    )
    assert re.search(r"ModelNotFound: .* nope .*\(/.*\.py:\d+\)$", kserves)


@pytest.mark.slow
def test_the_model_stays_whoever_asks_to_unload_it(predicted):
    for verb in ("unload", "load"):
        url = f"{predicted}/v2/repository/models/{MODEL}/{verb}"
        answer = requests.post(url, timeout=60)
        assert answer.status_code == 403 and "keeps the model" in answer.text
    request = pb.RepositoryModelUnloadRequest(model_name=MODEL)
    with stub(predicted.grpc) as client:
        with pytest.raises(grpc.RpcError) as error:
            client.RepositoryModelUnload(request, timeout=60)
        assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert client.ModelReady(pb.ModelReadyRequest(name=MODEL), timeout=60).ready
    assert ask_v2(predicted, TILE).status_code == 200


@pytest.mark.slow
def test_it_listens_on_loopback_alone_and_is_one_process(predicted):
    assert psutil.Process(predicted.pid).children() == []
    mine = [address for pid, address in listening() if pid == predicted.pid]
    assert {address.ip for address in mine} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert len(mine) == 2


@pytest.mark.slow
def test_a_message_that_is_none_is_refused(predicted):
    with grpc.insecure_channel(predicted.grpc) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for message, code in (
            (b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
            (b"", grpc.StatusCode.NOT_FOUND),
            (bytes(9 << 20), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with pytest.raises(grpc.RpcError) as error:
                ask(message, timeout=60)
            assert error.value.code() == code
    request = grpc_request(TILE)
    request.raw_input_contents.append(b"")
    with pytest.raises(grpc.RpcError, match="does not match the expected number"):
        by_grpc(predicted, request)
    assert requests.get(f"{predicted}/v2/health/ready", timeout=60).ok


def test_a_device_that_cannot_be_had_is_one_line_and_no_server(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # main sets both
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for engine, device, reason in (
        ("torch", "cuda", "device 'cuda', but torch"),
        ("openvino", "cuda", "openvino runs on the CPU alone"),
    ):
        flags = ["--engine", engine, "--device", device, "--model_dir", "absent"]
        monkeypatch.setattr(sys, "argv", ["predictor", *flags])
        with pytest.raises(SystemExit, match=f"^predictor: .*{reason}.*$"):
            main()


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line_and_no_server(predicted, artefact):
    port = predicted.rsplit(":", 1)[1]
    flags = [f"--model_dir={artefact}", f"--http_port={port}", "--grpc_port=0"]
    command = [sys.executable, "-m", "kserve_utils.predictor", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert f"predictor: cannot listen on 127.0.0.1:{port}\n" in ended.stderr


def test_an_artefact_that_is_not_there_is_an_error_before_anything_starts(tmp_path):
    with pytest.raises(FileNotFoundError, match="no artefact at .*absent"):
        with predictor(tmp_path / "absent"):
            pass


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"[]", 'no "instances"'),
        (b'{"instances": []}', 'no "instances"'),
        (b'{"instances": [{"data": 3}]}', "instance 0: data must be text"),
        (b'{"instances": [{"data": "QQ=="}, {"data": "QQ=="}, 1, 2]}', "at most 3"),
        (b'{"instances": [1], "parameters": []}', "must be an object"),
        (b'{"instances": [1], "parameters": {"sceen": true}}', "no parameter sceen"),
        (b'{"instances": [1], "parameters": {"scene": 1}}', "scene is 1"),
        (b'{"instances": [1], "parameters": {"scene": "%s"}}' % LONG, "scene is 'xx"),
        (b'{"instances": [1], "parameters": {"score_threshold": 2}}', "in 0..1"),
        (b'{"instances": [1], "parameters": {"score_threshold": false}}', "in 0..1"),
        (b'{"instances": [1], "parameters": {"score_threshold": "x"}}', "in 0..1"),
        (b'{"instances": [1, 2], "parameters": {"scene": true}}', "comes alone"),
        (b"[" + b"{}," * 1_000_000 + b"{}]", "1000002 objects, lists and texts"),
    ],
)
def test_a_v1_body_that_is_wrong_says_what_is(body, reason):
    with pytest.raises(Refusal, match=re.escape(reason)) as refusal:
        parse_v1(Job("v1"), body, max_pictures=3)
    assert refusal.value.status == 400 and len(str(refusal.value)) <= 1000


def tensor(**fields) -> dict:
    one = {"name": "image", "datatype": "UINT8", "shape": [3], "data": [1, 2, 3]}
    return {"inputs": [{**one, **fields}]}


TEXT = {"datatype": "BYTES", "shape": [1]}
SIZE_5 = {"parameters": {"binary_data_size": 5}}


@pytest.mark.parametrize(
    ("fields", "rest", "reason"),
    [
        ([], None, 'no "inputs"'),
        ({"inputs": []}, None, "one tensor"),
        (tensor(name="picture"), None, 'the name "image"'),
        (tensor(shape=[4]), None, "is 4 bytes, 3 are there"),
        (tensor(shape=["3"]), None, "has the shape"),
        (tensor(data=[1, 2, 300]), None, "0..255"),
        (tensor(data=[1, [2], 3]), None, "not a list of numbers"),
        (tensor(data=[1.5, 2, 3]), None, "0..255"),
        (tensor(data=None), None, 'no "data"'),
        (tensor(datatype="FP32"), None, "input image is FP32 [3]"),
        (tensor(shape=[1, 1, 4], data=[1, 2, 3, 4]), None, "[height, width, 3]"),
        (tensor(**TEXT, data=["%"]), None, "not base64"),
        (tensor(**TEXT, data=[3]), None, "a list of one text"),
        (tensor(data=None), b"abc", "binary_data_size is None, 3 bytes follow"),
        (tensor(parameters=[1]), b"abc", "binary_data_size is None, 3 bytes follow"),
        (tensor(**TEXT, **SIZE_5), b"\x09\0\0\0a", "its length, 9; 1 follow"),
        ({**tensor(), "outputs": [{"name": "masks"}]}, None, "no output 'masks'"),
        ({**tensor(), "outputs": 3}, None, '"outputs" must be'),
        (
            {**tensor(), "outputs": [{"name": "scores", "parameters": "x"}]},
            None,
            '"outputs" must be',
        ),
    ],
)
def test_a_v2_request_that_is_wrong_says_what_is(fields, rest, reason):
    with pytest.raises(Refusal, match=re.escape(reason)) as refusal:
        parse_v2(Job("v2"), fields, rest)
    assert refusal.value.status == 400


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 0), (2, 0), (1, 11)])
def test_a_grpc_request_of_many_tensors_is_refused_by_their_number(inputs, outputs):
    request = pb.ModelInferRequest(
        inputs=[{"name": "image"}] * inputs, outputs=[{"name": "scores"}] * outputs
    )
    with pytest.raises(Refusal, match=f"{inputs} inputs for {outputs} outputs"):
        parse_grpc(Job("grpc"), request)


URL, V2_URL = f"/v1/models/{MODEL}:predict", f"/v2/models/{MODEL}/infer"


@pytest.mark.parametrize("scene", [False, True])
def test_a_pass_under_way_leaves_health_free_and_a_lost_caller_no_slot(scene):
    began, end = threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        assert end.wait(60)

    model, app, sent = double_model(hold), FastAPI(), []
    add_routes(app, model)
    body = json.dumps({**instance(TILE), "parameters": {"scene": scene}}).encode()
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict:
        if messages:
            return messages.pop()
        assert await asyncio.to_thread(began.wait, 60)
        assert await model.healthy() and model.admission.in_flight == 1
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    request = {"type": "http", "method": "POST", "path": URL, "query_string": b""}
    asyncio.run(app({**request, "headers": []}, receive, send))
    assert sent[0]["status"] == 499 and not end.is_set()
    assert model.admission.in_flight == model.admission.scenes == 0
    end.set()
    model.close()


async def slowly(*pieces: bytes, pause: float = 0):
    for piece in pieces:
        await asyncio.sleep(pause)
        yield piece


def post(content, headers: dict | None = None, url: str = URL, **limits):
    """The answer of a route; a body in pieces declares no length."""
    options = {"content": content, "headers": headers}
    return in_process(double_model(**limits), lambda one: one.post(url, **options))


def test_a_body_is_counted_and_timed_while_it_comes(monkeypatch):
    answer = post(slowly(b"12345", b"67890"), request=10)
    assert answer.status_code == 400 and "the request has no" in answer.text
    for content, headers in (
        (slowly(b"12345", b"678901"), {}),
        (slowly(b"12345", b"678901"), {"content-length": "3"}),
        (b"1", {"content-length": "11"}),
    ):
        answer = post(content, headers, request=10)
        assert answer.status_code == 413 and "larger than 10 bytes" in answer.text
    answer = post(slowly(b"12345", pause=60), stall=0.2)
    assert answer.status_code == 408 and "no byte of the body for 0.2 s" in answer.text
    clock = itertools.count(step=10)  # a stand-in: 10 s from one look to the next
    monkeypatch.setattr(rest, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    answer = post(slowly(*[b"1"] * 10), request=10)
    assert answer.status_code == 408 and "more than 40 s" in answer.text


@pytest.mark.parametrize(
    ("scene", "size", "status"),  # 400: the body was taken, and is no picture
    [(False, 100, 400), (False, 700, 413), (True, 700, 400), (True, 1001, 413)],
)
@pytest.mark.parametrize("declared", [False, True])
def test_the_binary_form_may_be_as_large_as_what_it_asks_for(
    scene, size, status, declared
):
    one = {"name": "image", "datatype": "UINT8", "shape": [size]}
    one["parameters"] = {"binary_data_size": size}
    head = json.dumps({"inputs": [one], "parameters": {"scene": scene}}).encode()
    body = head + bytes(size)
    headers = {"Inference-Header-Content-Length": str(len(head))}
    pieces = body if declared else slowly(body[:50], body[50:300], body[300:])
    answer = post(pieces, headers, V2_URL, request=500, scene=1000)
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize("value", [b"x", b"\xb2", b"-1", b"9999999"])
def test_a_length_of_the_json_that_is_no_length_is_refused(value):
    headers = {"Inference-Header-Content-Length": value}
    assert post(b"{}", headers, V2_URL).status_code == 400


def test_a_version_is_answered_by_name_however_large_the_picture():
    answer = post(bytes(1 << 17), url=V2_URL.replace("/infer", "/versions/7/infer"))
    assert answer.status_code == 501 and f"version '7': ask {V2_URL}" in answer.text


@pytest.mark.parametrize("url", [URL, V2_URL])
def test_a_compressed_body_is_refused_by_its_name(url):
    answer = post(gzip.compress(b"{}"), {"content-encoding": "gzip"}, url)
    assert answer.status_code == 415 and "the body is in 'gzip'" in answer.text
    assert post(b"{}", {"content-encoding": "identity"}, url).status_code == 400


def test_what_no_route_of_pictures_takes_is_kept_small():
    assert post(bytes(1 << 16), url="/elsewhere").status_code == 404
    assert post(bytes((1 << 16) + 1), url="/elsewhere").status_code == 413


def test_the_queue_is_bounded_and_says_when_to_ask_again():
    admission = Admission(Limits(queue=2, scenes=1))
    with admission.admit("v1"), admission.admit("v2") as job:
        with pytest.raises(Refusal, match="2 requests wait already") as refusal:
            with admission.admit("grpc"):
                pass
        path = job.files.enter_context(admission.scene_file())
        assert path.is_file()
        with pytest.raises(Refusal, match="1 scenes wait already"):
            with admission.scene_file():
                pass
    assert refusal.value.status == 429
    assert 1 <= int(refusal.value.headers["retry-after"]) <= 30
    assert refusal.value.status_code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not path.exists() and admission.in_flight == admission.scenes == 0
    admission.close()


def test_the_wait_of_a_refused_caller_is_that_for_tiles_and_not_for_scenes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(
        "kserve_utils.predictor.admission.time.perf_counter", lambda: clock[0]
    )
    admission = Admission(Limits(queue=10))

    def answered(seconds: float, scene: bool) -> None:
        with admission.admit("v2") as job:
            job.scene = scene
            clock[0] += seconds

    def told() -> int:
        with contextlib.ExitStack() as slots:
            for _ in range(10):
                slots.enter_context(admission._queue_slot())
            with pytest.raises(Refusal) as refusal, admission.admit("v1"):
                pass
        return int(refusal.value.headers["retry-after"])

    assert told() == 1  # nothing is known yet
    answered(90, scene=True)
    assert told() == 1
    answered(0.35, scene=False)
    assert told() == 4  # ten of 0.35 s
    with admission._queue_slot():
        for _ in range(60):  # in the second place: half of it is for the one before
            answered(0.3, scene=False)
    assert told() == 2
    admission.close()


def test_an_error_of_the_server_says_nothing_of_itself():
    model = double_model(lambda: {}["secret"])
    answer = in_process(model, lambda client: client.post(URL, json=instance(TILE)))
    assert answer.status_code == 500 and model.admission.in_flight == 0
    assert answer.json() == {"error": "internal error, see the server's log"}


def test_scenes_of_a_server_that_was_killed_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = f"predictor-scenes-{psutil.Process().ppid()}-x"  # of one that runs
    for name in (f"predictor-scenes-{os.getpid()}-a", "predictor-scenes-999999999-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scene").write_text("left")
    (tmp_path / kept).mkdir()
    admission = Admission(Limits())
    names = {path.name for path in tmp_path.iterdir()}
    assert kept in names and len(names) == 2 and not list(tmp_path.glob("*/scene"))
    admission.close()
    assert {path.name for path in tmp_path.iterdir()} == {kept}


def test_a_job_that_nobody_waits_for_takes_no_turn():
    cancelled = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        detector = QueuedDetector(torch.nn.Identity(), executor, cancelled)
        assert detector([1]) == [1]
        cancelled.set()
        with pytest.raises(Refusal) as refusal:
            detector([1])
    assert refusal.value.status == 499


def test_rest_and_grpc_share_one_grace_period_after_the_drain_delay(monkeypatch):
    """The end of REST waits for gRPC's here: one after the other would never end."""
    waits, stopped = [], asyncio.Event()
    web = SimpleNamespace(config=SimpleNamespace(), should_exit=False)

    async def sleep(seconds: float) -> None:
        waits.append((seconds, web.should_exit))

    async def stop(grace: float) -> None:
        waits.append((grace, web.should_exit))
        stopped.set()

    async def start_grpc() -> SimpleNamespace:
        return SimpleNamespace(stop=stop)

    async def serve_rest() -> None:
        web.handle_exit(signal.SIGTERM, None)
        await stopped.wait()

    model = double_model()
    server = Server(model, parse(["--drain_delay=3", "--grace_period=30"]))
    server._rest_server = SimpleNamespace(_server=web)
    server._start_grpc, server.servers = start_grpc, [serve_rest()]
    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(asyncio.wait_for(server._serve(), 60))
    assert waits == [(3, False), (30, True)] and server.grace_period == 30
    assert model.draining and web.config.host == "127.0.0.1"
    model.close()


def test_the_command_line_has_kserves_names_and_listens_on_loopback():
    given = parse(["--http_port", "1", "--grpc_port", "2", "--model_name", "m"])
    assert (given.http_port, given.grpc_port, given.model_name) == (1, 2, "m")
    defaults = parse([])
    assert (defaults.http_port, defaults.grpc_port) == (8080, 8081)
    assert defaults.model_dir == "/mnt/models" and defaults.precision == "fp32"
    assert defaults.threads >= 1 and defaults.host == "127.0.0.1"


def test_the_image_and_the_manifests_listen_on_every_address_of_the_pod():
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", container(), re.MULTILINE)
    *program, host = json.loads(entry)
    assert program == ["python", "-m", "kserve_utils.predictor"]
    assert parse([host]).host == "0.0.0.0"
    folder = ROOT / "k8s_files"
    runtime, cpu, gpu = (
        yaml.safe_load((folder / f"xview-{name}.yaml").read_text())
        for name in ("runtime", "predictor", "predictor-gpu")
    )
    (one,) = runtime["spec"]["containers"]
    for service in (cpu, gpu):  # KServe appends their arguments to the runtime's
        added = service["spec"]["predictor"]["model"].get("args", [])
        assert parse(one["args"] + added).host == "0.0.0.0"


def container() -> str:
    return (FOLDER / "Containerfile").read_text()


def test_the_container_runs_as_nobody_and_holds_what_it_copies():
    text = container()
    user = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert user and all(re.fullmatch(r"[1-9]\d*:[1-9]\d*", one) for one in user)
    assert (FOLDER / "__main__.py").is_file()
    for source in re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE):
        assert (ROOT / source).exists()
    assert text.count("FROM python:3.11-slim") == 2  # build tools stay behind


def test_the_container_installs_what_the_server_imports_in_the_pinned_version():
    """Its grep gives the lines of requirements.txt; nothing imported is missing."""
    pins = re.sub(r" *#.*", "", (ROOT / "requirements.txt").read_text())
    (engines,) = re.findall(r'^ARG ENGINES="(.*)"$', container(), re.MULTILINE)
    chosen = set()
    for pattern in re.findall(r'grep -E "(.*)" pins.txt', container()):
        pattern = pattern.replace("${ENGINES:-none}", engines)
        lines = [line for line in pins.splitlines() if re.search(pattern, line)]
        assert len(lines) >= len(pattern.split("|"))  # each name is pinned
        chosen |= {re.split("[=[]", line)[0] for line in lines}
    served = [FOLDER.parent / "__init__.py", FOLDER.parent / "engines.py"]
    served += FOLDER.glob("*.py")
    served += [ROOT / "e2e_utils" / f"{name}.py" for name in CORE]
    imported = set().union(*(imports(path) for path in served))
    sources = importlib.metadata.packages_distributions()
    here = {"e2e_utils", "kserve_utils", "onnx"}  # onnx: of the export alone
    wanted = {sources[name][0] for name in imported & set(sources) - here}
    kserve = importlib.metadata.requires("kserve")
    chosen |= {re.split(r"[^\w-]", line)[0] for line in kserve if "extra" not in line}
    chosen |= {"starlette"}  # of fastapi
    names = [{name.lower().replace("_", "-") for name in s} for s in (wanted, chosen)]
    assert len(wanted) > 8 and names[0] <= names[1]
    assert {"rasterio", "tifffile"} <= chosen  # imported for the first TIFF


CORE = ("autocast", "backbones", "boxes", "checkpoint", "config")
CORE += ("efficientnet_lite", "files", "georeference", "grid", "hardware")
CORE += ("images", "models", "predict", "scenes", "stretch")


def imports(path) -> set[str]:
    """Top-level names of what a file imports when it is imported itself."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_a_scene_is_refused_by_its_header_unless_it_is_read_by_windows(tmp_path):
    pixels, path = np.zeros((96, 120, 3), np.uint8), tmp_path / "scene"
    most, total = 16 * 120, 96 * 120  # a row of tiles; all of it
    for options in ({}, {"compression": "zlib", "tile": (16, 16)}):
        tifffile.imwrite(path, pixels, photometric="rgb", **options)
        check_scene(path, most, total)  # by windows
    with pytest.raises(Refusal, match="at most 11519 are taken: send parts of it"):
        check_scene(path, most, total - 1)
    tifffile.imwrite(path, pixels, photometric="rgb", compression="zlib")
    with pytest.raises(Refusal, match="120 x 96 pixels, at most 1920 are decoded"):
        check_scene(path, most, total)
    path.write_bytes(png("RGB", 96, 120))
    with pytest.raises(Refusal, match="decoded whole: send it as a tiled TIFF"):
        check_scene(path, most, total)
    tifffile.imwrite(path, np.zeros((1, 100_001, 3), np.uint8), photometric="rgb")
    for check in (
        lambda: check_scene(path, most, total),
        lambda: check_sides(1, 100_001),
    ):
        with pytest.raises(Refusal, match="a side is at most 100000"):
            check()


def hostile(tmp_path) -> dict[str, bytes]:
    """What must be refused whatever it calls itself: name -> content."""
    secret = tmp_path / "secret.tif"
    tifffile.imwrite(secret, decode(TILE), photometric="rgb")
    files = {}
    for kind, place in (("path", secret), ("URL", "/vsicurl/http://127.0.0.1:9/a.tif")):
        bands = "".join(
            f'<VRTRasterBand dataType="Byte" band="{n}"><SimpleSource><SourceFilename>'
            f"{place}</SourceFilename><SourceBand>{n}</SourceBand></SimpleSource>"
            "</VRTRasterBand>"
            for n in (1, 2, 3)
        )
        vrt = f'<VRTDataset rasterXSize="300" rasterYSize="300">{bands}</VRTDataset>'
        files[f"a VRT with a {kind}"] = vrt.encode()
        files[f"the same behind a TIFF's mark, {kind}"] = b"II*\0" + vrt.encode()
    return files


@pytest.mark.parametrize("scene", [False, True])
def test_what_the_server_must_not_open_or_cannot_use_is_400(tmp_path, scene):
    deep, turned = np.zeros((300, 300, 3), np.uint16), io.BytesIO()
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(decode(TILE)).save(turned, "JPEG", exif=exif)
    thin = jpeg(2, 3000)
    expected = {content: "" for content in hostile(tmp_path).values()}
    expected[cv2.imencode(".png", deep)[1].tobytes()] = "16"
    expected[turned.getvalue()] = "orientation tag, 3, rotates it"
    if not scene:  # which is cut into tiles
        expected[thin] = "3000 x 2 pixels: a side is at most 100 times the other"

    async def ask(client) -> list:
        bodies = [
            {**instance(content), "parameters": {"scene": scene}}
            for content in expected
        ]
        return [await client.post(URL, json=body) for body in bodies]

    answers = in_process(double_model(), ask)
    for answer, said in zip(answers, expected.values(), strict=True):
        assert answer.status_code == 400 and said in answer.text, answer.text
        assert str(tmp_path) not in answer.text and "/vsi" not in answer.text


@pytest.mark.parametrize("scene", [False, True])
def test_a_tiff_of_16_bits_is_taken_by_the_record_of_the_artefact_alone(
    tmp_path, scene
):
    pixels = decode(TILE)
    deep = np.dstack([pixels[..., ::-1], pixels[..., :1]]).astype(np.uint16) * 40 + 500
    path, seen, size = tmp_path / "deep.tif", [], {"height": 300, "width": 300}
    with rasterio.open(path, "w", "GTiff", count=4, dtype="uint16", **size) as file:
        file.write(deep.transpose(2, 0, 1))
    body = {**instance(path.read_bytes()), "parameters": {"scene": scene}}

    def answer(record: dict | None):
        model = double_model(stretch=record)
        model.detector.register_forward_pre_hook(lambda _, given: seen.append(given))
        return in_process(model, lambda client: client.post(URL, json=body))

    ends = {"low": [500] * 3, "high": [500 + 40 * 255] * 3, "dtype": "uint16"}
    assert answer({"bands": [3, 2, 1], **ends}).status_code == 200
    (((one,),),) = seen
    assert np.array_equal((one * 255).round().permute(1, 2, 0).numpy(), pixels)
    for record in (None, {"bands": [3, 2, 1], **ends, "dtype": "float32"}):
        refused = answer(record)
        assert refused.status_code == 400 and "16" in refused.text
        assert str(tmp_path) not in refused.text and "\\n" not in refused.text
    assert len(seen) == 1


def test_a_tile_has_the_pixels_of_the_torchserve_handler_and_a_tiff_is_one():
    pixels = decode(TILE)
    for kind in ("PNG", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        assert np.array_equal(decode_picture(file.getvalue(), 1 << 20, "it"), pixels)
    assert np.array_equal(decode_picture(TILE, 1 << 20, "it"), pixels)
