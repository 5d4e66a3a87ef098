"""What goes wrong, put to both real servers; kserve_utils/FAULTS.md is its record.

    WRITE_FAULTS=1 pytest tests/test_faults.py

writes the record anew. Without it the last test compares the statuses with those in
the file.
"""

import asyncio
import http.client
import io
import os
import re
import signal
import threading
import time

import grpc
import httpx
import psutil
import pytest
import requests
import torch
from fastapi import FastAPI
from PIL import Image
from servers import (
    MODEL,
    ask_v1,
    ask_v2,
    boxes_v1,
    gone,
    grpc_request,
    held,
    instance,
    jpeg_header,
    png,
    processes_of,
    queued,
    stub,
    together,
)
from serving import ROOT, checkpoint, jpeg

from kserve_utils import export
from kserve_utils.predictor.model import Detector, Limits
from kserve_utils.predictor.rest import add_routes
from kserve_utils.servers import predictor, torchserve

pytestmark = pytest.mark.slow

RECORD = ROOT / "kserve_utils" / "FAULTS.md"
COLUMNS = ("TorchServe", "Predictor, REST", "Predictor, gRPC")
MEASURED: dict[str, dict[str, str]] = {}  # fault -> column -> what the caller got
TILE = jpeg()


def told(fault: str, column: str, status: object, reason: str = "") -> None:
    reason = " ".join(reason.split())
    reason = re.sub(r"(?<!\S)/(?!v1/)\S*/", ".../", reason)  # no path of this machine
    MEASURED.setdefault(fault, {})[column] = (
        f"{status}: {reason}" if reason else (f"{status}")
    )


def reason_of(answer: requests.Response) -> str:
    try:
        body = answer.json()
        return str(body.get("message") or body.get("error") or body)
    except ValueError:
        return answer.text


def well(torchserved: str, predicted: str) -> None:
    """Both are ready, and answer."""
    if torchserved:
        assert len(boxes_v1(ask_v1(torchserved, instance(TILE)).json())["scores"]) > 10
    if predicted:
        assert requests.get(f"{predicted}/v2/health/ready", timeout=60).ok
        assert len(boxes_v1(ask_v1(predicted, instance(TILE)).json())["scores"]) > 10


def by_grpc(address: str, request) -> tuple[str, str]:
    with stub(address) as client:
        try:
            client.ModelInfer(request, timeout=120)
        except grpc.RpcError as error:
            return error.code().name, error.details()
    return "OK", ""


def icon(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "ICO")
    return file.getvalue()


# name -> (the bytes of the picture, status of both servers, what the reason says)
PICTURES = {
    "a file that is no picture": (lambda: b"hello world", 400, "not a picture"),
    "a JPEG cut short": (lambda: TILE[:2000], 400, "damaged or cut short"),
    "a picture file of 0 bytes": (lambda: b"", 400, ""),
    "50 MB that are no picture": (
        lambda: b"0" * 50_000_000,
        400,
        "50000000 bytes that are not a picture",
    ),
    "70 MB, over the limit of 64 MiB": (lambda: b"0" * 70_000_000, 413, ""),
    "a PNG of 12,000 x 12,000 px": (
        lambda: png("L", 12_000, 12_000),
        400,
        "12000 x 12000 pixels, at most 16777216",
    ),
    "a JPEG whose header says 12,000 x 12,000 px": (
        lambda: jpeg_header(12_000, 12_000),
        400,
        "12000 x 12000 pixels, at most 16777216",
    ),
    "an ICO, which would be decoded to know its size": (
        lambda: icon(64),
        400,
        "bytes that are not a picture (JPEG, PNG or TIFF)",
    ),
    "16 bits a channel": (lambda: png("I;16", 8, 8), 400, "send 8 bits a channel"),
}


