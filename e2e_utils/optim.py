"""What moves the weights: the optimizer, its learning rate, the average of weights.

Copy: this file and config.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from .config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay on matrices and kernels only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict] = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            groups, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    raise ValueError(f"optimizer must be 'adamw' or 'sgd', got {config.optimizer!r}")


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move `average` towards the weights that `model` has after `step` (1, 2, ...).

    The decay rises as min(decay, (1 + step) / (10 + step)), so that the random
    weights of the start are soon forgotten (TensorFlow's ExponentialMovingAverage
    with num_updates). Running statistics are averaged too, counters copied.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    values = model.state_dict()
    for key, mean in average.state_dict().items():
        if mean.is_floating_point():
            mean.lerp_(values[key], weight)
        else:
            mean.copy_(values[key])


def lr_factor(config: TrainConfig, steps: int, steps_per_epoch: int) -> Callable:
    """What multiplies the learning rate at a step, for `LambdaLR`."""
    if config.lr_scheduler not in ("cosine", "multistep"):
        raise ValueError(
            f"lr_scheduler must be 'cosine' or 'multistep', got {config.lr_scheduler!r}"
        )
    warmup = round(config.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.lr_scheduler == "multistep":
            passed = sum(step >= epoch * steps_per_epoch for epoch in config.lr_steps)
            return config.lr_gamma**passed
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2

    return factor
