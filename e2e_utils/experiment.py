"""An experiment YAML of Determined as a TrainConfig; where its tiles are.

Determined and Ray read the same files by it.

Copy: this file, config.py, hardware.py, storage.py and files.py.

Hyperparameters are the fields of `TrainConfig` that say how to train (model, settings,
optimizer, lr, seed, ...) under their own names, and these:

    global_batch_size     tiles a step over all processes; an equal share for each
    max_batches           length of the run and of its learning rate schedule
    validation_batches    validate this often (once an epoch if absent)
    checkpoint_batches    save this often besides (never if absent)
    warmup_batches        length of the warm-up; instead of warmup, a share of the run
    lr_step_batches       steps of "multistep"; instead of lr_steps, in epochs
    backend               where the tiles are: local, fake, aws or gcs
    data_dir              a folder of tiles with their tiles.json, or the s3:// or gs://
                          URL of one
    cache_dir             where aws and gcs put the tiles, on each machine

On a cluster, data_dir of the backend local and init_checkpoint are absolute paths that
every machine sees.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from .config import TrainConfig, whole
from .hardware import AMP

# names of an experiment -> fields of TrainConfig
_BATCHES = {
    "max_batches": "steps",
    "validation_batches": "eval_steps",
    "checkpoint_batches": "save_steps",
    "lr_step_batches": "lr_milestones",
}
# what the platform decides, or what has another name here
_NOT_HERE = {"data_path", "output_dir", "epochs", "batch_size", "best_metric"}
_NOT_HERE |= {"device", *_BATCHES.values()}
_TRAIN_KEYS = {f.name for f in fields(TrainConfig)} - _NOT_HERE
_REQUIRED = {"global_batch_size", "max_batches", "backend"}
HYPERPARAMETERS = tuple(
    sorted(
        {*_TRAIN_KEYS, *_REQUIRED, *_BATCHES, "warmup_batches", "data_dir", "cache_dir"}
    )
)
_EITHER = (("warmup_batches", "warmup"), ("lr_step_batches", "lr_steps"))
_SCHEMES = {"aws": "s3://", "gcs": "gs://"}


def read_experiment(path: str | Path, overrides: list[str] | None = None) -> dict:
    """An experiment YAML with some hyperparameters replaced; ranges stay ranges.

    Args:
        path: of the YAML.
        overrides: "name=value" each, the value in YAML's notation.

    Raises:
        ValueError: no experiment, or a malformed override.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "const.yaml")
        ...     _ = path.write_text("hyperparameters: {lr: 0.001}")
        ...     read_experiment(path, ["lr=2.0e-3"])
        {'hyperparameters': {'lr': 0.002}}
    """
    config = yaml.safe_load(Path(path).read_text())
    if not isinstance(config, dict) or "hyperparameters" not in config:
        raise ValueError(f"{path} is not an experiment configuration")
    hparams = dict(config["hyperparameters"])
    for override in overrides or []:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"an override is name=value, got {override!r}")
        hparams[name] = yaml.safe_load(value)
    return {**config, "hyperparameters": hparams}


def load_config(path: str | Path, overrides: list[str] | None = None) -> dict:
    """The experiment of a single trial: as `read_experiment`, and each value is one.

    Raises:
        ValueError: a malformed override, an unknown hyperparameter, or one that is a
            range to search: a single trial needs one value.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> text = "{global_batch_size: 8, max_batches: 100, backend: fake, "
        >>> text += "lr: {type: log, minval: -5, maxval: -3}}"
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "search.yaml")
        ...     _ = path.write_text(f"hyperparameters: {text}")
        ...     load_config(path, ["lr=2.0e-3"])["hyperparameters"]["lr"]
        0.002
    """
    config = read_experiment(path, overrides)
    hparams = config["hyperparameters"]
    for name, value in hparams.items():
        if isinstance(value, dict) and "type" in value:
            if value["type"] != "const":
                raise ValueError(
                    f"{name} is a range to search in {path} ({value}); a single trial "
                    f"needs one value: add {name}=VALUE"
                )
            hparams[name] = value["val"]
    check_hparams(hparams)
    return config


def check_hparams(hparams: dict) -> None:
    """Raise ValueError for a hyperparameter that is missing or that nothing reads.

    Example:
        >>> check_hparams({"global_batch_size": 8, "max_batches": 100})
        Traceback (most recent call last):
            ...
        ValueError: the hyperparameters lack backend
    """
    unknown = sorted(set(hparams) - set(HYPERPARAMETERS))
    if unknown:
        raise ValueError(
            f"unknown hyperparameter {', '.join(map(repr, unknown))}; "
            f"valid: {', '.join(HYPERPARAMETERS)}"
        )
    missing = sorted(_REQUIRED - set(hparams))
    if missing:
        raise ValueError(f"the hyperparameters lack {', '.join(missing)}")
    for absolute, relative in _EITHER:
        if absolute in hparams and relative in hparams:
            raise ValueError(f"give {absolute} or {relative}, not both")


def train_config(
    hparams: dict, processes: int = 1, data_path: str = "", output_dir: str = ""
) -> TrainConfig:
    """The TrainConfig of each process that a trial's hyperparameters describe.

    Args:
        hparams: see the top of this file; one value each.
        processes: that share global_batch_size.
        data_path: folder of the tiles on this machine.
        output_dir: of the run.

    Raises:
        ValueError: as `check_hparams`, a number that is not whole, a global_batch_size
            that cannot be divided, or no such amp.

    Example:
        >>> hparams = {"global_batch_size": 8, "max_batches": 100, "backend": "local"}
        >>> config = train_config({**hparams, "warmup_batches": 5}, processes=4)
        >>> config.batch_size, config.steps, config.warmup
        (2, 100, 0.05)
    """
    check_hparams(hparams)
    size = whole("global_batch_size", hparams["global_batch_size"])
    batch_size, rest = divmod(size, processes)
    if rest:
        raise ValueError(
            f"global_batch_size {size} does not divide equally among {processes} "
            "processes"
        )
    values = {key: hparams[key] for key in _TRAIN_KEYS if key in hparams}
    values |= {new: hparams[key] for key, new in _BATCHES.items() if key in hparams}
    if isinstance(values.get("amp"), bool):  # on and off are booleans in YAML
        values["amp"] = "on" if values["amp"] else "off"
    if values.get("amp", "auto") not in AMP:
        raise ValueError(f"amp must be one of {', '.join(AMP)}, got {values['amp']!r}")
    if "warmup_batches" in hparams:
        values["warmup"] = whole("warmup_batches", hparams["warmup_batches"]) / whole(
            "max_batches", hparams["max_batches"]
        )
    return TrainConfig(data_path, output_dir, batch_size=batch_size, **values)


def hyperparameters(config: TrainConfig, processes: int = 1) -> dict:
    """The hyperparameters of a trial that trains as `config` does; see `train_config`.

    Args:
        config: of each process; its steps are the length, its data_path a folder of
            tiles. Its output_dir, device and best_metric are the platform's to choose.
        processes: that will share the batches.

    Raises:
        ValueError: it has no steps: how many an epoch has is known with the tiles.

    Example:
        >>> config = TrainConfig("/data/tiles", "", batch_size=2, steps=100)
        >>> hparams = hyperparameters(config, processes=4)
        >>> hparams["global_batch_size"], hparams["max_batches"], hparams["data_dir"]
        (8, 100, '/data/tiles')
    """
    if config.steps is None:
        raise ValueError("config.steps is None; give the length of the run in steps")
    values = asdict(config)
    lengths = {name: values[field] for name, field in _BATCHES.items()}
    kept = _TRAIN_KEYS if config.lr_milestones is None else _TRAIN_KEYS - {"lr_steps"}
    return {
        **{name: values[name] for name in sorted(kept)},
        **{name: value for name, value in lengths.items() if value is not None},
        "global_batch_size": config.batch_size * processes,
        "backend": "local",
        "data_dir": config.data_path,
    }


def fetch_tiles(hparams: dict, scratch: str | Path = "", local_rank: int = 0) -> str:
    """The folder of the tiles on this machine, fetched first if they are in a bucket.

    Args:
        hparams: backend, data_dir and cache_dir are read.
        scratch: folder for the noise of the backend fake, each process its own.
        local_rank: of this process on its machine; the first fetches.

    Raises:
        ValueError: an unknown backend, or a data_dir that does not fit it.

    Example:
        >>> fetch_tiles({"backend": "local", "data_dir": "/data/tiles"})
        '/data/tiles'
    """
    backend, where = hparams["backend"], str(hparams.get("data_dir") or "")
    if backend == "fake":
        from sample_data.noise import write_noise_tiles  # nobody else needs it

        write_noise_tiles(scratch)
        if not local_rank:
            print("backend fake: noise with rectangles, the figures mean nothing")
        return str(scratch)
    if backend == "local":
        if not where or "://" in where:
            raise ValueError(f"backend local needs a folder as data_dir, got {where!r}")
        return str(
            Path(where).resolve()
        )  # who runs it may change the working directory
    if backend not in _SCHEMES:
        valid = ", ".join(["local", "fake", *_SCHEMES])
        raise ValueError(f"backend must be one of {valid}, got {backend!r}")
    if not where.startswith(_SCHEMES[backend]):
        raise ValueError(
            f"backend {backend} needs a data_dir like {_SCHEMES[backend]}bucket/tiles, "
            f"got {where!r}"
        )
    if not hparams.get("cache_dir"):
        raise ValueError(f"backend {backend} needs cache_dir, a folder for the tiles")
    if local_rank == 0:  # once a machine, whatever the number of its processes
        from .storage import sync  # its libraries are needed here alone

        sync(where, hparams["cache_dir"])
    return str(hparams["cache_dir"])


def absolute_init(value: Any) -> Any:
    """init_checkpoint as an absolute path, also each of a range to search.

    For whoever starts processes in other working directories.

    Raises:
        ValueError: a URL; nothing fetches a checkpoint.

    Example:
        >>> absolute_init("/runs/best.pt"), absolute_init(None)
        ('/runs/best.pt', None)
    """
    if isinstance(value, dict):
        if "vals" not in value:
            return value
        return {**value, "vals": [absolute_init(one) for one in value["vals"]]}
    if not isinstance(value, str):
        return value
    if "://" in value:
        raise ValueError(
            f"init_checkpoint must be a file that every machine sees, got {value!r}"
        )
    return str(Path(value).resolve())
