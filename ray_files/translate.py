"""A Determined experiment as a search of Ray Tune.

How the YAML is read; the reference is Determined 0.38.1's master:

    hyperparameters   categorical, int (maxval excluded), double, log and const, also
                      nested; a grid takes all values of categorical and `count` evenly
                      spaced ones, both ends included, of the others
    searcher.name     single, random, grid, adaptive_asha
    metric            mAP, mAP_50, mAP_75, mAP_small, mAP_medium, mAP_large
    smaller_is_better must be false: each of these grows as it improves
    max_trials        samples; max_concurrent_trials (16) at a time, fewer where there
                      are not enough CPUs or GPUs
    time_metric       batches, ASHA's unit of time; max_time its longest run
    divisor (4), max_rungs (5)
                      rungs at max_time / divisor**k batches, at most max_rungs of them
                      and no more than max_time and max_trials can fill
    mode (standard)   brackets, each beginning a rung later than the one before:
                      aggressive 1, conservative one for each rung, standard the
                      first half of these; Ray deals trials to them at random,
                      Determined such that each costs the same
    slots_per_trial   workers of each trial; max_restarts its restarts
    experiment_seed   of the samples, 0 by default

At a rung a trial goes on if it is in the best 1/divisor: with Determined, of all that
came so far; with Ray, of those before it, so that the first is never stopped. What
else a searcher says is refused.

Copy: this folder, determined_files and e2e_utils.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray import tune

from e2e_utils.evaluate import METRICS
from e2e_utils.experiment import check_hparams

# fields of a searcher besides name, metric and smaller_is_better
_TRIALS = ("max_concurrent_trials", "max_trials")
_ASHA = ("time_metric", "max_time", "divisor", "max_rungs", "mode")
_FIELDS = {
    "single": (),
    "grid": ("max_concurrent_trials",),
    "random": _TRIALS,
    "adaptive_asha": (*_TRIALS, *_ASHA),
}
_RANGES = ("const", "categorical", "int", "double", "log")


@dataclass
class Plan:
    """A search in Ray's words."""

    space: dict  # of tune.Tuner: values, and ranges of tune
    searched: list[str]  # names of the hyperparameters that differ between trials
    metric: str
    samples: int  # of the space; a grid is gone through once
    concurrent: int  # trials at a time, 0 for any number
    asha: dict | None  # arguments of ASHAScheduler
    slots: int  # workers of each trial
    restarts: int  # of each trial
    seed: int  # of the samples


def translate(experiment: dict) -> Plan:
    """A Determined experiment as a search of Ray Tune; see the top of this file.

    Raises:
        ValueError: a field that has no translation, or a wrong value; names it.
    """
    searcher = {k: v for k, v in experiment["searcher"].items() if v is not None}
    _check(searcher)
    grid, adaptive = (searcher["name"] == name for name in ("grid", "adaptive_asha"))
    hparams = experiment["hyperparameters"]
    check_hparams(hparams)
    searched: list[str] = []
    space = _space(hparams, grid, "", searched)
    if grid and not searched:
        raise ValueError("searcher grid needs a hyperparameter with several values")
    return Plan(
        space=space,
        searched=searched,
        metric=searcher["metric"],
        samples=searcher.get("max_trials", 1),
        concurrent=searcher.get("max_concurrent_trials", 16),
        asha=_asha(searcher, hparams) if adaptive else None,
        slots=(experiment.get("resources") or {}).get("slots_per_trial", 1),
        restarts=experiment.get("max_restarts", 5),
        seed=(experiment.get("reproducibility") or {}).get("experiment_seed") or 0,
    )


def _one_of(field: str, value: Any, valid: Iterable[str]) -> None:
    if value not in valid:
        raise ValueError(f"{field} must be {' or '.join(valid)}, got {value!r}")


