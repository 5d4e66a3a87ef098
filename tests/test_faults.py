"""What goes wrong, put to both real servers; kserve_utils/FAULTS.md is its record.

    WRITE_FAULTS=1 pytest tests/test_faults.py

writes the record anew. Without it the last test compares the statuses with those in
the file.
"""

import http.client
import io
import os
import re
import signal
import threading
import time

import grpc
import psutil
import pytest
import requests
import torch
from PIL import Image
from servers import (
    MODEL,
    ask_v1,
    ask_v2,
    boxes_v1,
    double_model,
    gone,
    grpc_request,
    held,
    in_process,
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
from kserve_utils.servers import predictor, torchserve

pytestmark = pytest.mark.slow

RECORD = ROOT / "kserve_utils" / "FAULTS.md"
COLUMNS = ("TorchServe", "Predictor, REST", "Predictor, gRPC")
MEASURED: dict[str, dict[str, str]] = {}  # fault -> column -> what the caller got
TILE = jpeg()
LOST = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)


def measured(fault: str, column: int, status: object, reason: str = "") -> None:
    reason = " ".join(reason.split())
    reason = re.sub(r"(?<!\S)/(?!v1/)\S*/", ".../", reason)  # no path of this machine
    text = f"{status}: {reason}" if reason else f"{status}"
    MEASURED.setdefault(fault, {})[COLUMNS[column]] = text


def reason_of(answer: requests.Response) -> str:
    try:
        body = answer.json()
        return str(body.get("message") or body.get("error") or body)
    except ValueError:
        return answer.text


def well(torchserved: str, predicted: str) -> None:
    """Both are ready, and answer."""
    for url in filter(None, (torchserved, predicted)):
        assert len(boxes_v1(ask_v1(url, instance(TILE)).json())["scores"]) > 10
    if predicted:
        assert requests.get(f"{predicted}/v2/health/ready", timeout=60).ok


def by_grpc(address: str, request) -> tuple[str, str]:
    with stub(address) as client:
        try:
            client.ModelInfer(request, timeout=120)
        except grpc.RpcError as error:
            return error.code().name, error.details()
    return "OK", ""


def icon() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "ICO")
    return file.getvalue()


def turned() -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6
    Image.open(io.BytesIO(TILE)).save(file, "JPEG", exif=exif)
    return file.getvalue()


NO_PICTURE = "bytes that are not a picture (JPEG, PNG or TIFF)"
TOO_LARGE = "12000 x 12000 pixels, at most 16777216"
# name -> (the bytes of the picture, status of both servers, what the reason says)
PICTURES = {
    "a file that is no picture": (lambda: b"hello world", 400, NO_PICTURE),
    "a JPEG cut short": (lambda: TILE[:2000], 400, "damaged or cut short"),
    "a picture file of 0 bytes": (lambda: b"", 400, ""),
    "50 MB that are no picture": (lambda: b"0" * 50_000_000, 400, NO_PICTURE),
    "70 MB, over the limit of 64 MiB": (lambda: b"0" * 70_000_000, 413, ""),
    "a PNG of 12,000 x 12,000 px": (lambda: png("L", 12_000, 12_000), 400, TOO_LARGE),
    "a JPEG whose header says 12,000 x 12,000 px": (
        lambda: jpeg_header(12_000, 12_000),
        400,
        TOO_LARGE,
    ),
    "an ICO, which would be decoded to know its size": (icon, 400, NO_PICTURE),
    "16 bits a channel": (lambda: png("I;16", 8, 8), 400, "send 8 bits a channel"),
    "a JPEG that its EXIF turns": (turned, 400, "orientation tag, 6, rotates it"),
    "a JPEG of 3,000 x 2 px": (lambda: jpeg(2, 3000), 400, "at most 100 times"),
}


@pytest.mark.parametrize("fault", PICTURES)
def test_a_bad_picture_is_refused_and_the_servers_stay(torchserved, predicted, fault):
    make, status, reason = PICTURES[fault]
    content = make()
    first = ask_v1(torchserved, instance(content))
    v1, v2 = ask_v1(predicted, instance(content)), ask_v2(predicted, content)
    assert first.status_code == v1.status_code == v2.status_code == status
    for answer in (v1, v2) if status == 413 else (first, v1, v2):
        assert reason in reason_of(answer)
    measured(fault, 0, first.status_code, reason_of(first))
    measured(fault, 1, v1.status_code, reason_of(v1))
    code, details = by_grpc(predicted.grpc, grpc_request(content))
    measured(fault, 2, code, details)
    large = len(content) > 8 << 20  # what gRPC takes
    assert code == ("RESOURCE_EXHAUSTED" if large else "INVALID_ARGUMENT")
    well(torchserved, predicted)


