"""The predictor as a real server: the boxes of local prediction by every protocol."""

import ast
import asyncio
import base64
import importlib.metadata
import io
import itertools
import json
import logging
import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import psutil
import pytest
import requests
import tifffile
import torch
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from PIL import Image
from servers import (
    MODEL,
    ask_v1,
    ask_v2,
    boxes_grpc,
    boxes_v1,
    boxes_v2,
    gone,
    grpc_request,
    instance,
    listening,
    png,
    stub,
)
from serving import NAMES, ROOT, decode, jpeg

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.predict import predict_image, predict_scene, to_geojson
from kserve_utils.client import predict_remote
from kserve_utils.predictor import rest
from kserve_utils.predictor.__main__ import main, parse
from kserve_utils.predictor.model import Detector, Limits, Turns
from kserve_utils.predictor.protocol import Job, parse_v1, parse_v2
from kserve_utils.predictor.refusal import Refusal
from kserve_utils.predictor.rest import _all, _chunks, one_line
from kserve_utils.servers import predictor

TILE = jpeg(300, 300, seed=3)
FOLDER = ROOT / "kserve_utils" / "predictor"


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


def by_every_protocol(address: str) -> dict:
    with stub(address.grpc) as client:
        one = boxes_grpc(client.ModelInfer(grpc_request(TILE), timeout=120))
    return {
        "v1": boxes_v1(ask_v1(address, instance(TILE)).json()),
        "v2": boxes_v2(ask_v2(address, TILE).json()),
        "grpc": one,
    }


@pytest.mark.slow
def test_the_boxes_are_those_of_torch_and_torchserve_by_every_protocol(
    predicted, torchserved, eager
):
    local = predict_image(eager, decode(TILE))
    same(boxes_v1(ask_v1(torchserved, instance(TILE)).json()), local)
    for found in by_every_protocol(predicted).values():
        same(found, local)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_so_are_those_of_the_other_engines(artefact, eager, engine):
    local = predict_image(eager, decode(TILE))
    with predictor(artefact, engine=engine) as address:
        for found in by_every_protocol(address).values():
            same(found, local)
    assert gone({address.pid})


@pytest.mark.slow
def test_v1_is_answered_word_for_word_as_torchserve_does(predicted, torchserved):
    rows = [
        ask_v1(url, instance(TILE)).json()["predictions"]
        for url in (predicted, torchserved)
    ]
    assert [[list(row) for row in boxes] for boxes in rows[0]] == [
        [list(row) for row in boxes] for boxes in rows[1]
    ]


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
    contents = pb.ModelInferRequest(model_name=MODEL)
    one = contents.inputs.add(name="image", datatype="BYTES", shape=[1])
    one.contents.bytes_contents.append(TILE)
    raw = pb.ModelInferRequest(model_name=MODEL)
    raw.inputs.add(name="image", datatype="UINT8", shape=pixels.shape)
    raw.raw_input_contents.append(pixels.tobytes())
    with stub(predicted.grpc) as client:
        for request in (contents, raw):
            same(boxes_grpc(client.ModelInfer(request, timeout=120)), binary)


@pytest.mark.slow
def test_the_clients_of_kserve_are_understood(predicted):
    async def ask() -> dict:
        client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=120))
        tensor = InferInput("image", [len(TILE)], "UINT8")
        tensor.set_data_from_numpy(np.frombuffer(TILE, np.uint8))
        request = InferRequest(MODEL, [tensor], parameters={"binary_data_output": True})
        answer = await client.infer(predicted, request, model_name=MODEL)
        await client.close()
        return {row.name: row.as_numpy() for row in answer.outputs}

    found = asyncio.run(ask())
    same(found, boxes_v2(ask_v2(predicted, TILE).json()))
    named = [NAMES[label] for label in found["labels"]]
    assert [
        name.decode() if isinstance(name, bytes) else name for name in found["names"]
    ] == named


