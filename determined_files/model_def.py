"""The training of e2e_utils as a Determined trial: a thin adapter.

Copy: this folder and e2e_utils.

The model, the step, the data order and the metrics are those of `e2e_utils.train`; a
trial with the same seed sees the same batches and computes the same losses.
e2e_utils/experiment.py lists the hyperparameters.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from determined import pytorch
from torch import nn

from e2e_utils.data import eval_loader
from e2e_utils.evaluate import METRICS, coco_metrics, detect, searcher_metrics
from e2e_utils.experiment import fetch_tiles, train_config
from e2e_utils.hardware import native_precisions
from e2e_utils.optim import update_ema
from e2e_utils.processes import gather
from e2e_utils.run import Run, check_finite
from e2e_utils.train import forward_losses, seed_step


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
        return searcher_metrics(coco_metrics(self.coco, found, image_ids=ids))


class _Epochs:
    """A loader over the whole run whose length, for Determined, is one epoch."""

    def __init__(self, loader: Any, batches: int) -> None:
        self.loader, self.batches = loader, batches

    def __iter__(self) -> Any:
        return iter(self.loader)

    def __len__(self) -> int:
        return self.batches


class _Callback(pytorch.PyTorchCallback):
    """Puts into a checkpoint what describes the model, and reports."""

    def __init__(self, trial: ObjectDetectionTrial) -> None:
        self.trial, self.run = trial, trial.run

    def on_training_start(self) -> None:
        # A new trial may start from the weights of another, whose schedule is over
        run = self.run
        if not run.step:
            run.eval_model.load_state_dict(run.model.state_dict())
        if run.scheduler.last_epoch != run.step:
            run.scheduler.last_epoch = run.step - 1
            run.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        if self.run.eval_model is self.run.model:
            return {}
        return {"average": self.run.eval_model.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "average" in state_dict and self.run.step:
            self.run.eval_model.load_state_dict(state_dict["average"])

    def on_checkpoint_load_start(self, checkpoint: dict[str, Any]) -> None:
        if self.run.step:  # it goes on with the run, and takes no weights alone
            self.trial.keep_precision(checkpoint.get("e2e", {}).get("precision"))

    def on_checkpoint_save_start(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["e2e"] = self.run.describe()
        # As plain numbers NumPy's state passes torch's weights-only load, which
        # Determined's own resume meets from torch 2.6 on and fails at otherwise
        name, keys, *rest = checkpoint["rng_state"]["np_rng_state"]
        checkpoint["rng_state"]["np_rng_state"] = (name, keys.tolist(), *rest)

    def on_training_workload_end(self, avg_metrics: dict, batch_metrics: Any) -> None:
        # a list with a dict for each step, whatever Determined's hint says
        if self.trial.report and not self.run.rank:
            first = self.run.step - len(batch_metrics) + 1
            for step, losses in enumerate(batch_metrics, start=first):
                self.trial.report({k: float(v) for k, v in losses.items()}, step)

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        values = {k: v for k, v in metrics.items() if k in METRICS}
        self.run.metrics = {**values, "step": self.run.step}
        if self.trial.report and not self.run.rank:
            self.trial.report(values, self.run.step)

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        self.trial.checkpoint = uuid


class ObjectDetectionTrial(pytorch.PyTorchTrial):
    """Trains and validates a detector of e2e_utils on the slots that it is given.

    Args:
        context: of Determined.
        start: steps done, where Determined cannot know (a resumed run off the cluster).
        report: called on the chief with (metrics, step): the losses of each step, the
            COCO metrics of each validation.

    Attributes:
        run: of `e2e_utils.run`; its metrics are those of the last validation.
        checkpoint: id of the last checkpoint.
    """

    def __init__(
        self,
        context: pytorch.PyTorchTrialContext,
        start: int | None = None,
        report: Callable[[dict, int], None] | None = None,
    ) -> None:
        context.experimental.disable_dataset_reproducibility_checks()
        context.experimental.disable_auto_to_device()  # forward_losses moves the batch
        hparams = context.get_hparams()
        self.context, self.report = context, report
        self.checkpoint: str | None = None
        slots, local_rank = context.distributed.size, context.distributed.local_rank
        config = train_config(hparams, slots)  # checked before anything is fetched
        self._scratch = tempfile.TemporaryDirectory(prefix="fake_tiles_")
        tiles = fetch_tiles(hparams, self._scratch.name, local_rank)
        context.distributed.broadcast_local(None)  # wait for whoever fetches
        self.run = run = Run(replace(config, data_path=tiles))
        run.step = context.get_initial_batch() if start is None else start
        if len(run.val_set) < slots:
            raise ValueError(
                f"{run.val_set.json_path} has {len(run.val_set)} tiles for {slots} "
                "slots; each needs at least one"
            )
        if run.scaler.is_enabled():
            context.wrap_scaler(run.scaler)  # Determined saves and resumes it
        self.wrapped = context.wrap_model(run.model)
        run.optimizer = context.wrap_optimizer(run.optimizer)
        context.wrap_lr_scheduler(
            run.scheduler,  # type: ignore[arg-type]  # hint of torch 1
            pytorch.LRScheduler.StepMode.MANUAL_STEP,
        )
        reducer = CocoReducer(run.val_set.coco, chief=not run.rank)
        self.reducer = context.wrap_reducer(reducer, for_training=False)

    def keep_precision(self, began: str | None) -> None:
        """Go on in the precision in which the trial began.

        Raises:
            ValueError: it is unknown, was asked otherwise, or the slots have no units
                for it; or it needs a gradient scaler, which Determined takes earlier.
        """
        run, amp = self.run, self.run.config.amp
        if began == run.precision or (began is None and amp != "auto"):
            return
        able = set.intersection(*map(set, gather(native_precisions(run.device))))
        if amp == "auto" and began in able and "fp16" not in (began, run.precision):
            run.precision = str(began)
            return
        wanted = {"fp32": "off", None: "off or bf16"}.get(began, began)
        raise ValueError(
            f"the checkpoint was trained in {began or 'an unknown precision'}, this "
            f'trial would go on in {run.precision}: give it amp: "{wanted}"'
        )

    def build_callbacks(self) -> dict[str, pytorch.PyTorchCallback]:
        return {"e2e": _Callback(self)}

    def build_training_data_loader(self) -> Any:
        return _Epochs(self.run.loader(), self.run.steps_per_epoch)

    def build_validation_data_loader(self) -> Any:
        share = {"rank": self.run.rank, "world_size": self.run.world_size}
        return eval_loader(self.run.val_set, workers=self.run.config.workers, **share)

    def get_batch_length(self, batch: Any) -> int:
        return len(batch[0])

    def train_batch(self, batch: Any, epoch_idx: int, batch_idx: int) -> dict:
        run, config = self.run, self.run.config
        images, targets = batch
        run.step += 1
        seed_step(config.seed, run.step, run.rank)
        losses = forward_losses(self.wrapped, images, targets, run.dtype)
        values = torch.stack(list(losses.values())).detach().float()
        run.unreported = [(values, [target["image_id"] for target in targets])]
        check_finite(run)
        self.context.backward(run.scaler.scale(losses["loss"]))
        self.context.step_optimizer(run.optimizer, self._clip, scaler=run.scaler)
        run.scaler.update()
        run.scheduler.step()
        if config.ema:
            update_ema(run.eval_model, run.model, config.ema, run.step)
        return losses

    def _clip(self, _: Any) -> None:
        self.run.scaler.unscale_(self.run.optimizer)
        # in the model's order of parameters, not the optimizer's: the sum of squares
        # then rounds as in e2e_utils.train
        if limit := self.run.config.clip_grad:
            nn.utils.clip_grad_norm_(self.run.model.parameters(), limit)

    def evaluate_batch(self, batch: Any, batch_idx: int) -> dict:
        run, categories = self.run, self.run.val_set.category_ids
        # not by the DDP wrapper: slots may differ in their number of batches
        found = detect(run.eval_model, [batch], run.device, categories, run.dtype)
        self.reducer.update([target["image_id"] for target in batch[1]], found)
        return {}