@pytest.mark.parametrize("fault", PICTURES)
def test_a_bad_picture_is_refused_and_the_servers_stay(torchserved, predicted, fault):
    make, status, reason = PICTURES[fault]
    content = make()
    first = ask_v1(torchserved, instance(content))
    told(fault, COLUMNS[0], first.status_code, reason_of(first))
    v1, v2 = ask_v1(predicted, instance(content)), ask_v2(predicted, content)
    told(fault, COLUMNS[1], v1.status_code, reason_of(v1))
    assert first.status_code == v1.status_code == v2.status_code == status
    for answer in (v1, v2) if status == 413 else (first, v1, v2):
        assert reason in reason_of(answer)
    code, details = by_grpc(predicted.grpc, grpc_request(content))
    told(fault, COLUMNS[2], code, details)
    large = len(content) > 8 << 20  # what gRPC takes
    assert code == ("RESOURCE_EXHAUSTED" if large else "INVALID_ARGUMENT")
    well(torchserved, predicted)


V1 = {  # name -> (body, TorchServe's status, the predictor's, what its reason says)
    "text that is not base64": (
        {"instances": [{"data": "%%%"}]},
        400,
        400,
        "data is not base64",
    ),
    'no key "data"': (
        {"instances": [{"image": "x"}]},
        400,
        400,
        'needs the key "data"',
    ),
    'no key "instances"': ({"data": "x"}, 400, 400, 'the request has no "instances"'),
    "an empty body": (b"", 503, 400, "the body is empty"),
    "a body that is not JSON": (b"not json", 503, 400, "not JSON"),
}


@pytest.mark.parametrize("fault", V1)
def test_a_bad_body_is_refused_and_the_servers_stay(torchserved, predicted, fault):
    body, theirs, ours, reason = V1[fault]
    first, second = ask_v1(torchserved, body), ask_v1(predicted, body)
    told(fault, COLUMNS[0], first.status_code, reason_of(first))
    told(fault, COLUMNS[1], second.status_code, reason_of(second))
    assert (first.status_code, second.status_code) == (theirs, ours)
    assert reason in reason_of(second)
    well(torchserved, predicted)


def test_a_wrong_model_and_a_wrong_verb_say_so(torchserved, predicted):
    fault = "a model that is not there"
    for column, url in zip(COLUMNS, (torchserved, predicted), strict=False):
        answer = ask_v1(url, instance(TILE), "nope")
        assert answer.status_code == 404 and "nope" in reason_of(answer)
        told(fault, column, 404, reason_of(answer))
    code, details = by_grpc(predicted.grpc, grpc_request(TILE, "nope"))
    assert code == "NOT_FOUND" and "nope" in details
    told(fault, COLUMNS[2], code, details)
    assert ask_v2(predicted, TILE, "nope").status_code == 404
    fault = "GET where POST belongs"
    for column, url, status in zip(
        COLUMNS, (torchserved, predicted), (503, 405), strict=False
    ):
        answer = requests.get(f"{url}/v1/models/{MODEL}:predict", timeout=60)
        assert answer.status_code == status
        told(fault, column, answer.status_code, reason_of(answer))
    well(torchserved, predicted)


def test_two_hundred_requests_at_once_at_torchserve(torchserved):
    answers = together(200, lambda _: ask_v1(torchserved, instance(TILE)))
    assert {answer.status_code for answer in answers} == {200, 503}
    refused = next(answer for answer in answers if answer.status_code == 503)
    told("200 callers at once", COLUMNS[0], "200 or 503", reason_of(refused))
    well(torchserved, "")


def test_two_hundred_requests_at_once_at_the_predictor(predicted):
    def ask(index: int):
        if index % 20 == 0:  # health, in the middle of it
            return requests.get(f"{predicted}/v2/health/ready", timeout=120)
        return ask_v1(predicted, instance(TILE))

    with held(predicted, instance(TILE), 16) as requests_:  # every place is taken
        queued(predicted, 16)
        answers = together(184, ask)
        assert [finish() for finish in requests_] == [200] * 16
    assert all(answer.ok for answer in answers[::20])
    refused = [one for index, one in enumerate(answers) if index % 20]
    assert {answer.status_code for answer in refused} == {429}
    assert all(1 <= int(one.headers["Retry-After"]) <= 30 for one in refused)
    reason = re.sub(r"\d+ requests", "N requests", reason_of(refused[0]))
    told("200 callers at once", COLUMNS[1], "200 or 429", reason)
    well("", predicted)


