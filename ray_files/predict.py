"""A detector over an archive of scenes, on Ray Data: a machine, or a cluster.

    python ray_files/predict.py --scenes s3://BUCKET/scenes --checkpoint best.pt \\
        --output s3://BUCKET/boxes
    ray job submit --address http://HEAD:8265 --working-dir . -- \\
        python ray_files/predict.py --scenes ... --gpu

Ray streams the scenes to a pool of actors that each hold the detector once. One that is
larger than `block_mb` goes through in blocks, of which one merge makes the boxes that
`predict_scene` gives alone. Each scene has a file of boxes, which appears whole or not
at all; the same command again does what is missing. A bucket's credentials come from
the environment, see `e2e_utils.storage`, on every node.

Copy: this folder and e2e_utils.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.data
from tqdm.auto import tqdm

if not __package__:  # as a script; Ray's workers find the folder above as well
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ray_files import adapter
from ray_files.archive import REPORT, Output, Report, list_archive, one_line
from ray_files.scene_worker import WHOLE, Job, Worker, finish, load_job

ATTEMPTS = 2  # at a scene whose worker dies: others on the same worker may be to blame
DEATHS = 3  # of a worker, that one attempt outlives
TASKS = 2000  # at most; each costs the driver some kilobytes


@ray.remote(num_cpus=0)  # the actors have the CPUs; a merge takes a moment of one
def _merge(job: Job, row: dict, *parts: bytes) -> dict:
    try:
        return finish(job, row, parts)
    except Exception as error:
        return {"error": one_line(error)}


@contextmanager
def _without_restarts() -> Iterator[None]:
    """Leave out a line that Ray's core writes at the first actor of any pool.

    It warns of arguments that go out of scope, and those of Ray Data do not. All else
    that comes to the process's standard error meanwhile follows at the end.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file:
                if b"actor restart will fail" not in line:
                    os.write(2, line)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data without its bars and its log; what fails stands in our report."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    level, before = logger.level, dict(vars(context))
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1  # the rows of a worker that died again and again
    context.max_consecutive_actor_init_deaths = 10  # before it took its first row
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`ray_remote_args`")  # no other way yet
            yield
    finally:
        logger.setLevel(level)
        vars(context).update(before)


def _stream(
    job: Job, rows: list[dict], workers: int, one_by_one: bool
) -> Iterator[tuple[dict, bytes]]:
    """What the actors say of the rows, as it comes; nothing of one that kills them."""
    tasks = min(len(rows), max(TASKS, 20 * workers))
    queue = 1 if one_by_one else None  # of an actor
    pool = ray.data.ActorPoolStrategy(
        size=min(workers, tasks), max_tasks_in_flight_per_actor=queue
    )
    done = ray.data.from_items(rows, override_num_blocks=tasks).map(
        Worker,  # type: ignore[arg-type]
        fn_constructor_args=[job],
        compute=pool,
        num_cpus=job.threads,
        num_gpus=1 if job.gpu else 0,
        max_task_retries=DEATHS,
    )
    for row in done.iter_rows():
        yield json.loads(row["record"]), row["part"]


class Run:
    """An archive on its way through the actors, and what is awaited of it."""

    def __init__(self, job: Job, report: Report, progress: bool) -> None:
        self.job, self.report = job, report
        self.left: Counter = Counter()  # blocks of a scene that are still out
        self.parts: dict[str, dict] = defaultdict(dict)  # scene: {start: reference}
        self.merges: dict[Any, dict] = {}  # reference: row
        self.progress = progress

    def go(self, rows: list[dict], workers: int) -> None:
        """In rounds: the scenes; then blocks of the large ones, and what was lost."""
        todo, deaths = {_key(row): row for row in rows}, Counter[tuple]()
        with tqdm(total=len(rows), unit="scene", disable=not self.progress) as self.bar:
            while todo:
                waiting = dict(todo)
                more: dict[tuple, dict] = {}
                rows, one_by_one = list(todo.values()), bool(deaths.keys() & todo)
                for record, part in _stream(self.job, rows, workers, one_by_one):
                    row = waiting.pop(_key(record))
                    self.report.count(record["worker"], record)
                    if "cuts" in record:
                        more |= self.cut(row, record["cuts"])
                    elif part:
                        self.keep(row, part)
                    else:
                        self.close(row, record)
                    self.collect(wait=False)
                deaths.update(waiting.keys())
                for key, row in waiting.items():
                    if deaths[key] < ATTEMPTS:
                        more[key] = row
                    else:
                        self.close(row, {"error": "each worker that took it died"})
                todo = more
            self.collect(wait=True)

    def cut(self, row: dict, cuts: list[int]) -> dict:
        """The rows of the blocks of a large scene."""
        self.left[row["name"]] = len(cuts) - 1
        blocks = [
            {**row, "start": start, "stop": stop}
            for start, stop in zip(cuts, cuts[1:], strict=False)
        ]
        return {_key(block): block for block in blocks}

    def keep(self, row: dict, part: bytes) -> None:
        """Put a block's boxes into Ray's store, and merge a scene that is complete."""
        name = row["name"]
        if name in self.report.failed:
            return
        self.parts[name][row["start"]] = ray.put(part)
        self.left[name] -= 1
        if not self.left[name]:
            parts = [part for _, part in sorted(self.parts.pop(name).items())]
            self.merges[_merge.remote(self.job, row, *parts)] = row

    def collect(self, wait: bool) -> None:
        """Take in the merges that are done, or all of them."""
        merges = list(self.merges)
        if not merges:
            return
        count, timeout = (len(merges), None) if wait else (1, 0)
        for done in ray.wait(merges, num_returns=count, timeout=timeout)[0]:
            row = self.merges.pop(done)
            try:
                self.close(row, ray.get(done))
            except ray.exceptions.RayError as error:
                self.close(row, {"error": one_line(error)})

    def close(self, row: dict, record: dict) -> None:
        """A scene is written, or failed."""
        name = row["name"]
        if "error" not in record:
            self.report.finish(record)
        elif name in self.report.failed:
            return  # another block of it
        else:
            self.report.failed[name] = record["error"]
            self.parts.pop(name, None)
        self.bar.update()


