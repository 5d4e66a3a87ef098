"""Who runs a detector: an artefact as torch, OpenVINO or ONNX Runtime computes it.

Copy: this file. (And e2e_utils.)

`load_engine` gives each of them as a detector in torchvision's convention, so that
`predict_image` and `predict_scene` take it as they take a model. `artefact.py` writes
the folders that are read here.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.hardware import PRECISIONS, find_device, native_precisions

ENGINES = ("torch", "openvino", "onnxruntime")
FILES = {
    "torch": ("model.pth",),
    "openvino": ("model.xml", "model.bin"),
    "onnxruntime": ("model.onnx",),
}
_TILES = ("class_names", "category_ids", "tile_size", "overlap", "stretch")
DESCRIBES = ("architecture", "settings", *_TILES)
_TELLS = (*DESCRIBES, "model_name", "score_threshold", "max_pixels", "engines", "files")


def load_engine(
    artefact_dir: str | Path,
    engine: str = "torch",
    precision: str = "fp32",
    threads: int | None = None,
    *,
    device: str | None = None,
    at_once: int = 1,
    approved_only: bool = True,
) -> tuple[nn.Module, dict]:
    """A detector of an artefact, ready to predict on this machine.

    Args:
        artefact_dir: written by `artefact.write_artefact`.
        engine: one of `ENGINES`.
        precision: "fp32", or "bf16" or "fp16" if it was approved on one's own tiles
            (kserve_utils.approve), on a device that has units for it. fp16 is for
            "torch" on a GPU without bf16, such as a T4 or a V100.
        threads: of the CPU that one picture uses; None for what the library takes by
            itself. For "torch" it counts for the whole process.
        device: "cpu", "cuda" or "cuda:N"; None for the GPU if there is one and the
            engine is "torch", else the CPU, where the other engines always run. With
            fp32 on a GPU, TF32 is off from then on in the whole process: it keeps 10
            bits of a factor's 23, and engines that agree to 0.05 px need all.
        at_once: how many threads will call the detector at the same time; OpenVINO
            makes their passes wait for each other otherwise.
        approved_only: False for the measurement that approves a precision.

    Returns:
        (module, meta). module takes a list of float32 (3, H, W) in 0..1 of any sizes
        and returns a list of {"boxes" float32 (N, 4) xyxy in pixels, "labels" int64
        (N,), "scores" float32 (N,)}, best first, all of them on its device. Several
        threads may call it at once. meta is detector.json with "engine", "precision",
        "threads" and "device", a str such as "cuda:0".

    Raises:
        FileNotFoundError: no artefact there.
        ValueError: no such engine, precision or device; an artefact without this
            engine, or a damaged one; bf16 or fp16 is not approved.
        ImportError: the engine's library is not installed.
        RuntimeError: this device or engine has no such precision.
    """
    if engine not in ENGINES:
        raise ValueError(f"no engine {engine!r}; valid: {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"no precision {precision!r}; valid: {', '.join(PRECISIONS)}")
    for name, value in (("threads", threads), ("at_once", at_once)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    where = resolve_device(engine, device)
    folder = Path(artefact_dir)
    meta = read_artefact(folder)
    if engine not in meta["engines"]:
        raise ValueError(
            f"{folder} was written for {', '.join(meta['engines'])}, not for {engine}: "
            f"write it again with {engine!r} among its engines"
        )
    _check_files(folder, engine, meta)
    if precision != "fp32":
        if approved_only:
            _check_approved(folder, engine, precision, where, meta)
        _check_native(engine, precision, where)
    if engine == "torch":
        module, used = _torch(folder, precision, threads, where)
    else:
        run, used = RUNNERS[engine](folder, precision, threads, at_once)
        module = Compiled(run)
    meta |= {"engine": engine, "precision": precision}
    return module.eval(), {**meta, "threads": used, "device": str(where)}


def resolve_device(engine: str, device: str | None = None) -> torch.device:
    """Where an engine computes; ValueError if there is no such device for it.

    Example:
        >>> resolve_device("openvino")
        device(type='cpu')
    """
    if engine != "torch" and (device or "cpu").startswith("cuda"):
        raise ValueError(
            f"{engine} runs on the CPU alone, not on {device!r}: take the engine torch"
        )
    return find_device(device if engine == "torch" else device or "cpu")


def _check_files(folder: Path, engine: str, meta: dict) -> None:
    for name in FILES[engine]:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not whole: {name} is missing")
        if sha256(folder / name) != meta["files"].get(name):
            raise ValueError(
                f"{folder / name} is damaged, or not the file that was written: its "
                "SHA-256 is not that of detector.json"
            )


def _check_approved(
    folder: Path, engine: str, precision: str, device: torch.device, meta: dict
) -> None:
    measured = meta.get(precision, {}).get(engine, {})
    at = torch.device(measured.get("device", "cpu")).type  # other kernels elsewhere
    if not measured.get("approved") or at != device.type:
        option = "" if precision == "bf16" else f" --precision {precision}"
        raise ValueError(
            f"{precision} is not approved for {engine} on {device.type} in {folder}: "
            "measure what it costs on your own tiles with python -m "
            f"kserve_utils.approve{option} --device {device.type}"
        )


def read_artefact(artefact_dir: str | Path) -> dict:
    """detector.json of an artefact.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or another program's.

    Example:
        >>> read_artefact("no such folder")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no artefact at no such folder: it has no detector.json. ...
    """
    path = Path(artefact_dir, "detector.json")
    if not path.is_file():
        raise FileNotFoundError(
            f"no artefact at {artefact_dir}: it has no detector.json. "
            "`python -m kserve_utils.artefact` writes one"
        )
    try:
        meta = json.loads(path.read_text())
        lacks = [key for key in _TELLS if key not in meta]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if lacks:
        raise ValueError(f"{path} is not of an artefact: it lacks {', '.join(lacks)}")
    return meta


class Compiled(nn.Module):
    """An exported graph in torchvision's convention."""

    def __init__(self, run: Callable) -> None:
        super().__init__()
        self.run = run  # float32 (3, H, W) to arrays of boxes, labels, scores
        # callers ask a model's parameters where it is
        self.here = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        found = []
        for image in images:
            arrays = self.run(image.detach().cpu().contiguous().numpy())
            boxes, labels, scores = map(torch.from_numpy, arrays)
            found.append({"boxes": boxes, "labels": labels, "scores": scores})
        return found


