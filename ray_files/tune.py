"""A search on Ray Tune, from the experiment YAML of a Determined search.

    python ray_files/tune.py --config determined_files/adaptive.yaml --tiles TILES
    python ray_files/tune.py --config determined_files/const-distributed-search.yaml \\
        --output-dir s3://BUCKET/searches data_dir=s3://BUCKET/tiles

translate.py says how the YAML is read.

Copy: this folder, determined_files and e2e_utils.
"""

from __future__ import annotations

import functools
import json
import math
import sys
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
from e2e_utils.experiment import absolute_init, read_experiment, train_config
from ray_files import adapter
from ray_files.train import trainer
from ray_files.translate import Plan, translate


def _plain(values: dict) -> dict:
    """Samples as Python's own numbers, which a checkpoint can hold."""
    return json.loads(json.dumps(values, default=np.generic.item))


def _trial(values: dict, plan: Plan, storage: str, gpu: bool) -> None:
    """One trial: the plain loop here, or Ray Train with a worker for each slot."""
    hparams, trial_id = _plain(values), tune.get_context().get_trial_id()
    config = train_config(hparams, plan.slots)
    config = replace(config, best_metric=METRICS[plan.metric])
    if not gpu:
        config = replace(config, device="cpu")
    if plan.slots > 1:
        name = f"{trial_id}_workers"
        run = config, plan.slots, storage, name, gpu, plan.restarts, hparams
        trainer(*run, callbacks=[TuneReportCallback()]).fit()
        return
    path = adapter.join_url(storage, trial_id)
    adapter.fit_on_ray(config, hparams, tune.report, tune.get_checkpoint(), path)


class _Recorder(tune.Callback):
    """Keeps a record of each trial, in the process that searches."""

    def __init__(self, plan: Plan, on_result: Callable[[dict], None] | None) -> None:
        self.plan, self.on_result = plan, on_result
        self.records: dict[int, dict] = {}

    def __getstate__(self) -> dict:
        """Without on_result: Tune pickles its callbacks, a notebook's cannot be."""
        return self.__dict__ | {"on_result": None}

    def record(self, trial: Any) -> dict:
        index = _index(trial.trial_id)
        if index not in self.records:
            config = _plain(trial.config)
            self.records[index] = {
                "trial": index,
                "hparams": {
                    name: functools.reduce(dict.__getitem__, name.split("."), config)
                    for name in self.plan.searched
                },
                "curve": [],
                "state": "running",
                "length": config["max_batches"],
                **dict.fromkeys(("stopped_at", "best", "checkpoint", "error")),
            }
        return self.records[index]

    def on_trial_result(self, *_: Any, **info: Any) -> None:
        record, result = self.record(info["trial"]), info["result"]
        metric = self.plan.metric
        seen = [batches for batches, _ in record["curve"]]
        if metric in result and result["batches"] not in seen:
            record["curve"].append((result["batches"], result[metric]))
            self._update(record, best=max(value for _, value in record["curve"]))

    def on_trial_complete(self, *_: Any, **info: Any) -> None:
        record = self.record(info["trial"])
        last = record["curve"][-1][0] if record["curve"] else 0
        longest = min(record["length"], (self.plan.asha or {}).get("max_t", math.inf))
        if last < longest:
            self._update(record, state="stopped", stopped_at=last)
        else:
            self._update(record, state="finished")

    def on_trial_error(self, *_: Any, **info: Any) -> None:
        self._update(self.record(info["trial"]), state="failed")

    def _update(self, record: dict, **values: Any) -> None:
        record.update(values)
        if self.on_result:
            self.on_result(record)

    def finish(self, results: Any, storage: str) -> list[dict]:
        """The records with the checkpoints and errors that are known at the end."""
        for result in results:
            record = self.records[_index(result.path)]  # of .../trial_0
            path = (result.metrics or {}).get("checkpoint_path")  # of Ray Train's
            if result.checkpoint:
                path = result.checkpoint.path
            if path:  # on the storage's own file system, without s3://
                folder = path.rstrip("/").split("/")[-2:]
                record["checkpoint"] = adapter.join_url(storage, *folder, "best.pt")
            if result.error:
                record["error"] = str(result.error).strip().splitlines()[-1]
        return [self.records[index] for index in sorted(self.records)]


def _index(name: str) -> int:
    """0, 1, ... in the order in which the trials were drawn, from a trial's name."""
    return int(name.rsplit("_", 1)[-1])


