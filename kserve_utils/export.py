"""A checkpoint to what is served: stripped weights, a .mar, a model store.

    python -m kserve_utils.export --stripped-ckpt stripped.pth --out-dir store

Copy: this file and models.py. (The archive also takes the files beside
`fasterrcnn_handler.py`; pass their folder as `server_dir` if `kserve_utils` is not
installed.)

Everything that a server has to know (architecture, settings, class names, tile size,
threshold) travels in the artefact, so that no server repeats it.
"""

from __future__ import annotations

import argparse
import importlib.util
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
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from e2e_utils import models

DESCRIBES = ("architecture", "settings", "class_names", "tile_size", "overlap")


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
        `new_ckpt_path`, which `models.model_from_checkpoint` reads.

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
    said = checkpoint.get("e2e", checkpoint)  # a trial of determined_files has "e2e"
    known |= {k: said[k] for k in DESCRIBES if k in said}
    known |= {k: v for k, v in given.items() if v is not None}
    missing = [key for key in ("architecture", "class_names") if key not in known]
    if missing:
        raise ValueError(
            f"{path} does not say its {' and '.join(missing)}: pass "
            f"{' and '.join(f'{key}=...' for key in missing)} (architecture: one of "
            f"{', '.join(models.MODELS)}; class_names: a list, the background first)"
        )
    weights = _weights(checkpoint, path)
    beside = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save({"model": weights, **known}, beside)
        try:
            models.model_from_checkpoint(beside)  # fits, before anyone relies on it
        except ValueError as error:
            raise ValueError(str(error).replace(str(beside), str(path))) from error
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def _load(path: Path) -> dict:
    """A checkpoint read as data: tensors, plain Python, numpy arrays, a Namespace."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    # Determined saves numpy's random state, torchvision its arguments
    harmless: list = [
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        type(np.dtype(np.uint32)),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        (reconstruct, "numpy.core.multiarray._reconstruct"),  # numpy 1
    ]
    try:
        with torch.serialization.safe_globals(harmless):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # fed with some other file, an unpickler raises anything
        lines = [line for line in str(error).splitlines() if "nsupported" in line]
        reason = (lines or str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error
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


def index_to_name(class_names: list[str]) -> dict[str, str]:
    """TorchServe's class table: the label as text -> the name."""
    return {str(label): name for label, name in enumerate(class_names)}


def write_mar(
    stripped_ckpt: str | Path,
    out_dir: str | Path,
    model_name: str = "xview-fasterrcnn",
    *,
    version: str = "1.0",
    score_threshold: float = 0.0,
    max_pixels: int = 16_777_216,
    server_dir: str | Path | None = None,
) -> Path:
    """Archive a stripped checkpoint and all that a TorchServe needs to serve it.

    Args:
        stripped_ckpt: written by `strip_checkpoint`.
        out_dir: gets `<model_name>.mar`, in place of an older one.
        model_name: the model's name in the URL.
        version: of the model, told by the server.
        score_threshold: boxes below are not returned, 0..1. The detector's own
            `box_score_thresh` comes before it.
        max_pixels: larger pictures are refused; the default is 4096 x 4096.
        server_dir: folder of fasterrcnn_handler.py and model-xview.py.

    Returns:
        The path of the archive. Inside: the checkpoint, models.py, detector.json
        (what describes the weights, and the limits), index_to_name.json, the handler
        and model-xview.py, which builds the detector that detector.json names.

    Raises:
        ValueError: no stripped checkpoint, or a threshold outside 0..1.
        RuntimeError: torch-model-archiver failed; with its message.
    """
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must be in 0..1, got {score_threshold}")
    stripped, out = Path(stripped_ckpt), Path(out_dir)
    _, meta = models.model_from_checkpoint(stripped)
    description = {key: meta[key] for key in DESCRIBES}
    description |= {"score_threshold": score_threshold, "max_pixels": max_pixels}
    server = Path(server_dir) if server_dir else _server_dir()
    out.mkdir(parents=True, exist_ok=True)
    # The archiver stages in <temp folder>/<model name> and empties it first: runs at
    # the same time would destroy each other's, so each gets a temp folder of its own.
    with tempfile.TemporaryDirectory(dir=out, prefix=".mar-") as staging:
        files = {
            "detector.json": description,
            "index_to_name.json": index_to_name(meta["class_names"]),
        }
        for name, content in files.items():
            _write_text(Path(staging, name), json.dumps(content, indent=2) + "\n")
        extra = [Path(staging, name) for name in files] + [Path(models.__file__)]
        command = [sys.executable, "-m", "model_archiver.model_packaging"]
        command += ["--model-name", model_name, "--version", version]
        command += ["--model-file", str(server / "model-xview.py")]
        command += ["--serialized-file", str(stripped)]
        command += ["--handler", str(server / "fasterrcnn_handler.py")]
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
        os.replace(archive, out / archive.name)
    return out / f"{model_name}.mar"


