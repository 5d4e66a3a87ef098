"""The detector as a `kserve.Model`: a job in, its answer out.

Forward passes run one at a time, or `at_once` of them, in threads of their own and in
the order they were asked for, so the event loop stays free for health checks, and a
tile waits for one batch of a scene at most, not for the whole scene.
"""

from __future__ import annotations

import asyncio
import io
import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kserve import Model
from PIL import Image
from prometheus_client import Counter
from torch import nn

from e2e_utils.georeference import to_geojson
from e2e_utils.predict import predict_image, predict_scene

from .admission import Admission, Limits
from .pictures import (
    check_picture,
    check_scene,
    check_sides,
    check_size,
    decode,
    place_of,
    scene_error,
)
from .protocol import OUTPUTS, Job, answer
from .refusal import Refusal

PICTURES = Counter("predictor_pictures", "pictures answered", ["kind"])
_SCENE_THRESHOLD = 0.05  # as predict_scene's own


class QueuedDetector(nn.Module):
    """A detector whose forward passes queue for an executor, first come first served.

    Requests are not stacked into batches: on one core, two 300 px tiles took torch 171
    ms stacked and 189 ms one after the other, four 365 and 342 ms (fasterrcnn_small),
    the exported graphs take one picture, and the first would wait for the last.
    """

    def __init__(
        self, detector: nn.Module, executor: Executor, cancelled: threading.Event
    ) -> None:
        super().__init__()
        self.detector, self.executor, self.cancelled = detector, executor, cancelled

    def forward(self, images: list[torch.Tensor]) -> list[dict]:
        """As torchvision's detectors; called from any thread but the executor's."""
        return self.executor.submit(self._run, images).result()

    @torch.inference_mode()
    def _run(self, images: list[torch.Tensor]) -> list[dict]:
        if self.cancelled.is_set():
            raise Refusal(499, "the caller is gone")
        return self.detector(images)