def test_a_scene_that_cannot_be_read_is_refused_without_its_path(predicted):
    parameters = {"scene": True}
    for content, reason in (
        (b"hello", "scene: 5 bytes that are no TIFF"),
        (jpeg(400, 400)[:2000], "truncated"),
        (png("L", 12_000, 12_000), "12000 x 12000 pixels"),
        (png("I;16", 8, 8), "uint8"),
    ):
        answer = ask_v2(predicted, content, parameters=parameters)
        assert answer.status_code == 400 and reason in reason_of(answer)
        assert "/" not in reason_of(answer)
    well("", predicted)


def test_a_worker_that_is_killed_comes_back(torchserved):
    fault = "kill -9 of the worker"
    (worker,) = [
        pid
        for pid in processes_of(torchserved)
        if "model_service_worker" in " ".join(psutil.Process(pid).cmdline())
    ]
    os.kill(worker, signal.SIGKILL)
    end, statuses = time.monotonic() + 120, []
    while time.monotonic() < end and 200 not in statuses:
        answer = ask_v1(torchserved, instance(TILE))
        statuses.append(answer.status_code)
    assert statuses[-1] == 200 and set(statuses) <= {200, 503, 507}
    told(fault, COLUMNS[0], "507 or 503, then 200", "once a new worker is up")
    told(fault, COLUMNS[1], "no such process", "it is one, see the next line")
    well(torchserved, "")


def java_of(url: str) -> int:
    (java,) = [pid for pid in processes_of(url) if "java" in psutil.Process(pid).name()]
    return java


def test_a_server_that_is_killed_is_a_lost_connection_at_once(tree, artefact):
    fault = "kill -9 of the server"
    for column, server in (
        (COLUMNS[0], torchserve(tree)),
        (COLUMNS[1], predictor(artefact)),
    ):
        with server as url, held(url, instance(TILE), 4) as in_flight:
            mine, answered = processes_of(url), threading.Event()

            def ask(index: int, url=url, answered=answered):
                if index:  # asks without a pause
                    return until_lost(url, answered)
                assert answered.wait(120)
                return os.kill(getattr(url, "pid", 0) or java_of(url), signal.SIGKILL)

            lost = together(9, ask)[1:]
            assert all(isinstance(one, LOST) for one in lost), lost
            for finish in in_flight:
                with pytest.raises((ConnectionError, http.client.HTTPException)):
                    finish()
        assert gone(mine)
        told(fault, column, "connection closed", "ask again elsewhere")


LOST = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)


def until_lost(url: str, answered: threading.Event) -> Exception:
    """What ends asking again and again; a timeout is raised, for it is none of them."""
    while True:
        try:
            ask_v1(url, instance(TILE))
        except LOST as error:
            return error
        answered.set()


def test_sigterm_under_load(tree, artefact):
    """TorchServe drops what is in flight, the predictor answers it and then ends."""
    fault = "SIGTERM under load"
    with (
        predictor(artefact, arguments=["--drain_delay", "5"]) as url,
        held(url, instance(TILE), 8) as in_flight,
    ):
        process = psutil.Process(url.pid)
        queued(url, 8)
        process.terminate()
        while (ready := requests.get(f"{url}/v2/health/ready", timeout=60)).ok:
            time.sleep(0.05)
        assert ready.status_code == 503  # no longer ready, still serving
        assert ask_v1(url, instance(TILE)).status_code == 200
        assert [finish() for finish in in_flight] == [200] * 8
        assert process.wait(timeout=60) in (0, None)
    told(fault, COLUMNS[1], 200, "in flight: answered; new: not ready, then refused")
    with torchserve(tree) as url, held(url, instance(TILE), 8) as in_flight:
        java = psutil.Process(java_of(url))
        java.terminate()
        java.wait(timeout=60)
        for finish in in_flight:
            with pytest.raises((ConnectionError, http.client.HTTPException)):
                finish()
    told(fault, COLUMNS[0], "dropped", "requests in flight get no boxes")


