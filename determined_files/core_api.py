"""The training as a script of Determined's Core API: here, by torchrun, on a cluster.

    python determined_files/core_api.py --config determined_files/core.yaml \\
        --output-dir runs/core_api max_batches=40
    torchrun --nproc_per_node=2 determined_files/core_api.py \\
        --config determined_files/core.yaml --output-dir runs/core_api
    det e create determined_files/core.yaml determined_files/ --include e2e_utils

Copy: this folder and e2e_utils.

There is no trial class. The loop is `e2e_utils.train.fit` as it stands, and Determined
stands at its three callables: `report` sends the metrics, `save` uploads a checkpoint,
`should_stop` asks for preemption, each on the chief alone. A paused trial finds its
checkpoint in output_dir when it comes back, and `fit` goes on by itself. The length is
a hyperparameter: Determined 0.38 gave up core_context.searcher.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import determined as det
from determined import core

from e2e_utils.evaluate import searcher_metrics
from e2e_utils.experiment import fetch_tiles, load_config, train_config
from e2e_utils.train import fit

if __package__:
    from determined_files.train import command_line, joined_processes, show, trial_info
else:  # on a cluster, and as a script, this folder is the root
    from train import command_line, joined_processes, show, trial_info

FILES = ("last.pt", "best.pt", "metrics.jsonl")  # what fit writes and continues from


def train(
    core_context: core.Context,
    hparams: dict,
    output_dir: str | Path,
    report: Callable[[dict, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[dict, str | None]:
    """Run `fit` and report to Determined; a run in output_dir is continued.

    Args:
        core_context: of `determined.core.init`, with `PreemptMode.ChiefOnly`.
        hparams: see e2e_utils/experiment.py.
        output_dir: last.pt, best.pt and metrics.jsonl go here, on each machine.
        report: called on the chief with (metrics, step), as Determined gets them.
        should_stop: asked after every step besides Determined.

    Returns:
        (metrics of the last validation with its step, id of the last checkpoint); the
        id is None on other processes than the chief.
    """
    distributed, trial_id = core_context.distributed, _trial_id(core_context)
    chief, output = distributed.rank == 0, Path(output_dir)
    saved: list[tuple[int, str]] = []

    def send(values: dict, step: int) -> None:  # called on the chief alone
        if "loss" in values:
            core_context.train.report_training_metrics(step, values)
        else:
            values = searcher_metrics(values)
            core_context.train.report_validation_metrics(step, values)
        core_context.train.report_progress(step / hparams["max_batches"])
        if report:
            report(values, step)

    def upload(step: int) -> None:
        if chief:
            metadata = {"steps_completed": step, "trial_id": trial_id}
            with core_context.checkpoint.store_path(metadata) as (path, uuid):
                _copy_run(output, path)
            saved.append((step, uuid))

    def stops() -> bool:
        if should_stop and should_stop():
            return True
        # Off the cluster nobody asks for preemption, and in its stand-in the processes
        # would have to ask in step. fit makes all of them stop where one wants to.
        asks = chief and trial_id is not None
        return asks and core_context.preempt.should_preempt(auto_ack=False)

    with tempfile.TemporaryDirectory(prefix="fake_tiles_") as scratch:
        tiles = fetch_tiles(hparams, scratch, distributed.local_rank)
        distributed.broadcast_local(None)  # wait for whoever fetches
        config = train_config(hparams, distributed.size, tiles, str(output))
        metrics = fit(config, send, upload, stops, progress=False)
    if saved and saved[-1][0] < hparams["max_batches"]:
        # Or the master would take the clean exit for the end of the training
        core_context.preempt.acknowledge_preemption_signal()
    step = {"step": metrics["step"]} if metrics else {}
    return {**searcher_metrics(metrics), **step}, saved[-1][1] if saved else None


def _trial_id(core_context: core.Context) -> int | None:
    """Of the trial that this process is part of; None off the cluster."""
    info = core_context.info
    return info.trial.trial_id if info and info.task_type == "TRIAL" else None


def _copy_run(source: Path, target: Path) -> None:
    for name in FILES:
        if (source / name).exists():
            shutil.copy2(source / name, target / name)


def _restore(core_context: core.Context, checkpoint: Path, output: Path) -> None:
    """Put a checkpoint's files where `fit` continues from, once a machine."""
    if not (checkpoint / "last.pt").is_file():
        raise FileNotFoundError(
            f"{checkpoint} has no last.pt: it is no checkpoint of core_api.py"
        )
    trial_id = _trial_id(core_context)
    if trial_id is not None:
        written_by = json.loads((checkpoint / "metadata.json").read_text())["trial_id"]
        if written_by != trial_id:
            raise ValueError(
                f"trial {trial_id} was given the checkpoint {checkpoint.name} of trial "
                f"{written_by}; core_api.py continues a trial and forks none. To start "
                "from its weights give its last.pt as init_checkpoint."
            )
    if core_context.distributed.local_rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        _copy_run(checkpoint, output)
    core_context.distributed.broadcast_local(None)  # wait for whoever copies