PREDICT, NOPE = f"POST {MODEL}:predict", "a model that is not there"
TEXT, NO_DATA = ({"instances": [{key: "%%%"}]} for key in ("data", "image"))
# name -> (verb and path, body, status of TorchServe, the predictor's, what it says)
REQUESTS = {
    "text that is not base64": (PREDICT, TEXT, 400, 400, "data is not base64"),
    'no key "data"': (PREDICT, NO_DATA, 400, 400, 'needs the key "data"'),
    'no key "instances"': (PREDICT, {"data": "x"}, 400, 400, 'has no "instances"'),
    "an empty body": (PREDICT, None, 503, 400, "the body is empty"),
    "a body that is not JSON": (PREDICT, b"not json", 503, 400, "not JSON"),
    NOPE: ("POST nope:predict", instance(TILE), 404, 404, "nope"),
    "GET where POST belongs": (f"GET {MODEL}:predict", None, 503, 405, "takes POST"),
    "POST to :explain": (f"POST {MODEL}:explain", instance(TILE), 503, 501, "explains"),
}


@pytest.mark.parametrize("fault", REQUESTS)
def test_a_bad_request_is_refused_and_the_servers_stay(torchserved, predicted, fault):
    line, body, theirs, ours, reason = REQUESTS[fault]
    verb, path = line.split()
    sent = {"json": body} if isinstance(body, dict) else {"data": body}
    answers = [
        requests.request(verb, f"{url}/v1/models/{path}", timeout=120, **sent)
        for url in (torchserved, predicted)
    ]
    assert [answer.status_code for answer in answers] == [theirs, ours]
    assert reason in reason_of(answers[1])
    for column, answer in enumerate(answers):
        measured(fault, column, answer.status_code, reason_of(answer))
    if fault == NOPE:
        assert ask_v2(predicted, TILE, "nope").status_code == 404
        code, details = by_grpc(predicted.grpc, grpc_request(TILE, "nope"))
        assert code == "NOT_FOUND" and "nope" in details
        measured(fault, 2, code, details)
    well(torchserved, predicted)


def test_two_hundred_requests_at_once_at_torchserve(torchserved):
    answers = together(200, lambda _: ask_v1(torchserved, instance(TILE)))
    assert {answer.status_code for answer in answers} == {200, 503}
    refused = next(answer for answer in answers if answer.status_code == 503)
    measured("200 callers at once", 0, "200 or 503", reason_of(refused))
    well(torchserved, "")


def test_two_hundred_requests_at_once_at_the_predictor(predicted):
    def ask(index: int):
        if index % 20 == 0:  # health, in the middle of it
            return requests.get(f"{predicted}/v2/health/ready", timeout=120)
        return ask_v1(predicted, instance(TILE))

    with held(predicted, instance(TILE), 16) as in_flight:  # every slot is taken
        queued(predicted, 16)
        with stub(predicted.grpc) as client, pytest.raises(grpc.RpcError) as error:
            client.ModelInfer(grpc_request(TILE), timeout=120)
        answers = together(184, ask)
        assert [finish() for finish in in_flight] == [200] * 16
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    waits = [dict(error.value.trailing_metadata())["retry-after"]]
    assert all(answer.ok for answer in answers[::20])
    refused = [one for index, one in enumerate(answers) if index % 20]
    assert {answer.status_code for answer in refused} == {429}
    waits += [answer.headers["Retry-After"] for answer in refused]
    assert all(1 <= int(wait) <= 30 for wait in waits)
    reason = re.sub(r"\d+ requests", "N requests", reason_of(refused[0]))
    measured("200 callers at once", 1, "200 or 429", reason)
    well("", predicted)


def test_a_scene_that_cannot_be_read_is_refused_without_its_path(predicted):
    for content, reason in (
        (b"hello", "scene: 5 bytes that are no TIFF"),
        (jpeg(400, 400)[:2000], "truncated"),
        (png("L", 12_000, 12_000), "12000 x 12000 pixels"),
        (png("I;16", 8, 8), "uint8"),
    ):
        answer = ask_v2(predicted, content, parameters={"scene": True})
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
    measured(fault, 0, "507 or 503, then 200", "once a new worker is up")
    measured(fault, 1, "no such process", "it is one, see the next line")
    well(torchserved, "")


def java_of(url: str) -> int:
    (java,) = [pid for pid in processes_of(url) if "java" in psutil.Process(pid).name()]
    return java


def test_a_server_that_is_killed_is_a_lost_connection_at_once(tree, artefact):
    for column, server in enumerate((torchserve(tree), predictor(artefact))):
        with server as url, held(url, instance(TILE), 4) as in_flight:
            mine, answered = processes_of(url), threading.Event()

            def ask(index: int, url=url, answered=answered):
                while index:  # asks without a pause, until the connection is lost
                    ask_v1(url, instance(TILE))
                    answered.set()
                assert answered.wait(120)
                return os.kill(getattr(url, "pid", 0) or java_of(url), signal.SIGKILL)

            lost = together(9, ask)[1:]
            assert all(isinstance(one, LOST) for one in lost), lost
            all_are_lost(in_flight)
        assert gone(mine)
        fault = "kill -9 of the server"
        measured(fault, column, "connection closed", "ask again elsewhere")


