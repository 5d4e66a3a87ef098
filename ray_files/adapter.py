"""What train.py and tune.py share: a Ray to run on, and `fit` on it.

Copy: this folder, determined_files and e2e_utils.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import ray
import torch.distributed as dist
from ray.tune import Checkpoint

from e2e_utils.config import TrainConfig
from e2e_utils.evaluate import searcher_metrics
from e2e_utils.experiment import fetch_tiles
from e2e_utils.processes import start_process_group
from e2e_utils.train import fit

ROOT = Path(__file__).resolve().parents[1]

# Of this process and of a Ray that is started here. Each has its reason.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # loopback only; else a token in the home directory
    "RAY_USAGE_STATS_ENABLED": "0",  # no report to Ray's makers
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # print as it is, without the logger's frame
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # imports take long on few cores
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # of 2: a report waits for the next one
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default to come, else a warning
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output speaks also where it should not
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else it ends a search as if it were done
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they are in the records
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a save between validations has no mAP
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def command_line(text: str | None) -> argparse.ArgumentParser:
    """The options that train.py and tune.py have in common."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="name=value")
    parser.add_argument("--config", required=True, help="experiment YAML")
    parser.add_argument("--tiles", help="folder of tiles, instead of data_dir")
    parser.add_argument("--name", help="of the run; the experiment's by default")
    parser.add_argument("--gpu", action=argparse.BooleanOptionalAction)
    return parser


@contextlib.contextmanager
def ray_session(cpus: int = 1, verbose: bool = False) -> Iterator[None]:
    """A Ray to run on: the one at hand, the cluster of a job, or one started here.

    Args:
        cpus: logical CPUs of a Ray that is started here, more if the machine has more.
            It ends with the block.
        verbose: let what its workers print through.
    """
    variables = dict(ENVIRONMENT)
    address = os.environ.get("RAY_ADDRESS")  # set in a job, or by the user
    if address:
        del variables["RAY_AUTH_MODE"]  # the cluster's to say
    elif not ray.is_initialized():
        paths = [str(ROOT), os.environ.get("PYTHONPATH")]
        variables["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process less
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with contextlib.ExitStack() as stack:
        stack.callback(_restore_environment, dict(os.environ))
        os.environ.update(variables)  # the processes that Ray starts inherit it
        handler = signal.getsignal(signal.SIGINT)  # Ray takes it, and keeps it
        if handler and threading.current_thread() is threading.main_thread():
            stack.callback(signal.signal, signal.SIGINT, handler)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=FutureWarning, module="google")
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            if address:
                ray.init()
            else:
                _start(cpus, verbose)
        yield


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _start(cpus: int, verbose: bool, attempts: int = 3) -> None:
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
                include_dashboard=False,
                object_store_memory=200 * 2**20,  # tiles do not pass through it
                log_to_driver=verbose,
                logging_level=logging.ERROR,
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
    """Whether each process gets a GPU: as `gpu` says, or if there are any.

    Raises:
        ValueError: gpu is None, and there are GPUs for some of them.
    """
    present = int(ray.cluster_resources().get("GPU", 0))
    if gpu is None and 0 < present < processes:
        raise ValueError(
            f"{present} GPU for {processes} workers: gpu=True (--gpu) waits for the "
            "others, gpu=False (--no-gpu) trains on CPUs"
        )
    return present > 0 if gpu is None else gpu


def storage_path(storage: str | Path) -> str:
    """A folder as an absolute path, or the URL of a bucket as it is."""
    return str(storage) if "://" in str(storage) else str(Path(storage).resolve())


def join_url(storage: str, *names: str) -> str:
    """A path below a folder or bucket, whose URL may end with options (?region=...)."""
    root, mark, options = storage.partition("?")
    return "/".join([root.rstrip("/"), *names]) + mark + options


def local_tiles(hparams: dict, tiles: str | Path | None = None) -> dict:
    """Hyperparameters with an absolute data_dir: Ray changes the working directory.

    `tiles` is a folder to take the tiles from, whatever backend and data_dir say.
    """
    if tiles is not None:
        hparams = {**hparams, "backend": "local", "data_dir": str(tiles)}
    if hparams["backend"] == "local":
        hparams = {**hparams, "data_dir": fetch_tiles(hparams)}
    return hparams


def fit_on_ray(
    config: TrainConfig,
    hparams: dict,
    send: Callable[..., None],
    checkpoint: Checkpoint | None,
    path: str,
    verbose: bool = False,
) -> None:
    """Run `fit` in a temporary folder; Ray keeps what it saves.

    Args:
        config: of the run.
        hparams: where the tiles are (backend, data_dir, cache_dir); empty: they are in
            config.data_path.
        send: `report` of ray.train or ray.tune.
        checkpoint: the last one of this run, to go on from.
        path: where Ray keeps the run; errors name it.
        verbose: print a line for each report.
    """
    rank, workers, local_rank = start_process_group()  # Ray has joined its workers
    with tempfile.TemporaryDirectory(prefix="ray_worker_") as scratch:
        folder, tiles = Path(scratch) / "run", config.data_path
        if hparams:
            tiles = fetch_tiles(hparams, Path(scratch) / "tiles", local_rank)
        if workers > 1:
            dist.barrier()  # wait for whoever fetches
        config = replace(config, data_path=tiles, output_dir=str(folder))
        reporter = Reporter(send, folder, rank == 0, verbose)
        reporter.restore(checkpoint)
        try:
            fit(config, reporter.report, reporter.save, progress=False)
        except ValueError as error:
            if config.output_dir not in str(error):
                raise
            message = str(error).replace(config.output_dir, path)
            message = message.replace("another output_dir", "another name (--name)")
            raise ValueError(message) from error


@dataclass
class Reporter:
    """Reports to Ray: `report` and `save` are the callables that `fit` takes.

    `send` is called with (metrics, checkpoint=...), on every process equally often.
    metrics: "batches", the last losses, and mAP, mAP_50, ... of a validation at this
    very step; without a figure that has no ground truth.
    """

    send: Callable[..., None]
    folder: Path  # of the run, with last.pt, best.pt and metrics.jsonl
    main: bool = True  # whether this process writes it
    verbose: bool = False  # print a line for each report
    losses: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)  # steps where the run went on

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Put the files of a checkpoint back, and note that the run went on."""
        self.folder.mkdir()
        if checkpoint:
            with checkpoint.as_directory() as kept:
                shutil.copytree(kept, self.folder, dirs_exist_ok=True)
            before = checkpoint.get_metadata()
            self.resumed = [*before["resumed"], before["step"]]

    def report(self, values: dict, step: int) -> None:
        if "loss" in values:
            self.losses = values
        else:
            values = searcher_metrics(values)
            self.metrics = {"batches": step, **values}
        if self.verbose:
            line = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
            print(f"step {step}  {line}", flush=True)

    def save(self, step: int) -> None:
        now = self.metrics if self.metrics.get("batches") == step else {}
        checkpoint = None
        if self.main:
            checkpoint = Checkpoint.from_directory(str(self.folder))
            checkpoint.set_metadata({"step": step, "resumed": self.resumed})
        metrics = {**self.losses, **now, "batches": step}
        self.send(metrics, checkpoint=checkpoint)
