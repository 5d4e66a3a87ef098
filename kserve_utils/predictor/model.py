"""The detector as a `kserve.Model`: a job in, the same job with its boxes out.

Forward passes run one at a time, or `at_once` of them, in threads of their own and in
the order they were asked for, so the event loop stays free for health checks, and a
tile waits for one batch of a scene at most, not for the whole scene.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from kserve import InferResponse, Model
from PIL import Image
from prometheus_client import Counter, Gauge
from torch import nn

from e2e_utils.predict import predict_image, predict_scene, to_geojson

from .pictures import (
    MAX_SIDE,
    check_picture,
    check_scene,
    decode,
    scene_error,
)
from .protocol import OUTPUTS, Job, answer_v1, answer_v2
from .refusal import Refusal, bad

QUEUE = Gauge("predictor_queue_length", "requests that wait or run")
PICTURES = Counter("predictor_pictures", "pictures answered", ["kind"])
_SCENES = "predictor-scenes-"
SCENE_THRESHOLD = 0.05  # as predict_scene's own


@dataclass(frozen=True)
class Limits:
    """What a server takes at most; more is refused, never tried.

    Attributes:
        queue: requests that wait or run; memory is bounded by queue x request.
        request: bytes of a REST body.
        grpc: bytes of a gRPC message; protobuf can make forty times as many of them.
        pictures: of one V1 request.
        scene: bytes of a scene by the binary form of V2, which goes to a file.
        scene_pixels: of a scene whose format is decoded whole, 3 bytes each.
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