def _key(row: dict) -> tuple:
    return row["name"], row["start"], row["stop"]


def predict_archive(
    scenes: str,
    checkpoint: str,
    output: str,
    *,
    images: str | None = None,
    format: str = "geojson",
    workers: int | None = None,
    gpu: bool | None = None,
    threads: int = 1,
    score_threshold: float = 0.5,
    size: int | None = None,
    overlap: float | None = None,
    border: float = 2.0,
    stretch: str | None = None,
    batch_size: int = 4,
    precision: str = "fp32",
    block_mb: float = 100.0,
    progress: bool = False,
) -> Report:
    """Run a detector over an archive of scenes; what is done is not done again.

    Args:
        scenes: a folder or bucket (s3://, gs://, az://) with all below it, a COCO file
            (.json), or a file with a path or URL a line; see `archive.list_archive`.
        checkpoint: path or URL of a file that `e2e_utils.train` wrote.
        output: folder or bucket. A scene's boxes go to its path below `scenes`, with
            `format` behind; settings.json and report.json lie beside.
        images: folder or URL below which the paths of a COCO file or list are; that of
            the file by default.
        format: geojson, gpkg, parquet or json (COCO results, pixels). The image_id of
            these is the COCO file's, without one the scene's name.
        workers: actors; as many as there are GPUs, or CPUs, by default.
        gpu: one for each actor; if there are any, by default.
        threads: CPUs of an actor.
        score_threshold: drop boxes below, 0..1; to score them take 0.05 or less.
        size, overlap: of the tiles; the checkpoint's by default.
        border: what ends so near to a border of a tile may be a part, see there.
        stretch: file of a record for TIFFs of more than 8 bits, see `predict_scene`;
            the checkpoint's by default.
        batch_size: tiles a forward pass.
        precision: fp32, bf16 or fp16.
        block_mb: a scene of more decoded megabytes is cut into blocks of about so many.
        progress: show a bar.

    Returns:
        Report; print it. What failed is in its `failed`.

    Raises:
        ValueError, OSError: nothing to do, no such detector, or a place that cannot be
            read or written; no scene was touched.
    """
    archive, place = list_archive(scenes, images), Output(output, format)
    machine = {"batch_size": batch_size, "block_mb": block_mb, "threads": threads}
    machine["gpu"] = False  # until Ray tells
    options = {"score_threshold": score_threshold, "precision": precision}
    options |= {"border": border, "size": size, "overlap": overlap, "stretch": stretch}
    job, settings = load_job(checkpoint, archive, place, machine, options)
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; give 1 or more")
    there = place.start(settings, list(archive.scenes))
    rows = [
        {"name": name, "source": source, "start": 0, "stop": WHOLE}
        | {"id": json.dumps(archive.ids.get(name, name))}
        for name, source in archive.scenes.items()
        if name not in there
    ]
    report = Report(place.url, len(archive.scenes), skipped=len(there))
    if rows:
        hidden = nullcontext() if progress else _without_restarts()
        with adapter.ray_session(threads * (workers or 1)), _quiet(), hidden:
            gpu = adapter.takes_gpu(gpu, workers or 1)
            there_are = ray.cluster_resources().get("GPU" if gpu else "CPU", 0)
            workers = workers or max(1, int(there_are // (1 if gpu else threads)))
            job = replace(job, gpu=gpu, checkpoint=ray.put(job.checkpoint))
            began = time.perf_counter()
            Run(job, report, progress).go(rows, workers)
            report.seconds = time.perf_counter() - began
    try:
        place.put(REPORT, report.to_json().encode())
    except OSError as error:  # the disk is full: what was done is told all the same
        report.failed[REPORT] = one_line(error)
    return report


def main(arguments: list[str] | None = None) -> None:
    """The command line of `predict_archive`; the exit code is 1 if a scene failed."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="python ray_files/predict.py")
    skip: set[str | int] = {"gpu", "progress"}
    parser.add_function_arguments(predict_archive, skip=skip, as_positional=False)
    parser.add_argument("--gpu", action=argparse.BooleanOptionalAction)
    options = parser.parse_args(arguments).as_dict()
    try:
        report = predict_archive(**options, progress=True)
    except (OSError, ValueError, ray.exceptions.RayError) as error:
        sys.exit(f"error: {one_line(error)}")
    print(report)
    if report.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
