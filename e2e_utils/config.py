"""What decides a training run: its configuration, and the flags that give it.

Copy: this file.
"""

from __future__ import annotations

import argparse
import json
import typing
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from pathlib import Path

BEST_METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
# What may differ when a run goes on: it changes where and how, and no number
FREE = {"output_dir", "data_path", "workers", "cache", "device", "save_steps"}
FREE |= {"amp"}  # the precision that it led to is compared, see hardware.py
# What notebook 3 trains with unless it is told otherwise: fields of TrainConfig.
RECIPES: dict[str, dict] = {
    # the drawn scenes, in minutes on two cores; tried out in benchmarks/learn.py
    "sample": {
        "model": "fasterrcnn_lite0_fpn",
        "weights_backbone": "DEFAULT",
        "steps": 750,
        "eval_steps": 250,
        "lr": 1e-3,
        "cache": True,
    },
    # xView on a GPU: the schedule of torchvision's references for COCO, whose rate is
    # for 16 pictures a step and half for 8; and tiles that enter at their own size,
    # with anchors from 16 px and as many boxes as they hold
    "xview": {
        "model": "fasterrcnn_resnet50_fpn",
        "weights": "DEFAULT",
        "settings": {
            "min_size": 300,
            "max_size": 300,
            "anchor_sizes": [[16], [32], [64], [128], [256]],
            "box_detections_per_img": 300,
        },
        "epochs": 26,
        "batch_size": 8,
        "optimizer": "sgd",
        "lr": 0.01,
        "weight_decay": 1e-4,
        "lr_scheduler": "multistep",
        "workers": 8,
    },
}
_OF_MODEL = ("weights", "weights_backbone", "settings")


@dataclass
class TrainConfig:
    """Everything that decides a run. The defaults train the small detector on a CPU."""

    data_path: str  # folder of the tiles, with their tiles.json
    output_dir: str  # last.pt, best.pt and metrics.jsonl go here
    model: str = "fasterrcnn_small"  # a name of e2e_utils.models.MODELS
    weights: str | None = None  # "DEFAULT": COCO weights, needs a network
    weights_backbone: str | None = None  # "DEFAULT": ImageNet weights
    # of the same model and classes, to start from; `settings` come from it as well
    init_checkpoint: str | None = None
    settings: dict = field(default_factory=dict)  # constructor arguments of the model
    augment: dict = field(default_factory=dict)  # arguments of data.default_augment
    steps: int | None = None  # length of the run; instead of epochs
    epochs: int = 26
    batch_size: int = 2  # tiles a step on each process
    optimizer: str = "adamw"  # or "sgd"
    lr: float = 1.5e-3
    scale_lr: bool = False  # multiply lr by the number of processes (Goyal et al. 2017)
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.05  # on matrices and kernels; never on norms and biases
    lr_scheduler: str = "cosine"  # to 1 % of lr; or "multistep"
    lr_steps: list[float] = field(default_factory=lambda: [16, 22])  # epochs, multistep
    lr_milestones: list[int] | None = None  # the same in steps; instead of lr_steps
    lr_gamma: float = 0.1  # factor at each of lr_steps
    warmup: float = 0.05  # share of the steps with a linearly rising rate
    clip_grad: float = 10.0  # largest norm of the gradient; 0 for none
    amp: str = "auto"  # "off" is float32; "bf16", "fp16"; "auto" asks hardware.py
    ema: float = 0.0  # decay of an average of the weights, such as 0.999; 0 for none
    compile: bool = False  # torch.compile the backbone; not equal bit by bit
    eval_steps: int | None = None  # validate and save this often; once an epoch if None
    best_metric: str = "AP50"  # of the validation; best.pt is where it was highest
    save_steps: int | None = None  # save this often besides
    workers: int = 0  # processes that load tiles
    cache: bool = False  # keep decoded tiles in memory, in each process that loads
    repeat_threshold: float = 0.0  # repeat tiles of rarer classes; 0 for none, or 0.001
    aspect_ratio_group_factor: int = -1  # batches of like tiles, 3 for 7 bins; -1: any
    seed: int = 0
    device: str | None = None  # "cpu", "cuda"; a GPU if there is one

    def __post_init__(self) -> None:
        """Whole floats, as papermill makes of 1e5, become ints where ints belong."""
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if hint in (int, int | None) and value is not None:
                setattr(self, name, whole(name, value))
            elif hint is float and not _is_number(value):
                raise ValueError(
                    f"{name} must be a number, got {value!r} (YAML takes 1e-3 for a "
                    "word: write 1.0e-3)"
                )
        if self.lr_milestones is not None:
            self.lr_milestones = [whole("lr_milestones", v) for v in self.lr_milestones]

    def check(self) -> None:
        """Raise ValueError for a value out of range that nothing else would refuse."""
        for name in ("steps", "epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in 0..1, below 1, got {self.ema!r}")
        if self.best_metric not in BEST_METRICS:
            raise ValueError(
                f"best_metric must be one of {', '.join(BEST_METRICS)}, "
                f"got {self.best_metric!r}"
            )


