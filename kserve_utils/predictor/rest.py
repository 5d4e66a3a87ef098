"""The routes that take pictures by HTTP.

They replace KServe's own for `:predict` and `/infer`, which read a body of any size
into memory, and in the event loop: a binary tensor becomes a list of Python numbers
there, one a byte. Health, metadata and metrics stay KServe's, with bodies kept small.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from fastapi import FastAPI, Request, Response
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .model import DetectorModel
from .protocol import Job, parse_v1, parse_v2, read_json
from .refusal import Refusal, bad

_PREDICT = "/v1/models/{model_name}:predict"
_SMALL = 1 << 16  # bytes of a body that is read by no route here
_RATE = 1e6  # bytes/s of a body, at least
_HEAD = 1 << 20  # bytes of the JSON before a binary tensor


def add_routes(app: FastAPI, model: DetectorModel) -> None:
    """Put the routes in front of those that `kserve.ModelServer` adds later."""
    app.add_middleware(SmallBodies)
    app.add_middleware(CloseWhileDraining, model=model)
    app.add_exception_handler(Refusal, _refuse)

    @app.post(_PREDICT)
    async def predict(model_name: str, request: Request) -> Response:
        return await _answer(request, model, model_name, "v1")

    @app.post("/v2/models/{model_name}/infer")
    async def infer(model_name: str, request: Request) -> Response:
        return await _answer(request, model, model_name, "v2")

    @app.post("/v1/models/{model_name}:explain")
    async def explain(model_name: str) -> Response:
        raise Refusal(501, f"model {model_name!r} explains nothing: it takes :predict")

    @app.post("/v2/models/{model_name}/versions/{version}/infer")
    async def versioned(model_name: str, version: str) -> Response:
        there = f"/v2/models/{model_name}/infer"
        raise Refusal(501, f"no URL chooses a version {version!r}: ask {there}")

    @app.get(_PREDICT)  # KServe would take "NAME:predict" for the name of a model
    async def wrong_verb(model_name: str) -> Response:
        reason = f"GET /v1/models/{model_name}:predict: it takes POST"
        return JSONResponse({"error": reason}, 405, {"allow": "POST"})


async def _refuse(request: Request, refusal: Any) -> Response:
    return JSONResponse({"error": str(refusal)}, refusal.status, refusal.headers)


class SmallBodies:
    """Starlette's limit of a body, for all routes but those above."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.limited = app, RequestBodyLimitMiddleware(app, _SMALL)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        ours = path.endswith((":predict", ":explain", "/infer"))
        await (self.app if ours else self.limited)(scope, receive, send)


class CloseWhileDraining:
    """While the server drains, each connection ends with its answer.

    A Service of Kubernetes keeps a connection where it is. A client that sends one
    request after the other would stay until the server ends, and lose what it sent in
    that moment.
    """

    def __init__(self, app: ASGIApp, model: DetectorModel) -> None:
        self.app, self.model = app, model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def last(message: Message) -> None:
            if message["type"] == "http.response.start" and self.model.draining:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self.app(scope, receive, last)


async def _answer(
    request: Request, model: DetectorModel, model_name: str, protocol: str
) -> Response:
    with model.admission.admit(protocol) as job:
        model.check_name(model_name)
        await (_read_v1 if protocol == "v1" else _read_v2)(request, model, job)
        (body, headers), _ = await _unless_gone(request, model(job))
    return Response(body, headers=headers)


async def _unless_gone(request: Request, answer: Awaitable) -> Any:
    """The answer, or 499 as soon as the caller hangs up."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refusal(499, "the caller hung up")
        return work.result()
    finally:
        gone.cancel()
        work.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read_v1(request: Request, model: DetectorModel, job: Job) -> None:
    request.state.most = model.admission.limits.request
    body = await _joined(_pieces(request, model.admission.limits.stall))
    await asyncio.to_thread(parse_v1, job, body, model.admission.limits.pictures)


async def _read_v2(request: Request, model: DetectorModel, job: Job) -> None:
    """A scene in the binary form never lies in memory."""
    limits = model.admission.limits
    request.state.most = limits.request
    pieces = _pieces(request, limits.stall)
    given = request.headers.get(INFERENCE_CONTENT_LENGTH_HEADER)
    if given is None:
        fields = await asyncio.to_thread(read_json, await _joined(pieces))
        return await asyncio.to_thread(parse_v2, job, fields)
    size = int(given) if given.isascii() and given.isdigit() else 0
    if not 0 < size <= _HEAD:
        raise bad(f"{INFERENCE_CONTENT_LENGTH_HEADER} is {given!r}: 1 to {_HEAD}")
    request.state.most = max(limits.request, limits.scene + size)
    start = await _joined(pieces, size)
    fields = read_json(start[:size], "the body does not begin with JSON")
    parameters = fields.get("parameters") if isinstance(fields, dict) else None
    if isinstance(parameters, dict) and parameters.get("scene") is True:
        request.state.most = limits.scene + size
        path = job.files.enter_context(model.admission.scene_file())
        with path.open("wb") as file:
            file.write(start[size:])
            async for piece in pieces:
                await asyncio.to_thread(file.write, piece)
        return await asyncio.to_thread(parse_v2, job, fields, path)
    request.state.most = limits.request
    rest = start[size:] + await _joined(pieces)
    await asyncio.to_thread(parse_v2, job, fields, rest)


async def _joined(pieces: AsyncIterator[bytes], size: float = math.inf) -> bytes:
    """All of them, or those that have the first `size` bytes."""
    parts, length = [], 0
    async for piece in pieces:
        parts.append(piece)
        length += len(piece)
        if length >= size:
            break
    return b"".join(parts)


async def _pieces(request: Request, stall: float) -> AsyncIterator[bytes]:
    """A body as it comes, at most `request.state.most` bytes.

    Starlette's limit would not do: it does not say what is taken, nor does it change
    when the JSON before a tensor asks for a scene.

    Raises:
        Refusal: 415, the body is compressed; 413, more bytes, declared or sent; 408,
            none for `stall` s, or slower than `_RATE` on the whole: a caller holds a
            slot meanwhile; 499, it hung up.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Refusal(415, f"the body is in {encoding!r}: send it as it is")
    declared = request.headers.get("content-length", "")
    length = int(declared) if declared.isdigit() else 0
    stream, total, began = request.stream(), 0, time.monotonic()
    seconds = 2 * stall + (length or request.state.most) / _RATE
    while True:
        if max(length, total) > request.state.most:
            raise Refusal(413, f"the body is larger than {request.state.most} bytes")
        if time.monotonic() - began > seconds:
            raise Refusal(408, f"the body took more than {seconds:.0f} s")
        try:
            piece = await asyncio.wait_for(anext(stream), stall)
        except StopAsyncIteration:
            return
        except ClientDisconnect as error:
            raise Refusal(499, "the caller hung up") from error
        except asyncio.TimeoutError as error:
            raise Refusal(408, f"no byte of the body for {stall:g} s") from error
        total += len(piece)
        yield piece