class DetectorModel(Model):
    """Boxes for tiles and scenes.

    Args:
        detector: of `kserve_utils.engines.load_engine`.
        meta: its description: "class_names", "tile_size", "overlap",
            "score_threshold", "max_pixels", "stretch", "files".
        name: in the URLs.
        limits: of its requests.
        at_once: forward passes at the same time. On as many cores, several of one
            thread each give more pictures a second than one of several threads, and
            make a single caller wait longer.
        nms_threshold: above 0, at most 1; of two boxes of one class in a scene whose
            IoU is above, the better stays, see `predict_scene`.

    Raises:
        ValueError: nms_threshold is out of its range.
    """

    def __init__(
        self,
        detector: nn.Module,
        meta: dict,
        name: str,
        limits: Limits,
        at_once: int = 1,
        nms_threshold: float = 0.5,
    ) -> None:
        super().__init__(name)
        if not 0 < nms_threshold <= 1:
            raise ValueError(f"nms_threshold is {nms_threshold}: above 0, at most 1")
        self.nms_threshold = nms_threshold
        self.detector, self.meta = detector.eval(), meta
        self.stretch = meta.get("stretch")
        # of the weights, the same for each engine: the start of their SHA-256
        self.version = meta.get("files", {}).get("model.pth", "")[:12] or None
        self.admission, self.draining = Admission(limits), False
        self._passes = ThreadPoolExecutor(at_once, "forward")
        # one more, which decodes while the others wait for their passes
        self._tile_jobs = ThreadPoolExecutor(at_once + 1, "tile")
        self._scene_jobs = ThreadPoolExecutor(1, "scene")

    def load(self) -> bool:
        """Answer one picture from end to end; ready only if that worked."""
        size = self.meta["tile_size"]
        file = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(noise).save(file, "JPEG")
        answer(self._detect(Job("v1", [file.getvalue()])), self.name)
        self.ready = True
        return self.ready

    def check_name(self, name: str) -> None:
        """Raises a Refusal, 404, if a request is for another model."""
        if name != self.name:
            raise Refusal(404, f"no model {name!r}: there is {self.name!r}")

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

    async def preprocess(self, payload: Job, headers: dict | None = None) -> Job:
        """Refuse what its header shows to be no picture or too large, before it waits.

        Raises:
            Refusal: 400.
        """
        if not payload.scene:
            await asyncio.to_thread(self._check, payload)
        return payload

    def _check(self, job: Job) -> None:
        most = self.meta["max_pixels"]
        for index, picture in enumerate(job.pictures):
            if isinstance(picture, bytes):
                check_picture(picture, most, job.where(index), self.stretch)
            else:
                height, width, _ = picture.shape
                check_size(height, width, most, job.where(index))

    async def predict(self, payload: Job, headers: dict | None = None, *_: Any) -> Job:
        """Fill `payload.found`.

        Raises:
            Refusal: 400 for a picture that cannot be decoded, 499 once the job is
                cancelled, 429 for a scene too many, 503 if the GPU has not the memory.
        """
        loop = asyncio.get_running_loop()
        executor = self._scene_jobs if payload.scene else self._tile_jobs
        if payload.scene and isinstance(payload.pictures[0], bytes):
            path = payload.files.enter_context(self.admission.scene_file())
            await asyncio.to_thread(path.write_bytes, payload.pictures[0])
            payload.pictures = [path]
        try:
            return await loop.run_in_executor(executor, self._detect, payload)
        except torch.cuda.OutOfMemoryError as error:
            # what this job held is free again; the rest may be another's on the GPU
            reason = "the GPU's memory is full: ask again later, or send fewer pixels"
            raise Refusal(503, reason, retry_after=5) from error

    def _detect(self, job: Job) -> Job:
        detector = QueuedDetector(self.detector, self._passes, job.cancelled)
        threshold, names = job.score_threshold, self.meta["class_names"]
        if threshold is None:
            least = _SCENE_THRESHOLD if job.scene else 0.0
            threshold = max(least, self.meta["score_threshold"])
        for index, picture in enumerate(job.pictures):
            if job.scene:
                found = self._detect_scene(detector, picture, threshold)
            else:
                place, where = None, job.where(index)
                if isinstance(picture, bytes):
                    content = picture
                    most = self.meta["max_pixels"]
                    picture = decode(content, most, where, self.stretch)
                    place = place_of(content, where) if job.geojson else None
                found = predict_image(detector, picture, threshold, names)
                found["georeference"] = place
            if job.geojson:
                found["geojson"] = to_geojson(found)
            job.found.append(found)
            PICTURES.labels(job.kind).inc()
        return job

    def _detect_scene(
        self, detector: nn.Module, scene: Path | np.ndarray, threshold: float
    ) -> dict:
        if isinstance(scene, Path):
            limits = self.admission.limits
            check_scene(scene, limits.scene_pixels, limits.scene // 3, self.stretch)
        else:
            check_sides(*scene.shape[:2])
        try:
            return predict_scene(
                detector,
                scene,
                self.meta["tile_size"],
                self.meta["overlap"],
                score_threshold=threshold,
                nms_threshold=self.nms_threshold,
                class_names=self.meta["class_names"],
                stretch=self.stretch,
            )
        except ValueError as error:
            if isinstance(scene, Path) and str(scene) in str(error):
                raise scene_error(scene, error) from error  # of its pixels
            raise

    async def postprocess(
        self, result: Job, headers: dict | None = None, *_: Any
    ) -> Any:
        """The answer in the job's protocol, see `protocol.answer`."""
        return await asyncio.to_thread(answer, result, self.name, self.version)

    def close(self) -> bool:
        """Let go of threads and files; True if a forward pass still runs."""
        for executor in (self._tile_jobs, self._scene_jobs, self._passes):
            executor.shutdown(wait=False, cancel_futures=True)
        self.admission.close()
        return any(thread.is_alive() for thread in self._passes._threads)