@pytest.mark.slow
def test_a_scene_gives_the_boxes_of_predict_scene_in_every_form(
    predicted, eager, scene
):
    local = predict_scene(eager, scene, score_threshold=0.017, class_names=NAMES)
    pixels, content = decode(jpeg(500, 700, seed=5)), scene.read_bytes()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    parameters = {"scene": True, "score_threshold": 0.017}
    for form in (content, file.getvalue()):
        same(boxes_v2(ask_v2(predicted, form, parameters=parameters).json()), local)
    body = {**instance(content), "parameters": parameters}
    answer = ask_v1(predicted, body).json()
    assert answer["scene"] is True
    same(boxes_v1(answer), local)
    for protocol in ("v1", "v2"):
        options = {"protocol": protocol, "scene": True, "score_threshold": 0.017}
        same(predict_remote(predicted, scene, **options), local)
    request = grpc_request(content, scene=True, score_threshold="0.017")
    with stub(predicted.grpc) as client:
        same(boxes_grpc(client.ModelInfer(request, timeout=120)), local)
    # more than tiles: a scene without the parameter is one large picture
    whole = boxes_v2(ask_v2(predicted, content).json())
    assert len(whole["scores"]) < len(local["scores"])


@pytest.mark.slow
def test_a_scene_comes_as_geojson_too(predicted, scene):
    parameters = {"scene": True, "score_threshold": 0.017, "geojson": True}
    content = scene.read_bytes()
    answer = boxes_v2(ask_v2(predicted, content, parameters=parameters).json())
    collection = json.loads(answer["geojson"][0])
    found = {key: answer[key] for key in ("boxes_xyxy", "labels", "scores")}
    expected = to_geojson(found, NAMES)["features"]
    assert len(collection["features"]) == len(expected) > 10
    assert collection["features"][0] == expected[0]
    body = {**instance(content), "parameters": parameters}
    (first,) = ask_v1(predicted, body).json()["predictions"]
    assert first["type"] == "FeatureCollection"


@pytest.mark.slow
def test_a_threshold_of_the_request_wins(predicted):
    scores = boxes_v2(ask_v2(predicted, TILE).json())["scores"]
    cut = float(np.median(scores))
    fewer = ask_v2(predicted, TILE, parameters={"score_threshold": cut}).json()
    assert len(boxes_v2(fewer)["scores"]) == (scores >= cut).sum()
    none = ask_v2(predicted, TILE, parameters={"score_threshold": 1.0}).json()
    assert boxes_v2(none)["boxes_xyxy"].shape == (0, 4)
    assert ask_v1(
        predicted, {**instance(TILE), "parameters": {"score_threshold": 1}}
    ).json() == {"predictions": [[]]}


class Gated(torch.nn.Module):
    """A stand-in for a detector whose pass takes until the test lets it end."""

    def __init__(self) -> None:
        super().__init__()
        self.here = torch.nn.Parameter(torch.empty(0))
        self.began, self.end = threading.Event(), threading.Event()

    def forward(self, images: list[torch.Tensor]) -> list[dict]:
        self.began.set()
        assert self.end.wait(60)
        none = {"boxes": torch.empty(0, 4), "scores": torch.empty(0)}
        return [{**none, "labels": torch.empty(0, dtype=torch.int64)} for _ in images]


@pytest.mark.parametrize("scene", [False, True])
def test_health_answers_while_a_pass_is_under_way(scene):
    gated, names = Gated(), ["background", "car"]
    meta = {"tile_size": 8, "overlap": 0.2, "max_pixels": 64, "class_names": names}
    detector = Detector(gated, {**meta, "score_threshold": 0.0}, MODEL, Limits())
    detector.ready = True
    job = Job("v2", [np.zeros((8, 8, 3), np.uint8)], scene=scene)

    async def ask() -> None:
        under_way = asyncio.create_task(detector.predict(job))
        assert await asyncio.to_thread(gated.began.wait, 60)
        assert await detector.healthy() and not under_way.done()
        gated.end.set()
        await under_way

    asyncio.run(ask())
    assert len(job.found) == 1
    detector.close()


@pytest.mark.slow
def test_metrics_count_requests_pictures_and_refusals(predicted):
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
    before = [value(name) for name in names]
    body = {"instances": instance(TILE)["instances"] * 3}
    assert len(ask_v1(predicted, body).json()["predictions"]) == 3
    assert ask_v2(predicted, b"no picture").status_code == 400
    assert [value(n) - b for n, b in zip(names, before, strict=True)] == [1, 1, 3, 1]
    assert value("predictor_queue_length") == 0


