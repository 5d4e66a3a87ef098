"""A checkpoint to what is served: stripped weights, a .mar, a model store.

    python -m kserve_utils.export --stripped-ckpt stripped.pth --out-dir store

Copy: this file and engines.py. (And e2e_utils; for an archive or a model store also the
folder torchserve_utils.)

Everything that a server has to know (architecture, settings, class names, tile size,
threshold) travels in the artefact, so that no server repeats it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from e2e_utils import models
from e2e_utils.checkpoint import (
    bare_weights,
    load_detector,
    load_file,
    save_checkpoint,
)
from e2e_utils.files import atomic_path, write_file
from e2e_utils.stretch import Stretch, as_stretch

from .engines import DESCRIBES, load_eager

MAX_PIXELS = 4096 * 4096  # of a picture that servers take
# build the detector
CODE = ("models.py", "backbones.py", "efficientnet_lite.py", "autocast.py")
_MODEL = "xview-fasterrcnn"  # in the files of torchserve_utils
_WEIGHTS = "trained_model_stripped.pth"
_SERVER = Path(__file__).with_name("torchserve_utils")


def strip_checkpoint(
    ckpt_path: str | Path,
    new_ckpt_path: str | Path,
    *,
    architecture: str | None = None,
    class_names: list[str] | None = None,
    settings: dict | None = None,
    tile_size: int | None = None,
    overlap: float | None = None,
    category_ids: list[int] | None = None,
    stretch: Stretch | dict | str | Path | None = None,
) -> Path:
    """Keep the weights of a checkpoint and what describes them, nothing else.

    Args:
        ckpt_path: a file of `e2e_utils.train`; one with {"model": state_dict}; one of
            a Determined PyTorchTrial ("models_state_dict"), or its folder; or a bare
            state_dict. The prefixes "module." of DistributedDataParallel and
            "_orig_mod." of torch.compile are removed.
        new_ckpt_path: the file to write; it appears whole or not at all.
        architecture, class_names, settings, tile_size, overlap, category_ids, stretch:
            what the checkpoint does not say itself. `class_names` is indexed by label,
            background first; `category_ids` are the COCO ids of labels 1, 2, ...;
            `stretch` is the record of the scenes, see `predict.predict_scene`. Given
            here, they win. Where neither says it there are no settings, no ids and no
            stretch; the others are needed.

    Returns:
        `new_ckpt_path`, which `checkpoint.model_from_checkpoint` reads.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it cannot be read as data only, holds no weights, does not say what
            they are, or they do not fit the architecture.

    Example:
        >>> from e2e_utils.models import build_model
        >>> weights = build_model("fasterrcnn_small", 2).state_dict()
        >>> says = {"architecture": "fasterrcnn_small", "tile_size": 96, "overlap": 0.2}
        >>> says["class_names"] = ["background", "car"]
        >>> with tempfile.TemporaryDirectory() as name:
        ...     torch.save({"model": weights, "epoch": 7}, f"{name}/last.pth")
        ...     stripped = strip_checkpoint(f"{name}/last.pth", f"{name}/a.pth", **says)
        ...     model, description = read_stripped(stripped)
        >>> description["tile_size"], "epoch" in description
        (96, False)
    """
    path, target = Path(ckpt_path), Path(new_ckpt_path)
    if path.is_dir():
        path = path / "state_dict.pth"
    checkpoint = _load(path)
    given: dict = {"architecture": architecture, "class_names": class_names}
    given |= {"settings": settings, "tile_size": tile_size, "overlap": overlap}
    record = as_stretch(stretch)
    given |= {"category_ids": category_ids, "stretch": record and record.to_dict()}
    known: dict = {"settings": {}, "category_ids": None, "stretch": None}
    own = checkpoint.get("e2e", checkpoint)  # a trial of determined_files has "e2e"
    known |= {k: own[k] for k in DESCRIBES if k in own}
    known |= {k: v for k, v in given.items() if v is not None}
    missing = [key for key in DESCRIBES if key not in known]
    if missing:
        raise ValueError(
            f"{path} does not say its {' and '.join(missing)}: pass "
            f"{' and '.join(f'{key}=...' for key in missing)} (architecture: one of "
            f"{', '.join(models.MODELS)}; class_names: a list, the background first; "
            "tile_size in pixels and overlap in 0..1: of the tiles it learned from)"
        )
    content = {"model": _weights(checkpoint, path), **known}
    load_detector(content, path)  # it fits, before anyone relies on it
    target.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(target, content)
    return target


def _load(path: Path) -> dict:
    """A checkpoint read as data: tensors, plain Python, numpy arrays, a Namespace."""
    reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    # Determined saves numpy's random state, torchvision its arguments
    harmless: list = [argparse.Namespace, np.ndarray, np.dtype, np.dtypes.UInt32DType]
    for package in ("numpy._core", "numpy.core"):  # the second is that of numpy 1
        harmless.append((reconstruct, f"{package}.multiarray._reconstruct"))
    with torch.serialization.safe_globals(harmless):
        checkpoint = load_file(path)
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise ValueError(f"{path} holds a {kind}, not the dict of a checkpoint")
    return checkpoint


def _weights(checkpoint: dict, path: Path) -> dict[str, torch.Tensor]:
    if "models_state_dict" in checkpoint:
        several = checkpoint["models_state_dict"]
        if len(several) != 1:
            raise ValueError(f"{path} holds {len(several)} models, expected one")
        weights = several[0]
    else:
        weights = checkpoint.get("model", checkpoint)
    tensors = isinstance(weights, dict) and all(
        isinstance(value, torch.Tensor) for value in weights.values()
    )
    if not weights or not tensors:
        keys = ", ".join(map(str, checkpoint))[:200]
        raise ValueError(
            f"{path} holds no weights: expected 'model', 'models_state_dict' or a bare "
            f"state_dict, found the keys {keys or '(none)'}"
        )
    # a view would drag the whole storage it looks at into the file
    own = {name: tensor.detach().clone() for name, tensor in weights.items()}
    return bare_weights(own)


def read_stripped(ckpt_path: str | Path) -> tuple[nn.Module, dict]:
    """The detector of a stripped checkpoint, and what a server has to know of it.

    Args:
        ckpt_path: written by `strip_checkpoint`.

    Returns:
        (model, description): ready to predict; `DESCRIBES`, and two limits of servers:
        "score_threshold" 0..1, below which they return no box (0.0, the detector's own
        comes before it), and "max_pixels", above which they refuse a picture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not stripped.
    """
    model, meta = load_eager(ckpt_path)
    odd = sorted(set(meta) ^ set(DESCRIBES))
    if odd:
        raise ValueError(
            f"{ckpt_path} is not stripped ({', '.join(odd)}): use strip_checkpoint"
        )
    limits = {"score_threshold": 0.0, "max_pixels": MAX_PIXELS}
    return model, {key: meta[key] for key in DESCRIBES} | limits


def write_mar(
    stripped_ckpt: str | Path, out_dir: str | Path, model_name: str = _MODEL
) -> Path:
    """Archive a stripped checkpoint and all that a TorchServe needs to serve it.

    Args:
        stripped_ckpt: written by `strip_checkpoint`.
        out_dir: gets `<model_name>.mar`, in place of an older one.
        model_name: in the URL.

    Returns:
        The path of the archive. Inside: the checkpoint, the code that builds its
        detector, detector.json (what describes the weights, and the limits),
        index_to_name.json, the handler and model-xview.py, which loads that code.

    Raises:
        FileNotFoundError, ValueError: as `read_stripped`.
        ModelArchiverError: `model_name` has other characters than A-Z a-z 0-9 _ - .
    """
    from model_archiver.model_archiver_config import ModelArchiverConfig
    from model_archiver.model_packaging_utils import ModelExportUtils

    _, description = read_stripped(stripped_ckpt)
    names = {str(label): n for label, n in enumerate(description["class_names"])}
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    ModelExportUtils.validate_inputs(model_name, out_dir)
    config = ModelArchiverConfig(
        model_name=model_name,
        version="1.0",
        model_file="model-xview.py",
        serialized_file=_WEIGHTS,
        handler="fasterrcnn_handler.py",
    )
    manifest = ModelExportUtils.generate_manifest_json(config)
    # not by the archiver's command, which stages in <temp folder>/<model name> and
    # empties it first: two at the same time would destroy each other's
    with tempfile.TemporaryDirectory(dir=out, prefix=".mar-") as new:
        inside = Path(new, "inside")
        inside.mkdir()
        for name in CODE:
            shutil.copy(Path(models.__file__).with_name(name), inside)
        for name in (config.model_file, config.handler):
            shutil.copy(_SERVER / name, inside)
        shutil.copy(stripped_ckpt, inside / _WEIGHTS)
        for name, content in (("detector", description), ("index_to_name", names)):
            text = json.dumps(content, indent=2) + "\n"
            (inside / f"{name}.json").write_text(text)
        ModelExportUtils.archive(new, model_name, inside, manifest)
        archive = Path(new, f"{model_name}.mar")
        return archive.replace(out / archive.name)


def write_model_store(mar_path: str | Path, out_dir: str | Path) -> Path:
    """Write the tree that KServe's TorchServe expects on its volume.

    config/config.properties, model-store/properties.json and model-store/<name>.mar.
    The first two are those of torchserve_utils/, for the model of this archive: a pod's
    addresses (KServe's own server has 8080 and 8081 and asks TorchServe over loopback;
    Prometheus reads the metrics from outside) and settings that are safe anywhere.

    Args:
        mar_path: written by `write_mar`; its name is the model's.
        out_dir: gets the two folders; files of the same names are replaced. Returned.

    Raises:
        FileNotFoundError, ValueError: `mar_path` is no model archive.
    """
    mar, out = Path(mar_path), Path(out_dir)
    try:
        with zipfile.ZipFile(mar) as archive:
            archive.getinfo("MAR-INF/MANIFEST.json")
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{mar} is not a model archive: {error}") from error
    for name in ("config/config.properties", "model-store/properties.json"):
        text = (_SERVER / name).read_text().replace(_MODEL, mar.stem)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(out / name, [text.encode()])
    target = out / "model-store" / mar.name
    if mar.resolve() != target.resolve():
        with atomic_path(target) as temporary:
            shutil.copyfile(mar, temporary)
    return out


def main() -> None:
    parser = argparse.ArgumentParser("kserve_utils.export")
    add = parser.add_argument
    add("--stripped-ckpt", required=True, help="of strip_checkpoint")
    add("--out-dir", required=True, help="gets config/, model-store/")
    add("--model-name", default=_MODEL)
    args = parser.parse_args()
    store = Path(args.out_dir, "model-store")
    mar = write_mar(args.stripped_ckpt, store, args.model_name)
    print(f"wrote {mar} and {write_model_store(mar, args.out_dir) / 'config'}")


if __name__ == "__main__":
    main()