class _Autocast(nn.Module):
    """A detector in a lower precision, its convolutions channels last."""

    def __init__(self, detector: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.detector = detector.to(memory_format=torch.channels_last)
        self.dtype = dtype
        detector.get_submodule("backbone").register_forward_pre_hook(
            lambda _, args: (args[0].contiguous(memory_format=torch.channels_last),)
        )

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        with torch.autocast(images[0].device.type, self.dtype):
            return self.detector(images)


def load_eager(
    ckpt_path: str | Path, device: str | torch.device = "cpu"
) -> tuple[nn.Module, dict]:
    """A checkpoint as a detector that is ready to predict, and what describes it.

    It has seen a square picture: torchvision's pooling of regions takes the scales of
    the feature maps from the first one, and from one of 13 rows it takes wrong ones,
    for good. Raises what `checkpoint.model_from_checkpoint` raises.
    """
    model, meta = model_from_checkpoint(ckpt_path, device)
    side = meta.get("tile_size") or 256  # any square does
    with torch.inference_mode():
        model.requires_grad_(False)([torch.zeros(3, side, side, device=device)])
    return model, meta


def _torch(
    folder: Path, precision: str, threads: int | None, device: torch.device
) -> tuple[nn.Module, int]:
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda" and precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # on by default, see load_engine
        torch.set_float32_matmul_precision("highest")
    module, _ = load_eager(folder / "model.pth", device)
    dtype = PRECISIONS[precision]
    if dtype is not None:
        module = _Autocast(module, dtype)
    return module, torch.get_num_threads()


def _openvino(
    folder: Path, precision: str, threads: int | None, at_once: int = 1
) -> tuple[Callable, int]:
    import openvino

    # Without the hint a CPU with AMX computes in bf16, and one of ARM in f16.
    options: dict[str, str | int] = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": at_once,
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads * at_once
    core = openvino.Core()
    compiled = core.compile_model(str(folder / "model.xml"), "CPU", options)
    local = threading.local()  # a request serves one thread at a time

    def run(image: np.ndarray) -> list[np.ndarray]:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        found = local.request.infer({0: image}, share_inputs=True)
        return [found[i] for i in range(3)]

    return run, int(compiled.get_property("INFERENCE_NUM_THREADS")) // at_once


def _onnxruntime(
    folder: Path, precision: str, threads: int | None, at_once: int = 1
) -> tuple[Callable, int]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about the graph's own shapes
    # by itself it would take the whole machine's, also where a pod may use two
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    run = lambda image: session.run(None, {"image": image})  # noqa: E731
    return run, options.intra_op_num_threads


RUNNERS = {"openvino": _openvino, "onnxruntime": _onnxruntime}


def _check_native(engine: str, precision: str, device: torch.device) -> None:
    """RuntimeError where it would be emulated, or computed in another precision."""
    native = native_precisions(device) if engine == "torch" else ("fp32",)
    if engine == "openvino":
        import openvino

        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        native += ("bf16",) * ("BF16" in able)
    if precision not in native:
        what = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        raise RuntimeError(
            f"{engine}: this {what} has no units for {precision} that it would use: "
            f"take {' or '.join(native)}"
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.txt").write_text("onetwo")
        ...     sha256(Path(folder, "a.txt"))[:8]
        '25b6746d'
    """
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