class FullGpu(torch.nn.Module):
    """A test double of a detector on a GPU: its memory is full for one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.here, self.full = torch.nn.Parameter(torch.empty(0)), True

    def forward(self, images: list[torch.Tensor]) -> list[dict]:
        if self.full:
            self.full = False
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        one = {"boxes": torch.ones(1, 4), "labels": torch.ones(1, dtype=torch.int64)}
        return [{**one, "scores": torch.ones(1)} for _ in images]


@pytest.mark.parametrize("scene", [False, True])
def test_a_gpu_whose_memory_is_full_is_503_and_the_next_picture_is_answered(scene):
    meta = {"tile_size": 300, "overlap": 0.2, "max_pixels": 1 << 24}
    meta |= {"score_threshold": 0.0, "class_names": ["background", "car"]}
    detector = Detector(FullGpu(), meta, MODEL, Limits())
    app = FastAPI()
    add_routes(app, detector)
    body = {**instance(TILE), "parameters": {"scene": scene}}

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)  # in this process, through the routes
        async with httpx.AsyncClient(transport=transport, base_url="http://-") as one:
            url = f"/v1/models/{MODEL}:predict"
            return [await one.post(url, json=body, timeout=120) for _ in range(2)]

    first, second = asyncio.run(ask())
    detector.close()
    assert first.status_code == 503 and first.headers["Retry-After"] == "5"
    assert second.status_code == 200 and detector.waiting == 0
    fault = "the GPU's memory is full (a test double of a detector says so)"
    told(fault, COLUMNS[1], 503, reason_of(first))


def test_what_is_damaged_or_foreign_never_starts(tree, artefact, tmp_path):
    fault = "a corrupt .mar, a damaged artefact"
    (tmp_path / "config").symlink_to(tree / "config")
    (tmp_path / "model-store").mkdir()
    whole = (tree / "model-store" / f"{MODEL}.mar").read_bytes()
    (tmp_path / "model-store" / f"{MODEL}.mar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged") as error:
        with torchserve(tmp_path):
            pass
    told(fault, COLUMNS[0], "does not start", str(error.value))
    broken = tmp_path / "artefact"
    broken.mkdir()
    for path in artefact.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.xml").write_text("<net/>")
    with pytest.raises(RuntimeError, match="model.xml is damaged") as error:
        with predictor(broken):
            pass
    said = str(error.value).splitlines()
    assert len([line for line in said if "Traceback" in line]) == 0
    told(fault, COLUMNS[1], "does not start", said[-1].removeprefix("predictor: "))
    fault = "a foreign checkpoint"
    torch.save({"model": {"a": torch.zeros(3)}}, tmp_path / "foreign.pth")
    known = checkpoint()
    with pytest.raises(ValueError) as error:
        export.strip_checkpoint(
            tmp_path / "foreign.pth",
            tmp_path / "stripped.pth",
            architecture=known["architecture"],
            class_names=known["class_names"],
        )
    assert "foreign.pth" in str(error.value)
    for column in COLUMNS[:2]:
        told(fault, column, "is not packed", str(error.value).split(":")[0])


def test_the_record_in_the_docs_is_what_was_measured():
    if os.environ.get("WRITE_FAULTS"):
        before = rows(RECORD.read_text()) if RECORD.is_file() else {}
        RECORD.write_text(record(before | MEASURED))
    kept = rows(RECORD.read_text())
    for fault, cells in MEASURED.items():
        for column, cell in cells.items():
            status = cell.split(":")[0]
            assert kept[fault][column].split(":")[0] == status, (fault, column)


def record(measured: dict[str, dict[str, str]]) -> str:
    """The table of FAULTS.md; of a part of the tests, the rest of it stays."""
    lines = [
        "# What goes wrong, and what the caller sees",
        "",
        "Both servers on the same detector, each fault put to them as a client would.",
        "After every one they were ready and answered the next picture. Written by",
        "`WRITE_FAULTS=1 pytest tests/test_faults.py`; each run of the tests compares",
        "the statuses.",
        "",
        "REST is V1; V2 gives the same status. Behind KServe's wrapper for TorchServe",
        "a 400 arrives as 500.",
        "",
        "| Fault | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for fault, cells in measured.items():
        row = [cells.get(column, "-").replace("|", "/") for column in COLUMNS]
        lines.append(f"| {fault} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def rows(text: str) -> dict[str, dict[str, str]]:
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == len(COLUMNS) + 1:
            found[cells[0]] = dict(zip(COLUMNS, cells[1:], strict=True))
    found.pop("Fault", None)  # the head of the table
    return found