def search(
    experiment: dict,
    tiles: str | Path | None = None,
    output_dir: str | Path = "runs/ray",
    *,
    on_result: Callable[[dict], None] | None = None,
    name: str | None = None,
    gpu: bool | None = None,
) -> list[dict]:
    """Run the trials of an experiment; a record of each.

    Args:
        experiment: of `e2e_utils.experiment.read_experiment`.
        tiles: folder of the tiles, instead of the experiment's backend and data_dir.
        output_dir: folder that all machines share, or an s3:// or gs:// URL.
        on_result: called with a trial's record at each validation and at its end.
        name: of the search, below output_dir; the experiment's by default.
        gpu: a GPU for each slot; if there are any, by default.

    Returns:
        A record of each trial, in the order in which they were drawn: "trial" (0, 1,
        ...), "hparams" {name: value} of the searched ones, "curve" [(batches, metric
        in 0..1), ...], "state" ("running", "finished", "stopped" by ASHA, "failed"),
        "stopped_at" (batches or None), "best" (the highest metric, or None),
        "checkpoint" (file or URL of the weights that had it, or None), "error" (or
        None), "length" (max_batches).

    Raises:
        ValueError: the experiment cannot be translated, or there are GPUs for some of
            the slots only.
        FileExistsError: the folder output_dir/name holds a search; a bucket is not
            looked into.
        RuntimeError: all trials failed; names the first error.
    """
    hparams = dict(experiment["hyperparameters"])
    hparams["init_checkpoint"] = absolute_init(hparams.get("init_checkpoint"))
    plan = translate({**experiment, "hyperparameters": hparams})
    name = name or experiment.get("name", "search")
    storage = adapter.storage_path(output_dir)
    if "://" not in storage and (Path(storage) / name).exists():
        raise FileExistsError(
            f"{output_dir}/{name} holds a search; remove it or choose another name"
        )
    plan.space = adapter.local_tiles(plan.space, tiles)
    recorder = _Recorder(plan, on_result)
    with adapter.ray_session(plan.slots + 1 if plan.slots > 1 else 1):
        gpu = adapter.takes_gpu(gpu, plan.slots)
        results = _tuner(plan, storage, name, gpu, recorder).fit()
        records = recorder.finish(results, adapter.join_url(storage, name))
    if records and all(record["state"] == "failed" for record in records):
        raise RuntimeError(f"all {len(records)} trials failed: {records[0]['error']}")
    return records


def _tuner(
    plan: Plan, storage: str, name: str, gpu: bool, callback: tune.Callback
) -> tune.Tuner:
    """Ray's tuner of a search; see `search` for the arguments."""
    here = plan.slots == 1  # else its workers have the GPUs, and restart by themselves
    present = ray.cluster_resources().get("GPU" if gpu else "CPU", 0)
    room = max(1, int(present // plan.slots))

    def trial(values: dict) -> None:
        _trial(values, plan, adapter.join_url(storage, name), gpu)

    return tune.Tuner(
        tune.with_resources(trial, {"cpu": 1.0, "gpu": 1.0 if gpu and here else 0.0}),
        param_space=plan.space,
        tune_config=tune.TuneConfig(
            metric=plan.metric,
            mode="max",
            num_samples=plan.samples,
            scheduler=ASHAScheduler(**plan.asha) if plan.asha else None,
            search_alg=BasicVariantGenerator(
                max_concurrent=min(plan.concurrent or room, room),
                random_state=plan.seed,
            ),
            trial_dirname_creator=lambda one: f"trial_{_index(one.trial_id)}",
            reuse_actors=here,  # a new one imports torch anew
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=storage,
            verbose=0,
            progress_reporter=tune.CLIReporter(),  # else an empty output in a notebook
            callbacks=[callback],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            failure_config=tune.FailureConfig(plan.restarts if here else 0),
        ),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = adapter.command_line(__doc__)
    parser.add_argument("--output-dir", default="runs/ray", help="folder or URL")
    given = vars(parser.parse_args(arguments))
    experiment = read_experiment(given.pop("config"), given.pop("overrides"))
    metric = experiment["searcher"]["metric"]

    def show(record: dict) -> None:
        line = f"trial {record['trial']} {record['state']}"
        for batches, value in record["curve"][-1:]:
            line += f"  batches {batches}  {metric} {value:.4f}"
        print(line, flush=True)

    records = search(experiment, on_result=show, **given)
    best = max(records, key=lambda record: record["best"] or 0.0)
    print(f"best: trial {best['trial']} {best['hparams']}, {best['best']}")
    print(f"checkpoint {best['checkpoint']}")


if __name__ == "__main__":
    main()
