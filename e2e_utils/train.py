"""One training step, one loop; from a notebook, a shell or torchrun.

    python -m e2e_utils.train --data-path tiles --output-dir training
    torchrun --nproc_per_node=4 -m e2e_utils.train --data-path tiles \\
        --output-dir training --model fasterrcnn_resnet50_fpn --weights DEFAULT \\
        --epochs 26 --optimizer sgd --lr 0.02 --weight-decay 1e-4 \\
        --lr-scheduler multistep --lr-steps 16 22 --aspect-ratio-group-factor 3

SIGTERM makes it save and end with exit code 143; the same command goes on from there.
What a loop says goes through three plain callables: report(metrics, step), save(step)
and should_stop(); the platforms hang theirs on these.

Copy: this file, run.py, checkpoint.py, files.py, config.py, data.py, coco.py,
tile_set.py, sampling.py, scenes.py, images.py, stretch.py, models.py, backbones.py,
efficientnet_lite.py, autocast.py, hardware.py, optim.py, processes.py,
metrics_log.py, evaluate.py and truth.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from .config import TrainConfig, parse_args
from .data import CocoTiles, eval_loader
from .evaluate import coco_metrics, detect
from .metrics_log import MetricsLog
from .optim import update_ema
from .processes import gather
from .run import Run, check_finite

REPORT_STEPS = 20  # losses are averaged over so many steps
STOP_STEPS = 10  # several processes agree this often on whether to stop
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Make all that is random in one step a function of (seed, step, rank).

    A detector samples anchors and proposals at random. Seeded by the step, a resumed
    run needs no saved generator state, and every adapter draws the same samples.

    Example:
        >>> draws = [(seed_step(seed=0, step=7), torch.rand(())) for _ in range(2)]
        >>> draws[0] == draws[1]
        True
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

    Example:
        >>> from e2e_utils.models import build_model
        >>> model = build_model("fasterrcnn_small", 2)
        >>> boxes, labels = torch.tensor([[9.0, 9, 30, 30]]), torch.tensor([1])
        >>> tile, car = torch.zeros(3, 64, 64), {"boxes": boxes, "labels": labels}
        >>> losses = forward_losses(model, [tile], [car])
        >>> bool(losses.pop("loss") == sum(losses.values()))
        True
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

    Example:
        >>> from e2e_utils.models import build_model
        >>> model = build_model("fasterrcnn_small", 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> boxes, labels = torch.tensor([[9.0, 9, 30, 30]]), torch.tensor([1])
        >>> batch = [torch.zeros(3, 64, 64)], [{"boxes": boxes, "labels": labels}]
        >>> first, *_, last = [train_step(model, optimizer, *batch) for _ in range(6)]
        >>> bool(last["loss"] < first["loss"])
        True
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


def evaluate_split(
    model: nn.Module,
    dataset: CocoTiles,
    device: torch.device,
    dtype: torch.dtype | None = None,
    workers: int = 0,
) -> tuple[dict, list[dict]]:
    """(COCO metrics, detections) of a split; processes share the tiles, each once.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from e2e_utils.models import build_model
        >>> from sample_data.noise import write_noise_tiles
        >>> model = build_model("fasterrcnn_small", 61)  # has learned nothing
        >>> with TemporaryDirectory() as folder:
        ...     write_noise_tiles(folder, size=64, tiles=2)
        ...     tiles = CocoTiles(f"{folder}/val", f"{folder}/val.json")
        ...     metrics, found = evaluate_split(model, tiles, torch.device("cpu"))
        >>> 0 <= metrics["AP"] < 0.1
        True
    """
    joined = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    loader = eval_loader(dataset, workers=workers, rank=rank, world_size=world_size)
    found = detect(model, loader, device, dataset.category_ids, dtype)
    found = [row for part in gather(found) for row in part]
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
        report: called with (metrics, step): losses every 20 steps, COCO metrics of the
            validation tiles at each evaluation.
        save: called with the step of each checkpoint, after last.pt was written; on
            every process, so that it may be a collective call. The file is on the main
            one.
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

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from sample_data.noise import write_noise_tiles
        >>> with TemporaryDirectory() as folder:
        ...     write_noise_tiles(folder, size=64, tiles=2)
        ...     config = TrainConfig(folder, f"{folder}/run", steps=2, batch_size=1)
        ...     metrics = fit(config, progress=False)
        ...     lines = read_metrics(f"{folder}/run/metrics.jsonl")
        >>> metrics["step"], ["loss" in line for line in lines]
        (2, [True, False])
    """
    run = Run(config)
    model = run.model.train()
    path = Path(config.output_dir, "metrics.jsonl")
    log = None if run.rank else MetricsLog(path, run.step)  # of the main process

    def tell(values: dict) -> None:
        if log:
            log.write(run.step, values)
        if log and report:
            report(values, run.step)

    if run.world_size > 1:
        ids = [run.device.index] if run.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids)
    hidden = not progress or run.rank > 0
    bar = tqdm(run.loader(), "training", run.steps, initial=run.step, disable=hidden)
    stop = False
    for images, targets in bar:
        losses = _step(run, model, images, targets)
        stop = stop or bool(should_stop and should_stop())
        stops = _any_process(run, stop)
        evaluates = run.is_due(config.eval_steps or run.steps_per_epoch)
        if evaluates or run.is_due(REPORT_STEPS):
            means = check_finite(run).mean(dim=0).tolist()
            run.unreported.clear()
            rate = run.scheduler.get_last_lr()[0]
            tell({**dict(zip(losses, means, strict=True)), "lr": rate})
            bar.set_postfix(loss=f"{means[-1]:.3f}")
        if evaluates:
            tell(_evaluate(run))
        if evaluates or stops or run.is_due(config.save_steps):
            _save(run, save)
        if stops:
            break
    return run.metrics


