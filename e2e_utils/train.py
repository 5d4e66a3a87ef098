"""One training step, one loop, checkpoints; from a notebook, a shell or torchrun.

    python -m e2e_utils.train --data-path tiles --output-dir training
    torchrun --nproc_per_node=4 -m e2e_utils.train --data-path tiles \\
        --output-dir training --model fasterrcnn_resnet50_fpn --weights DEFAULT \\
        --epochs 26 --optimizer sgd --lr 0.02 --weight-decay 1e-4 \\
        --lr-scheduler multistep --lr-steps 16 22 --aspect-ratio-group-factor 3

SIGTERM makes it save and end with exit code 143; the same command goes on from there.

Copy: this file, config.py, data.py, sampling.py, models.py, backbones.py, optim.py,
hardware.py and evaluate.py.
It alone composes the others; the adapters to a cluster call `forward_losses`,
`make_optimizer`, `lr_factor` and `seed_step`, so that a step means the same thing
everywhere.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from .config import TrainConfig, check_same_run, parse_args
from .data import CocoTiles, default_augment, eval_loader, train_loader
from .evaluate import coco_metrics, detect
from .hardware import (
    PRECISIONS,
    choose_precision,
    find_device,
    grad_scaler,
    memory_format,
    native_precisions,
)
from .models import build_model, resolved_settings, start_from
from .optim import lr_factor, make_optimizer, update_ema
from .sampling import aspect_ratio_groups, epoch_length, repeat_factors

REPORT_STEPS = 20  # losses are averaged over so many steps
BEST_METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
STOP_STEPS = 10  # several processes agree this often on whether to stop
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Make all that is random in one step a function of (seed, step, rank).

    A detector samples anchors and proposals at random. Seeded by the step, a resumed
    run needs no saved generator state, and every adapter draws the same samples.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 9_973 + rank)


def forward_losses(
    model: nn.Module,
    images: list[torch.Tensor],
    targets: list[dict],
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """The losses of a batch; "loss" is their sum, the one to call backward on.

    Args:
        model: a detector in training mode, on its device.
        images: uint8 (3, H, W) each; moved to the model's device here.
        targets: {"boxes": float32 (N, 4) xyxy, "labels": int64 (N,)} each.
        dtype: of autocast, None for none.
    """
    device = next(model.parameters()).device
    batch = [i.to(device, non_blocking=True).float() / 255 for i in images]
    wanted = [
        {
            key: target[key].as_subclass(torch.Tensor).to(device, non_blocking=True)
            for key in ("boxes", "labels")
        }
        for target in targets
    ]
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        losses = model(batch, wanted)
        losses["loss"] = sum(losses.values())
    return losses


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: list[torch.Tensor],
    targets: list[dict],
    dtype: torch.dtype | None = None,
    clip_grad: float = 10.0,
    scaler: torch.amp.GradScaler = NO_SCALER,
) -> dict[str, torch.Tensor]:
    """One step of the optimizer; the losses, detached, still on the device.

    Nothing here waits for a GPU: no value of it is read on the host, but in float16
    the scaler's, which may leave out a step whose gradients are too large for it.
    """
    losses = forward_losses(model, images, targets, dtype)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(losses["loss"]).backward()
    if clip_grad:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    return {key: value.detach() for key, value in losses.items()}


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint so that it appears whole or not at all."""
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())  # the name must not reach the disk before the bytes
    os.replace(beside, path)


def start_process_group(device_name: str | None = None) -> tuple[int, int, int]:
    """(rank, world size, local rank), joining the group that torchrun announces.

    Args:
        device_name: of the configuration; tells what the processes will speak over.

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


def open_run(config: TrainConfig, device: torch.device) -> tuple[dict, str]:
    """(last.pt of the run that goes on, or {}; what all processes compute in).

    Raises:
        ValueError: output_dir holds a run of another configuration, or one that cannot
            go on in its precision; or processes see different runs there. The same on
            all processes, so that none waits for another.
    """
    path = Path(config.output_dir) / "last.pt"
    state: dict = {}
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        check_same_run(state["config"], config)
    # what one process tells the others: its units, and the run that it sees
    told = native_precisions(device), state.get("step"), state.get("precision")
    everyone = [told]
    if dist.is_initialized():
        everyone = [told] * dist.get_world_size()
        dist.all_gather_object(everyone, told)
    if any(other[1:] != told[1:] for other in everyone):
        raise ValueError(
            f"{config.output_dir} is not the same on all machines: output_dir must be "
            "a folder that each of them sees"
        )
    able = set.intersection(*(set(units) for units, *_ in everyone))
    if state and "precision" not in state and config.amp == "auto":
        raise ValueError(
            f"{path} does not tell its precision: give amp='off' or 'bf16'"
        )
    began = state.get("precision")
    try:
        return state, choose_precision(config.amp, config.model, device, able, began)
    except ValueError as error:
        if not state:
            raise
        raise ValueError(
            f"{config.output_dir} holds a run that cannot go on here: {error}"
        ) from error


def _anyone(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process; all of them must ask."""
    told = torch.tensor(float(flag), device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)


