"""The routes that take pictures by HTTP, and what stands before every other.

They replace KServe's own for `:predict` and `/infer`, which read a body of any size
into memory, and in the event loop: a binary tensor becomes a list of Python numbers
there, one a byte. Health, metadata and metrics stay KServe's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import orjson
from fastapi import FastAPI, Request, Response
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER
from kserve.logging import logger
from prometheus_client import Counter, Histogram
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from .model import Detector
from .protocol import Job, parse_v1, parse_v2, read_json
from .refusal import Refusal, bad

REQUESTS = Counter("predictor_requests", "requests", ["protocol", "code"])
LATENCY = Histogram(
    "predictor_latency_seconds",
    "from the first byte to the answer, of requests that were answered",
    ["protocol", "kind"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)
_SMALL = 1 << 16  # bytes of a body that no route here needs
_PACE = 1e6  # bytes/s of a body, at least
_HEAD = 1 << 20  # bytes of the JSON before a binary tensor
_TEXT = {"content-type": "application/json"}


def add_routes(app: FastAPI, detector: Detector) -> None:
    """Put the routes in front of those that `kserve.ModelServer` adds later."""
    app.add_middleware(Gate)

    @app.post("/v1/models/{model_name}:predict")
    async def predict(model_name: str, request: Request) -> Response:
        return await _answer(detector, request, model_name, "v1")

    @app.post("/v2/models/{model_name}/infer")
    async def infer(model_name: str, request: Request) -> Response:
        return await _answer(detector, request, model_name, "v2")

    for verb in ("load", "unload"):

        @app.post(f"/v2/repository/models/{{model_name}}/{verb}")
        async def blocked(model_name: str) -> Response:
            return _error(Refusal(403, "this server keeps the model it started with"))


class Gate:
    """Refuses what the SDK would misread: a body where none belongs, a wrong verb.

    It would read any body whole, and take "NAME:predict" for the name of a model.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        takes = path.endswith((":predict", "/infer")) and "/versions/" not in path
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if takes and scope["method"] != "POST":
            answer = _error(Refusal(405, f"{scope['method']} {path}: it takes POST"))
            answer.headers["allow"] = "POST"
            return await answer(scope, receive, send)
        if not takes:
            headers = dict(scope["headers"])
            length = headers.get(b"content-length", b"0")
            chunked = b"transfer-encoding" in headers
            if chunked or not length.isdigit() or int(length) > _SMALL:
                answer = _error(Refusal(413, f"{path} takes no body"))
                return await answer(scope, receive, send)
        return await self.app(scope, receive, send)


async def _answer(
    detector: Detector, request: Request, model_name: str, protocol: str
) -> Response:
    started, job = time.perf_counter(), None
    try:
        if model_name != detector.name:
            raise Refusal(404, f"no model {model_name!r}: there is {detector.name!r}")
        with detector.place(), contextlib.ExitStack() as stack:
            job = await _read(detector, request, protocol, stack)
            response = await _unless_gone(request, job, _rendered(detector, job))
        seconds = time.perf_counter() - started
        detector.pace(seconds)
        LATENCY.labels(protocol, "scene" if job.scene else "tile").observe(seconds)
        REQUESTS.labels(protocol, 200).inc()
        return response
    except Exception as error:
        refusal = as_refusal(error)
        note(protocol, refusal, error)
        return _error(refusal)


