"""Real servers of one untrained detector, each started once for all tests that ask it.

The requests are written out here byte by byte, without kserve_utils.client: what a
server takes must not depend on who asks.
"""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import re
import struct
import tempfile
import threading
import time
from pathlib import Path

import grpc
import httpx
import numpy as np
import psutil
import pytest
import requests
import torch
from fastapi import FastAPI
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from PIL import Image
from serving import NAMES, checkpoint, decode, jpeg

from kserve_utils import export
from kserve_utils.artefact import write_artefact
from kserve_utils.predictor.admission import Limits
from kserve_utils.predictor.model import DetectorModel
from kserve_utils.predictor.rest import add_routes
from kserve_utils.servers import predictor, torchserve

MODEL = "xview-fasterrcnn"


@pytest.fixture(scope="session")
def stripped(tmp_path_factory):
    """A stripped checkpoint of an untrained detector (see serving.py)."""
    folder = tmp_path_factory.mktemp("served")
    torch.save(checkpoint(), folder / "best.pt")
    new = folder / "trained_model_stripped.pth"
    return export.strip_checkpoint(folder / "best.pt", new)


@pytest.fixture(scope="session")
def tree(stripped):
    """A model store of it, for TorchServe."""
    folder = stripped.parent
    mar = export.write_mar(stripped, folder)
    return export.write_model_store(mar, folder / "store")


@pytest.fixture(scope="session")
def artefact(stripped):
    """An artefact of it, for the predictor and all engines."""
    tiles = [decode(jpeg(seed=seed)) for seed in (1, 2)]
    return write_artefact(stripped, stripped.parent / "artefact", tiles=tiles)


@pytest.fixture(scope="session")
def torchserved(tree):
    """The base URL of a TorchServe."""
    with torchserve(tree) as base_url:
        assert len(processes_of(base_url)) >= 3  # launcher, Java, worker
        yield base_url
        mine = processes_of(base_url)
    assert gone(mine)


@pytest.fixture(scope="session")
def predicted(artefact):
    """The address of a predictor with OpenVINO."""
    with predictor(artefact, engine="openvino") as address:
        yield address
    assert gone({address.pid})


def serving_processes(kind: str = "torchserve") -> set[int]:
    """Every process on this machine that a server of this kind consists of."""
    prefix, found = os.path.join(tempfile.gettempdir(), f"{kind}-"), set()
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR", "").startswith(prefix):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def processes_of(url: str) -> set[int]:
    """Those of the server that listens there: they share its temporary folder."""
    port = int(url.rsplit(":", 1)[1])
    folders = {
        psutil.Process(pid).environ()["TMPDIR"]
        for pid, address in listening()
        if address.port == port
    }
    found = set()
    for pid in serving_processes() | serving_processes("predictor"):
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).environ().get("TMPDIR") in folders:
                found.add(pid)
    return found


def listening() -> list[tuple[int, tuple]]:
    """(process, its address with `ip` and `port`) of all that listen here."""
    return [
        (connection.pid, connection.laddr)
        for connection in psutil.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]


def serving_folders(kind: str = "torchserve") -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob(f"{kind}-*"))