def _remove_left_scenes() -> None:
    """Remove the scenes of servers that were killed: a pod's /tmp outlives them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCENES}*"):
        pid = folder.name.removeprefix(_SCENES).split("-")[0]
        # in a container, the one before had this very number
        gone = pid.isdigit() and not psutil.pid_exists(int(pid))
        if gone or pid == str(os.getpid()):
            shutil.rmtree(folder, ignore_errors=True)


class Turns(nn.Module):
    """A detector whose forward passes take turns in few threads, first come first.

    Requests are not stacked into batches: on one core, two 300 px tiles took torch 171
    ms stacked and 189 ms one after the other, four 365 and 342 ms (fasterrcnn_small),
    the exported graphs take one picture, and the first would wait for the last.
    """

    def __init__(
        self, detector: nn.Module, thread: Executor, cancelled: threading.Event
    ) -> None:
        super().__init__()
        self.detector, self.thread, self.cancelled = detector, thread, cancelled

    def forward(self, images: list[torch.Tensor]) -> list[dict]:
        """As torchvision's detectors; called from any thread but the engine's."""
        return self.thread.submit(self._run, images).result()

    @torch.inference_mode()
    def _run(self, images: list[torch.Tensor]) -> list[dict]:
        if self.cancelled.is_set():
            raise Refusal(499, "the caller is gone")
        return self.detector(images)


class Detector(Model):
    """Boxes for tiles and scenes.

    Args:
        detector: of `kserve_utils.engines.load_engine`.
        meta: its description: "class_names", "tile_size", "overlap",
            "score_threshold", "max_pixels".
        name: in the URLs.
        limits: see `Limits`.
        at_once: forward passes at the same time. On as many cores, several of one
            thread each give more pictures a second than one of several threads, and
            make a single caller wait longer.
    """

    def __init__(
        self,
        detector: nn.Module,
        meta: dict,
        name: str,
        limits: Limits,
        at_once: int = 1,
    ) -> None:
        super().__init__(name)
        self.detector, self.meta, self.limits = detector.eval(), meta, limits
        self.draining = False
        self.waiting = self.scenes = 0
        self._pace = 1.0  # seconds a request, smoothed
        self._engine = ThreadPoolExecutor(at_once, "engine")
        self._readers = ThreadPoolExecutor(2, "reader")
        # one more, which decodes while the others wait for their passes
        self._tiles = ThreadPoolExecutor(at_once + 1, "tile")
        self._scenes = ThreadPoolExecutor(1, "scene")
        _remove_left_scenes()
        self._folder = tempfile.TemporaryDirectory(prefix=f"{_SCENES}{os.getpid()}-")

    def load(self) -> bool:
        """Answer one picture from end to end; ready only if that worked."""
        size = self.meta["tile_size"]
        file = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(noise).save(file, "JPEG")
        answer_v1(self._answer_tiles(Job("v1", [file.getvalue()])))
        self.ready = True
        return self.ready

    async def healthy(self) -> bool:
        """Whether new requests should come here."""
        return self.ready and not self.draining

    def get_input_types(self) -> list[dict]:
        """Of V2's model metadata: the main form, bytes of a picture file."""
        return [{"name": "image", "datatype": "UINT8", "shape": [-1]}]

    def get_output_types(self) -> list[dict]:
        """Of V2's model metadata."""
        return [
            {"name": name, "datatype": datatype, "shape": shape}
            for name, (datatype, shape) in OUTPUTS.items()
        ]

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue, taken before the body is read.

        Raises:
            Refusal: 429, all places are taken.
        """
        if self.waiting >= self.limits.queue:
            wait = min(30, max(1, math.ceil(self._pace * self.waiting)))
            raise Refusal(429, f"{self.waiting} requests wait already", wait)
        self.waiting += 1
        QUEUE.set(self.waiting)
        try:
            yield
        finally:
            self.waiting -= 1
            QUEUE.set(self.waiting)

    @contextlib.contextmanager
    def scene_file(self) -> Iterator[Path]:
        """A place for a scene and the path of its file, which goes afterwards.

        Raises:
            Refusal: 429, all places of scenes are taken.
        """
        if self.scenes >= self.limits.scenes:
            raise Refusal(429, f"{self.scenes} scenes wait already", 30)
        self.scenes += 1
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder.name) as file:
                yield Path(file.name)
        finally:
            self.scenes -= 1

    def pace(self, seconds: float) -> None:
        """Learn how long a request takes, for Retry-After."""
        self._pace += 0.1 * (seconds / max(1, self.waiting) - self._pace)

    async def aside(self, do: Callable, *args: Any) -> Any:
        """What parses a body or writes an answer, off the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, do, *args)

    async def preprocess(self, payload: Job, headers: dict | None = None) -> Job:
        """Refuse what its header shows to be no picture or too large, before it waits.

        Raises:
            Refusal: 400.
        """
        if not payload.scene:
            await self.aside(self._check, payload)
        return payload

    def _check(self, job: Job) -> None:
        most = self.meta["max_pixels"]
        for index, picture in enumerate(job.pictures):
            if isinstance(picture, bytes):
                check_picture(picture, most, job.where(index))
            elif math.prod(picture.shape[:2]) > most:
                height, width, _ = picture.shape
                raise bad(f"the picture has {width} x {height} pixels, at most {most}")

    async def predict(self, payload: Job, headers: dict | None = None, *_: Any) -> Job:
        """Fill `payload.found`.

        Raises:
            Refusal: 400 for a picture that cannot be decoded, 499 once the job is
                cancelled, 429 for a scene too many, 503 if the GPU has not the memory.
        """
        loop = asyncio.get_running_loop()
        try:
            if not payload.scene:
                return await loop.run_in_executor(
                    self._tiles, self._answer_tiles, payload
                )
            if isinstance(payload.pictures[0], bytes):  # else the file is there
                with self.scene_file() as path:
                    return await self._scene(payload, path)
            return await self._scene(payload, None)
        except torch.cuda.OutOfMemoryError as error:
            # what this job held is free again; the rest may be another's on the GPU
            reason = "the GPU's memory is full: ask again later, or send fewer pixels"
            raise Refusal(503, reason, retry_after=5) from error
        finally:
            payload.cancelled.set()  # also when this coroutine is cancelled
            payload.pictures = []  # a job that waits in a pool would hold them

    async def _scene(self, job: Job, path: Path | None) -> Job:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._scenes, self._answer_scene, job, path)

    def _answer_tiles(self, job: Job) -> Job:
        turns = Turns(self.detector, self._engine, job.cancelled)
        threshold = job.score_threshold
        if threshold is None:
            threshold = self.meta["score_threshold"]
        for index, picture in enumerate(job.pictures):
            if isinstance(picture, bytes):
                picture = decode(picture, self.meta["max_pixels"], job.where(index))
            found = predict_image(turns, picture, threshold, self.meta["class_names"])
            job.found.append(self._finished(job, found))
            PICTURES.labels("tile").inc()
        return job

    def _answer_scene(self, job: Job, path: Path | None) -> Job:
        if path is not None:
            path.write_bytes(job.pictures[0])
            job.pictures = [path]
        image = job.pictures[0]
        if isinstance(image, Path):
            check_scene(image, self.limits.scene_pixels)
        elif max(image.shape[:2]) > MAX_SIDE:
            raise bad(f"scene: the shape {image.shape}, a side is at most {MAX_SIDE}")
        threshold = job.score_threshold
        if threshold is None:
            threshold = max(SCENE_THRESHOLD, self.meta["score_threshold"])
        try:
            found = predict_scene(
                Turns(self.detector, self._engine, job.cancelled),
                image,
                self.meta["tile_size"],
                self.meta["overlap"],
                score_threshold=threshold,
                class_names=self.meta["class_names"],
            )
        except ValueError as error:
            if isinstance(image, Path) and str(image) in str(error):
                raise scene_error(image, error) from error  # of its pixels
            raise
        job.found.append(self._finished(job, found))
        PICTURES.labels("scene").inc()
        return job

    def _finished(self, job: Job, found: dict) -> dict:
        if job.geojson:
            found["geojson"] = to_geojson(found, self.meta["class_names"])
        return found

    async def postprocess(
        self, result: Job, headers: dict | None = None, *_: Any
    ) -> bytes | InferResponse:
        """The answer in the job's protocol: V1's bytes, or V2's InferResponse."""
        if result.protocol == "v1":
            return await self.aside(answer_v1, result)
        return await self.aside(answer_v2, result, self.name)

    def close(self) -> bool:
        """Let go of threads and files; True if a forward pass still runs."""
        for pool in (self._readers, self._tiles, self._scenes, self._engine):
            pool.shutdown(wait=False, cancel_futures=True)
        self._folder.cleanup()
        return any(thread.is_alive() for thread in self._engine._threads)