@pytest.mark.slow
def test_the_log_has_one_line_for_a_failure_and_nothing_of_the_picture(predicted):
    log = Path(psutil.Process(predicted.pid).environ()["TMPDIR"], "server.log")
    before = log.read_text()
    noise = base64.b64encode(np.random.default_rng(0).bytes(10_000)).decode()
    assert ask_v1(predicted, {"instances": [{"data": noise}]}).status_code == 400
    assert requests.get(f"{predicted}/v1/models/nope", timeout=60).status_code == 404
    assert ask_v2(predicted, TILE).status_code == 200
    lines = log.read_text().removeprefix(before).splitlines()
    assert len(lines) == 2
    assert "v1 400 instance 0: 10000 bytes that are not a picture" in lines[0]
    assert "nope" in lines[1]


@pytest.mark.slow
def test_the_model_stays_whoever_asks_to_unload_it(predicted):
    for verb in ("unload", "load"):
        url = f"{predicted}/v2/repository/models/{MODEL}/{verb}"
        answer = requests.post(url, timeout=60)
        assert answer.status_code == 403 and "keeps the model" in answer.text
    with stub(predicted.grpc) as client:
        with pytest.raises(grpc.RpcError) as error:
            client.RepositoryModelUnload(
                pb.RepositoryModelUnloadRequest(model_name=MODEL), timeout=60
            )
        assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert client.ModelReady(pb.ModelReadyRequest(name=MODEL), timeout=60).ready
    assert ask_v2(predicted, TILE).status_code == 200


@pytest.mark.slow
def test_it_listens_on_loopback_alone_and_is_one_process(predicted):
    process = psutil.Process(predicted.pid)
    assert process.children() == []
    mine = [address for pid, address in listening() if pid == predicted.pid]
    assert {address.ip for address in mine} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert len(mine) == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--engine", "torch", "--device", "cuda"), "device 'cuda', but torch"),
        (("--engine", "torch", "--device", "gpu"), "no device 'gpu'; valid: cpu, cuda"),
        (
            ("--engine", "openvino", "--device", "cuda"),
            "openvino runs on the CPU alone",
        ),
    ],
)
def test_a_device_that_cannot_be_had_is_one_line_and_no_server(
    tmp_path, arguments, reason, monkeypatch
):
    absent = ["--model_dir", str(tmp_path / "absent")]
    monkeypatch.setattr(sys, "argv", ["predictor", *arguments, *absent])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # main sets both
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = str(ended.value).splitlines()
    assert line.startswith("predictor: ") and reason in line


@pytest.mark.slow
def test_the_log_tells_where_it_computes(artefact):
    with predictor(artefact, engine="torch", device="cpu") as address:
        log = Path(psutil.Process(address.pid).environ()["TMPDIR"], "server.log")
        assert "torch computes in fp32 on cpu" in log.read_text()


def test_an_artefact_that_is_not_there_is_an_error_before_anything_starts(tmp_path):
    with pytest.raises(FileNotFoundError, match="no artefact at .*absent"):
        with predictor(tmp_path / "absent"):
            pass


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "the body is empty"),
        (b"not json", "not JSON"),
        (b"[]", 'no "instances"'),
        (b'{"instances": []}', 'no "instances"'),
        (b'{"instances": [{"image": "x"}]}', 'instance 0: needs the key "data"'),
        (b'{"instances": [{"data": 3}]}', "instance 0: data must be text"),
        (b'{"instances": [{"data": "%%%"}]}', "instance 0: data is not base64"),
        (b'{"instances": [{"data": "QQ=="}, {"data": "QQ=="}, 1, 2]}', "at most 3"),
        (b'{"instances": [1], "parameters": {"sceen": true}}', "no parameter sceen"),
        (b'{"instances": [1], "parameters": {"scene": 1}}', "scene is 1"),
        (b'{"instances": [1], "parameters": {"score_threshold": 2}}', "in 0..1"),
        (b'{"instances": [1, 2], "parameters": {"scene": true}}', "comes alone"),
        (b"[" + b"{}," * 1_000_000 + b"{}]", "1000002 objects, lists and texts"),
    ],
)
def test_a_v1_body_that_is_wrong_says_what_is(body, reason):
    with pytest.raises(Refusal, match=re.escape(reason)) as refusal:
        parse_v1(body, max_pictures=3)
    assert refusal.value.status == 400


