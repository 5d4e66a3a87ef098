"""The training loop of e2e_utils on Ray Train: N workers, with CPUs or GPUs.

    python ray_files/train.py --config determined_files/fake.yaml --workers 2
    python ray_files/train.py --config determined_files/const.yaml lr=0.002
    ray job submit --address http://HEAD:8265 --working-dir . -- \\
        python ray_files/train.py --config determined_files/const.yaml \\
        --storage s3://BUCKET/runs --max-failures 3 data_dir=/shared/tiles

The YAML is a Determined experiment of one trial. Read are its name, hyperparameters,
resources.slots_per_trial (workers) and max_restarts (restarts after a failure); what
describes Determined's cluster (environment, bind_mounts, ...) is Ray's to configure.

Copy: this folder, determined_files and e2e_utils.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

import ray.train
from ray.train.torch import TorchTrainer

if not __package__:  # as a script; Ray's workers find the folder above as well
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e_utils.config import TrainConfig
from e2e_utils.evaluate import METRICS, searcher_metrics
from e2e_utils.experiment import absolute_init, load_config, train_config
from e2e_utils.train import read_metrics
from ray_files import adapter


def _worker(task: dict) -> None:
    """What each worker of Ray Train runs."""
    given = {**task, "config": TrainConfig(**task["config"])}
    last = ray.train.get_checkpoint()
    adapter.fit_on_ray(send=ray.train.report, checkpoint=last, **given)


def trainer(
    config: TrainConfig,
    workers: int,
    storage: str,
    name: str,
    gpu: bool,
    max_failures: int,
    hparams: dict | None = None,
    verbose: bool = False,
    callbacks: list | None = None,
) -> TorchTrainer:
    """Ray's trainer of a run; see `train` for the arguments."""
    if not gpu:
        config = replace(config, device="cpu")
    return TorchTrainer(
        _worker,
        train_loop_config={
            "config": asdict(config),
            "hparams": hparams or {},
            "verbose": verbose,
            "path": adapter.join_url(storage, name),
        },
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=callbacks,
            logging_config=ray.train.LoggingConfig("ERROR"),  # type: ignore[call-arg]
        ),
    )


def train(
    config: TrainConfig,
    workers: int = 1,
    storage: str | Path | None = None,
    *,
    name: str = "train",
    gpu: bool | None = None,
    max_failures: int = 3,
    hparams: dict | None = None,
    verbose: bool = False,
) -> dict:
    """Train with Ray; a worker that dies is replaced and goes on from the last save.

    Args:
        config: of each worker; batch_size is that of one. data_path is a folder that
            each machine sees. Its output_dir is the storage if none is given.
        workers: number of processes, each with a CPU or a GPU.
        storage: folder that all machines share, or an s3:// or gs:// URL. The
            checkpoint goes to storage/name/checkpoint_<time>: last.pt, best.pt and
            metrics.jsonl; the newest is kept.
        name: of the run. One of this name that is in the storage goes on.
        gpu: a GPU for each worker; if there are any, by default.
        max_failures: restarts before the run is given up; -1 for any number.
        hparams: where the tiles are (backend, data_dir, cache_dir), if they are not in
            config.data_path.
        verbose: print the losses and figures as they come.

    Returns:
        {"metrics": {"mAP", "mAP_50", ... , "batches"} of the last validation,
        "losses": {step: mean loss since the one before}, "records": lines of
        metrics.jsonl, "resumed": steps at which the run went on after a failure,
        "checkpoint": folder or URL of last.pt and best.pt}.

    Raises:
        ray.train.TrainingFailedError: a worker failed more often; holds its error.
        ValueError: there are GPUs, but fewer than workers, and gpu is None.
    """
    kept = adapter.storage_path(storage or config.output_dir)
    if not hparams:
        config = replace(config, data_path=str(Path(config.data_path).resolve()))
    config = replace(config, init_checkpoint=absolute_init(config.init_checkpoint))
    with adapter.ray_session(workers, verbose):
        gpu = adapter.takes_gpu(gpu, workers)
        given = config, workers, kept, name, gpu, max_failures, hparams, verbose
        run = trainer(*given).fit()
        if run.checkpoint is None:  # fit raises where a run failed
            raise RuntimeError(f"{kept}/{name} ended without a checkpoint")
        with run.checkpoint.as_directory() as folder:
            records = read_metrics(Path(folder) / "metrics.jsonl")
    last: dict = next((r for r in reversed(records) if "AP" in r), {})
    return {
        "metrics": {**searcher_metrics(last), "batches": last.get("step")},
        "losses": {r["step"]: r["loss"] for r in records if "loss" in r},
        "records": records,
        "resumed": run.checkpoint.get_metadata()["resumed"],
        "checkpoint": adapter.join_url(kept, name, Path(run.checkpoint.path).name),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = adapter.command_line(__doc__)
    parser.add_argument("--workers", type=int, help="slots_per_trial by default")
    parser.add_argument("--storage", default="runs/ray", help="folder or URL")
    parser.add_argument("--max-failures", type=int, help="max_restarts by default")
    options = parser.parse_args(arguments)
    experiment = load_config(options.config, options.overrides)
    slots = experiment.get("resources", {}).get("slots_per_trial", 1)
    workers = options.workers or slots
    hparams = adapter.local_tiles(experiment["hyperparameters"], options.tiles)
    config = train_config(hparams, workers)
    metric = experiment.get("searcher", {}).get("metric")
    if metric in METRICS:
        config = replace(config, best_metric=METRICS[metric])
    restarts = options.max_failures
    if restarts is None:
        restarts = experiment.get("max_restarts", 5)
    done = train(
        config,
        workers,
        options.storage,
        name=options.name or experiment.get("name", "train"),
        gpu=options.gpu,
        max_failures=restarts,
        hparams=hparams,
        verbose=True,
    )
    line = "  ".join(f"{key} {value:.4f}" for key, value in done["metrics"].items())
    print(f"{line}\ncheckpoint {done['checkpoint']}")


if __name__ == "__main__":
    main()