def _server_dir() -> Path:
    spec = importlib.util.find_spec("kserve_utils.torchserve_utils")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("kserve_utils is not installed: pass server_dir=...")
    return Path(next(iter(spec.submodule_search_locations)))


# Of a pod: KServe's own server has 8080 (HTTP) and 8081 (gRPC) and asks TorchServe over
# loopback; Prometheus reads the metrics from outside.
POD_ADDRESSES = {
    "inference_address": "http://127.0.0.1:8085",
    "management_address": "http://127.0.0.1:8083",
    "metrics_address": "http://0.0.0.0:8082",
    "grpc_inference_port": 7070,
    "grpc_management_port": 7071,
    "model_store": "/mnt/models/model-store",
}

_CONFIG = """\
# Where this runs decides what stands above; below is the same everywhere.
# Whoever reaches the management address can load code into the server, so it has its
# own port, on loopback. TorchServe 0.12 would ask for a token on every call as well;
# KServe's wrapper sends none, therefore it is off.
disable_token_authorization=true
# lets TS_SERVICE_ENVELOPE=kserve choose the protocol
enable_envvars_config=true
# a request is base64 in JSON: 64 MiB hold a picture of 48 MiB
max_request_size=67108864
max_response_size=67108864
# nothing is installed from an archive
install_py_dep_per_model=false
enable_metrics_api=true
metrics_mode=prometheus
# a worker computes on one GPU: the first takes GPU 0, the second GPU 1, in turns over
# all that TorchServe sees (number_of_gpu=0 would keep it on the CPU). The number of
# workers is that of model_snapshot below: one
default_workers_per_model=1
number_of_netty_threads=4
job_queue_size=10
# KServe's envelope takes one request at a time: batchSize stays 1
"""


def write_model_store(
    mar_path: str | Path, out_dir: str | Path, **addresses: object
) -> Path:
    """Write the tree that KServe's TorchServe expects on its volume.

    config/config.properties, model-store/properties.json and model-store/<name>.mar.

    Args:
        mar_path: written by `write_mar`; its name and version are read from inside.
        out_dir: gets the two folders; files of the same names are replaced.
        **addresses: what differs from a pod's `POD_ADDRESSES` on another machine.

    Returns:
        `out_dir`.

    Raises:
        ValueError: `mar_path` is no model archive, or there is no such address.
    """
    unknown = sorted(set(addresses) - set(POD_ADDRESSES))
    if unknown:
        raise ValueError(f"no address {unknown}; valid: {', '.join(POD_ADDRESSES)}")
    mar, out = Path(mar_path), Path(out_dir)
    manifest = _manifest(mar)
    name, version = manifest["modelName"], manifest["modelVersion"]
    properties = {
        "model-name": name,
        "version": version,
        "model-file": manifest["modelFile"],
        "serialized-file": manifest["serializedFile"],
        "extra-files": "detector.json,index_to_name.json,models.py",
        "handler": manifest["handler"],
        "min-workers": 1,
        "max-workers": 1,
        "batch-size": 1,
        "max-batch-delay": 100,
        "response-timeout": 120,
        "requirements": "",
    }
    workers = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 1}
    workers |= {"maxBatchDelay": 100, "responseTimeout": 120}
    model = {version: {"defaultVersion": True, "marName": mar.name, **workers}}
    snapshot = {"name": "startup.cfg", "modelCount": 1, "models": {name: model}}
    lines = [f"{key}={value}\n" for key, value in (POD_ADDRESSES | addresses).items()]
    lines += [_CONFIG, f"model_snapshot={json.dumps(snapshot)}\n"]
    config, store = out / "config", out / "model-store"
    for folder in (config, store):
        folder.mkdir(parents=True, exist_ok=True)
    _write_text(config / "config.properties", "".join(lines))
    _write_text(store / "properties.json", json.dumps([properties], indent=2) + "\n")
    target = store / mar.name
    if mar.resolve() != target.resolve():
        beside = target.with_name(target.name + ".part")
        shutil.copyfile(mar, beside)
        os.replace(beside, target)
    return out


def _manifest(mar: Path) -> dict:
    try:
        with zipfile.ZipFile(mar) as archive:
            return json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]
    except FileNotFoundError:
        raise FileNotFoundError(f"no model archive at {mar}") from None
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{mar} is not a model archive: {error}") from error


def _write_text(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    os.replace(beside, path)


def main() -> None:
    parser = argparse.ArgumentParser("kserve_utils.export")
    parser.add_argument("--stripped-ckpt", required=True, help="of strip_checkpoint")
    parser.add_argument("--out-dir", required=True, help="gets config/, model-store/")
    parser.add_argument("--model-name", default="xview-fasterrcnn")
    parser.add_argument("--score-threshold", type=float, default=0.0)
    args = parser.parse_args()
    mar = write_mar(
        args.stripped_ckpt,
        Path(args.out_dir) / "model-store",
        args.model_name,
        score_threshold=args.score_threshold,
    )
    print(f"wrote {mar} and {write_model_store(mar, args.out_dir) / 'config'}")


if __name__ == "__main__":
    main()
