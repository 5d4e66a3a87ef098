"""What an actor of predict.py does: a scene or a block of one to boxes, and the merge.

Copy: this file, archive.py and e2e_utils.
"""

from __future__ import annotations

import json
import os
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray
import torch

from e2e_utils.checkpoint import TRAINING_KEYS, load_detector, read_checkpoint
from e2e_utils.files import digest
from e2e_utils.georeference import georeference_of, write_boxes
from e2e_utils.grid import tile_grid
from e2e_utils.hardware import PRECISIONS
from e2e_utils.scenes import Scene
from e2e_utils.sliced import merge_tables, predict_tiles
from e2e_utils.stretch import as_stretch
from ray_files.archive import (
    Archive,
    Output,
    gdal_settings,
    local_copy,
    one_line,
    open_source,
)

WHOLE = -1  # `stop` of a scene that was not cut


@dataclass
class Job:
    """What every actor has to know."""

    checkpoint: Any  # content of the file; in an actor's hands a reference to it
    path: str  # of the file
    output: Output
    class_names: list[str]
    category_ids: list[int] | None
    batch_size: int
    block_mb: float
    gpu: bool
    threads: int
    score_threshold: float
    precision: str
    border: float
    size: int
    overlap: float
    stretch: dict | None


class Worker:
    """An actor: it holds the detector, and takes scenes or blocks of them."""

    def __init__(self, job: Job) -> None:
        began = time.perf_counter()
        gdal_settings()
        torch.set_num_threads(job.threads)
        model = load_detector(ray.get(job.checkpoint), job.path)
        self.job, self.model = job, model.to("cuda" if job.gpu else "cpu")
        self.actor = f"{ray.util.get_node_ip_address()}:{os.getpid()}"
        self.start = time.perf_counter() - began

    def __call__(self, row: dict) -> dict:
        """{"record": JSON, "part": bytes}, see `_predict`; an error is a record too."""
        began = time.time()
        try:
            record, part = self._predict(row)
        except Exception as error:  # whatever one scene raises, the others go on
            record, part = {"error": one_line(error)}, b""
        about = {"actor": self.actor, "start": self.start}
        about |= {"from": began, "to": time.time()}
        keys = {key: row[key] for key in ("name", "start", "stop")}
        return {"record": json.dumps({**record, "worker": about, **keys}), "part": part}

    def _predict(self, row: dict) -> tuple[dict, bytes]:
        """The record of a scene that is done, or where to cut it; or a block."""
        job, whole = self.job, row["stop"] == WHOLE
        with open_source(row["source"], stretch=job.stretch) as scene:
            grid = tile_grid(scene.height, scene.width, job.size, job.overlap)
            cuts = block_starts(scene, len(grid), job.batch_size, job.block_mb)
            if whole and len(cuts) > 1:
                return {"cuts": [*cuts, len(grid)]}, b""
            table = predict_tiles(
                self.model,
                scene,
                grid,
                row["start"],
                None if whole else row["stop"],
                batch_size=job.batch_size,
                score_threshold=job.score_threshold,
                border=job.border,
                amp_dtype=PRECISIONS[job.precision],
            )
            place, pixels = georeference_of(scene), scene.height * scene.width
        part = pickle.dumps((table, place, pixels))
        return (finish(job, row, [part]), b"") if whole else ({"block": True}, part)


def block_starts(scene: Scene, tiles: int, batch_size: int, block_mb: float) -> list:
    """Where the blocks of a scene begin among its tiles, at multiples of a batch.

    A block has about `block_mb` of decoded pixels, and no fewer than its file decodes
    at once (all of a PNG or JPEG): blocks would each decode them anew.
    """
    decoded = scene.height * scene.width * 3
    count = max(1.0, decoded / max(block_mb * 1e6, scene.held))
    batches = -(-tiles // batch_size)
    step = max(1, round(batches / count)) * batch_size
    return list(range(0, tiles, step if count > 1 else tiles))


def finish(job: Job, row: dict, parts: Iterable[bytes]) -> dict:
    """Merge the boxes of a scene and write its file.

    Args:
        job: settings and output.
        row: of the scene.
        parts: pickled (table, georeference, pixels) of its blocks, in their order.

    Returns:
        {"boxes": {class: count}, "pixels"}.

    Raises:
        OSError: the file cannot be written; nothing of it is there.
    """
    tables, places, pixels = zip(*map(pickle.loads, parts), strict=True)
    found = merge_tables(tables, class_names=job.class_names)
    with tempfile.TemporaryDirectory() as folder:
        path, scenes = f"{folder}/{{scene}}{job.output.ending}", {row["name"]: found}
        scenes[row["name"]]["georeference"] = places[0]
        (file,) = write_boxes(path, scenes, job.category_ids)
        content = file.read_bytes()
    if job.output.ending == ".json":
        image_id = json.loads(row["id"])
        results = [{**one, "image_id": image_id} for one in json.loads(content)]
        content = json.dumps(results).encode()
    job.output.put(job.output.file_of(row["name"]), content)
    return {"boxes": Counter(found["names"]), "pixels": pixels[0]}


def load_job(
    checkpoint: str, archive: Archive, output: Output, machine: dict, options: dict
) -> tuple[Job, dict]:
    """Read the checkpoint, and check all that decides on the boxes.

    Args:
        checkpoint: path or URL.
        archive, output: of the run.
        machine: batch_size, block_mb, gpu and threads of a `Job`.
        options: score_threshold, precision, border, size, overlap, stretch; the last
            three are the checkpoint's where they are None.

    Returns:
        The job, and the record of its settings.

    Raises:
        ValueError, OSError: no checkpoint, one of other classes, or no such option.
    """
    with local_copy(checkpoint) as path:
        content, sha256 = read_checkpoint(path), digest(path)
    content = {key: v for key, v in content.items() if key not in TRAINING_KEYS}
    load_detector(content, checkpoint)  # raises here what it would in every actor
    ids, names = content.get("category_ids"), content["class_names"]
    known = dict(zip(ids or range(len(names) - 1), names[1:], strict=True))
    for number, name in known.items() if archive.classes else ():
        if archive.classes.get(number) != name:
            raise ValueError(
                f"{checkpoint} has other classes than the COCO file: category {number} "
                f"is {name!r} here, {archive.classes.get(number)!r} there"
            )
    for key, name in ("size", "tile_size"), ("overlap", "overlap"):
        if options[key] is None and content.get(name) is None:
            raise ValueError(f"{checkpoint} has no {name}: give {key}")
    own = {"size": content.get("tile_size"), **content}
    options = {key: own.get(key) if v is None else v for key, v in options.items()}
    _check(options, machine)
    stretch = as_stretch(options["stretch"])
    options["stretch"] = stretch.to_dict() if stretch else None
    settings = {"scenes": archive.root, "checkpoint": sha256, "format": output.ending}
    job = Job(content, checkpoint, output, names, ids, **machine, **options)
    return job, {**settings, **options}


def _check(options: dict, machine: dict) -> None:
    tile_grid(1, 1, options["size"], options["overlap"])  # raises
    if not 0 <= options["score_threshold"] <= 1:
        raise ValueError(
            f"score_threshold must be in 0..1, got {options['score_threshold']}"
        )
    if options["precision"] not in PRECISIONS:
        valid = ", ".join(PRECISIONS)
        got = options["precision"]
        raise ValueError(f"precision must be one of {valid}, got {got!r}")
    for key in ("batch_size", "block_mb", "threads"):
        if machine[key] <= 0:
            raise ValueError(f"{key} is {machine[key]}; give more than 0")
