"""What moves the weights: the optimizer, its learning rate, the average of weights.

Copy: this file and config.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .config import TrainConfig


def make_optimizer(
    model: nn.Module, config: TrainConfig, world_size: int = 1
) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay on matrices and kernels only.

    Args:
        model: those of its parameters that learn.
        config: of the run.
        world_size: processes that train together; scale_lr multiplies the rate by it.

    Raises:
        ValueError: no such optimizer.

    Example:
        >>> optimizer = make_optimizer(nn.Linear(3, 2), TrainConfig("tiles", "out"))
        >>> [group["weight_decay"] for group in optimizer.param_groups]  # weight, bias
        [0.05, 0.0]
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict] = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    lr = config.lr * (world_size if config.scale_lr else 1)
    options: dict = {"lr": lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, **options, momentum=config.momentum)
    raise ValueError(f"optimizer must be 'adamw' or 'sgd', got {config.optimizer!r}")


def lr_factor(
    config: TrainConfig, steps: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """What multiplies the learning rate at a step, for `LambdaLR`.

    Args:
        config: its lr_milestones are steps; without them lr_steps are epochs.
        steps: length of the run.
        steps_per_epoch: of this run.

    Raises:
        ValueError: no such lr_scheduler.

    Example:
        >>> factor = lr_factor(TrainConfig("tiles", "out", warmup=0.1), 100, 50)
        >>> [round(factor(step), 2) for step in (0, 9, 10, 55, 100)]
        [0.09, 0.91, 1.0, 0.51, 0.01]
    """
    if config.lr_scheduler not in ("cosine", "multistep"):
        raise ValueError(
            f"lr_scheduler must be 'cosine' or 'multistep', got {config.lr_scheduler!r}"
        )
    warmup = round(config.warmup * steps)
    milestones = config.lr_milestones
    if milestones is None:
        milestones = [math.ceil(epoch * steps_per_epoch) for epoch in config.lr_steps]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.lr_scheduler == "multistep":
            return config.lr_gamma ** sum(step >= one for one in milestones)
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2

    return factor


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    steps: int,
    steps_per_epoch: int,
) -> LambdaLR:
    """The learning rate's schedule, to be stepped after each step of the optimizer.

    Example:
        >>> config = TrainConfig("tiles", "out", lr=1.0, warmup=0.1)
        >>> optimizer = make_optimizer(nn.Linear(3, 2), config)
        >>> make_scheduler(optimizer, config, 10, 5).get_last_lr()
        [0.5, 0.5]
    """
    return LambdaLR(optimizer, lr_factor(config, steps, steps_per_epoch))


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move `average` towards the weights that `model` has after `step` (1, 2, ...).

    The decay rises as min(decay, (1 + step) / (10 + step)), so that the random
    weights of the start are soon forgotten (TensorFlow's ExponentialMovingAverage
    with num_updates). Running statistics are averaged too, counters copied.

    Example:
        >>> average, model = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = average.weight.data.fill_(0), model.weight.data.fill_(1)
        >>> update_ema(average, model, decay=0.75, step=1000)
        >>> average.weight.item()
        0.25
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    values = model.state_dict()
    for key, mean in average.state_dict().items():
        if mean.is_floating_point():
            mean.lerp_(values[key], weight)
        else:
            mean.copy_(values[key])
