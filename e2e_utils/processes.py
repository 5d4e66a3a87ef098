"""The processes of one training, as torchrun or another launcher starts them.

Copy: this file and hardware.py.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from .hardware import find_device


def start_process_group(device_name: str | None = None) -> tuple[int, int, int]:
    """(rank, world size, local rank), joining the group that torchrun announces.

    Args:
        device_name: of the configuration; decides what the processes speak over.

    Raises:
        ValueError: no such device on this machine, or one GPU for all processes.

    Example:
        >>> start_process_group()  # not started by torchrun
        (0, 1, 0)
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
    """What each process gives, in the order of their ranks; all of them must ask.

    Example:
        >>> gather("from the one process")
        ['from the one process']
    """
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
