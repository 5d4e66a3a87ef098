"""Checkpoints of a Determined trial, brought back.

Copy: this file, and models.py and backbones.py of e2e_utils.

Reading a checkpoint folder needs neither determined nor the code that wrote it;
`download_best` needs the cluster that holds the experiment.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from e2e_utils.models import build_model

DESCRIPTION: tuple[str, ...] = ("architecture", "settings", "class_names")
DESCRIPTION += ("tile_size", "overlap", "step", "metrics")


def read_trial_checkpoint(path: str | Path) -> dict:
    """A trial's checkpoint folder as the content of an e2e_utils checkpoint.

    Of a folder of core_api.py it is last.pt that is read, the weights of the step at
    which the checkpoint was taken; its best.pt is the best until then.

    Returns:
        "model" (state dict, without the prefix that DDP gives its keys),
        "architecture", "settings", "class_names", "tile_size", "overlap", "step" and
        "metrics" (of the last validation before it; by the names of
        `e2e_utils.experiment.METRICS`, or of `coco_metrics` if core_api.py wrote it).

    Raises:
        FileNotFoundError: neither state_dict.pth nor last.pt in the folder.
        ValueError: it was written neither by ObjectDetectionTrial nor by core_api.py.
    """
    for name in ("state_dict.pth", "last.pt"):
        file = Path(path) / name
        if file.is_file():
            break
    else:
        raise FileNotFoundError(
            f"no Determined checkpoint in {path}: neither state_dict.pth nor last.pt"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} is not a readable checkpoint: {reason}") from error
    if set(DESCRIPTION) <= set(content):
        return {key: content[key] for key in ("model", *DESCRIPTION)}
    if "e2e" not in content:
        raise ValueError(
            f"{file} does not say which model it holds: it was not written by "
            f"ObjectDetectionTrial or core_api.py (its keys: "
            f"{', '.join(sorted(content))})"
        )
    weights = content["models_state_dict"][0]
    consume_prefix_in_state_dict_if_present(weights, "module.")
    return {"model": weights, **content["e2e"]}


def load_trial_checkpoint(path: str | Path) -> tuple[nn.Module, dict]:
    """The model of a trial's checkpoint folder, written on one slot or on many.

    Args:
        path: folder with state_dict.pth or, by core_api.py, last.pt, as Determined
            writes and downloads it.

    Returns:
        (model, meta) like `e2e_utils.models.model_from_checkpoint`: the model in
        evaluation mode on the CPU, and what describes it.
    """
    meta = read_trial_checkpoint(path)
    model = build_model(
        meta["architecture"], len(meta["class_names"]), **meta["settings"]
    )
    model.load_state_dict(meta.pop("model"))
    return model.eval(), meta


def convert_trial_checkpoint(path: str | Path, new_path: str | Path) -> Path:
    """Write a trial's checkpoint as a file that e2e_utils loads, exports and serves."""
    content, new_path = read_trial_checkpoint(path), Path(new_path)
    beside = new_path.with_suffix(".part")
    torch.save(content, beside)
    os.replace(beside, new_path)
    return new_path


def download_best(
    experiment_id: int,
    output_dir: str | Path,
    metric: str = "mAP",
    master: str | None = None,
) -> Path:
    """The checkpoint with the highest `metric` of an experiment; needs a cluster.

    Args:
        experiment_id: as `det e create` printed it.
        output_dir: the checkpoint's folder is made in it, named by its uuid.
        metric: a validation metric, larger is better.
        master: address of the master; $DET_MASTER by default.

    Returns:
        The folder, for `load_trial_checkpoint`.

    Raises:
        ValueError: the experiment has no checkpoint with that metric.
    """
    from determined.experimental import client

    # client.login would refuse a second master in the same process
    experiment = client.Determined(master=master).get_experiment(experiment_id)
    found = experiment.list_checkpoints(
        sort_by=metric, order_by=client.OrderBy.DESC, max_results=1
    )
    if not found:
        raise ValueError(f"experiment {experiment_id} has no checkpoint with {metric}")
    return Path(found[0].download(str(Path(output_dir) / found[0].uuid)))
