"""Who is let in: slots of a bounded queue, counts, and what a refused caller reads."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from kserve.errors import InvalidInput
from kserve.logging import logger
from prometheus_client import Counter, Gauge, Histogram

from .protocol import Job
from .refusal import Refusal, bad

QUEUE = Gauge("predictor_queue_length", "requests that wait or run")
REQUESTS = Counter("predictor_requests", "requests", ["protocol", "code"])
LATENCY = Histogram(
    "predictor_latency_seconds",
    "from the first byte to the answer, of requests that were answered",
    ["protocol", "kind"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)
_SCENES = "predictor-scenes-"


@dataclass(frozen=True)
class Limits:
    """What a server takes at most; more is refused, never tried.

    Attributes:
        queue: requests that wait or run; memory is bounded by queue x request.
        request: bytes of a REST body.
        grpc: bytes of a gRPC message; protobuf can make forty times as many of them.
        pictures: of one V1 request.
        scene: bytes of a scene by the binary form of V2, which goes to a file; decoded,
            3 a pixel, as many are taken of a compressed one.
        scene_pixels: that are decoded at a time, 3 bytes each: of PNG and JPEG all.
        scenes: that wait or run, each with its file.
        stall: seconds without a byte of a body that is still coming.
    """

    queue: int = 16
    request: int = 64 << 20
    grpc: int = 8 << 20
    pictures: int = 32
    scene: int = 2048 << 20
    scene_pixels: int = 100_000_000
    scenes: int = 2
    stall: float = 20.0


class Admission:
    """The queue of a server; `limits` bound it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.in_flight = self.scenes = 0
        self._seconds = 0.0  # that a request of tiles adds to the wait, smoothed
        _remove_left_scenes()
        self._folder = tempfile.TemporaryDirectory(prefix=f"{_SCENES}{os.getpid()}-")

    @contextlib.contextmanager
    def admit(self, protocol: str) -> Iterator[Job]:
        """A slot in the queue, taken before a request's body is read, and its job.

        The request is timed and counted, and logged in a line if it is refused.

        Raises:
            Refusal: 429, all slots are taken; or what the block raises, 500 with
                nothing of its text if it was no refusal.
        """
        job, began = Job(protocol), time.perf_counter()
        try:
            with self._queue_slot() as place, job.files:
                yield job
        except Exception as error:
            raise _refused(protocol, error) from None
        finally:
            job.cancelled.set()  # also when the caller is gone
            job.pictures = []  # a job that waits for an executor would hold them
        seconds = time.perf_counter() - began
        if job.kind == "tile":  # tiles pass a scene between its batches
            each = seconds / place
            self._seconds += (0.1 if self._seconds else 1.0) * (each - self._seconds)
        LATENCY.labels(protocol, job.kind).observe(seconds)
        REQUESTS.labels(protocol, 200).inc()

    @contextlib.contextmanager
    def _queue_slot(self) -> Iterator[int]:
        """Its place in the queue, from 1."""
        if self.in_flight >= self.limits.queue:
            wait = min(30, max(1, math.ceil(self._seconds * self.in_flight)))
            raise Refusal(429, f"{self.in_flight} requests wait already", wait)
        self.in_flight += 1
        QUEUE.set(self.in_flight)
        try:
            yield self.in_flight
        finally:
            self.in_flight -= 1
            QUEUE.set(self.in_flight)

    @contextlib.contextmanager
    def scene_file(self) -> Iterator[Path]:
        """The path of a file for a scene, which goes afterwards.

        Raises:
            Refusal: 429, too many scenes wait or run.
        """
        if self.scenes >= self.limits.scenes:
            raise Refusal(429, f"{self.scenes} scenes wait already", 30)
        self.scenes += 1
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder.name) as file:
                yield Path(file.name)
        finally:
            self.scenes -= 1

    def close(self) -> None:
        """Remove the folder of the scenes' files."""
        self._folder.cleanup()


def _refused(protocol: str, error: Exception) -> Refusal:
    """What the caller reads of an error, after a count and a line of the log."""
    if isinstance(error, InvalidInput):
        error = bad(str(error))
    if isinstance(error, Refusal):
        refusal = error
        logger.warning("%s %d %s", protocol, refusal.status, refusal)
    else:
        refusal = Refusal(500, "internal error, see the server's log")
        logger.error("%s 500", protocol, exc_info=error)
    REQUESTS.labels(protocol, refusal.status).inc()
    return refusal


def _remove_left_scenes() -> None:
    """Remove the scenes of servers that were killed: a pod's /tmp outlives them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCENES}*"):
        pid = folder.name.removeprefix(_SCENES).split("-")[0]
        # in a container, the one before had this very number
        gone = pid.isdigit() and not psutil.pid_exists(int(pid))
        if gone or pid == str(os.getpid()):
            shutil.rmtree(folder, ignore_errors=True)
