"""KServe's model server with its listening address, its gRPC and its end under control.

The SDK listens on every address, has no word for back-pressure in gRPC, answers that
it is ready for as long as it lives, and takes its model away at SIGTERM while requests
still run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from typing import Any

import grpc
from grpc_interceptor import AsyncExceptionToStatusInterceptor
from kserve import ModelServer
from kserve.errors import ModelNotFound
from kserve.logging import logger, trace_logger
from kserve.model_server import app
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2, grpc_predict_v2_pb2_grpc
from kserve.protocol.grpc.servicer import InferenceServicer

from .model import Detector
from .protocol import Job, parse_grpc
from .refusal import Refusal
from .rest import (
    LATENCY,
    REQUESTS,
    add_routes,
    as_refusal,
    note,
    one_line,
)


class _Health(DataPlane):
    """Ready while the one model is; the SDK's own says so always."""

    async def ready(self) -> bool:
        models = self.model_registry.get_models().values()
        return bool(models) and all([await model.healthy() for model in models])


class _Servicer(InferenceServicer):
    def __init__(self, dataplane: DataPlane, detector: Detector) -> None:
        super().__init__(dataplane, None)
        self._detector = detector

    async def ModelInfer(self, request: bytes, context: Any) -> Any:
        """Takes a place before the message is parsed, which can grow fortyfold."""
        detector, started = self._detector, time.perf_counter()
        with detector.place():
            job = await detector.aside(self._job, request)
            answer, _ = await detector(job)
            message = await detector.aside(answer.to_grpc)
        seconds = time.perf_counter() - started
        detector.pace(seconds)
        LATENCY.labels("grpc", "scene" if job.scene else "tile").observe(seconds)
        REQUESTS.labels("grpc", 200).inc()
        return message

    def _job(self, message: bytes) -> Job:
        try:
            request = grpc_predict_v2_pb2.ModelInferRequest.FromString(message)
        except Exception as error:  # protobuf's DecodeError, whatever its backend
            raise Refusal(400, "the message is no ModelInferRequest") from error
        if request.model_name != self._detector.name:
            raise ModelNotFound(request.model_name)
        self.validate_grpc_request(request)
        return parse_grpc(request)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> None:
        raise Refusal(403, "this server keeps the model it started with")

    RepositoryModelUnload = RepositoryModelLoad


class _Methods:
    """Stands where the generated code wants a server, and keeps what it would add."""

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        pass

    def add_registered_method_handlers(self, service: str, methods: dict) -> None:
        self.service, self.methods = service, methods


class _Statuses(AsyncExceptionToStatusInterceptor):
    async def handle_exception(
        self, ex: Exception, request_or_iterator: Any, context: Any, method_name: str
    ) -> Any:
        if isinstance(ex, ModelNotFound):
            ex = Refusal(404, str(ex))
        elif type(ex).__module__ == "kserve.errors":
            ex = Refusal(400, str(ex))
        refusal = as_refusal(ex)
        note("grpc", refusal, ex)
        metadata = tuple(refusal.headers.items())
        await context.abort(refusal.code, str(refusal), metadata)


class Server(ModelServer):
    """One detector by REST and gRPC until SIGTERM, then an orderly end.

    Args:
        detector: loaded.
        host: address to listen on; "0.0.0.0" in a pod.
        http_port, grpc_port: free ports.
        drain_delay: seconds after the signal in which it is not ready, but still
            serves: so long may a cluster go on sending.
        grace_period: seconds after that in which requests may come to their end.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        host: str = "0.0.0.0",
        http_port: int = 8080,
        grpc_port: int = 8081,
        drain_delay: float = 3.0,
        grace_period: int = 30,
    ) -> None:
        super().__init__(
            http_port=http_port,
            grpc_port=grpc_port,
            workers=1,  # each further process would hold the weights again
            enable_grpc=False,  # started here, with limits
            enable_latency_logging=False,
            grace_period=grace_period,
        )
        self.dataplane = _Health(model_registry=self.registered_models)
        self.detector, self.host, self.drain_delay = detector, host, drain_delay
        trace_logger.setLevel(logging.WARNING)  # else a line for each request
        logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
        for name in ("kserve", "uvicorn.error"):
            logging.getLogger(name).addFilter(one_line)
        add_routes(app, detector)

    def register_signal_handler(self) -> None:
        """Nothing: `_serve` does it, in the event loop."""

    async def _serve(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, stop.set)
        listener = await self._start_grpc()
        self._rest_server.config.host = self.host
        web = self._rest_server._server
        web.capture_signals = contextlib.nullcontext  # the handlers above stay
        (coroutine,) = self.servers
        serving = asyncio.ensure_future(coroutine)
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            self.detector.draining = True
            logger.info("draining: %d requests in flight", self.detector.waiting)
            await asyncio.sleep(self.drain_delay)
            web.should_exit = True
        stopping.cancel()
        await asyncio.gather(serving, listener.stop(self.grace_period))

    async def _start_grpc(self) -> grpc.aio.Server:
        limits = self.detector.limits
        listener = grpc.aio.server(
            interceptors=(_Statuses(),),
            options=[
                ("grpc.max_receive_message_length", limits.grpc),
                ("grpc.max_send_message_length", -1),  # the boxes of a scene
                ("grpc.so_reuseport", 0),  # a port in use is an error
            ],
            # health checks come through beside those that wait
            maximum_concurrent_rpcs=limits.queue + 16,
        )
        servicer = _Servicer(self.dataplane, self.detector)
        infer = grpc.unary_unary_rpc_method_handler(
            servicer.ModelInfer,  # gets the message as it came
            response_serializer=grpc_predict_v2_pb2.ModelInferResponse.SerializeToString,
        )
        taken = _Methods()
        grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            servicer, taken
        )
        methods = {**taken.methods, "ModelInfer": infer}
        handler = grpc.method_handlers_generic_handler(taken.service, methods)
        listener.add_generic_rpc_handlers((handler,))
        listener.add_insecure_port(f"{self.host}:{self.grpc_port}")
        await listener.start()
        return listener
