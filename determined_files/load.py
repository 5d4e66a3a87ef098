"""Checkpoints of a Determined trial, brought back.

Copy: this file and e2e_utils.

Reading a checkpoint folder needs neither determined nor the code that wrote it;
`download_best` needs the cluster that holds the experiment.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from e2e_utils.checkpoint import (
    bare_weights,
    load_detector,
    load_file,
    read_checkpoint,
    save_checkpoint,
)

_OF_DETECTOR = ("architecture", "settings", "class_names", "category_ids")
_OF_TILES = ("tile_size", "overlap", "stretch")
DESCRIPTION = (*_OF_DETECTOR, *_OF_TILES, "precision", "step", "metrics")


def read_trial_checkpoint(path: str | Path) -> dict:
    """A trial's checkpoint folder as the content of an e2e_utils checkpoint.

    Of a folder of core_api.py it is last.pt that is read, not the best until then.

    Returns:
        "model" (state dict, without DDP's prefix; the average of the weights where the
        trial made one), "architecture", "settings", "class_names", "category_ids",
        "tile_size", "overlap", "stretch", "precision", "step" and "metrics" (of the
        last validation; by the names of `e2e_utils.evaluate.METRICS`, or of
        `coco_metrics` if core_api.py wrote it).

    Raises:
        FileNotFoundError: neither state_dict.pth nor last.pt in the folder.
        ValueError: it was written neither by ObjectDetectionTrial nor by core_api.py.
    """
    of_trial, of_core_api = Path(path) / "state_dict.pth", Path(path) / "last.pt"
    if of_core_api.is_file():
        content = {"stretch": None, **read_checkpoint(of_core_api)}
        return {key: content[key] for key in ("model", *DESCRIPTION)}
    if not of_trial.is_file():
        raise FileNotFoundError(
            f"no Determined checkpoint in {path}: neither {of_trial.name} nor last.pt"
        )
    content = load_file(of_trial)
    if "e2e" not in content:
        raise ValueError(
            f"{of_trial} does not say which model it holds: it was not written by "
            f"ObjectDetectionTrial (its keys: {', '.join(sorted(content))})"
        )
    weights = content["callbacks"].get("e2e", {}).get("average")
    if weights is None:
        weights = content["models_state_dict"][0]
    return {"model": bare_weights(weights), "stretch": None, **content["e2e"]}


def load_trial_checkpoint(path: str | Path) -> tuple[nn.Module, dict]:
    """The model of a trial's checkpoint folder, written on one slot or on many.

    Returns:
        (model, meta) like `e2e_utils.checkpoint.model_from_checkpoint`: the model in
        evaluation mode on the CPU, and what describes it.
    """
    content = read_trial_checkpoint(path)
    model = load_detector(content, path)
    return model, {key: content[key] for key in DESCRIPTION}


def convert_trial_checkpoint(path: str | Path, new_path: str | Path) -> Path:
    """Write a trial's checkpoint as a file that e2e_utils loads, exports and serves."""
    save_checkpoint(new_path, read_trial_checkpoint(path))
    return Path(new_path)


def download_best(
    experiment_id: int,
    output_dir: str | Path,
    metric: str = "mAP",
    master: str | None = None,
) -> Path:
    """Folder of an experiment's checkpoint with the highest metric; needs a cluster.

    Args:
        experiment_id: as `det e create` printed it.
        output_dir: gets the checkpoint's folder, named by its uuid.
        metric: a validation metric, larger is better.
        master: address of the master; $DET_MASTER by default.

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