def all_are_lost(in_flight: list) -> None:
    for finish in in_flight:
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            finish()


def test_sigterm_under_load(tree, artefact):
    """TorchServe drops what is in flight, the predictor answers it and then ends."""
    fault = "SIGTERM under load"
    with (
        predictor(artefact, drain_delay=5) as url,
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
    measured(fault, 1, 200, "in flight: answered; new: not ready, then refused")
    with torchserve(tree) as url, held(url, instance(TILE), 8) as in_flight:
        java = psutil.Process(java_of(url))
        java.terminate()
        java.wait(timeout=60)
        all_are_lost(in_flight)
    measured(fault, 0, "dropped", "requests in flight get no boxes")


@pytest.mark.parametrize("scene", [False, True])
def test_a_gpu_whose_memory_is_full_is_503_and_the_next_picture_is_answered(scene):
    full = [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")]

    def allocate() -> None:
        if full:
            raise full.pop()

    async def ask(client) -> list:
        url = f"/v1/models/{MODEL}:predict"
        body = {**instance(TILE), "parameters": {"scene": scene}}
        return [await client.post(url, json=body) for _ in range(2)]

    model = double_model(allocate)
    first, second = in_process(model, ask)
    assert first.status_code == 503 and first.headers["Retry-After"] == "5"
    assert second.status_code == 200 and model.admission.in_flight == 0
    fault = "the GPU's memory is full (a test double of a detector says so)"
    measured(fault, 1, 503, reason_of(first))


def test_what_is_damaged_or_foreign_never_starts(tree, artefact, tmp_path):
    fault = "a corrupt .mar, a damaged artefact"
    (tmp_path / "config").symlink_to(tree / "config")
    (tmp_path / "model-store").mkdir()
    whole = (tree / "model-store" / f"{MODEL}.mar").read_bytes()
    (tmp_path / "model-store" / f"{MODEL}.mar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged") as error:
        with torchserve(tmp_path):
            pass
    measured(fault, 0, "does not start", str(error.value))
    broken = tmp_path / "artefact"
    broken.mkdir()
    for path in artefact.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.xml").write_text("<net/>")
    with pytest.raises(RuntimeError, match="model.xml is damaged") as error:
        with predictor(broken):
            pass
    lines = str(error.value).splitlines()
    assert not [line for line in lines if "Traceback" in line]
    measured(fault, 1, "does not start", lines[-1].removeprefix("predictor: "))
    fault, foreign = "a foreign checkpoint", tmp_path / "foreign.pth"
    torch.save({"model": {"a": torch.zeros(3)}}, foreign)
    says = ("architecture", "class_names", "tile_size", "overlap")
    known = {key: checkpoint()[key] for key in says}
    with pytest.raises(ValueError, match="foreign.pth") as error:
        export.strip_checkpoint(foreign, tmp_path / "stripped.pth", **known)
    for column in (0, 1):
        measured(fault, column, "is not packed", str(error.value).split(":")[0])


def test_the_record_in_the_docs_is_what_was_measured():
    text = RECORD.read_text()
    if os.environ.get("WRITE_FAULTS"):
        # rows stay where they are, those of tests that did not run as they are; what is
        # new comes last, to be moved into the section where it belongs
        lines, new = text.splitlines(), dict(MEASURED)
        for number, line in enumerate(lines):
            fault = line.strip("|").split(" | ")[0].strip()
            if fault in new:
                lines[number] = row(fault, rows(line)[fault] | new.pop(fault))
        text = "\n".join([*lines, *(row(*pair) for pair in new.items())]) + "\n"
        RECORD.write_text(text)
    kept = rows(text)
    for fault, cells in MEASURED.items():
        for column, cell in cells.items():
            status = cell.split(":")[0]
            assert kept[fault][column].split(":")[0] == status, (fault, column)


def row(fault: str, cells: dict[str, str]) -> str:
    told = [cells.get(column, "-").replace("|", "/") for column in COLUMNS]
    texts = [cell.replace("<", "&lt;") for cell in told]  # no tag of HTML
    return f"| {fault} | " + " | ".join(texts) + " |"


def rows(text: str) -> dict[str, dict[str, str]]:
    """Fault -> column -> what the caller gets, of the record's tables."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == 4]
    return {
        one[0]: dict(zip(COLUMNS, one[1:], strict=True))
        for one in cells
        if one[0] != "Fault"
    }
