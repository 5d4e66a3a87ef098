"""KServe's model server with its listening address, its gRPC and its end under control.

The SDK listens on every address, has no word for back-pressure in gRPC, answers that
it is ready for as long as it lives, and takes its model away at SIGTERM while requests
still run.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from kserve import ModelServer
from kserve.logging import logger, trace_logger
from kserve.model_server import app
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as pb_grpc
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.model_repository_extension import ModelRepositoryExtension

from .model import DetectorModel
from .protocol import Job, parse_grpc
from .refusal import Refusal, bad
from .rest import add_routes


class _Plane(DataPlane):
    """The SDK's own is always ready, and knows no version of a model."""

    async def ready(self) -> bool:
        models = self.model_registry.get_models().values()
        return bool(models) and all([await model.healthy() for model in models])

    async def model_metadata(self, model_name: str) -> dict:
        about = await super().model_metadata(model_name)
        version = self.get_model_from_registry(model_name).version
        return {**about, "versions": [version] if version else []}


class _Fixed(ModelRepositoryExtension):
    """A repository of the one model, whoever asks to load or unload it."""

    async def load(self, model_name: str) -> None:
        raise Refusal(403, "this server keeps the model it started with")

    unload = load


class _Servicer(InferenceServicer):
    def __init__(self, server: Server) -> None:
        super().__init__(server.dataplane, server.model_repository_extension)
        self._model = server.model

    async def ModelInfer(self, request: bytes, context: Any) -> Any:
        """Takes a slot before the message is parsed, which can grow fortyfold."""
        try:
            with self._model.admission.admit("grpc") as job:
                await asyncio.to_thread(self._parse, request, job)
                message, _ = await self._model(job)
            return message
        except Refusal as refusal:
            context.set_trailing_metadata(tuple(refusal.headers.items()))
            raise

    def _parse(self, message: bytes, job: Job) -> None:
        try:
            request = pb.ModelInferRequest.FromString(message)
        except Exception as error:  # protobuf's DecodeError, whatever its backend
            raise bad("the message is no ModelInferRequest") from error
        self._model.check_name(request.model_name)
        self.validate_grpc_request(request)
        parse_grpc(job, request)


class Server(ModelServer):
    """One detector by REST and gRPC until SIGTERM, then an orderly end.

    Args:
        model: loaded.
        args: the command line: `host`, `http_port` and `grpc_port`; `drain_delay`,
            seconds after the signal in which it is not ready, but still serves, as long
            as a cluster goes on sending; `grace_period`, seconds after that in which
            requests may come to their end, of REST and gRPC at the same time.
    """

    def __init__(self, model: DetectorModel, args: argparse.Namespace) -> None:
        super().__init__(
            http_port=args.http_port,
            workers=1,  # each further process would hold the weights again
            enable_grpc=False,  # started here, with limits
            enable_latency_logging=False,
            grace_period=args.grace_period,
        )
        self.model, self.args = model, args
        self.dataplane = _Plane(self.registered_models)
        self.model_repository_extension = _Fixed(self.registered_models)
        trace_logger.setLevel(logging.WARNING)  # else a line for each request
        logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
        for name in ("kserve", "uvicorn.error"):
            logging.getLogger(name).addFilter(one_line)
        add_routes(app, model)

    def register_signal_handler(self) -> None:
        """Nothing: uvicorn has its own, which `_serve` replaces."""

    async def _serve(self) -> None:
        loop, web = asyncio.get_running_loop(), self._rest_server._server
        # of asyncio.to_thread, which reads bodies: more at once would fill the memory
        loop.set_default_executor(ThreadPoolExecutor(2, "reader"))
        stop = asyncio.Event()
        web.config.host = self.args.host
        web.handle_exit = lambda *_: loop.call_soon_threadsafe(stop.set)
        listener = await self._start_grpc()
        await asyncio.gather(self._rest(listener), self._drain(stop, web, listener))

    async def _rest(self, listener: Any) -> None:
        (rest,) = self.servers
        try:
            await rest
        except SystemExit as error:  # uvicorn has logged why
            await listener.stop(None)
            address = f"{self.args.host}:{self.args.http_port}"
            raise OSError(f"cannot listen on {address}") from error

    async def _drain(self, stop: asyncio.Event, web: Any, listener: Any) -> None:
        """At the signal: not ready, and later the end of both servers at once."""
        await stop.wait()
        self.model.draining = True
        logger.info("draining: %d requests in flight", self.model.admission.in_flight)
        await asyncio.sleep(self.args.drain_delay)
        web.should_exit = True  # its own grace period begins
        await listener.stop(self.args.grace_period)

    async def _start_grpc(self) -> grpc.aio.Server:
        limits = self.model.admission.limits
        listener = grpc.aio.server(
            interceptors=(ExceptionToStatusInterceptor(),),
            options=[
                ("grpc.max_receive_message_length", limits.grpc),
                ("grpc.max_send_message_length", -1),  # the boxes of a scene
                ("grpc.so_reuseport", 0),  # a port in use is an error
            ],
            # health checks come through beside those that wait
            maximum_concurrent_rpcs=limits.queue + 16,
        )
        servicer = _Servicer(self)
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, listener)
        infer = grpc.unary_unary_rpc_method_handler(
            servicer.ModelInfer,  # gets the message as it came
            response_serializer=pb.ModelInferResponse.SerializeToString,
        )
        service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
        listener.add_registered_method_handlers(service, {"ModelInfer": infer})
        listener.add_insecure_port(f"{self.args.host}:{self.args.grpc_port}")
        await listener.start()
        return listener


def one_line(record: logging.LogRecord) -> bool:
    """A logging filter: what went wrong and where, in place of a traceback."""
    if record.exc_info and record.exc_info[1]:
        _, error, trace = record.exc_info
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        line = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
        text = " ".join(str(error).split())[:500]
        record.msg = f"{record.getMessage()} {type(error).__name__}: {text} ({line})"
        record.args, record.exc_info = (), None
    return True
