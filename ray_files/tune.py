"""A search on Ray Tune, from the experiment YAML of a Determined search.

    python ray_files/tune.py --config determined_files/adaptive.yaml --tiles TILES
    python ray_files/tune.py --config determined_files/const-distributed-search.yaml \\
        --output-dir s3://BUCKET/searches data_dir=s3://BUCKET/tiles

translate.py tells how the YAML is read.

Copy: this folder, determined_files and e2e_utils.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

if not __package__:  # as a script; Ray's workers find the folder above as well
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e_utils.evaluate import METRICS
from e2e_utils.experiment import (
    absolute_init,
    fetch_tiles,
    read_experiment,
)
from e2e_utils.train import fit
from ray_files.adapter import (
    Courier,
    below,
    experiment_config,
    place,
    prepare,
    ray_session,
    takes_gpu,
)
from ray_files.train import trainer
from ray_files.translate import Plan, translate


def _plain(value: Any) -> Any:
    """Samples as Python's own numbers, which a checkpoint can hold."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _trial(values: dict, plan: Plan, storage: str, gpu: bool) -> None:
    """One trial: the plain loop here, or Ray Train with a worker for each slot."""
    slots = plan.slots
    config, hparams = experiment_config(_plain(values), slots)
    config = replace(config, best_metric=METRICS[plan.metric])
    if slots > 1:
        name = tune.get_context().get_trial_id()
        trainer(
            config,
            slots,
            storage,
            f"{name}_workers",
            gpu,
            plan.restarts,
            hparams,
            callbacks=[TuneReportCallback()],
        ).fit()
        return

    if not gpu:
        config = replace(config, device="cpu")

    def send(metrics: dict, kept: Path | None) -> None:
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(str(kept)))

    with tempfile.TemporaryDirectory(prefix="ray_trial_") as scratch:
        config = prepare(config, hparams, Path(scratch))
        courier = Courier(send, Path(config.output_dir))
        courier.restore(tune.get_checkpoint())
        fit(config, courier.report, courier.save, progress=False)


class _Recorder(tune.Callback):
    """Keeps what the trials told, in the process that searches."""

    def __init__(self, plan: Plan, on_result: Callable[[dict], None] | None) -> None:
        self.plan, self.on_result = plan, on_result
        self.records: dict[str, dict] = {}

    def __getstate__(self) -> dict:
        """Without on_result: Tune pickles its callbacks, a notebook's cannot be."""
        return self.__dict__ | {"on_result": None}

    def record(self, trial: Any) -> dict:
        if trial.trial_id not in self.records:
            config = _plain(trial.config)
            self.records[trial.trial_id] = {
                "trial": _index(trial),
                "hparams": {name: _at(config, name) for name in self.plan.searched},
                "curve": [],
                "state": "running",
                "stopped_at": None,
                "best": None,
                "checkpoint": None,
                "error": None,
                "length": config["max_batches"],
            }
        return self.records[trial.trial_id]

    def on_trial_start(
        self, iteration: int, trials: list, trial: Any, **_: Any
    ) -> None:
        self.record(trial)

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **_: Any
    ) -> None:
        record, metric = self.record(trial), self.plan.metric
        told = [batches for batches, _ in record["curve"]]
        if metric in result and result["batches"] not in told:
            record["curve"].append((result["batches"], result[metric]))
            record["best"] = max(value for _, value in record["curve"])
            self._tell(record)

    def on_trial_complete(
        self, iteration: int, trials: list, trial: Any, **_: Any
    ) -> None:
        record = self.record(trial)
        last = record["curve"][-1][0] if record["curve"] else 0
        longest = min(record["length"], (self.plan.asha or {}).get("max_t", math.inf))
        record["state"] = "stopped" if last < longest else "finished"
        record["stopped_at"] = last if last < longest else None
        self._tell(record)

    def on_trial_error(
        self, iteration: int, trials: list, trial: Any, **_: Any
    ) -> None:
        record = self.record(trial)
        record["state"] = "failed"
        self._tell(record)

    def _tell(self, record: dict) -> None:
        if self.on_result:
            self.on_result(record)


def _index(trial: Any) -> int:
    """0, 1, ... in the order in which the trials were drawn."""
    return int(trial.trial_id.rsplit("_", 1)[-1])


def _at(values: dict, name: str) -> Any:
    for key in name.split("."):
        values = values[key]
    return values