def _step(
    run: Run, model: nn.Module, images: list[torch.Tensor], targets: list[dict]
) -> dict[str, torch.Tensor]:
    config = run.config
    run.step += 1
    seed_step(config.seed, run.step, run.rank)
    batch = model, run.optimizer, images, targets
    losses = train_step(*batch, run.dtype, config.clip_grad, run.scaler)
    run.scheduler.step()
    if config.ema:
        update_ema(run.eval_model, run.model, config.ema, run.step)
    values = torch.stack(list(losses.values())).float()
    run.unreported.append((values, [target["image_id"] for target in targets]))
    return losses


def _any_process(run: Run, flag: bool) -> bool:
    """Whether the flag is set on any process; they agree every STOP_STEPS steps."""
    if run.world_size == 1:
        return flag
    return run.step % STOP_STEPS == 0 and any(gather(flag))


def _evaluate(run: Run) -> dict:
    """COCO metrics of the validation tiles, which the run keeps."""
    if run.world_size > 1:  # running statistics differ; those of rank 0 are saved
        for buffer in run.eval_model.buffers():
            dist.broadcast(buffer, 0)
    how = run.device, run.dtype, run.config.workers
    metrics, _ = evaluate_split(run.eval_model, run.val_set, *how)
    run.metrics = {**metrics, "step": run.step}
    run.best = max(run.best, metrics[run.config.best_metric] or 0.0)
    return metrics


def _save(run: Run, save: Callable[[int], None] | None) -> None:
    check_finite(run)  # never save what cannot go on
    if not run.rank:
        run.save()
    if save:
        if run.world_size > 1:
            dist.barrier()  # nobody hears of it before last.pt is there
        save(run.step)


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl, in order of their steps."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def main() -> None:
    """Train as the command line says; SIGTERM saves and ends with exit code 143."""
    terminated = threading.Event()
    saved: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())

    def show(values: dict, step: int) -> None:
        floats = [f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float)]
        tqdm.write("  ".join([f"step {step}", *floats]))

    config = parse_args()
    try:
        fit(config, report=show, save=saved.append, should_stop=terminated.is_set)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
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
