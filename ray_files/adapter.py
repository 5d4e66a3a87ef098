"""What train.py and tune.py share: a Ray to run on, and how `fit` speaks to it.

Copy: this folder, determined_files and e2e_utils.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import ray
import torch.distributed as dist
from ray.train import Checkpoint

from e2e_utils.config import TrainConfig
from e2e_utils.evaluate import searcher_metrics
from e2e_utils.experiment import fetch_tiles, train_config

ROOT = Path(__file__).resolve().parents[1]
RESUMED = "resumed.json"  # in a checkpoint: its step, and where the run went on

# Of this process and of a Ray that is started here. Each has its reason.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # loopback only; else a token in the home directory
    "RAY_USAGE_STATS_ENABLED": "0",  # no report to Ray's makers
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # print as it is, without the logger's frame
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # imports take long on few cores
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # of 2: a report waits for the next one
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default to come, else a warning
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output speaks even where it is told not to
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else it ends a search as if it were done
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they are in the records
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a save between validations has no mAP
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@contextlib.contextmanager
def ray_session(
    cpus: int = 1, verbose: bool = False, dashboard_port: int | None = None
) -> Iterator[None]:
    """A Ray to run on: the one at hand, the cluster of a job, or one started here.

    Args:
        cpus: logical CPUs of a Ray that is started here, more if the machine has more.
            It ends with the block.
        verbose: let what its workers print through.
        dashboard_port: of this machine alone, where `ray job submit` finds it; none by
            default.
    """
    with contextlib.ExitStack() as stack:
        told = dict(ENVIRONMENT)
        address = os.environ.get("RAY_ADDRESS")  # in a job, or told by the user
        if address:
            del told["RAY_AUTH_MODE"]  # the cluster's to say
        elif not ray.is_initialized():
            paths = [str(ROOT), os.environ.get("PYTHONPATH")]
            told["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process less
            told["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        stack.enter_context(_environment(told))
        handler = signal.getsignal(signal.SIGINT)  # Ray takes it, and keeps it
        if handler and threading.current_thread() is threading.main_thread():
            stack.callback(signal.signal, signal.SIGINT, handler)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=FutureWarning, module="google")
        if not ray.is_initialized():
            options: dict = {}
            if dashboard_port is not None:
                # A job finds its Ray by the files of a folder, where another Ray of
                # this machine would write the same ones
                own = tempfile.mkdtemp(prefix="ray_")
                stack.callback(shutil.rmtree, own, ignore_errors=True)
                options = {"dashboard_port": dashboard_port, "_temp_dir": own}
            stack.callback(ray.shutdown)
            if address:
                ray.init()
            else:
                _start(cpus, verbose, options)
        yield


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)  # the processes that Ray starts inherit it
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _start(cpus: int, verbose: bool, options: dict, attempts: int = 3) -> None:
    """Start a Ray of this machine alone.

    Its node gives its helpers 15 s to start, a figure that no option changes
    (ray-project/ray#65983); on busy cores they need longer, and the next attempt finds
    their files in memory.
    """
    before = set(psutil.Process().children(recursive=True))
    for attempt in range(1, attempts + 1):
        try:
            ray.init(
                address="local",
                num_cpus=max(cpus, os.cpu_count() or 1),
                include_dashboard="dashboard_port" in options,
                dashboard_host="127.0.0.1",
                object_store_memory=200 * 2**20,  # tiles do not pass through it
                log_to_driver=verbose,
                logging_level=logging.ERROR,
                **options,
            )
            return
        except Exception as error:  # Ray raises no other class for this
            ray.shutdown()
            # which does not know of a node that never came to be
            left = set(psutil.Process().children(recursive=True)) - before
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=30)
            if "timed out during startup" not in str(error) or attempt == attempts:
                raise


def takes_gpu(gpu: bool | None, processes: int) -> bool:
    """Whether each process gets a GPU: as told, or if there are any.

    Raises:
        ValueError: nothing was told, and there are GPUs for some of them.
    """
    there = int(ray.cluster_resources().get("GPU", 0))
    if gpu is None and 0 < there < processes:
        raise ValueError(
            f"{there} GPU for {processes} workers: gpu=True (--gpu) waits for the "
            "others, gpu=False (--no-gpu) trains on CPUs"
        )
    return there > 0 if gpu is None else gpu


def place(storage: str | Path) -> str:
    """A folder as an absolute path, or the URL of a bucket as it is."""
    return str(storage) if "://" in str(storage) else str(Path(storage).resolve())


def below(storage: str, *names: str) -> str:
    """A place in a folder or bucket, whose URL may end with options (?region=...)."""
    root, mark, options = storage.partition("?")
    return "/".join([root.rstrip("/"), *names]) + mark + options


def experiment_config(
    hparams: dict, workers: int = 1, tiles: str | Path | None = None
) -> tuple[TrainConfig, dict]:
    """(configuration of each worker, hyperparameters) that a trial's values describe.

    Args:
        hparams: one value each, see e2e_utils/experiment.py.
        workers: among which global_batch_size is divided.
        tiles: folder to take the tiles from, whatever backend and data_dir say.

    Raises:
        ValueError: an unknown or missing hyperparameter; a global_batch_size that
            cannot be divided.
    """
    if tiles is not None:
        hparams = {**hparams, "backend": "local", "data_dir": str(tiles)}
    config = train_config(hparams, workers)
    if hparams["backend"] == "local":  # Ray changes the working directory
        hparams = {**hparams, "data_dir": fetch_tiles(hparams)}
    return config, hparams


def prepare(
    config: TrainConfig,
    hparams: dict,
    folder: Path,
    workers: int = 1,
    local_rank: int = 0,
) -> TrainConfig:
    """The configuration as this process has it: its own folder, tiles at hand.

    Args:
        config: of the run.
        hparams: where the tiles are (backend, data_dir, cache_dir); empty: they are in
            config.data_path.
        folder: empty; the run goes to folder/run.
        workers: in the run.
        local_rank: of this one on its machine; the first fetches the tiles.
    """
    data_path = config.data_path
    if hparams:
        data_path = fetch_tiles(hparams, folder / "tiles", local_rank)
    if workers > 1:
        dist.barrier()
    return replace(config, data_path=data_path, output_dir=str(folder / "run"))


class Courier:
    """Takes what `fit` tells to Ray: `report` and `save` are its callables.

    Args:
        send: called with (metrics, folder to keep or None), on every process equally
            often. metrics: "batches", the last losses, and mAP, mAP_50, ... of a
            validation at this very step; without a figure that has no ground truth.
        folder: of the run, with last.pt, best.pt and metrics.jsonl.
        main: whether this process writes it.
        verbose: print a line for each report.
    """

    def __init__(
        self,
        send: Callable[[dict, Path | None], None],
        folder: Path,
        main: bool = True,
        verbose: bool = False,
    ) -> None:
        self.send, self.folder = send, folder
        self.main, self.verbose = main, verbose
        self.losses: dict = {}
        self.figures: dict = {}
        self.resumed: list[int] = []

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Put a checkpoint back in its place, and note that the run went on."""
        self.folder.mkdir()
        if checkpoint:
            with checkpoint.as_directory() as kept:
                shutil.copytree(kept, self.folder, dirs_exist_ok=True)
            told = json.loads((self.folder / RESUMED).read_text())
            self.resumed = [*told["resumed"], told["step"]]

    def report(self, values: dict, step: int) -> None:
        if "loss" in values:
            self.losses = values
        else:
            self.figures = {"batches": step, **searcher_metrics(values)}
        if self.verbose:
            told = values if "loss" in values else searcher_metrics(values)
            line = "  ".join(f"{key} {value:.4f}" for key, value in told.items())
            print(f"step {step}  {line}", flush=True)

    def save(self, step: int) -> None:
        now = self.figures if self.figures.get("batches") == step else {}
        metrics = {**self.losses, **now, "batches": step}
        if self.main:
            told = {"step": step, "resumed": self.resumed}
            (self.folder / RESUMED).write_text(json.dumps(told))
        self.send(metrics, self.folder if self.main else None)
