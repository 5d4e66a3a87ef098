"""One training step, one loop, checkpoints; from a notebook, a shell or torchrun.

    python -m e2e_utils.train --data-path tiles --output-dir training
    torchrun --nproc_per_node=4 -m e2e_utils.train --data-path tiles \\
        --output-dir training --model fasterrcnn_resnet50_fpn --weights DEFAULT \\
        --epochs 26 --optimizer sgd --lr 0.02 --weight-decay 1e-4 \\
        --lr-scheduler multistep --lr-steps 16 22

Copy: this file, data.py, models.py and evaluate.py. It alone composes the others;
the adapters to a cluster call `forward_losses`, `make_optimizer`, `lr_factor` and
`seed_step`, so that a step means the same thing everywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from e2e_utils.data import CocoTiles, default_augment, eval_loader, train_loader
from e2e_utils.evaluate import coco_metrics, detect
from e2e_utils.models import build_model


@dataclass
class TrainConfig:
    """Everything that decides a run. The defaults train the small detector on a CPU."""

    data_path: str  # folder with train_300_02.json, train_images_300_02/, val_...
    output_dir: str  # last.pt, best.pt and metrics.jsonl go here
    model: str = "fasterrcnn_small"  # a name of e2e_utils.models.MODELS
    weights: str | None = None  # "DEFAULT": COCO weights, needs a network
    weights_backbone: str | None = None  # "DEFAULT": ImageNet weights
    settings: dict = field(default_factory=dict)  # constructor arguments of the model
    steps: int | None = None  # length of the run; instead of epochs
    epochs: int = 26
    batch_size: int = 2  # tiles a step on each process
    optimizer: str = "adamw"  # or "sgd"
    lr: float = 1.5e-3
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.05  # on matrices and kernels; never on norms and biases
    lr_scheduler: str = "cosine"  # to 1 % of lr; or "multistep"
    lr_steps: list[int] = field(default_factory=lambda: [16, 22])  # epochs, multistep
    lr_gamma: float = 0.1  # factor at each of lr_steps
    warmup: float = 0.05  # share of the steps with a linearly rising rate
    clip_grad: float = 10.0  # largest norm of the gradient; 0 for none
    amp: str = "auto"  # bfloat16 autocast: "on", "off", "auto" where hardware has it
    eval_steps: int | None = None  # validate and save this often; once an epoch if None
    workers: int = 0  # processes that load tiles
    cache: bool = False  # keep decoded tiles in memory
    seed: int = 0
    device: str | None = None  # cuda if there is one
    tile_size: int = 300  # of the tiles: finds the files, goes into the checkpoint
    overlap: float = 0.2

    def split(self, name: str) -> tuple[Path, Path]:
        """(folder of tiles, COCO file) of "train" or "val" below data_path."""
        tag = f"{self.tile_size}_{str(self.overlap).replace('.', '')}"
        root = Path(self.data_path)
        return root / f"{name}_images_{tag}", root / f"{name}_{tag}.json"


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Make all that is random in one step a function of (seed, step, rank).

    A detector samples anchors and proposals at random. Seeded by the step, a resumed
    run needs no saved generator state, and every adapter draws the same samples.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 9_973 + rank)


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 if it pays: always on a GPU, on a CPU with AMX or AVX512-bf16.

    On a CPU without them bfloat16 is emulated, and was measured seven times slower
    than float32.
    """
    if amp not in ("auto", "on", "off"):
        raise ValueError(f"amp must be 'auto', 'on' or 'off', got {amp!r}")
    if amp == "auto" and device.type == "cpu":
        native = (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
        amp = "on" if native else "off"
    return None if amp == "off" else torch.bfloat16


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
) -> dict[str, torch.Tensor]:
    """One step of the optimizer; the losses, detached, still on the device."""
    losses = forward_losses(model, images, targets, dtype)
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    if clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    optimizer.step()
    return {key: value.detach() for key, value in losses.items()}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay on matrices and kernels only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
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


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint so that it appears whole or not at all."""
    beside = path.with_suffix(".part")
    torch.save(content, beside)
    os.replace(beside, path)


def start_process_group() -> tuple[int, int, int]:
    """(rank, world size, local rank), joining the group that torchrun announces."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if not dist.is_initialized():
        return 0, 1, 0
    return dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0))


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
        save: told the step of each checkpoint, after last.pt was written.
        should_stop: asked after every step; if true, saves and returns.
        progress: show a bar.

    Returns:
        The metrics of the last evaluation with "step", the step reached.

    Raises:
        ValueError: output_dir holds a run of another configuration.
        FloatingPointError: the loss is not finite; names the tiles of that step.
    """
    rank, world_size, local_rank = start_process_group()
    main = rank == 0
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
    dtype = amp_dtype(config.amp, device)
    train_set = CocoTiles(*config.split("train"), default_augment(), config.cache)
    val_set = CocoTiles(*config.split("val"), cache=config.cache)
    steps_per_epoch = max(1, len(train_set) // (config.batch_size * world_size))
    steps = config.steps or config.epochs * steps_per_epoch
    eval_steps = config.eval_steps or steps_per_epoch

    torch.manual_seed(config.seed)
    model = build_model(
        config.model,
        len(train_set.class_names),
        config.weights,
        config.weights_backbone,
        **config.settings,
    ).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lr_factor(config, steps, steps_per_epoch)
    )
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    start, best, metrics = 0, -1.0, {}
    if (output / "last.pt").exists():
        state = torch.load(output / "last.pt", map_location=device, weights_only=True)
        _same_run(state["config"], asdict(config), output)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        start, best, metrics = state["step"], state["best"], state["metrics"]
    log = _MetricsLog(output / "metrics.jsonl", start) if main else None

    def tell(values: dict, step: int) -> None:
        if main:
            log.write(values, step)
            if report:
                report(values, step)

    def checkpoint(step: int) -> None:
        content = {
            "model": model.state_dict(),
            "architecture": config.model,
            "settings": config.settings,
            "class_names": train_set.class_names,
            "tile_size": config.tile_size,
            "overlap": config.overlap,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "step": step,
            "epoch": step // steps_per_epoch,
            "config": asdict(config),
            "metrics": metrics,
            "best": best,
        }
        if main:
            save_checkpoint(output / "last.pt", content)
            if metrics and metrics["step"] == step and metrics["AP50"] == best:
                save_checkpoint(output / "best.pt", content)
            if save:
                save(step)

    wrapped = model
    if world_size > 1:
        ids = [local_rank] if device.type == "cuda" else None
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
    )
    bar = tqdm(
        loader, "training", steps, initial=start, disable=not (progress and main)
    )
    model.train()
    recent: list = []  # losses stay on the device until they are reported
    for step, (images, targets) in enumerate(bar, start=start + 1):
        seed_step(config.seed, step, rank)
        losses = train_step(
            wrapped, optimizer, images, targets, dtype, config.clip_grad
        )
        scheduler.step()
        recent.append((losses, [t["image_id"] for t in targets]))
        stop = bool(should_stop and should_stop())
        evaluates = step % eval_steps == 0 or step == steps
        if step % 20 == 0 or evaluates or stop:
            values = _mean_losses(recent, step, train_set)
            values["lr"] = scheduler.get_last_lr()[0]
            recent.clear()
            tell(values, step)
            bar.set_postfix(loss=f"{values['loss']:.3f}")
        if evaluates:
            metrics, _ = evaluate_split(
                model, val_set, device, dtype, rank, world_size, config.workers
            )
            metrics["step"] = step
            best = max(best, metrics["AP50"] or 0.0)
            tell({k: v for k, v in metrics.items() if k != "step"}, step)
        if evaluates or stop:
            checkpoint(step)
        if stop:
            break
    return metrics


def _same_run(saved: dict, wanted: dict, output: Path) -> None:
    """Refuse to continue a run whose results would differ from what was asked."""
    free = {"output_dir", "data_path", "workers", "cache", "device"}
    changed = [
        f"{key}: {saved.get(key)!r} there, {value!r} asked"
        for key, value in wanted.items()
        if key not in free and saved.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{output} holds a run of another configuration ({'; '.join(changed)}). "
            "Remove the folder or choose another output_dir."
        )


def _mean_losses(recent: list, step: int, dataset: CocoTiles) -> dict[str, float]:
    table = torch.stack([torch.stack(list(losses.values())) for losses, _ in recent])
    values = table.float().cpu()
    bad = (~values.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        ids = set(recent[bad[0]][1])
        tiles = [i["file_name"] for i in dataset.images if i["id"] in ids]
        at = step - len(recent) + 1 + bad[0]
        raise FloatingPointError(
            f"the loss is not finite at step {at}, on the tiles {', '.join(tiles)}. "
            "Lower lr, or look at these tiles and their boxes."
        )
    return dict(zip(recent[0][0], values.mean(dim=0).tolist(), strict=True))


class _MetricsLog:
    """metrics.jsonl: a line per report; a resumed run drops the lines after `start`."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        lines = path.read_text().splitlines() if start and path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept))

    def write(self, values: dict, step: int) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl, in order of their steps."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def parse_args(arguments: list[str] | None = None) -> TrainConfig:
    """A TrainConfig from command line flags; each field is a flag."""
    parser = argparse.ArgumentParser(
        "e2e_utils.train", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    hints = typing.get_type_hints(TrainConfig)
    required = ("data_path", "output_dir")
    for option in fields(TrainConfig):
        flag = "--" + option.name.replace("_", "-")
        default = TrainConfig("", "").__dict__[option.name]
        if option.name in required:
            parser.add_argument(flag, required=True)
        elif isinstance(default, bool):
            parser.add_argument(
                flag, default=default, action=argparse.BooleanOptionalAction
            )
        elif isinstance(default, list):
            parser.add_argument(flag, default=default, nargs="+", type=int)
        elif isinstance(default, dict):
            parser.add_argument(flag, default=default, type=json.loads, metavar="JSON")
        else:
            kinds = [
                k for k in typing.get_args(hints[option.name]) if k is not type(None)
            ]
            kind = kinds[0] if kinds else hints[option.name]
            parser.add_argument(flag, default=default, type=kind)
    return TrainConfig(**vars(parser.parse_args(arguments)))


def main() -> None:
    config = parse_args()

    def show(values: dict, step: int) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, float)}
        told = "  ".join(f"{k} {v:.4f}" for k, v in numbers.items())
        tqdm.write(f"step {step}  {told}")

    fit(config, report=show)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