def tensor(**fields) -> dict:
    one = {"name": "image", "datatype": "UINT8", "shape": [3], "data": [1, 2, 3]}
    return {"inputs": [{**one, **fields}]}


@pytest.mark.parametrize(
    ("head", "rest", "reason"),
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
        (tensor(datatype="BYTES", shape=[1], data=["%"]), None, "not base64"),
        (tensor(data=None), b"abc", "binary_data_size is None, 3 bytes follow"),
        (tensor(parameters=[1]), b"abc", "binary_data_size is None, 3 bytes follow"),
        (
            tensor(datatype="BYTES", shape=[1], parameters={"binary_data_size": 5}),
            b"\x09\0\0\0a",
            "its length, 9; 1 follow",
        ),
        ({**tensor(), "outputs": [{"name": "masks"}]}, None, "no output 'masks'"),
        ({**tensor(), "outputs": 3}, None, '"outputs" must be'),
    ],
)
def test_a_v2_request_that_is_wrong_says_what_is(head, rest, reason):
    with pytest.raises(Refusal, match=re.escape(reason)) as refusal:
        parse_v2(head, rest)
    assert refusal.value.status == 400


class Upload:
    """A stand-in for a request whose body comes in these pieces."""

    def __init__(self, *pieces: bytes, pause: float = 0) -> None:
        self.pieces, self.pause = pieces, pause

    async def stream(self):
        for piece in self.pieces:
            await asyncio.sleep(self.pause)
            yield piece


def read(upload: Upload, declared: int, stall: float = 30) -> bytes:
    return asyncio.run(_all(_chunks(upload, declared, most=10, stall=stall)))


