"""A trial's hyperparameters, and its tiles: what model_def.py is told.

Copy: this file, config.py, hardware.py, storage.py and xview_classes.json.

Hyperparameters are the fields of `e2e_utils.train.TrainConfig` that say how to train
(model, settings, optimizer, lr, seed, ...) under their own names, and these:

    global_batch_size     tiles a step over all slots; an equal share for each
    max_batches           length of the run and of its learning rate schedule
    validation_batches    validate this often (once an epoch if absent)
    checkpoint_batches    save this often besides (never if absent)
    warmup_batches        length of the warm-up; instead of warmup, a share of the run
    lr_step_batches       steps of "multistep"; instead of lr_steps, in epochs
    backend               where the tiles are: local, fake, aws or gcs
    data_dir              a folder, or the s3:// or gs:// URL of one
    cache_dir             where aws and gcs put the tiles, on each machine

On a cluster, data_dir of the backend local and init_checkpoint are absolute paths that
every machine sees.
"""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from .config import TrainConfig
from .hardware import AMP

# What Determined decides or this trial measures in batches, and so is no hyperparameter
_NOT_HERE = {"data_path", "output_dir", "steps", "epochs", "batch_size", "eval_steps"}
_NOT_HERE |= {"save_steps", "tensorboard", "best_metric"}
# What the loop of e2e_utils.train does and this trial does not: refused, not ignored
_NOT_HERE |= {"ema", "compile", "scale_lr", "repeat_threshold"}
_NOT_HERE |= {"aspect_ratio_group_factor"}
_TRAIN_KEYS = {f.name for f in fields(TrainConfig)} - _NOT_HERE - {"device"}
_REQUIRED = {"global_batch_size", "max_batches", "backend"}
_OPTIONAL = {"validation_batches", "checkpoint_batches", "warmup_batches"}
_OPTIONAL |= {"lr_step_batches", "data_dir", "cache_dir"}
HYPERPARAMETERS = tuple(sorted(_TRAIN_KEYS | _REQUIRED | _OPTIONAL))

_SCHEMES = {"aws": "s3://", "gcs": "gs://"}

# What a searcher may name as its metric -> its key in e2e_utils.evaluate.coco_metrics
METRICS = {
    "mAP": "AP",
    "mAP_50": "AP50",
    "mAP_75": "AP75",
    "mAP_small": "AP_small",
    "mAP_medium": "AP_medium",
    "mAP_large": "AP_large",
}


def read_experiment(path: str | Path, overrides: list[str] | None = None) -> dict:
    """An experiment YAML with some hyperparameters replaced; ranges stay ranges.

    Args:
        path: of the YAML.
        overrides: "name=value" each, the value in YAML's notation.

    Raises:
        ValueError: no experiment, or a malformed override.
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
    """Raise ValueError for a hyperparameter that is missing or that nothing reads."""
    unknown = sorted(set(hparams) - set(HYPERPARAMETERS))
    if unknown:
        raise ValueError(
            f"unknown hyperparameter {', '.join(map(repr, unknown))}; "
            f"valid: {', '.join(HYPERPARAMETERS)}"
        )
    missing = sorted(_REQUIRED - set(hparams))
    if missing:
        raise ValueError(f"the hyperparameters lack {', '.join(missing)}")
    both = [
        (absolute, relative)
        for absolute, relative in (
            ("warmup_batches", "warmup"),
            ("lr_step_batches", "lr_steps"),
        )
        if absolute in hparams and relative in hparams
    ]
    if both:
        raise ValueError(f"give {both[0][0]} or {both[0][1]}, not both")


def train_config(hparams: dict, batch_size: int, data_path: str = "") -> TrainConfig:
    """The TrainConfig that a trial's hyperparameters describe.

    Args:
        hparams: see the top of this file.
        batch_size: tiles a step on each slot.
        data_path: folder of the tiles on this machine.

    Raises:
        ValueError: as `check_hparams`, or no such amp.
    """
    check_hparams(hparams)
    steps = hparams["max_batches"]
    values = {key: hparams[key] for key in _TRAIN_KEYS if key in hparams}
    if isinstance(values.get("amp"), bool):  # on and off are booleans in YAML
        values["amp"] = "on" if values["amp"] else "off"
    if values.get("amp", "auto") not in AMP:
        raise ValueError(f"amp must be one of {', '.join(AMP)}, got {values['amp']!r}")
    if "warmup_batches" in hparams:
        values["warmup"] = hparams["warmup_batches"] / steps
    if "lr_step_batches" in hparams:
        values["lr_steps"] = hparams["lr_step_batches"]
    return TrainConfig(data_path, "", steps=steps, batch_size=batch_size, **values)


def fetch_tiles(hparams: dict, local_rank: int = 0) -> str:
    """The folder of the tiles on this machine, fetched first if they are in a bucket.

    Raises:
        ValueError: an unknown backend, or a data_dir that does not fit it.
    """
    backend, where = hparams["backend"], str(hparams.get("data_dir") or "")
    if backend == "local":
        if not where or "://" in where:
            raise ValueError(f"backend local needs a folder as data_dir, got {where!r}")
        return where
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
    if local_rank == 0:  # once a machine, whatever the number of its slots
        from .storage import sync  # its libraries are needed here alone

        sync(where, hparams["cache_dir"])
    return str(hparams["cache_dir"])


def absolute_init(value: Any) -> Any:
    """init_checkpoint as an absolute path, also each of a range to search.

    For whoever starts processes in other working directories.

    Raises:
        ValueError: a URL; nothing fetches a checkpoint.
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


def write_fake_tiles(folder: str | Path, config: TrainConfig, tiles: int = 8) -> None:
    """Noise with bright rectangles, as COCO tiles: proves that a trial runs, no more.

    Writes the two splits that `TrainConfig.split` names, `tiles` and `tiles // 2` of
    them, with two xView classes that mean nothing here.
    """
    listed = resources.files("e2e_utils").joinpath("xview_classes.json").read_text()
    classes = json.loads(listed)["classes"]
    rng, size = np.random.default_rng(0), config.tile_size
    for split, count in (("train", tiles), ("val", max(2, tiles // 2))):
        image_dir, json_path = TrainConfig(
            str(folder), "", tile_size=size, overlap=config.overlap
        ).split(split)
        image_dir.mkdir(parents=True)
        coco: dict[str, list] = {"images": [], "annotations": [], "categories": []}
        for index, entry in enumerate(classes):
            coco["categories"].append({"id": index, "name": entry["name"]})
        for image_id in range(count):
            image = rng.integers(60, 120, (size, size, 3), dtype=np.uint8)
            for _ in range(4):
                w, h = (int(v) for v in rng.integers(12, 40, 2))
                x, y = (int(v) for v in rng.integers(0, size - 40, 2))
                category = int(rng.integers(0, 2))
                image[y : y + h, x : x + w] = (40, 40, 230) if category else 220
                coco["annotations"].append(
                    {
                        "id": len(coco["annotations"]) + 1,
                        "image_id": image_id,
                        "category_id": category,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                    }
                )
            name = f"fake_{split}_{image_id}.jpg"
            cv2.imwrite(str(image_dir / name), image)
            coco["images"].append(
                {"id": image_id, "file_name": name, "width": size, "height": size}
            )
        json_path.write_text(json.dumps(coco))
