"""Run the trial: on this machine, under torchrun, or on a Determined cluster.

    python determined_files/train.py --config determined_files/const.yaml --test-mode
    python determined_files/train.py --config determined_files/const.yaml lr=0.002
    torchrun --nproc_per_node=2 determined_files/train.py \\
        --config determined_files/fake.yaml
    det e create determined_files/const.yaml determined_files/ --include e2e_utils

The last line uploads this folder and e2e_utils; the YAML's entrypoint then runs this
file without arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import appdirs
import determined as det
import torch.distributed as dist
from determined import core, pytorch

from e2e_utils.experiment import absolute_init, fetch_tiles, load_config
from e2e_utils.processes import start_process_group

if __package__:
    from determined_files.model_def import ObjectDetectionTrial
else:  # on a cluster, and as a script, this folder is the root
    from model_def import ObjectDetectionTrial


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, strings and their containers; nothing that can run code."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")


def steps_done(checkpoint: str | Path) -> int:
    """Steps after which a run off the cluster continues from a checkpoint folder.

    Zero for a trial of a cluster: Determined takes its weights for a new beginning.
    """
    file = Path(checkpoint) / "trial_state.pkl"
    if not file.is_file():
        raise FileNotFoundError(f"no Determined checkpoint at {checkpoint}")
    with file.open("rb") as stream:
        state = _PlainUnpickler(stream).load()
    return state["batches_trained"] if state["trial_id"] == 0 else 0


def _every(period: int | None, start: int, stop: int) -> pytorch.Batch | None:
    """Each `period` batches. Off the cluster Determined counts from the resume."""
    if not period:
        return None
    if not start:
        return pytorch.Batch(period)
    return pytorch.Batch({s - start for s in range(period, stop + 1, period)})


def fit_trial(
    context: pytorch.PyTorchTrialContext,
    trial: ObjectDetectionTrial,
    start: int = 0,
    **options: Any,
) -> None:
    """Determined's Trainer with the lengths that the trial's configuration has."""
    run = trial.run
    validation = run.config.eval_steps or run.steps_per_epoch
    pytorch.Trainer(trial, context).fit(
        max_length=pytorch.Batch(run.steps),
        validation_period=_every(validation, start, run.steps),
        checkpoint_period=_every(run.config.save_steps, start, run.steps),
        reporting_period=pytorch.Batch(20),
        **options,
    )


def run_local(
    config: dict,
    output_dir: str | Path | None = None,
    resume: str | Path | None = None,
    test_mode: bool = False,
    report: Callable[[dict, int], None] | None = None,
) -> tuple[dict, Path]:
    """Train without a cluster: one process, or those that torchrun started.

    Args:
        config: of `load_config`.
        output_dir: checkpoints go to output_dir/determined/<uuid>; by default to the
            user's data folder.
        resume: checkpoint folder to continue from.
        test_mode: one batch of training, one of validation, a checkpoint.
        report: called with (metrics, step), see `ObjectDetectionTrial`.

    Returns:
        (metrics of the last validation, folder of the last checkpoint).
    """
    hparams = dict(config["hyperparameters"])
    if hparams["backend"] == "local":  # the working directory changes below
        hparams["data_dir"] = fetch_tiles(hparams)
    hparams["init_checkpoint"] = absolute_init(hparams.get("init_checkpoint"))
    start = steps_done(resume) if resume else 0
    last = str(Path(resume).resolve()) if resume else None
    with _checkpoints_in(output_dir) as folder, joined_processes() as distributed:
        if distributed:
            os.environ["USE_TORCH_DISTRIBUTED"] = "true"  # asks the Trainer for DDP
        with pytorch.init(
            hparams=hparams,
            exp_conf={**config, "hyperparameters": hparams},
            distributed=distributed,
            enable_tensorboard_logging=False,
        ) as context:
            trial = ObjectDetectionTrial(context, start, report)
            options = {"checkpoint_policy": "all", "test_mode": test_mode}
            fit_trial(context, trial, start, latest_checkpoint=last, **options)
        return trial.run.metrics, folder / str(trial.checkpoint)


@contextlib.contextmanager
def _checkpoints_in(output_dir: str | Path | None) -> Iterator[Path]:
    """Let Determined keep its checkpoints in a folder, and only this code with them.

    Off the cluster their folder follows from XDG_DATA_HOME, and each holds a copy of
    the working directory: this folder, for as long as the training lasts.
    """
    before, here = dict(os.environ), os.getcwd()
    if output_dir:
        os.environ["XDG_DATA_HOME"] = str(Path(output_dir).resolve())
    try:
        folder = Path(appdirs.user_data_dir("determined"))
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(Path(__file__).parent)
        yield folder
    finally:
        os.chdir(here)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def run_on_cluster(info: det.ClusterInfo, report: Callable | None = None) -> None:
    """Train as the trial that Determined started this process for."""
    config = info.trial._config
    with pytorch.init(hparams=info.trial.hparams) as context:
        trial = ObjectDetectionTrial(context, report=report)
        fit_trial(
            context,
            trial,
            latest_checkpoint=info.latest_checkpoint,
            checkpoint_policy=config.get("checkpoint_policy") or "best",
            profiling_enabled=(config.get("profiling") or {}).get("enabled", False),
        )


# ---- what core_api.py shares


@contextlib.contextmanager
def joined_processes() -> Iterator[core.DistributedContext | None]:
    """The processes of torchrun or of Determined's launcher; None for a single one."""
    joined, distributed = dist.is_initialized(), None
    try:
        if start_process_group()[1] > 1:
            chief_ip = os.environ.get("DET_CHIEF_IP") or os.environ["MASTER_ADDR"]
            distributed = core.DistributedContext.from_torch_distributed(chief_ip)
        yield distributed
    finally:
        if dist.is_initialized() and not joined:
            dist.destroy_process_group()


def show(values: dict, step: int) -> None:
    """Print a line for each validation and for every twentieth step."""
    if "loss" not in values or step % 20 == 0 or step == 1:
        line = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        print(f"step {step}  {line}", flush=True)


def command_line(text: str | None) -> argparse.ArgumentParser:
    """The options of a script that starts a training."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="name=value")
    parser.add_argument("--config", help="experiment YAML; not used on a cluster")
    parser.add_argument("--output-dir", help="folder of the run and its checkpoints")
    parser.add_argument("--resume", metavar="DIR", help="checkpoint to continue from")
    parser.add_argument("--verbose", action="store_true", help="Determined's log")
    return parser


def trial_info(verbose: bool = False) -> det.ClusterInfo | None:
    """The cluster that started this process as a trial, or None; sets up the log."""
    info = det.get_cluster_info()
    if info and info.task_type != "TRIAL":
        info = None
    level = logging.INFO if info or verbose else logging.WARNING
    logging.basicConfig(level=level, format=det.LOG_FORMAT)
    return info


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--test-mode", action="store_true", help="one batch of each")
    options = parser.parse_args(arguments)
    if info := trial_info(options.verbose):
        run_on_cluster(info, show)
        return
    if not options.config:
        parser.error("--config is required off a Determined cluster")
    _, checkpoint = run_local(
        load_config(options.config, options.overrides),
        options.output_dir,
        options.resume,
        options.test_mode,
        show,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"checkpoint {checkpoint}")


if __name__ == "__main__":
    main()