def evaluate_split(
    model: nn.Module,
    dataset: CocoTiles,
    device: torch.device,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> tuple[dict, list[dict]]:
    """(COCO metrics, detections) of a split; ranks share the tiles, each once."""
    loader = eval_loader(dataset, workers=workers, rank=rank, world_size=world_size)
    found = detect(model, loader, device, dataset.category_ids, dtype)
    if world_size > 1:
        parts: list = [None] * world_size
        dist.all_gather_object(parts, found)
        found = [row for part in parts for row in part]
    return coco_metrics(dataset.coco, found), found


def fit(
    config: TrainConfig,
    report: Callable[[dict, int], None] | None = None,
    save: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = True,
) -> dict:
    """Train until the last step; a run that was interrupted continues.

    Args:
        config: of the run. If its output_dir holds the last.pt of the same
            configuration, training goes on from there.
        report: told (metrics, step): losses every 20 steps, COCO metrics of the
            validation tiles at each evaluation.
        save: told the step of each checkpoint, after last.pt was written; on every
            process, so that it may be a collective call. The file is on the main one.
        should_stop: asked after every step; if true, saves and returns. Of several
            processes any may say so; they agree on it every 10 steps.
        progress: show a bar.

    Returns:
        The metrics of the last evaluation, with the "step" at which it was.

    Raises:
        ValueError: output_dir holds a run of another configuration, or of a precision
            that this machine has no units for; init_checkpoint holds a model of another
            kind; there is no such device.
        FloatingPointError: the loss is not finite; names the tiles of that step.
    """
    if not 0 <= config.ema < 1:
        raise ValueError(f"ema must be in 0..1, below 1, got {config.ema!r}")
    if config.best_metric not in BEST_METRICS:
        raise ValueError(
            f"best_metric must be one of {', '.join(BEST_METRICS)}, "
            f"got {config.best_metric!r}"
        )
    rank, world_size, local_rank = start_process_group(config.device)
    main = rank == 0
    device = find_device(config.device, local_rank)
    state, precision = open_run(config, device)
    dtype = PRECISIONS[precision]
    if world_size > 1 and local_rank:
        dist.barrier()  # one process of each machine writes what cache="disk" keeps
    train_set = CocoTiles(*config.split("train"), default_augment(), config.cache)
    val_set = CocoTiles(*config.split("val"), cache=config.cache)
    if world_size > 1 and not local_rank:
        dist.barrier()
    repeats = repeat_factors(train_set, config.repeat_threshold)
    groups = aspect_ratio_groups(train_set, config.aspect_ratio_group_factor)
    epoch_tiles = epoch_length(len(train_set), config.batch_size, repeats, groups)
    steps_per_epoch = max(1, epoch_tiles // (config.batch_size * world_size))
    steps = config.steps or config.epochs * steps_per_epoch
    eval_steps = config.eval_steps or steps_per_epoch

    torch.manual_seed(config.seed)
    model = build_model(
        config.model,
        len(train_set.class_names),
        config.weights,
        config.weights_backbone,
        **config.settings,
    ).to(  # type: ignore[call-overload]  # torch has no hint for both at once
        device, memory_format=memory_format(precision)
    )
    if config.init_checkpoint and not state:
        start_from(model, config.init_checkpoint, config.model, train_set.class_names)
    average = copy.deepcopy(model).requires_grad_(False) if config.ema else None
    judged = model if average is None else average  # what is evaluated and served
    if config.compile:
        # not the rest, whose shapes change with the tiles
        model.backbone.compile()  # type: ignore[union-attr]
    scale = world_size if config.scale_lr else 1
    optimizer = make_optimizer(model, replace(config, lr=config.lr * scale))
    scaler = grad_scaler(precision, device)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lr_factor(config, steps, steps_per_epoch)
    )
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    start, best, metrics = 0, -1.0, {}
    recent: list = []  # (losses, image ids); losses stay on the device until reported
    if state:
        judged.load_state_dict(state["model"])
        model.load_state_dict(state.get("trained", state["model"]))
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        start, best, metrics = state["step"], state["best"], state["metrics"]
        recent = [(losses, []) for losses in state.get("unreported", [])]
        state.clear()  # its tensors
    log = _MetricsLog(output, start, config.tensorboard) if main else None

    def tell(values: dict, step: int) -> None:
        if log is not None:
            log.write(values, step)
            if report:
                report(values, step)

    def checkpoint(step: int) -> None:
        _check_finite(recent, step, train_set)  # never save what cannot go on
        content = {
            "model": judged.state_dict(),
            "architecture": config.model,
            # all of them: a default that changes later must not change this model
            "settings": resolved_settings(
                config.model, config.weights, config.weights_backbone, **config.settings
            ),
            "class_names": train_set.class_names,
            "tile_size": config.tile_size,
            "overlap": config.overlap,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": scaler.state_dict(),
            "precision": precision,
            "step": step,
            "epoch": step // steps_per_epoch,
            "config": asdict(config),
            "metrics": metrics,
            "best": best,
        }
        if main:
            # best.pt first: killed in between, the run repeats this step and both
            # a metric is None where it has no ground truth
            now = metrics.get(config.best_metric) or 0.0
            if metrics and metrics["step"] == step and now == best:
                save_checkpoint(output / "best.pt", content)
            if average is not None:
                content["trained"] = model.state_dict()
            content["unreported"] = [losses for losses, _ in recent]
            save_checkpoint(output / "last.pt", content)
        if save:
            if world_size > 1:
                dist.barrier()  # nobody is told before last.pt is there
            save(step)

    wrapped = model
    if world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=ids)
    loader = train_loader(
        train_set,
        config.batch_size,
        steps,
        start=start,
        seed=config.seed,
        workers=config.workers,
        rank=rank,
        world_size=world_size,
        repeats=repeats,
        groups=groups,
    )
    bar = tqdm(
        loader, "training", steps, initial=start, disable=not (progress and main)
    )
    model.train()
    stop = False
    for step, (images, targets) in enumerate(bar, start=start + 1):
        seed_step(config.seed, step, rank)
        losses = train_step(
            wrapped, optimizer, images, targets, dtype, config.clip_grad, scaler
        )
        scheduler.step()
        if average is not None:
            update_ema(average, model, config.ema, step)
        ids = [target["image_id"] for target in targets]
        recent.append((torch.stack(list(losses.values())).float(), ids))
        stop = stop or bool(should_stop and should_stop())
        stops = stop
        if world_size > 1:
            stops = step % STOP_STEPS == 0 and _anyone(stop, device)
        evaluates = step % eval_steps == 0 or step == steps
        if step % REPORT_STEPS == 0 or evaluates:
            mean = _check_finite(recent, step, train_set).mean(dim=0)
            values = dict(zip(losses, mean.tolist(), strict=True))
            values["lr"] = scheduler.get_last_lr()[0]
            recent.clear()
            tell(values, step)
            bar.set_postfix(loss=f"{values['loss']:.3f}")
        if evaluates:
            if world_size > 1:  # running statistics differ; those of rank 0 are saved
                for buffer in judged.buffers():
                    dist.broadcast(buffer, 0)
            metrics, _ = evaluate_split(
                judged, val_set, device, dtype, rank, world_size, config.workers
            )
            metrics["step"] = step
            best = max(best, metrics[config.best_metric] or 0.0)
            tell({k: v for k, v in metrics.items() if k != "step"}, step)
        saves = config.save_steps and step % config.save_steps == 0
        if evaluates or saves or stops:
            checkpoint(step)
        if stops:
            break
    return metrics


