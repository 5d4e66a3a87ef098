"""Checkpoints: what describes a detector, written whole, read strictly.

Copy: this file, files.py, config.py, models.py, backbones.py, efficientnet_lite.py and
autocast.py.

A checkpoint is a file of torch with a dict. `CHECKPOINT_KEYS` are in each of them, so
that whoever reads it can build the detector without being told anything: to predict,
to train on, to export and to serve.
"""

from __future__ import annotations

import os
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import TrainConfig
from .files import atomic_path
from .models import build_model, resolved_settings

CHECKPOINT_KEYS = ("model", "architecture", "settings", "class_names")
# settings that decide which weights there are, and their shapes
SHAPES = ("anchor_sizes", "aspect_ratios", "backbone_norm", "reduced_tail")
# what only the training that goes on needs, as large as the weights
TRAINING_KEYS = ("trained", "optimizer", "scheduler", "scaler", "unreported")


def describe(config: TrainConfig, tiles: dict) -> dict:
    """What a checkpoint says of its detector.

    Args:
        config: of the run.
        tiles: what the run learned from, of `TileSet.describe`.

    Returns:
        "architecture", "settings" (all of them, with the values they have, so that a
        default that changes later does not change this detector), "class_names" (index
        = label, the background first), "category_ids" (COCO id of label 1, 2, ...),
        "tile_size", "overlap" and "stretch" (`Stretch.to_dict` of the scenes, or None).

    Example:
        >>> tiles = {"class_names": ["background", "car"], "tile_size": 300}
        >>> content = describe(TrainConfig("tiles", "out"), tiles)
        >>> content["architecture"], content["settings"]["min_size"]
        ('fasterrcnn_small', 300)
    """
    return {
        "architecture": config.model,
        "settings": resolved_settings(
            config.model, config.weights, config.weights_backbone, **config.settings
        ),
        **tiles,
    }


def bare_weights(weights: dict) -> dict:
    """A state dict by the model's own names of its weights.

    DistributedDataParallel writes "module." before each, torch.compile "_orig_mod."
    before those of what was compiled, both in either order.

    Example:
        >>> bare_weights({"module._orig_mod.head.bias": 0.5})
        {'head.bias': 0.5}
    """
    return {
        re.sub(r"^module\.", "", name.replace("_orig_mod.", "")): value
        for name, value in weights.items()
    }


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write a checkpoint so that it appears whole or not at all.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/last.pt", {"step": 250})
        ...     load_file(f"{folder}/last.pt")
        {'step': 250}
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())  # the name must not reach the disk before the bytes