@contextlib.contextmanager
def _core_context(**options: Any) -> Iterator[core.Context]:
    """core.init, within the processes of torchrun or of Determined's launcher."""
    with joined_processes() as distributed:
        options |= {"distributed": distributed}
        with core.init(preempt_mode=core.PreemptMode.ChiefOnly, **options) as context:
            yield context


def run_local(
    config: dict,
    output_dir: str | Path,
    resume: str | Path | None = None,
    report: Callable[[dict, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[dict, Path | None]:
    """Train without a cluster: one process, or those that torchrun started.

    Args:
        config: of `e2e_utils.experiment.load_config`.
        output_dir: a run that is there goes on; checkpoints go to its checkpoints/.
        resume: checkpoint folder to continue from in a new output_dir.
        report: called on the chief with (metrics, step): the mean losses of twenty
            steps, the figures of each validation.
        should_stop: asked after every step; if true, the run is saved and ends.

    Returns:
        (metrics of the last validation with its step, folder of the last checkpoint);
        the folder is None if no step was left, and on other processes than the chief.
    """
    output = Path(output_dir).resolve()
    if resume and (output / "last.pt").exists():
        raise ValueError(
            f"{output_dir} holds a run already, which goes on without resume; to "
            f"continue {resume} choose another output_dir"
        )
    storage = output / "checkpoints"
    with _core_context(checkpoint_storage=str(storage)) as core_context:
        if resume:
            _restore(core_context, Path(resume), output)
        metrics, uuid = train(
            core_context, config["hyperparameters"], output, report, should_stop
        )
    return metrics, storage / uuid if uuid else None


def run_on_cluster(info: det.ClusterInfo, report: Callable | None = None) -> dict:
    """Train as the trial that Determined started this process for."""
    with _core_context() as core_context, contextlib.ExitStack() as stack:
        distributed, folder = core_context.distributed, None
        if distributed.local_rank == 0:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="run_"))
        output = Path(distributed.broadcast_local(folder))
        if info.latest_checkpoint:
            with core_context.checkpoint.restore_path(info.latest_checkpoint) as path:
                _restore(core_context, path, output)
        return train(core_context, info.trial.hparams, output, report)[0]


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    options = parser.parse_args(arguments)
    if info := trial_info(options.verbose):
        run_on_cluster(info, show)
        return
    if not (options.config and options.output_dir):
        parser.error("--config and --output-dir are required off a Determined cluster")
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    _, checkpoint = run_local(
        load_config(options.config, options.overrides),
        options.output_dir,
        options.resume,
        show,
        terminated.is_set,
    )
    if checkpoint:
        print(f"checkpoint {checkpoint}")
    if terminated.is_set():
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