def search(
    experiment: dict,
    tiles: str | Path | None = None,
    output_dir: str | Path = "runs/ray",
    *,
    trials: int | None = None,
    max_concurrent: int | None = None,
    on_result: Callable[[dict], None] | None = None,
    name: str | None = None,
    gpu: bool | None = None,
    seed: int | None = None,
) -> list[dict]:
    """Run the trials of an experiment and tell how each one went.

    Args:
        experiment: of `e2e_utils.experiment.read_experiment`.
        tiles: folder of the tiles, instead of the experiment's backend and data_dir.
        output_dir: folder that all machines share, or an s3:// or gs:// URL; the
            search goes to output_dir/name.
        trials: instead of searcher.max_trials.
        max_concurrent: instead of searcher.max_concurrent_trials; never more than
            there are CPUs or GPUs for.
        on_result: called with a trial's record at each of its validations, and when
            it ends.
        name: of the search; the experiment's by default.
        gpu: a GPU for each slot; if there are any, by default.
        seed: of the samples; reproducibility.experiment_seed, or 0, by default.

    Returns:
        A record of each trial, in the order in which they were drawn: "trial" (0, 1,
        ...), "hparams" {name: value} of the searched ones, "curve" [(batches, metric
        in 0..1), ...], "state" ("finished", "stopped" by ASHA, "failed"), "stopped_at"
        (batches or None), "best" (the highest metric, or None), "checkpoint" (file or
        URL of the weights that had it, or None), "error" (or None), "length"
        (max_batches).

    Raises:
        ValueError: the experiment cannot be translated, or its number of trials is
            not free, or there are GPUs for some of the slots only.
        FileExistsError: the folder output_dir/name holds a search. (A bucket is not
            looked into: there, give each search a name of its own.)
        RuntimeError: all trials failed; tells the first error.
    """
    hparams = dict(experiment["hyperparameters"])
    hparams["init_checkpoint"] = absolute_init(hparams.get("init_checkpoint"))
    plan = translate({**experiment, "hyperparameters": hparams})
    if trials and experiment["searcher"]["name"] in ("grid", "single"):
        raise ValueError("trials are those of the grid, or one; change the experiment")
    name = name or experiment.get("name", "search")
    storage = place(output_dir)
    if "://" not in storage and (Path(storage) / name).exists():
        raise FileExistsError(
            f"{output_dir}/{name} holds a search; remove it or choose another name"
        )
    space = dict(plan.space)
    if tiles is not None:
        space |= {"backend": "local", "data_dir": str(Path(tiles).resolve())}
    elif space["backend"] == "local":
        space["data_dir"] = fetch_tiles(space)
    if seed is None:
        seed = plan.seed or 0
    recorder = _Recorder(plan, on_result)
    with ray_session(plan.slots + 1 if plan.slots > 1 else 1):
        has = ray.cluster_resources()
        gpu = takes_gpu(gpu, plan.slots)
        limit = plan.concurrent if max_concurrent is None else max_concurrent
        room = max(1, int(has.get("GPU" if gpu else "CPU", 0) // plan.slots))
        each: dict[str, float] = {"cpu": 1, "gpu": 1 if gpu and plan.slots == 1 else 0}

        def trial(values: dict) -> None:
            _trial(values, plan, below(storage, name), gpu)

        results = tune.Tuner(
            tune.with_resources(trial, each),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=plan.metric,
                mode="max",
                num_samples=plan.samples if trials is None else trials,
                scheduler=ASHAScheduler(**plan.asha) if plan.asha else None,
                search_alg=BasicVariantGenerator(
                    max_concurrent=min(limit or room, room), random_state=seed
                ),
                trial_dirname_creator=lambda one: f"trial_{_index(one)}",
                reuse_actors=plan.slots == 1,  # a new one imports torch anew
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=storage,
                verbose=0,
                callbacks=[recorder],
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                failure_config=tune.FailureConfig(
                    max_failures=plan.restarts if plan.slots == 1 else 0
                ),
            ),
        ).fit()
        records = _finish(recorder, results, below(storage, name))
    if records and all(record["state"] == "failed" for record in records):
        raise RuntimeError(f"all {len(records)} trials failed: {records[0]['error']}")
    return records


def _finish(recorder: _Recorder, results: Any, storage: str) -> list[dict]:
    """The records with the files and errors that are known at the end."""
    records = {record["trial"]: record for record in recorder.records.values()}
    for result in results:
        record = records[int(result.path.rsplit("_", 1)[-1])]  # of .../trial_0
        if result.checkpoint:
            path = result.checkpoint.path
        else:
            path = (result.metrics or {}).get("checkpoint_path")
        if path:  # on the storage's own file system, without s3://
            folder = path.rstrip("/").split("/")[-2:]
            record["checkpoint"] = below(storage, *folder, "best.pt")
        if result.error:
            record["error"] = str(result.error).strip().splitlines()[-1]
    return [records[index] for index in sorted(records)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="name=value")
    parser.add_argument("--config", required=True, help="experiment YAML")
    parser.add_argument("--tiles", help="folder of tiles, instead of data_dir")
    parser.add_argument("--output-dir", default="runs/ray", help="folder or URL")
    parser.add_argument("--name", help="of the search; the experiment's by default")
    parser.add_argument("--trials", type=int, help="max_trials by default")
    parser.add_argument("--max-concurrent", type=int)
    parser.add_argument("--gpu", action=argparse.BooleanOptionalAction)
    parser.add_argument("--seed", type=int)
    given = vars(parser.parse_args(arguments))
    experiment = read_experiment(given.pop("config"), given.pop("overrides"))

    def show(record: dict) -> None:
        line = f"trial {record['trial']} {record['state']}"
        if record["curve"]:
            line += "  batches {}  {} {:.4f}".format(
                record["curve"][-1][0],
                experiment["searcher"]["metric"],
                record["curve"][-1][1],
            )
        print(line, flush=True)

    records = search(experiment, on_result=show, **given)
    best = max(records, key=lambda record: record["best"] or 0.0)
    print(f"best: trial {best['trial']} {best['hparams']}, {best['best']}")
    print(f"checkpoint {best['checkpoint']}")


if __name__ == "__main__":
    main()