def test_a_body_is_measured_while_it_comes_whatever_it_declared(monkeypatch):
    assert read(Upload(b"12345", b"67890"), 10) == b"1234567890"
    for declared in (0, 3, 11):
        with pytest.raises(Refusal, match="larger than 10 bytes") as refusal:
            read(Upload(b"12345", b"678901"), declared)
        assert refusal.value.status == 413
    with pytest.raises(Refusal, match="no byte of the body for 0.2 s") as refusal:
        read(Upload(b"12345", pause=60), 5, stall=0.2)
    assert refusal.value.status == 408
    clock = itertools.count(step=10)  # a stand-in: 10 s from one look to the next
    monkeypatch.setattr(rest, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(Refusal, match="body took more than 60 s") as refusal:
        read(Upload(*[b"1"] * 10), 10)
    assert refusal.value.status == 408


def test_the_queue_is_bounded_and_says_when_to_ask_again():
    meta = {"tile_size": 8, "max_pixels": 64, "score_threshold": 0.0}
    detector = Detector(torch.nn.Identity(), meta, MODEL, Limits(queue=2, scenes=1))
    with detector.place(), detector.place():
        with pytest.raises(Refusal, match="2 requests wait already") as refusal:
            with detector.place():
                pass
    assert refusal.value.status == 429
    assert 1 <= int(refusal.value.headers["retry-after"]) <= 30
    assert refusal.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    with detector.place(), detector.scene_file() as path:
        assert path.is_file()
        with pytest.raises(Refusal, match="1 scenes wait already"):
            with detector.scene_file():
                pass
    assert not path.exists() and detector.waiting == detector.scenes == 0
    detector.close()


def a_detector() -> Detector:
    meta = {"tile_size": 8, "max_pixels": 64, "score_threshold": 0.0}
    return Detector(torch.nn.Identity(), meta, MODEL, Limits())


def test_scenes_of_a_server_that_was_killed_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = a_detector()  # what runs keeps its own: a process of another number
    other = Path(kept._folder.name).rename(
        tmp_path / f"predictor-scenes-{psutil.Process().ppid()}-x"
    )
    for name in (f"predictor-scenes-{os.getpid()}-a", "predictor-scenes-999999999-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scene").write_text("left")
    detector = a_detector()
    own = Path(detector._folder.name)
    assert {path.name for path in tmp_path.iterdir()} == {own.name, other.name}
    detector.close()
    assert not own.exists()


def test_a_scene_of_one_long_row_is_refused_in_raw_pixels_too():
    detector = a_detector()
    job = Job("v2", [np.zeros((1, 100_001, 3), np.uint8)], scene=True)
    with pytest.raises(Refusal, match="a side is at most 100000"):
        asyncio.run(detector.predict(job))
    assert job.pictures == []  # nothing is held for a job that ended
    detector.close()


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
    assert requests.get(f"{predicted}/v2/health/ready", timeout=60).ok


@pytest.mark.slow
def test_a_header_that_is_no_number_is_refused(predicted):
    for value in ("x", "\u00b2", "-1"):
        headers = {"Inference-Header-Content-Length": value.encode("latin-1")}
        url = f"{predicted}/v2/models/{MODEL}/infer"
        answer = requests.post(url, data=b"{}", headers=headers, timeout=60)
        assert answer.status_code == 400, answer.text


def test_a_job_that_nobody_waits_for_takes_no_turn():
    cancelled = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        turns = Turns(torch.nn.Identity(), thread, cancelled)
        assert turns([1]) == [1]
        cancelled.set()
        with pytest.raises(Refusal) as refusal:
            turns([1])
    assert refusal.value.status == 499


def test_the_log_says_one_line_of_an_error_and_where_it_was():
    try:
        raise KeyError("a\nb")
    except KeyError as error:
        told = type(error), error, error.__traceback__
    line = logging.LogRecord("kserve", 40, "", 1, "v1 500", (), told)
    assert one_line(line) and line.exc_info is None
    said = line.getMessage()
    assert "\n" not in said and said.startswith("v1 500 KeyError")
    assert "test_predictor.py:" in said


def test_the_names_of_kserves_own_arguments_are_kept():
    given = parse(["--http_port", "1", "--grpc_port", "2", "--model_name", "m"])
    assert (given.http_port, given.grpc_port, given.model_name) == (1, 2, "m")
    defaults = parse([])
    assert (defaults.http_port, defaults.grpc_port) == (8080, 8081)
    assert defaults.model_dir == "/mnt/models" and defaults.precision == "fp32"
    assert defaults.threads >= 1


def container() -> str:
    return (FOLDER / "Containerfile").read_text()


def test_the_container_runs_as_nobody_and_starts_this_module():
    text = container()
    user = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert user and all(re.fullmatch(r"[1-9]\d*:[1-9]\d*", one) for one in user)
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    assert json.loads(entry) == ["python", "-m", "kserve_utils.predictor"]
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
    assert len(wanted) > 10 and names[0] <= names[1]


CORE = ("files", "grid", "hardware", "models", "predict", "scenes")


def imports(path) -> set[str]:
    """Top-level names of what a file imports when it is imported itself."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_pictures_are_refused_by_their_header(tmp_path):
    from kserve_utils.predictor.pictures import check_picture, check_scene

    with pytest.raises(Refusal, match="mode I;16: send 8 bits"):
        check_picture(png("I;16", 8, 8), 100, "instance 0")
    with pytest.raises(Refusal, match="9 x 12 pixels, at most 100"):
        check_picture(png("L", 9, 12), 100, "instance 0")
    large = tmp_path / "large.png"
    large.write_bytes(png("RGB", 9, 12))
    with pytest.raises(Refusal, match="decoded whole: send it as an uncompressed"):
        check_scene(large, 100)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((9, 12, 3), np.uint8))
    assert check_scene(tmp_path / "a.tif", 100) == (9, 12)  # by windows
    zipped = tmp_path / "b.tif"
    tifffile.imwrite(zipped, np.zeros((9, 12, 3), np.uint8), compression="zlib")
    with pytest.raises(Refusal, match="at most 100 are decoded"):
        check_scene(zipped, 100)
    (tmp_path / "c").write_bytes(b"hello")
    with pytest.raises(Refusal, match="^scene: 5 bytes that are no TIFF"):
        check_scene(tmp_path / "c", 100)
