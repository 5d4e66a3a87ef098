"""What goes wrong, put to both real servers; kserve_utils/FAULTS.md is its record.

    WRITE_FAULTS=1 pytest tests/test_faults.py

writes the record anew. Without it the last test compares the statuses with those in
the file.
"""

import io
import os
import re
import signal
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
    gone,
    grpc_request,
    instance,
    jpeg_header,
    png,
    processes_of,
    stub,
    together,
)
from serving import ROOT, checkpoint, jpeg

from e2e_utils import export
from kserve_utils.predictor.local import predictor
from kserve_utils.torchserve_utils.local import torchserve

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


def test_a_picture_in_two_hundred_requests_at_once(torchserved, predicted):
    fault = "200 callers at once"
    for column, url, busy in zip(
        COLUMNS, (torchserved, predicted), (503, 429), strict=False
    ):

        def ask(index: int, url=url):
            if url == predicted and index % 20 == 0:  # health, in the middle of it
                return requests.get(f"{url}/v2/health/ready", timeout=120)
            return ask_v1(url, instance(TILE))

        answers = together(200, ask)
        statuses = {answer.status_code for answer in answers}
        assert statuses == {200, busy}
        refused = [answer for answer in answers if answer.status_code == busy]
        if url == predicted:
            assert all(answer.ok for answer in answers[::20])
            assert all(1 <= int(a.headers["Retry-After"]) <= 30 for a in refused)
        reason = re.sub(r"\d+ requests", "N requests", reason_of(refused[0]))
        told(fault, column, f"200 or {busy}", reason)
    well(torchserved, predicted)


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


def killed(url: str, pid: int) -> list:
    """Kill a server while eight callers wait; what they get."""

    def ask(index: int):
        if index == 0:
            time.sleep(0.3)
            os.kill(pid, signal.SIGKILL)
            return None
        return ask_v1(url, instance(TILE))

    return together(9, ask)[1:]


def test_a_server_that_is_killed_is_a_lost_connection_at_once(tree, artefact):
    fault = "kill -9 of the server"
    servers = (
        (COLUMNS[0], torchserve(tree)),
        (COLUMNS[1], predictor(artefact, arguments=["--max_queue", "32"])),
    )
    for column, server in servers:
        with server as url:
            mine = processes_of(url)
            pid = getattr(url, "pid", None) or next(
                pid for pid in mine if "java" in psutil.Process(pid).name()
            )
            found = killed(url, pid)
            lost = [one for one in found if isinstance(one, Exception)]
            assert lost and all(
                isinstance(one, requests.ConnectionError) for one in lost
            )
        assert gone(mine)
        told(fault, column, "connection closed", "ask again elsewhere")


def test_sigterm_under_load(tree, artefact):
    """TorchServe drops what is in flight, the predictor answers it and then ends."""
    fault = "SIGTERM under load"
    options = ["--drain_delay", "1", "--max_queue", "32"]
    with predictor(artefact, arguments=options) as url:
        process = psutil.Process(url.pid)

        def ask(index: int):
            if index == 0:
                time.sleep(0.3)
                os.kill(url.pid, signal.SIGTERM)
                time.sleep(0.4)  # within the delay: no longer ready, still serving
                return requests.get(f"{url}/v2/health/ready", timeout=60)
            return ask_v1(url, instance(TILE))

        ready, *answers = together(9, ask)
        assert [answer.status_code for answer in answers] == [200] * 8
        assert ready.status_code == 503
        assert process.wait(timeout=40) in (0, None)
    told(fault, COLUMNS[1], 200, "in flight: answered; new: not ready, then refused")
    with torchserve(tree) as url:
        (java,) = [
            pid for pid in processes_of(url) if "java" in psutil.Process(pid).name()
        ]

        def ask_it(index: int):
            if index == 0:
                time.sleep(0.3)
                os.kill(java, signal.SIGTERM)
                return None
            return ask_v1(url, instance(TILE))

        found = together(9, ask_it)[1:]
        lost = [
            one for one in found if isinstance(one, Exception) or one.status_code != 200
        ]
        assert lost
        told(fault, COLUMNS[0], "dropped", "requests in flight get no boxes")


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
