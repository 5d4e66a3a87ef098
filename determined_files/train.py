"""Run the trial: on this machine, under torchrun, or on a Determined cluster.

    python determined_files/train.py --config determined_files/const.yaml --test-mode
    python determined_files/train.py --config determined_files/const.yaml lr=0.002
    torchrun --nproc_per_node=2 determined_files/train.py \\
        --config determined_files/fake.yaml
    det e create determined_files/const.yaml determined_files/ --include e2e_utils

The last line uploads this folder with e2e_utils beside it; the YAML's entrypoint then
runs this file without arguments, and the cluster says the rest.
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
import torch
import torch.distributed as dist
from determined import core, pytorch

from e2e_utils.experiment import absolute_init, fetch_tiles, load_config

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
    hparams: dict,
    latest_checkpoint: str | None,
    offset: int = 0,
    test_mode: bool = False,
    **options: Any,
) -> None:
    """Give the lengths among the hyperparameters to Determined's Trainer."""
    validation = hparams.get("validation_batches") or trial.run.steps_per_epoch
    pytorch.Trainer(trial, context).fit(
        max_length=pytorch.Batch(trial.stop),
        validation_period=_every(validation, offset, trial.stop),
        checkpoint_period=_every(hparams.get("checkpoint_batches"), offset, trial.stop),
        reporting_period=pytorch.Batch(20),
        latest_checkpoint=latest_checkpoint,
        test_mode=test_mode,
        **options,
    )


def run_local(
    config: dict,
    output_dir: str | Path | None = None,
    resume: str | Path | None = None,
    stop: int | None = None,
    test_mode: bool = False,
    report: Callable[[dict, int], None] | None = None,
) -> tuple[dict, Path]:
    """Train without a cluster: one process, or those that torchrun started.

    Args:
        config: of `load_config`.
        output_dir: checkpoints go to output_dir/determined/<uuid>; where Determined
            keeps its user's data by default.
        resume: checkpoint folder to continue from.
        stop: end at this step, before max_batches, the schedule being that of the
            whole run.
        test_mode: one batch of training, one of validation, a checkpoint.
        report: told (metrics, step), see `ObjectDetectionTrial`.

    Returns:
        (metrics of the last validation, folder of the last checkpoint).
    """
    hparams = dict(config["hyperparameters"])
    if hparams["backend"] == "local":  # the working directory changes below
        hparams["data_dir"] = fetch_tiles(hparams)
    hparams["init_checkpoint"] = absolute_init(hparams.get("init_checkpoint"))
    start = steps_done(resume) if resume else 0
    last = str(Path(resume).resolve()) if resume else None
    distributed = None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        os.environ["USE_TORCH_DISTRIBUTED"] = "true"  # asks the Trainer for DDP
        distributed = core.DistributedContext.from_torch_distributed(
            chief_ip=os.environ["MASTER_ADDR"]
        )
    with _checkpoints_in(output_dir) as folder, contextlib.ExitStack() as stack:
        if distributed:
            stack.callback(dist.destroy_process_group)
        context = stack.enter_context(
            pytorch.init(
                hparams=hparams,
                exp_conf={**config, "hyperparameters": hparams},
                distributed=distributed,
                enable_tensorboard_logging=False,
            )
        )
        trial = ObjectDetectionTrial(context, hparams, start, stop, report)
        fit_trial(
            context, trial, hparams, last, start, test_mode, checkpoint_policy="all"
        )
        return trial.run.metrics, folder / str(trial.checkpoint)


@contextlib.contextmanager
def _checkpoints_in(output_dir: str | Path | None) -> Iterator[Path]:
    """Let Determined keep its checkpoints in a folder, and only this code with them.

    Off the cluster the place follows from XDG_DATA_HOME, and a checkpoint holds a copy
    of the whole working directory: this folder, for as long as the training lasts.
    """
    before, here = os.environ.get("XDG_DATA_HOME"), os.getcwd()
    if output_dir:
        os.environ["XDG_DATA_HOME"] = str(Path(output_dir).resolve())
    try:
        folder = Path(appdirs.user_data_dir("determined"))
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(Path(__file__).parent)
        yield folder
    finally:
        os.chdir(here)
        if before is None:
            os.environ.pop("XDG_DATA_HOME", None)
        else:
            os.environ["XDG_DATA_HOME"] = before


def run_on_cluster(info: det.ClusterInfo, report: Callable | None = None) -> None:
    """Train as the trial that Determined started this process for."""
    hparams = info.trial.hparams
    with pytorch.init(hparams=hparams) as context:
        trial = ObjectDetectionTrial(context, hparams, report=report)
        profiling = (info.trial._config.get("profiling") or {}).get("enabled", False)
        fit_trial(
            context,
            trial,
            hparams,
            info.latest_checkpoint,
            checkpoint_policy=info.trial._config.get("checkpoint_policy") or "best",
            profiling_enabled=profiling,
        )


def show(values: dict, step: int) -> None:
    """Print a line for each validation and for every twentieth step."""
    if "loss" not in values or step % 20 == 0 or step == 1:
        told = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        print(f"step {step}  {told}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="name=value")
    parser.add_argument("--config", help="experiment YAML; not used on a cluster")
    parser.add_argument("--output-dir", help="folder for the checkpoints")
    parser.add_argument("--resume", metavar="DIR", help="checkpoint to continue from")
    parser.add_argument("--stop", type=int, help="end at this step, before max_batches")
    parser.add_argument("--test-mode", action="store_true", help="one batch of each")
    parser.add_argument("--verbose", action="store_true", help="Determined's log")
    options = parser.parse_args(arguments)
    info = det.get_cluster_info()
    on_cluster = info is not None and info.task_type == "TRIAL"
    level = logging.INFO if on_cluster or options.verbose else logging.WARNING
    logging.basicConfig(level=level, format=det.LOG_FORMAT)
    if info is not None and on_cluster:
        run_on_cluster(info, show)
        return
    if not options.config:
        parser.error("--config is required off a Determined cluster")
    _, checkpoint = run_local(
        load_config(options.config, options.overrides),
        options.output_dir,
        options.resume,
        options.stop,
        options.test_mode,
        show,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"checkpoint {checkpoint}")


if __name__ == "__main__":
    main()