def load_file(path: str | os.PathLike, device: str | torch.device = "cpu") -> Any:
    """What torch.save wrote; no code that stands in it is run.

    Raises:
        ValueError: not such a file; the message names it.
        OSError: there is no such file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/last.pt", {"step": 250})
        ...     load_file(f"{folder}/last.pt")
        {'step': 250}
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's unpickler raises whatever the bytes lead to
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "nsupported" in line), lines[0])
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error


def read_checkpoint(
    path: str | os.PathLike, device: str | torch.device = "cpu"
) -> dict:
    """The content of a checkpoint file.

    Raises:
        ValueError: not a checkpoint that describes its detector; the message names the
            file and what it lacks.
        OSError: there is no such file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/other.pt", {"step": 250})
        ...     read_checkpoint(f"{folder}/other.pt")
        Traceback (most recent call last):
            ...
        ValueError: ...other.pt lacks model, architecture, settings, class_names: ...
    """
    checkpoint = load_file(path, device)
    keys = set(checkpoint) if isinstance(checkpoint, dict) else set()
    missing = [key for key in CHECKPOINT_KEYS if key not in keys]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: it was not written by e2e_utils.train "
            f"(its keys: {', '.join(map(str, sorted(keys, key=str)))[:200]})"
        )
    return checkpoint


def model_from_checkpoint(
    path: str | os.PathLike, device: str | torch.device = "cpu", **settings: Any
) -> tuple[nn.Module, dict]:
    """The detector of a checkpoint file, in evaluation mode, and what describes it.

    Args:
        path: a file written by `e2e_utils.train` or `kserve_utils.export`.
        device: where the weights go.
        **settings: of `build_model`, instead of those in the file: another input size,
            or higher caps. What changes the shape of a weight does not fit.

    Returns:
        (model, meta): meta is the checkpoint without its weights and optimizer state:
        architecture, settings, class_names (index = label), category_ids, tile_size,
        overlap, stretch, and what else the checkpoint says.

    Raises:
        ValueError: not such a checkpoint, or no such setting; the message names the
            file and what lacks, or the valid settings.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> names = ["background", "car"]
        >>> content = describe(TrainConfig("tiles", "out"), {"class_names": names})
        >>> weights = build_model(content["architecture"], 2).state_dict()
        >>> with TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/best.pt", {"model": weights, **content})
        ...     model, meta = model_from_checkpoint(f"{folder}/best.pt")
        >>> meta["class_names"], model.training
        (['background', 'car'], False)
    """
    checkpoint = read_checkpoint(path, device)
    checkpoint["settings"] = {**checkpoint["settings"], **settings}
    model = load_detector(checkpoint, path).to(device)
    left_out = ("model", *TRAINING_KEYS)
    return model, {k: v for k, v in checkpoint.items() if k not in left_out}


def load_detector(checkpoint: dict, path: str | os.PathLike) -> nn.Module:
    """The detector of a checkpoint's content, in evaluation mode.

    Args:
        checkpoint: of `read_checkpoint`.
        path: of its file, for the error.

    Raises:
        ValueError: the weights do not fit what the checkpoint says of itself.

    Example:
        >>> content = {"architecture": "fasterrcnn_small", "settings": {}}
        >>> content["class_names"] = ["background", "car"]
        >>> content["model"] = build_model("fasterrcnn_small", 2).state_dict()
        >>> load_detector(content, "best.pt").training
        False
    """
    name, classes = checkpoint["architecture"], len(checkpoint["class_names"])
    model = build_model(name, classes, **checkpoint["settings"])
    try:
        model.load_state_dict(bare_weights(checkpoint["model"]))
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {path} do not fit {name} with {classes} classes: "
            f"{str(error)[:300]}"
        ) from error
    return model.eval()


def start_from(
    path: str | os.PathLike,
    architecture: str,
    class_names: list[str],
    tile_size: int,
    **settings: Any,
) -> tuple[nn.Module, dict]:
    """A detector with the weights and settings of a checkpoint, to train on from there.

    Args:
        path: a file that `read_checkpoint` reads.
        architecture: that it must have.
        class_names: of its labels, in their order, that it must have.
        tile_size: side of the tiles to train on in pixels. They are resized by the
            factor by which those of the checkpoint were, most often 1.
        **settings: of `build_model`, instead of those in the file.

    Returns:
        (model, settings): the model in training mode, and all its settings.

    Raises:
        ValueError: not such a checkpoint, or one of another architecture or other
            classes; or a setting changes which weights there are, or their shape.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> names, kind = ["background", "car"], "fasterrcnn_small"
        >>> content = describe(TrainConfig("tiles", "out"), {"class_names": names})
        >>> content["model"] = build_model(kind, 2).state_dict()
        >>> with TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/best.pt", content)
        ...     model, settings = start_from(f"{folder}/best.pt", kind, names, 300)
        >>> model.training, settings == content["settings"]
        (True, True)
    """
    there = read_checkpoint(path)
    if there["architecture"] != architecture:
        raise ValueError(
            f"init_checkpoint {path} holds architecture {there['architecture']}, "
            f"the run wants {architecture}"
        )
    learned = list(there["class_names"])
    if learned != class_names:
        pairs = enumerate(zip_longest(learned, class_names))
        label, (old, new) = next(pair for pair in pairs if len(set(pair[1])) > 1)
        raise ValueError(
            f"init_checkpoint {path} has {old!r} as label {label}, the run {new!r}"
        )
    own, old_size = there["settings"], there.get("tile_size")
    if old_size and isinstance(side := own.get("min_size"), int):
        if side == own.get("max_size"):
            side = round(side * tile_size / old_size)
            own = {**own, "min_size": side, "max_size": side}
    settings = resolved_settings(architecture, **{**own, **settings})
    model = build_model(architecture, len(learned), **settings)
    try:
        model.load_state_dict(bare_weights(there["model"]))
    except RuntimeError as error:
        kind = {k: v for k, v in there["settings"].items() if k in SHAPES}
        raise ValueError(
            f"init_checkpoint {path} was trained with other settings, leave the run "
            f"its {kind}: {' '.join(str(error).split())}"[:400]
        ) from error
    return model, settings