def gone(pids: set[int], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def instance(content: bytes) -> dict:
    """The body of V1, TorchServe's and KServe's alike."""
    return {"instances": [{"data": base64.b64encode(content).decode()}]}


def ask_v1(url: str, body: dict | bytes, model: str = MODEL, **options):
    """POST to `:predict`."""
    data = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    options = {"timeout": 120, "headers": headers, **options}
    return requests.post(f"{url}/v1/models/{model}:predict", data=data, **options)


@contextlib.contextmanager
def held(url: str, body: dict, count: int):
    """V1 requests that stay in flight for as long as one wishes, on any machine.

    The last byte of each body is held back.

    Yields:
        Functions that send the last byte and give the status of the answer; they raise
        ConnectionError if the server is gone.
    """
    data = json.dumps(body).encode()
    head = {"Content-Type": "application/json", "Content-Length": str(len(data))}

    def finish(connection) -> int:
        connection.send(data[-1:])
        return connection.getresponse().status

    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(count):
            connection = http.client.HTTPConnection(url.split("//")[1], timeout=120)
            stack.callback(connection.close)
            path = f"/v1/models/{MODEL}:predict"
            connection.request("POST", path, data[:-1], head)
            connections.append(connection)
        yield [lambda one=one: finish(one) for one in connections]


def queued(predicted: str, count: int) -> None:
    """Wait until so many requests are in the queue of a predictor."""
    wanted, end = f"{count}.0", time.monotonic() + 60
    while True:
        text = requests.get(f"{predicted}/metrics", timeout=60).text
        (found,) = re.findall(r"^predictor_queue_length (\S+)$", text, re.MULTILINE)
        if found == wanted:
            return
        assert time.monotonic() < end, f"{found} requests are queued"
        time.sleep(0.05)


def ask_v2(url: str, content: bytes | dict, model: str = MODEL, **fields):
    """POST to `/infer`: a file's bytes by the binary form, or a whole JSON body."""
    address = f"{url}/v2/models/{model}/infer"
    if isinstance(content, dict):
        return requests.post(address, json=content, timeout=120)
    tensor = {"name": "image", "datatype": "UINT8", "shape": [len(content)]}
    tensor["parameters"] = {"binary_data_size": len(content)}
    head = json.dumps({"inputs": [tensor], **fields}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    headers["Content-Type"] = "application/octet-stream"
    return requests.post(address, data=head + content, headers=headers, timeout=120)


def grpc_request(content: bytes, model: str = MODEL, **parameters):
    """ModelInferRequest with a file's bytes as UINT8 [n]."""
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="image", datatype="UINT8", shape=[len(content)])
    request.raw_input_contents.append(content)
    for key, value in parameters.items():
        kind = "bool_param" if isinstance(value, bool) else "string_param"
        setattr(request.parameters[key], kind, value)
    return request


@contextlib.contextmanager
def stub(address: str):
    options = [("grpc.max_send_message_length", -1)]
    options += [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        yield GRPCInferenceServiceStub(channel)


def boxes_v1(answer: dict) -> dict:
    """Boxes, labels and scores of the first prediction."""
    rows = [dict(row) for row in answer["predictions"][0]]
    scores = np.array([row.pop("score") for row in rows], np.float32)
    boxes = np.array([box for row in rows for box in row.values()], np.float32)
    labels = np.array([NAMES.index(name) for row in rows for name in row])
    return {"boxes_xyxy": boxes, "labels": labels, "scores": scores}


_TYPES = {"FP32": np.float32, "INT64": np.int64}


def boxes_v2(answer: dict) -> dict:
    """The outputs of a V2 answer in JSON, as arrays."""
    found = {}
    for row in answer["outputs"]:
        column = np.array(row["data"], _TYPES.get(row["datatype"]))
        found[row["name"]] = column.reshape(row["shape"])
    return found


def boxes_grpc(answer) -> dict:
    """The outputs of a ModelInferResponse; BYTES as they came."""
    found = {}
    for row, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        kind, found[row.name] = _TYPES.get(row.datatype), raw
        if kind:
            found[row.name] = np.frombuffer(raw, kind).reshape(tuple(row.shape))
    return found


def png(mode: str, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def jpeg_header(width: int, height: int) -> bytes:
    """A small JPEG whose header says that it is large."""
    content = bytearray(jpeg())
    size = content.index(b"\xff\xc0") + 5
    content[size : size + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def together(count: int, ask) -> list:
    """What `ask(i)` gives or raises, for `count` callers that start at once."""
    start, found = threading.Barrier(count), [None] * count

    def one(index: int) -> None:
        start.wait(60)
        try:
            found[index] = ask(index)
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    return found


class Double(torch.nn.Module):
    """A test double of a detector: each pass calls `action`, then finds one box."""

    def __init__(self, action=lambda: None) -> None:
        super().__init__()
        self.here, self.action = torch.nn.Parameter(torch.empty(0)), action

    def forward(self, images: list[torch.Tensor]) -> list[dict]:
        self.action()
        one = {"boxes": torch.ones(1, 4), "labels": torch.ones(1, dtype=torch.int64)}
        return [{**one, "scores": torch.ones(1)} for _ in images]


def double_model(
    action=lambda: None, stretch=None, nms_threshold=0.5, **limits
) -> DetectorModel:
    """A predictor's model, ready, with a test double of a detector."""
    meta = {"tile_size": 300, "overlap": 0.2, "max_pixels": 1 << 24}
    meta |= {"score_threshold": 0.0, "class_names": ["background", "car"]}
    meta["stretch"] = stretch
    how = {"nms_threshold": nms_threshold}
    model = DetectorModel(Double(action), meta, MODEL, Limits(**limits), **how)
    model.ready = True
    return model


def in_process(model: DetectorModel, ask):
    """What `await ask(client)` gives of a predictor's own routes, without a server."""
    app = FastAPI()
    add_routes(app, model)

    async def run():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://-") as one:
            return await ask(one)

    try:
        return asyncio.run(run())
    finally:
        model.close()