def _is_number(value: typing.Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def whole(name: str, value: typing.Any) -> int:
    """A number as an int if it is a whole one; `name` is for the error.

    Raises:
        ValueError: it is none.

    Example:
        >>> whole("steps", 1e5)  # as YAML and papermill give it
        100000
    """
    if not _is_number(value) or value % 1 != 0:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def from_recipe(
    recipe: str,
    data_path: str | Path,
    output_dir: str | Path,
    tile_size: int | None = None,
    **changes: typing.Any,
) -> TrainConfig:
    """The configuration of a recipe, with some of its fields changed.

    Args:
        recipe: a name of `RECIPES`.
        data_path, output_dir: see `TrainConfig`.
        tile_size: side of the tiles in pixels, which the recipe's input size follows.
        **changes: fields of `TrainConfig`. Settings join those of the recipe, where
            None is the model's default. With another model weights and settings are
            those of TrainConfig. With epochs, the recipe's steps do not count.

    Raises:
        ValueError: no such recipe.

    Example:
        >>> config = from_recipe("xview", "tiles", "out", tile_size=512, epochs=2)
        >>> config.model, config.epochs, config.settings["min_size"]
        ('fasterrcnn_resnet50_fpn', 2, 512)
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    fields_of, given = deepcopy(RECIPES[recipe]), dict(changes)
    if tile_size is not None and "settings" in fields_of:
        fields_of["settings"] |= {"min_size": tile_size, "max_size": tile_size}
    if given.get("model", fields_of["model"]) != fields_of["model"]:
        fields_of = {k: v for k, v in fields_of.items() if k not in _OF_MODEL}
    if "settings" in given:
        own = given["settings"] or {}
        given["settings"] = {**fields_of.get("settings", {}), **own}
    if given.get("epochs") is not None:
        fields_of["steps"] = None
    return TrainConfig(str(data_path), str(output_dir), **{**fields_of, **given})


def check_same_run(saved: dict, wanted: TrainConfig) -> None:
    """Refuse to continue a run whose results would differ from what was asked.

    Args:
        saved: asdict of the configuration that began it. A field that it lacks did
            not exist then, and has its default.
        wanted: the configuration asked for; its output_dir is named in the error.

    Example:
        >>> check_same_run({"lr": 1e-3}, TrainConfig("tiles", "out", lr=2e-3))
        Traceback (most recent call last):
            ...
        ValueError: out holds a run of another configuration (lr: 0.001 there, ...
    """
    saved = {**asdict(TrainConfig("", "")), **saved}
    changed = [
        f"{key}: {saved[key]!r} there, {value!r} asked"
        for key, value in asdict(wanted).items()
        if key not in FREE and saved[key] != value
    ]
    if changed:
        raise ValueError(
            f"{wanted.output_dir} holds a run of another configuration "
            f"({'; '.join(changed)}). Remove the folder or choose another output_dir."
        )


def parse_args(arguments: list[str] | None = None) -> TrainConfig:
    """A TrainConfig from command line flags; each field is a flag.

    Example:
        >>> flags = "--data-path tiles --output-dir out --lr-steps 16 22"
        >>> parse_args(flags.split()).lr_steps
        [16, 22]
    """
    parser = argparse.ArgumentParser(
        "e2e_utils.train", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    hints, defaults = typing.get_type_hints(TrainConfig), TrainConfig("", "")
    for option in fields(TrainConfig):
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            required=option.name in ("data_path", "output_dir"),
            **_flag(hints[option.name], getattr(defaults, option.name)),
        )
    return TrainConfig(**vars(parser.parse_args(arguments)))


def _flag(hint: typing.Any, default: typing.Any) -> dict[str, typing.Any]:
    """How argparse reads a field of that type."""
    kinds = [k for k in typing.get_args(hint) or [hint] if k is not type(None)]
    if kinds == [bool]:
        how: dict = {"action": argparse.BooleanOptionalAction}
    elif isinstance(default, dict):
        how = {"type": json.loads, "metavar": "JSON"}
    elif list in [typing.get_origin(kind) for kind in (hint, *kinds)]:
        how = {"nargs": "+", "type": int}
    else:
        how = {"type": kinds[0]}
    return {"default": default, **how}
