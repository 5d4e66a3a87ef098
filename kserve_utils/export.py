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
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from e2e_utils import models
from e2e_utils.checkpoint import load_detector, load_file, save_checkpoint
from e2e_utils.files import atomic_path, write_file

from .engines import DESCRIBES, load_eager

MAX_PIXELS = 4096 * 4096  # of a picture that servers take
CODE = (
    "models.py",
    "backbones.py",
    "autocast.py",
)  # of e2e_utils: they build the detector
_TABLES = ("detector.json", "index_to_name.json")
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
) -> Path:
    """Keep the weights of a checkpoint and what describes them, nothing else.

    Args:
        ckpt_path: a file of `e2e_utils.train`; one with {"model": state_dict}; one of
            a Determined PyTorchTrial ("models_state_dict"), or its folder; or a bare
            state_dict. DistributedDataParallel's "module." prefix is removed.
        new_ckpt_path: the file to write; it appears whole or not at all.
        architecture, class_names, settings, tile_size, overlap: what the checkpoint
            does not say itself. `class_names` is indexed by label, background first.
            Given here, they win. Defaults where neither says it: no settings, 300 px,
            0.2; there is none for the architecture and the names.

    Returns:
        `new_ckpt_path`, which `checkpoint.model_from_checkpoint` reads.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it cannot be read as data only, holds no weights, does not say what
            they are, or they do not fit the architecture.
    """
    path, target = Path(ckpt_path), Path(new_ckpt_path)
    if path.is_dir():
        path = path / "state_dict.pth"
    checkpoint = _load(path)
    given: dict = {"architecture": architecture, "class_names": class_names}
    given |= {"settings": settings, "tile_size": tile_size, "overlap": overlap}
    known: dict = {"settings": {}, "tile_size": 300, "overlap": 0.2}
    own = checkpoint.get("e2e", checkpoint)  # a trial of determined_files has "e2e"
    known |= {k: own[k] for k in DESCRIBES if k in own}
    known |= {k: v for k, v in given.items() if v is not None}
    missing = [key for key in ("architecture", "class_names") if key not in known]
    if missing:
        raise ValueError(
            f"{path} does not say its {' and '.join(missing)}: pass "
            f"{' and '.join(f'{key}=...' for key in missing)} (architecture: one of "
            f"{', '.join(models.MODELS)}; class_names: a list, the background first)"
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
    weights = dict(weights)
    consume_prefix_in_state_dict_if_present(weights, "module.")
    # a view would drag the whole storage it looks at into the file
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def read_stripped(
    ckpt_path: str | Path, score_threshold: float = 0.0, max_pixels: int = MAX_PIXELS
) -> tuple[nn.Module, dict]:
    """The detector of a stripped checkpoint, and what a server has to know of it.

    Args:
        ckpt_path: written by `strip_checkpoint`.
        score_threshold: servers return no boxes below, 0..1. The detector's own
            threshold comes before it.
        max_pixels: servers refuse larger pictures; the default is 4096 x 4096.

    Returns:
        (model, description): ready to predict; `DESCRIBES` and the two limits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not stripped, or a limit is out of range.
    """
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must be in 0..1, got {score_threshold}")
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, got {max_pixels}")
    model, meta = load_eager(ckpt_path)
    odd = sorted(set(meta) ^ set(DESCRIBES))
    if odd:
        raise ValueError(
            f"{ckpt_path} is not stripped ({', '.join(odd)}): use strip_checkpoint"
        )
    description = {key: meta[key] for key in DESCRIBES}
    limits = {"score_threshold": score_threshold, "max_pixels": max_pixels}
    return model, description | limits


def write_mar(
    stripped_ckpt: str | Path,
    out_dir: str | Path,
    model_name: str = "xview-fasterrcnn",
    *,
    version: str = "1.0",
    score_threshold: float = 0.0,
    max_pixels: int = MAX_PIXELS,
) -> Path:
    """Archive a stripped checkpoint and all that a TorchServe needs to serve it.

    Args:
        stripped_ckpt: written by `strip_checkpoint`.
        out_dir: gets `<model_name>.mar`, in place of an older one.
        model_name: in the URL.
        version: of the model, as the server gives it.
        score_threshold, max_pixels: as for `read_stripped`.

    Returns:
        The path of the archive. Inside: the checkpoint, the code that builds its
        detector, detector.json (what describes the weights, and the limits),
        index_to_name.json, the handler and model-xview.py, which loads that code.

    Raises:
        FileNotFoundError, ValueError: as `read_stripped`.
        RuntimeError: torch-model-archiver failed; with its message.
    """
    _, description = read_stripped(stripped_ckpt, score_threshold, max_pixels)
    names = {str(label): n for label, n in enumerate(description["class_names"])}
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    # The archiver stages in <temp folder>/<model name> and empties it first: runs at
    # the same time would destroy each other's, so each gets a temp folder of its own.
    with tempfile.TemporaryDirectory(dir=out, prefix=".mar-") as staging:
        extra = [Path(models.__file__).with_name(name) for name in CODE]
        for name, content in zip(_TABLES, (description, names), strict=True):
            extra.append(Path(staging, name))
            extra[-1].write_text(json.dumps(content, indent=2) + "\n")
        command = [sys.executable, "-m", "model_archiver.model_packaging"]
        command += ["--model-name", model_name, "--version", version]
        command += ["--model-file", str(_SERVER / "model-xview.py")]
        command += ["--serialized-file", str(stripped_ckpt)]
        command += ["--handler", str(_SERVER / "fasterrcnn_handler.py")]
        command += ["--extra-files", ",".join(map(str, extra))]
        command += ["--export-path", staging]
        done = subprocess.run(
            command,
            env={**os.environ, "TMPDIR": staging},
            capture_output=True,
            text=True,
            timeout=600,
        )
        archive = Path(staging, f"{model_name}.mar")
        if done.returncode or not archive.is_file():
            raise RuntimeError(f"torch-model-archiver failed: {done.stderr[-2000:]}")
        return archive.replace(out / archive.name)


def write_model_store(mar_path: str | Path, out_dir: str | Path) -> Path:
    """Write the tree that KServe's TorchServe expects on its volume.

    config/config.properties, model-store/properties.json and model-store/<name>.mar.
    The first two are those of torchserve_utils/, for the model of this archive: a pod's
    addresses (KServe's own server has 8080 and 8081 and asks TorchServe over loopback;
    Prometheus reads the metrics from outside) and settings that are safe anywhere.

    Args:
        mar_path: written by `write_mar`; its name and version are read from inside.
        out_dir: gets the two folders; files of the same names are replaced. Returned.

    Raises:
        FileNotFoundError, ValueError: `mar_path` is no model archive.
    """
    mar, out = Path(mar_path), Path(out_dir)
    manifest = _manifest(mar)
    name, version = manifest["modelName"], manifest["modelVersion"]
    text = (_SERVER / "config" / "config.properties").read_text()
    settings, _, line = text.partition("model_snapshot=")
    snapshot = json.loads(line)
    (versions,) = snapshot["models"].values()
    (model,) = versions.values()
    snapshot["models"] = {name: {version: {**model, "marName": mar.name}}}
    config = f"{settings}model_snapshot={json.dumps(snapshot)}\n"
    path = _SERVER / "model-store" / "properties.json"
    (properties,) = json.loads(path.read_text())
    properties |= {"model-name": name, "version": version}
    properties |= {"serialized-file": manifest["serializedFile"]}
    properties |= {"extra-files": ",".join((*_TABLES, *CODE))}
    store = json.dumps([properties], indent=2) + "\n"
    for folder in (out / "config", out / "model-store"):
        folder.mkdir(parents=True, exist_ok=True)
    write_file(out / "config" / "config.properties", [config.encode()])
    write_file(out / "model-store" / "properties.json", [store.encode()])
    target = out / "model-store" / mar.name
    if mar.resolve() != target.resolve():
        with atomic_path(target) as temporary:
            shutil.copyfile(mar, temporary)
    return out


def _manifest(mar: Path) -> dict:
    try:
        with zipfile.ZipFile(mar) as archive:
            return json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]
    except FileNotFoundError:
        raise FileNotFoundError(f"no model archive at {mar}") from None
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{mar} is not a model archive: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser("kserve_utils.export")
    add = parser.add_argument
    add("--stripped-ckpt", required=True, help="of strip_checkpoint")
    add("--out-dir", required=True, help="gets config/, model-store/")
    add("--model-name", default="xview-fasterrcnn")
    add("--score-threshold", type=float, default=0.0)
    args = parser.parse_args()
    mar = write_mar(
        args.stripped_ckpt,
        Path(args.out_dir, "model-store"),
        args.model_name,
        score_threshold=args.score_threshold,
    )
    print(f"wrote {mar} and {write_model_store(mar, args.out_dir) / 'config'}")


if __name__ == "__main__":
    main()