def _check_finite(recent: list, step: int, dataset: CocoTiles) -> torch.Tensor:
    """The losses of the steps up to `step`, float32 (steps, losses), on the host."""
    if not recent:
        return torch.zeros(0, 0)
    values = torch.stack([losses for losses, _ in recent]).cpu()
    bad = (~values.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        ids = set(recent[bad[0]][1])
        tiles = [i["file_name"] for i in dataset.images if i["id"] in ids]
        at = step - len(recent) + 1 + bad[0]
        raise FloatingPointError(
            f"the loss is not finite at step {at}, on the tiles {', '.join(tiles)}. "
            "Lower lr, or look at these tiles and their boxes."
        )
    return values


class _MetricsLog:
    """metrics.jsonl, a line per report, and TensorBoard's events if asked.

    A resumed run drops what was written after `start`.
    """

    def __init__(self, output: Path, start: int, tensorboard: bool) -> None:
        self.path = output / "metrics.jsonl"
        kept = []
        if start and self.path.exists():
            for line in self.path.read_text().splitlines(keepends=True):
                # a kill may have cut the last line, which is later than `start`
                if not line.endswith("\n") or json.loads(line)["step"] > start:
                    break
                kept.append(line)
        beside = self.path.with_suffix(".part")
        beside.write_text("".join(kept))
        os.replace(beside, self.path)
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(
                str(output / "tensorboard"), purge_step=start + 1 if start else None
            )

    def write(self, values: dict, step: int) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            kind = "train" if "loss" in values else "val"
            for key, value in values.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{kind}/{key}", value, step)
            self.board.flush()


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl, in order of their steps."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def main() -> None:
    try:
        _run(parse_args())
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error


def _run(config: TrainConfig) -> None:
    terminated = threading.Event()
    saved: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())

    def show(values: dict, step: int) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, float)}
        told = "  ".join(f"{k} {v:.4f}" for k, v in numbers.items())
        tqdm.write(f"step {step}  {told}")

    fit(config, report=show, save=saved.append, should_stop=terminated.is_set)
    if dist.is_initialized():
        dist.destroy_process_group()
    if terminated.is_set():
        if saved and not int(os.environ.get("RANK", 0)):  # the process that writes
            print(
                f"stopped by SIGTERM; {config.output_dir}/last.pt holds step "
                f"{saved[-1]}, and the same command goes on from there",
                file=sys.stderr,
            )
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
