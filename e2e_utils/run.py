"""A training run: set up once, resumed where it stopped, saved whole.

Copy: this file, checkpoint.py, files.py, config.py, data.py, coco.py, tile_set.py,
sampling.py, scenes.py, images.py, stretch.py, models.py, backbones.py,
efficientnet_lite.py, autocast.py, hardware.py, optim.py and processes.py.

`train.fit` goes on from here, and so does a loop of another framework: it takes the
model, the optimizer, the data and the precision of a `Run`, and leaves the rest.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from .checkpoint import describe, save_checkpoint, start_from
from .config import TrainConfig, check_same_run
from .data import CocoTiles, default_augment, train_loader
from .hardware import (
    PRECISIONS,
    choose_precision,
    find_device,
    grad_scaler,
    memory_format,
    native_precisions,
)
from .models import build_model, resolved_settings
from .optim import make_optimizer, make_scheduler
from .processes import gather, start_process_group
from .sampling import aspect_ratio_groups, epoch_length, repeat_factors
from .tile_set import read_tile_set


class Run:
    """A run as one process has it: made once, from the beginning or from last.pt.

    Args:
        config: of the run. If its output_dir holds the last.pt of the same
            configuration, it goes on from there; with an empty output_dir it begins.

    Attributes:
        rank, world_size, device, precision: of this process; precision is a key of
            `hardware.PRECISIONS`, the same on all processes.
        tiles: what config.data_path holds, of `tile_set.read_tile_set`.
        train_set, val_set: CocoTiles.
        steps_per_epoch, steps: the latter of the whole run.
        model: what learns.
        eval_model: what is evaluated and served: the model, or the average of its
            weights.
        optimizer, scheduler, scaler: as torch has them.
        step: how many are done.
        metrics, best: of the last evaluation, and the highest best_metric so far.
        unreported: (losses, image ids) of each step since the last report; losses are
            float32 (L,) on the device.

    Raises:
        ValueError, FileNotFoundError: see `train.fit`.
    """

    def __init__(self, config: TrainConfig) -> None:
        config.check()
        self.rank, self.world_size, local_rank = start_process_group(config.device)
        self.device = find_device(config.device, local_rank)
        self.tiles = read_tile_set(config.data_path)
        self.config = config = as_they_are(config, self.tiles.tile_size)
        state = read_last(config, self.device)
        self.precision = agree_on_precision(config, self.device, state)
        self._open_tiles()
        self.tiles.check_same(state, config.output_dir)
        self._make_model(state)
        self.optimizer = make_optimizer(self.model, config, self.world_size)
        self.scheduler = make_scheduler(
            self.optimizer, config, self.steps, self.steps_per_epoch
        )
        self.scaler = grad_scaler(self.precision, self.device)
        self.step, self.best = 0, -1.0
        self.metrics: dict = {}
        self.unreported: list[tuple[torch.Tensor, list[int]]] = []
        if state:
            self._resume(state)

    def _open_tiles(self) -> None:
        config = self.config
        try:
            augment = default_augment(**config.augment)
        except (TypeError, ValueError) as error:
            raise ValueError(f"augment is {config.augment}: {error}") from error
        train = CocoTiles(*self.tiles.split("train"), augment, config.cache)
        self.train_set = train
        self.val_set = CocoTiles(*self.tiles.split("val"), cache=config.cache)
        self.repeats = repeat_factors(train, config.repeat_threshold)
        self.groups = aspect_ratio_groups(train, config.aspect_ratio_group_factor)
        size = config.batch_size
        tiles = epoch_length(len(train), size, self.repeats, self.groups)
        self.steps_per_epoch = max(1, tiles // (size * self.world_size))
        self.steps = config.steps or config.epochs * self.steps_per_epoch

    def _make_model(self, state: dict) -> None:
        config, names = self.config, self.train_set.class_names
        torch.manual_seed(config.seed)
        kind, settings = config.model, config.settings
        model: Any
        if state:  # its weights come from there: nothing to download
            self.settings = state["settings"]
            model = build_model(kind, len(names), **self.settings)
        elif begin := config.init_checkpoint:
            size = self.tiles.tile_size
            model, self.settings = start_from(begin, kind, names, size, **settings)
        else:
            pretrained = config.weights, config.weights_backbone
            self.settings = resolved_settings(kind, *pretrained, **settings)
            model = build_model(kind, len(names), *pretrained, **self.settings)
        warn_if_shrunk(self.settings, self.tiles.tile_size)
        layout = memory_format(self.precision)
        self.model = self.eval_model = model.to(self.device, memory_format=layout)
        if config.ema:
            self.eval_model = copy.deepcopy(model).requires_grad_(False)
        if config.compile:
            model.backbone.compile()  # not the rest, whose shapes change with the tiles

    def _resume(self, state: dict) -> None:
        """Put the run back where its last.pt was written."""
        self.eval_model.load_state_dict(state["model"])
        self.model.load_state_dict(state.get("trained", state["model"]))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.best = state["step"], state["best"]
        self.metrics = state["metrics"]
        self.unreported = [(losses, []) for losses in state.get("unreported", [])]
        state.clear()  # its tensors

    @property
    def dtype(self) -> torch.dtype | None:
        """Of autocast."""
        return PRECISIONS[self.precision]

    def loader(self) -> DataLoader:
        """The batches of this process, from its step on to the end."""
        return train_loader(
            self.train_set,
            self.config.batch_size,
            self.steps,
            start=self.step,
            seed=self.config.seed,
            workers=self.config.workers,
            rank=self.rank,
            world_size=self.world_size,
            repeats=self.repeats,
            groups=self.groups,
        )

    def is_due(self, period: int | None) -> bool:
        """Whether what is done each `period` steps is done now; at the end it is."""
        if not period:
            return False
        return self.step % period == 0 or self.step == self.steps

    def describe(self) -> dict:
        """What its checkpoints say besides the weights."""
        return {
            **describe(self.config, self.tiles.describe()),
            "settings": self.settings,
            "precision": self.precision,
            "step": self.step,
            "metrics": self.metrics,
        }

    def save(self) -> None:
        """Write last.pt, and best.pt if the evaluation of this step was the best."""
        content = {
            "model": self.eval_model.state_dict(),
            **self.describe(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.step // self.steps_per_epoch,
            "config": asdict(self.config),
            "best": self.best,
        }
        output = Path(self.config.output_dir)
        # best.pt first: killed in between, the run repeats this step and both
        # a metric is None where it has no ground truth
        now = self.metrics.get(self.config.best_metric) or 0.0
        if self.metrics.get("step") == self.step and now == self.best:
            save_checkpoint(output / "best.pt", content)
        if self.eval_model is not self.model:
            content["trained"] = self.model.state_dict()
        content["unreported"] = [losses for losses, _ in self.unreported]
        save_checkpoint(output / "last.pt", content)


def check_finite(run: Run) -> torch.Tensor:
    """The losses since the last report, float32 (steps, losses), on the host.

    Raises:
        FloatingPointError: one of them is not finite; names the step and its tiles.

    Example:
        >>> from types import SimpleNamespace
        >>> run = SimpleNamespace(unreported=[(torch.tensor([0.5, 1.5]), [7])])
        >>> check_finite(run).tolist()
        [[0.5, 1.5]]
    """
    if not run.unreported:
        return torch.zeros(0, 0)
    losses = torch.stack([values for values, _ in run.unreported]).cpu()
    bad = (~losses.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        ids = set(run.unreported[bad[0]][1])
        tiles = [i["file_name"] for i in run.train_set.images if i["id"] in ids]
        raise FloatingPointError(
            f"the loss is not finite at step {run.step - len(losses) + 1 + bad[0]}, on "
            f"the tiles {', '.join(tiles)}. Lower lr, or look at these tiles and their "
            "boxes."
        )
    return losses


def as_they_are(config: TrainConfig, tile_size: int) -> TrainConfig:
    """The configuration whose detector takes tiles of this size without resizing them.

    It is that of a model which means to: its min_size is its max_size. Settings that
    name either of them stay, and so do models that resize on purpose; and a run from
    a checkpoint, whose settings `start_from` takes.

    Example:
        >>> as_they_are(TrainConfig("tiles", "out"), tile_size=512).settings
        {'max_size': 512, 'min_size': 512}
    """
    own = resolved_settings(config.model)
    sides = {"min_size", "max_size"}
    meant = own.get("min_size") is not None and own["min_size"] == own.get("max_size")
    fits = own.get("min_size") == tile_size or config.init_checkpoint
    if not meant or fits or sides & config.settings.keys():
        return config
    fitted = {**config.settings, **dict.fromkeys(sorted(sides), tile_size)}
    return replace(config, settings=fitted)


def warn_if_shrunk(settings: dict, tile_size: int) -> None:
    """A warning if a model's settings let it shrink square tiles of this size.

    Example:
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warn_if_shrunk({"min_size": 300, "max_size": 300}, tile_size=512)
        >>> len(told)
        1
    """
    given = (settings.get(key) for key in ("min_size", "max_size"))
    side = min((one for one in given if isinstance(one, int)), default=tile_size)
    if side < tile_size:
        warnings.warn(
            f"tiles of {tile_size} px are shrunk to {side} px, and their objects with "
            "them: settings say so (min_size, max_size)",
            stacklevel=2,
        )


def read_last(config: TrainConfig, device: torch.device) -> dict:
    """last.pt of the run that goes on, or {}; the same on all processes.

    Raises:
        ValueError: output_dir holds a run of another configuration, or processes see
            different runs there. On all of them, so that none waits for another.

    Example:
        >>> read_last(TrainConfig("tiles", "no such folder"), torch.device("cpu"))
        {}
    """
    state: dict = {}
    path = Path(config.output_dir) / "last.pt"
    if config.output_dir and path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        check_same_run(state["config"], config)
    if len(set(gather((state.get("step"), state.get("precision"))))) > 1:
        raise ValueError(
            f"{config.output_dir} is not the same on all machines: output_dir must be "
            "a folder that each of them sees"
        )
    return state


def agree_on_precision(config: TrainConfig, device: torch.device, state: dict) -> str:
    """What all processes compute in: what each of them has units for.

    Raises:
        ValueError: the run in output_dir cannot go on in its precision here.

    Example:
        >>> config = TrainConfig("tiles", "out", amp="off")
        >>> agree_on_precision(config, torch.device("cpu"), {})
        'fp32'
    """
    able: set[str] = set.intersection(*map(set, gather(native_precisions(device))))
    if state and "precision" not in state and config.amp == "auto":
        raise ValueError(
            f"{config.output_dir}/last.pt lacks its precision: give amp='off' or 'bf16'"
        )
    began = state.get("precision")
    try:
        return choose_precision(config.amp, config.model, device, able, began)
    except ValueError as error:
        if not state:
            raise
        raise ValueError(
            f"{config.output_dir} holds a run that cannot go on here: {error}"
        ) from error
