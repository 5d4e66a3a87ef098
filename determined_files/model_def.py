"""The training of e2e_utils as a Determined trial: a thin adapter.

Copy: this folder and e2e_utils.

The model, the step, the data order and the figures are those of `e2e_utils.train`; a
trial with the same seed sees the same batches and computes the same losses. What is
here tells Determined where they are. e2e_utils/experiment.py lists the
hyperparameters.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from determined import pytorch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from e2e_utils import experiment
from e2e_utils.data import CocoTiles, default_augment, eval_loader, train_loader
from e2e_utils.evaluate import coco_metrics, detect
from e2e_utils.hardware import (
    PRECISIONS,
    choose_precision,
    grad_scaler,
    memory_format,
    native_precisions,
)
from e2e_utils.models import build_model, resolved_settings, start_from
from e2e_utils.optim import lr_factor, make_optimizer
from e2e_utils.train import forward_losses, seed_step

METRICS = experiment.METRICS


class CocoReducer(pytorch.MetricReducer):
    """Gathers the detections of all slots; the chief turns them into COCO's figures."""

    def __init__(self, coco: dict, chief: bool = True) -> None:
        self.coco, self.chief = coco, chief
        self.reset()

    def reset(self) -> None:
        self.image_ids: list[int] = []
        self.detections: list[dict] = []

    def update(self, image_ids: list[int], detections: list[dict]) -> None:
        self.image_ids += image_ids
        self.detections += detections

    def per_slot_reduce(self) -> tuple[list[int], list[dict]]:
        return self.image_ids, self.detections

    def cross_slot_reduce(self, per_slot_metrics: list) -> dict[str, float]:
        """mAP, mAP_50, mAP_75, mAP_small, _medium, _large in 0..1.

        A figure that has no ground truth to rest on is left out.
        """
        if not self.chief:
            return {}
        ids = [i for slot, _ in per_slot_metrics for i in slot]
        found = [row for _, slot in per_slot_metrics for row in slot]
        values = coco_metrics(self.coco, found, image_ids=ids)
        table = {name: values[key] for name, key in METRICS.items()}
        return {name: value for name, value in table.items() if value is not None}


class _Epochs:
    """A loader over the whole run that tells Determined the length of one epoch."""

    def __init__(self, loader: Any, batches: int) -> None:
        self.loader, self.batches = loader, batches

    def __iter__(self) -> Any:
        return iter(self.loader)

    def __len__(self) -> int:
        return self.batches


