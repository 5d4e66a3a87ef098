"""A training run: set up once, resumed where it stopped, saved whole.

Copy: this file, checkpoint.py, files.py, config.py, data.py, sampling.py, models.py,
hardware.py and optim.py.

`train.fit` goes on from here, and so does a loop of another framework: it takes the
model, the optimizer, the data and the precision of a `Run`, and leaves the rest.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
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
from .models import build_model
from .optim import make_optimizer, make_scheduler
from .sampling import aspect_ratio_groups, epoch_length, repeat_factors


def start_process_group(device_name: str | None = None) -> tuple[int, int, int]:
    """(rank, world size, local rank), joining the group that torchrun announces.

    Args:
        device_name: of the configuration; decides what the processes speak over.

    Raises:
        ValueError: no such device on this machine, or one GPU for all processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if world_size > 1 and not dist.is_initialized():
        if device_name and ":" in device_name:
            raise ValueError(
                f"device {device_name!r} for {world_size} processes: give 'cuda', and "
                "each takes one of its own"
            )
        device = find_device(device_name, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL gathers objects on this one
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if not dist.is_initialized():
        return 0, 1, 0
    return dist.get_rank(), dist.get_world_size(), local_rank


def gather(value: Any) -> list:
    """What each process gives, in the order of their ranks; all of them must ask."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@dataclass
class Run:
    """A run as one process has it, between two steps."""

    config: TrainConfig
    rank: int
    world_size: int
    device: torch.device
    precision: str  # a key of hardware.PRECISIONS
    train_set: CocoTiles
    val_set: CocoTiles
    repeats: list[float] | None  # of the tiles, see sampling.py
    groups: list[int] | None
    steps_per_epoch: int
    steps: int  # of the whole run
    model: nn.Module  # what learns
    eval_model: nn.Module  # what is evaluated and served: the model, or its average
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    step: int = 0  # done
    best: float = -1.0  # best_metric, the highest so far
    metrics: dict = field(default_factory=dict)  # of the last evaluation
    # (losses, image ids) of each step since the last report, on the device
    unreported: list[tuple[torch.Tensor, list[int]]] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of autocast."""
        return PRECISIONS[self.precision]

    def loader(self, last: int | None = None) -> DataLoader:
        """The batches of this process from its step on, to the end or step `last`."""
        return train_loader(
            self.train_set,
            self.config.batch_size,
            last or self.steps,
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
            **describe(self.config, self.train_set.class_names),
            "precision": self.precision,
            "step": self.step,
            "metrics": self.metrics,
        }


def set_up(config: TrainConfig) -> Run:
    """Everything that a loop needs, from the beginning or from output_dir's last.pt.

    Args:
        config: of the run; with an empty output_dir it begins anew.

    Raises:
        ValueError, FileNotFoundError: see `train.fit`.
    """
    config.check()
    rank, world_size, local_rank = start_process_group(config.device)
    device = find_device(config.device, local_rank)
    state = read_last(config, device)
    precision = agree_on_precision(config, device, state)
    if world_size > 1 and local_rank:
        dist.barrier()  # one process of each machine writes what cache="disk" keeps
    train_set = CocoTiles(*config.split("train"), default_augment(), config.cache)
    val_set = CocoTiles(*config.split("val"), cache=config.cache)
    if world_size > 1 and not local_rank:
        dist.barrier()
    repeats = repeat_factors(train_set, config.repeat_threshold)
    groups = aspect_ratio_groups(train_set, config.aspect_ratio_group_factor)
    tiles = epoch_length(len(train_set), config.batch_size, repeats, groups)
    steps_per_epoch = max(1, tiles // (config.batch_size * world_size))
    steps = config.steps or config.epochs * steps_per_epoch
    model = _make_model(config, train_set.class_names, begins=not state)
    model.to(device, memory_format=memory_format(precision))  # type: ignore[call-overload]
    average = copy.deepcopy(model).requires_grad_(False) if config.ema else None
    if config.compile:
        # not the rest, whose shapes change with the tiles
        model.backbone.compile()  # type: ignore[union-attr, operator]
    optimizer = make_optimizer(model, config, world_size)
    run = Run(
        config=config,
        rank=rank,
        world_size=world_size,
        device=device,
        precision=precision,
        train_set=train_set,
        val_set=val_set,
        repeats=repeats,
        groups=groups,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        model=model,
        eval_model=model if average is None else average,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, config, steps, steps_per_epoch),
        scaler=grad_scaler(precision, device),
    )
    if state:
        _resume(run, state)
    return run


def read_last(config: TrainConfig, device: torch.device) -> dict:
    """last.pt of the run that goes on, or {}; the same on all processes.

    Raises:
        ValueError: output_dir holds a run of another configuration, or processes see
            different runs there. On all of them, so that none waits for another.
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
    """
    units: Iterable = map(set, gather(native_precisions(device)))
    able: set[str] = set.intersection(*units)
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


def _make_model(config: TrainConfig, class_names: list[str], begins: bool) -> nn.Module:
    torch.manual_seed(config.seed)
    model = build_model(
        config.model,
        len(class_names),
        config.weights,
        config.weights_backbone,
        **config.settings,
    )
    if begins and config.init_checkpoint:
        start_from(model, config.init_checkpoint, config.model, class_names)
    return model


def _resume(run: Run, state: dict) -> None:
    """Put a run back where its last.pt was written."""
    run.eval_model.load_state_dict(state["model"])
    run.model.load_state_dict(state.get("trained", state["model"]))
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    if state.get("scaler"):
        run.scaler.load_state_dict(state["scaler"])
    run.step, run.best, run.metrics = state["step"], state["best"], state["metrics"]
    run.unreported = [(losses, []) for losses in state.get("unreported", [])]
    state.clear()  # its tensors


def save_run(run: Run) -> None:
    """Write last.pt, and best.pt where the evaluation of this step was the best."""
    content = {
        "model": run.eval_model.state_dict(),
        **run.describe(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": run.step // run.steps_per_epoch,
        "config": asdict(run.config),
        "best": run.best,
    }
    output = Path(run.config.output_dir)
    # best.pt first: killed in between, the run repeats this step and both
    # a metric is None where it has no ground truth
    now = run.metrics.get(run.config.best_metric) or 0.0
    if run.metrics.get("step") == run.step and now == run.best:
        save_checkpoint(output / "best.pt", content)
    if run.eval_model is not run.model:
        content["trained"] = run.model.state_dict()
    content["unreported"] = [losses for losses, _ in run.unreported]
    save_checkpoint(output / "last.pt", content)