async def _unless_gone(request: Request, job: Job, answer: Awaitable) -> Response:
    """The answer, or 499 as soon as the caller hangs up."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refusal(499, "the caller hung up")
        return work.result()
    finally:
        job.cancelled.set()
        gone.cancel()
        work.cancel()


async def _rendered(detector: Detector, job: Job) -> Response:
    answer, _ = await detector(job)
    if isinstance(answer, bytes):
        return Response(answer, headers=_TEXT)
    content, head = await detector.aside(answer.to_rest)
    if head is None:
        return Response(await detector.aside(orjson.dumps, content), headers=_TEXT)
    headers = {INFERENCE_CONTENT_LENGTH_HEADER: str(head)}
    return Response(
        content, headers={**headers, "content-type": "application/octet-stream"}
    )


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(
    detector: Detector, request: Request, protocol: str, stack: contextlib.ExitStack
) -> Job:
    """The body as a job. A scene in the binary form of V2 never lies in memory."""
    limits, headers = detector.limits, request.headers
    declared = headers.get("content-length", "0")
    length = int(declared) if declared.isdigit() else 0
    head = headers.get(INFERENCE_CONTENT_LENGTH_HEADER)
    if protocol == "v1" or head is None:
        body = await _all(_chunks(request, length, limits.request, limits.stall))
        if protocol == "v1":
            return await detector.aside(parse_v1, body, limits.pictures)
        return await detector.aside(_parse_json, body)
    if not (head.isascii() and head.isdigit()) or not 0 < int(head) <= _HEAD:
        raise bad(f"{INFERENCE_CONTENT_LENGTH_HEADER} is {head!r}: 1 to {_HEAD}")
    most = max(limits.request, limits.scene)
    chunks = _chunks(request, length, most, limits.stall)
    text = bytearray()
    async for chunk in chunks:
        text += chunk
        if len(text) >= int(head):
            break
    fields = read_json(bytes(text[: int(head)]), "the body does not begin with JSON")
    parameters = fields.get("parameters") if isinstance(fields, dict) else None
    first = bytes(text[int(head) :])
    if not (isinstance(parameters, dict) and parameters.get("scene") is True):
        rest = limits.request - len(first)
        if length > limits.request:
            raise _too_large(limits.request)
        return await detector.aside(
            parse_v2, fields, first + await _all(_most(chunks, rest, limits.request))
        )
    path = stack.enter_context(detector.scene_file())
    await _to_file(path, first, _most(chunks, limits.scene, limits.scene))
    return await detector.aside(parse_v2, fields, path)


def _parse_json(body: bytes) -> Job:
    return parse_v2(read_json(body))


async def _chunks(
    request: Request, length: int, most: int, stall: float
) -> AsyncIterator[bytes]:
    """The body in pieces.

    Raises:
        Refusal: 413, more bytes than `most`, declared or sent; 408, none for `stall` s,
            or slower than `_PACE` on the whole: a caller holds a place meanwhile.
    """
    if length > most:
        raise _too_large(most)
    stream, total = request.stream(), 0
    began = time.monotonic()
    allowed = 2 * stall + (length or most) / _PACE
    while True:
        try:
            chunk = await asyncio.wait_for(anext(stream), stall)
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError as error:
            raise Refusal(408, f"no byte of the body for {stall:g} s") from error
        if time.monotonic() - began > allowed:
            raise Refusal(408, f"the body took more than {allowed:.0f} s")
        total += len(chunk)
        if total > most:
            raise _too_large(most)
        yield chunk


async def _most(
    chunks: AsyncIterator[bytes], most: int, limit: int
) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        most -= len(chunk)
        if most < 0:
            raise _too_large(limit)
        yield chunk


async def _all(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def _to_file(path: Path, first: bytes, chunks: AsyncIterator[bytes]) -> None:
    loop = asyncio.get_running_loop()
    with path.open("wb") as file:
        file.write(first)
        async for chunk in chunks:
            await loop.run_in_executor(None, file.write, chunk)


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body is larger than {most} bytes")


def as_refusal(error: Exception) -> Refusal:
    """What a caller is told of an error: a reason, or that it is the server's."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ClientDisconnect):
        return Refusal(499, "the caller hung up")
    return Refusal(500, "internal error, see the server's log")


def note(protocol: str, refusal: Refusal, error: Exception) -> None:
    """One count and one line of the log."""
    REQUESTS.labels(protocol, refusal.status).inc()
    if refusal.status == 500:
        logger.error("%s 500", protocol, exc_info=error)
    else:
        logger.warning("%s %d %s", protocol, refusal.status, refusal)


def one_line(record: logging.LogRecord) -> bool:
    """A logging filter: what went wrong and where, in place of a traceback."""
    if record.exc_info and record.exc_info[1]:
        _, error, trace = record.exc_info
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = (
            f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
        )
        said = " ".join(str(error).split())[:500]
        record.msg = f"{record.getMessage()} {type(error).__name__}: {said} ({place})"
        record.args, record.exc_info = (), None
    return True


def _error(refusal: Refusal) -> Response:
    return Response(
        orjson.dumps({"error": str(refusal)}),
        refusal.status,
        headers={**_TEXT, **refusal.headers},
    )