class _Callback(pytorch.PyTorchCallback):
    """Puts into a checkpoint what describes the model, and tells the outside."""

    def __init__(self, trial: ObjectDetectionTrial) -> None:
        self.trial = trial

    def on_training_start(self) -> None:
        # A new trial may start from the weights of another, whose schedule is over
        scheduler, step = self.trial.scheduler, self.trial.step
        if scheduler.last_epoch != step:
            scheduler.last_epoch = step
            for group, factor in zip(
                self.trial.optimizer.param_groups,
                scheduler.lr_lambdas,  # type: ignore[attr-defined]
                strict=True,
            ):
                group["lr"] = group["initial_lr"] * factor(step)

    def on_checkpoint_load_start(self, checkpoint: dict[str, Any]) -> None:
        if self.trial.step:  # it goes on with the run, and takes no weights alone
            self.trial.keep_precision(checkpoint.get("e2e", {}).get("precision"))

    def on_checkpoint_save_start(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["e2e"] = self.trial.describe()
        # As plain numbers NumPy's state passes torch's weights-only load, which
        # Determined's own resume meets from torch 2.6 on and fails at otherwise
        name, keys, *rest = checkpoint["rng_state"]["np_rng_state"]
        checkpoint["rng_state"]["np_rng_state"] = (name, keys.tolist(), *rest)

    def on_training_workload_end(
        self, avg_metrics: dict[str, Any], batch_metrics: Any
    ) -> None:
        # a list with a dict for each step, whatever Determined's hint says
        if self.trial.chief and self.trial.report:
            first = self.trial.step - len(batch_metrics) + 1
            for step, losses in enumerate(batch_metrics, start=first):
                self.trial.report({k: float(v) for k, v in losses.items()}, step)

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        values = {k: v for k, v in metrics.items() if k in METRICS}
        self.trial.metrics = {**values, "step": self.trial.step}
        if self.trial.chief and self.trial.report:
            self.trial.report(values, self.trial.step)

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        self.trial.checkpoint = uuid


class ObjectDetectionTrial(pytorch.PyTorchTrial):
    """Trains and validates a detector of e2e_utils on the slots that it is given.

    Args:
        context: of Determined.
        hparams: see e2e_utils/experiment.py; those of the experiment by default.
        start: steps already done, where Determined cannot know (a resumed run off
            the cluster).
        stop: last step of this run, where it ends before max_batches.
        report: told (metrics, step) on the chief: the losses of each step, the COCO
            figures of each validation.

    Attributes:
        metrics: of the last validation, with its step.
        checkpoint: id of the last checkpoint.
    """

    def __init__(
        self,
        context: pytorch.PyTorchTrialContext,
        hparams: dict | None = None,
        start: int | None = None,
        stop: int | None = None,
        report: Callable[[dict, int], None] | None = None,
    ) -> None:
        context.experimental.disable_dataset_reproducibility_checks()
        context.experimental.disable_auto_to_device()  # forward_losses moves the batch
        hparams = context.get_hparams() if hparams is None else hparams
        experiment.check_hparams(hparams)
        self.context, self.report = context, report
        self.rank, self.slots = context.distributed.rank, context.distributed.size
        self.chief = self.rank == 0
        self.metrics: dict = {}
        self.checkpoint: str | None = None
        if hparams["global_batch_size"] % self.slots:
            raise ValueError(
                f"global_batch_size {hparams['global_batch_size']} does not divide "
                f"equally among {self.slots} slots"
            )
        batch_size = hparams["global_batch_size"] // self.slots
        self.config = experiment.train_config(hparams, batch_size, self._tiles(hparams))
        self.step = context.get_initial_batch() if start is None else start
        steps = hparams["max_batches"]
        self.stop = min(stop or steps, steps)

        config = self.config
        self.train_set = CocoTiles(
            *config.split("train"), default_augment(), config.cache
        )
        self.val_set = CocoTiles(*config.split("val"), cache=config.cache)
        if len(self.val_set) < self.slots:
            raise ValueError(
                f"{config.split('val')[1]} has {len(self.val_set)} tiles for "
                f"{self.slots} slots; each needs at least one"
            )
        self.epoch = max(1, len(self.train_set) // hparams["global_batch_size"])
        self.precision = self._precision()
        self.dtype = PRECISIONS[self.precision]
        self.scaler = grad_scaler(self.precision, context.device)
        if self.scaler.is_enabled():
            context.wrap_scaler(self.scaler)  # Determined saves and resumes it
        self.model = self._build()
        self.wrapped = context.wrap_model(self.model)
        self.optimizer = context.wrap_optimizer(make_optimizer(self.model, config))
        # TrainConfig counts the steps of "multistep" in epochs: make one batch an epoch
        unit = 1 if "lr_step_batches" in hparams else self.epoch
        self.scheduler = LambdaLR(self.optimizer, lr_factor(config, steps, unit))
        context.wrap_lr_scheduler(
            self.scheduler,  # type: ignore[arg-type]  # hint of torch 1
            pytorch.LRScheduler.StepMode.MANUAL_STEP,
        )
        self.reducer = context.wrap_reducer(
            CocoReducer(self.val_set.coco, self.chief), for_training=False
        )

    def _tiles(self, hparams: dict) -> str:
        if hparams["backend"] == "fake":
            self._folder = tempfile.TemporaryDirectory(prefix="fake_tiles_")
            experiment.write_fake_tiles(
                self._folder.name, experiment.train_config(hparams, 1)
            )
            if self.chief:
                print("backend fake: noise with rectangles, the figures mean nothing")
            return self._folder.name
        path = experiment.fetch_tiles(hparams, self.context.distributed.local_rank)
        self.context.distributed.broadcast_local(None)  # wait for whoever fetches
        return path

    def _precision(self) -> str:
        """What all slots compute in, by what each of them has units for."""
        device, distributed = self.context.device, self.context.distributed
        able = distributed.allgather(native_precisions(device))
        self.able = set.intersection(*map(set, able))
        return choose_precision(self.config.amp, self.config.model, device, self.able)

    def keep_precision(self, began: str | None) -> None:
        """Go on in the precision in which the trial began.

        Raises:
            ValueError: it is unknown, was asked otherwise, or the slots have no units
                for it; or it needs a gradient scaler that this trial has not, which
                Determined takes before the checkpoint is read.
        """
        amp = self.config.amp
        if began == self.precision or (began is None and amp != "auto"):
            return
        scaled = "fp16" in (began, self.precision)
        if amp == "auto" and began in self.able and not scaled:
            self.precision = str(began)
            self.dtype = PRECISIONS[self.precision]
            return
        before = began or "a precision that it does not tell"
        wanted = {"fp32": "off", None: "off or bf16"}.get(began, began)
        raise ValueError(
            f"the checkpoint was trained in {before}, this trial would go on in "
            f'{self.precision}: give it amp: "{wanted}"'
        )

    def _build(self) -> nn.Module:
        config = self.config
        torch.manual_seed(config.seed)
        model = build_model(
            config.model,
            len(self.train_set.class_names),
            config.weights,
            config.weights_backbone,
            **config.settings,
        )
        if config.init_checkpoint:
            start_from(
                model, config.init_checkpoint, config.model, self.train_set.class_names
            )
        return model.to(memory_format=memory_format(self.precision))

    def describe(self) -> dict:
        """What makes a checkpoint complete: see `e2e_utils.train`."""
        return {
            "architecture": self.config.model,
            "settings": resolved_settings(
                self.config.model,
                self.config.weights,
                self.config.weights_backbone,
                **self.config.settings,
            ),
            "class_names": self.train_set.class_names,
            "tile_size": self.config.tile_size,
            "overlap": self.config.overlap,
            "precision": self.precision,
            "step": self.step,
            "metrics": dict(self.metrics),
        }

    def build_callbacks(self) -> dict[str, pytorch.PyTorchCallback]:
        return {"e2e": _Callback(self)}

    def build_training_data_loader(self) -> Any:
        loader = train_loader(
            self.train_set,
            self.config.batch_size,
            self.stop,
            start=self.step,
            seed=self.config.seed,
            workers=self.config.workers,
            rank=self.rank,
            world_size=self.slots,
        )
        return _Epochs(loader, self.epoch)

    def build_validation_data_loader(self) -> Any:
        return eval_loader(
            self.val_set,
            workers=self.config.workers,
            rank=self.rank,
            world_size=self.slots,
        )

    def get_batch_length(self, batch: Any) -> int:
        return len(batch[0])

    def train_batch(self, batch: Any, epoch_idx: int, batch_idx: int) -> dict:
        images, targets = batch
        self.step += 1
        seed_step(self.config.seed, self.step, self.rank)
        losses = forward_losses(self.wrapped, images, targets, self.dtype)
        if not math.isfinite(losses["loss"].detach()):
            ids = {target["image_id"] for target in targets}
            tiles = [i["file_name"] for i in self.train_set.images if i["id"] in ids]
            raise FloatingPointError(
                f"the loss is not finite at step {self.step}, on {', '.join(tiles)}"
            )
        self.context.backward(self.scaler.scale(losses["loss"]))
        self.context.step_optimizer(self.optimizer, self._clip, scaler=self.scaler)
        self.scaler.update()
        self.scheduler.step()
        return losses

    def _clip(self, _: Any) -> None:
        self.scaler.unscale_(self.optimizer)
        # in the model's order of parameters, not the optimizer's: the sum of squares
        # then rounds as in e2e_utils.train
        if self.config.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)

    def evaluate_batch(self, batch: Any, batch_idx: int) -> dict:
        ids = [target["image_id"] for target in batch[1]]
        found = detect(
            self.model,  # not its DDP wrapper: slots may differ in number of batches
            [batch],
            self.context.device,
            self.val_set.category_ids,
            self.dtype,
        )
        self.reducer.update(ids, found)
        return {}