def _check(searcher: dict) -> None:
    """Raise ValueError for a field that has no translation or a wrong value."""
    name, metric = searcher.get("name"), searcher.get("metric")
    _one_of("searcher.name", name, _FIELDS)
    known = {"name", "metric", "smaller_is_better", *_FIELDS[str(name)]}
    unknown = sorted(set(searcher) - known)
    if unknown:
        raise ValueError(
            f"searcher.{unknown[0]} = {searcher[unknown[0]]!r} of {name} has no "
            f"translation to Ray; known are {', '.join(sorted(known))}"
        )
    _one_of("searcher.metric", metric, METRICS)
    if searcher.get("smaller_is_better", True):
        raise ValueError(
            f"searcher.smaller_is_better is true, as it is by default, and {metric} "
            "grows as it improves: the worst would be kept. Write false"
        )
    if "max_trials" in known and "max_trials" not in searcher:
        raise ValueError(f"searcher.max_trials is needed by {name}")


def _space(values: dict, grid: bool, above: str, searched: list[str]) -> dict:
    """Hyperparameters as a space of Tune; the names of ranges go to `searched`."""
    space: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        if not isinstance(value, dict):
            space[key] = value
        elif "type" not in value:  # nested, as settings can be
            space[key] = _space(value, grid, f"{name}.", searched)
        elif value["type"] == "const":
            space[key] = value["val"]
        else:
            searched.append(name)
            space[key] = _axis(name, value) if grid else _range(name, value)
    return space


def _range(name: str, value: dict) -> Any:
    """A hyperparameter as a range that Tune samples."""
    kind = value["type"]
    if kind == "categorical":
        return tune.choice(value["vals"])
    low, high = _ends(name, value)
    if kind == "log":  # the distribution is the same by any base
        return tune.loguniform(value["base"] ** low, value["base"] ** high)
    return (tune.randint if kind == "int" else tune.uniform)(low, high)


def _axis(name: str, value: dict) -> dict:
    """A hyperparameter as the values of a grid, in the master's order."""
    kind = value["type"]
    if kind == "categorical":
        return tune.grid_search(value["vals"])
    low, high = _ends(name, value)
    count = value.get("count")
    if not count:
        raise ValueError(f"{name} needs a count in a grid: {value}")
    if kind == "int":
        count = min(count, high - low + 1)
    shares = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
    points = [low + share * (high - low) for share in shares]
    if kind == "int":  # half up, as Go rounds; Python's round takes the even one
        points = [math.floor(point + 0.5) for point in points]
    if kind == "log":
        points = [value["base"] ** point for point in points]
    return tune.grid_search(points)


def _ends(name: str, value: dict) -> tuple:
    _one_of(f"{name}.type", value["type"], _RANGES)
    needed = {"minval", "maxval"} | ({"base"} if value["type"] == "log" else set())
    missing = sorted(needed - set(value))
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}: {value}")
    if not value["minval"] < value["maxval"]:
        raise ValueError(f"{name}.minval must be below maxval: {value}")
    return value["minval"], value["maxval"]


def _asha(searcher: dict, hparams: dict) -> dict:
    """Arguments of ASHAScheduler; see the top of this file."""
    # the time that each validation has
    _one_of("searcher.time_metric", searcher.get("time_metric"), ["batches"])
    longest, divisor = searcher.get("max_time"), searcher.get("divisor", 4)
    if not longest or longest < 1:
        raise ValueError(f"searcher.max_time must be 1 or more, got {longest!r}")
    if not divisor > 1:
        raise ValueError(f"searcher.divisor must be above 1, got {divisor!r}")

    def filled(total: int) -> int:
        return int(math.log(total) / math.log(divisor) + 1e-9) + 1

    rungs = min(
        searcher.get("max_rungs", 5), filled(longest), filled(searcher["max_trials"])
    )
    first = longest / divisor ** (rungs - 1)
    every = hparams.get("validation_batches")
    if every and rungs > 1 and every >= first * divisor:
        raise ValueError(
            f"validation_batches {every} steps over the rung at {first:g} batches, "
            f"where trials are first compared; validate at least every {int(first)}"
        )
    brackets = {"aggressive": 1, "standard": rungs // 2 + 1, "conservative": rungs}
    mode = searcher.get("mode", "standard")
    _one_of("searcher.mode", mode, brackets)
    return {
        "time_attr": "batches",
        "max_t": longest,
        "grace_period": first,
        "reduction_factor": divisor,
        "brackets": brackets[mode],
    }
