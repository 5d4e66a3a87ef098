"""One artefact for every server: the checkpoint, its exports, and who runs them.

    python -m e2e_utils.engines --stripped-ckpt stripped.pth --out-dir artefact \\
        --tiles-dir tiles/val_images_300_02

Copy: this file and models.py.

An engine is what computes a detector: "torch" runs the checkpoint itself, "openvino"
and "onnxruntime" a graph of it that is exported once. An export can go wrong without
an error, therefore an artefact is written only after each engine gave the boxes of
torch on your own tiles. `load_engine` gives any of them as a detector in torchvision's
convention, so that `predict_image` and `predict_scene` take it as they take a model.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import boxes as box_ops

from e2e_utils import models

ENGINES = ("torch", "openvino", "onnxruntime")
PRECISIONS = ("fp32", "bf16")
BOX_TOLERANCE = 0.05  # pixels that a box may move between torch and another engine
SCORE_TOLERANCE = 1e-4
OPSET = 17  # torchvision's detectors are tested with the exporter of this age
FILES = {
    "torch": ("model.pth",),
    "openvino": ("model.xml", "model.bin"),
    "onnxruntime": ("model.onnx",),
}
DESCRIBES = ("architecture", "settings", "class_names", "tile_size", "overlap")
_TELLS = (*DESCRIBES, "model_name", "score_threshold", "max_pixels", "engines", "files")


def write_artefact(
    stripped_ckpt: str | Path,
    out_dir: str | Path,
    engines: Sequence[str] = ENGINES,
    *,
    tiles: Sequence[np.ndarray] | None = None,
    model_name: str = "xview-fasterrcnn",
    score_threshold: float = 0.0,
    max_pixels: int = 16_777_216,
) -> Path:
    """Write the folder from which every engine serves one detector.

    Args:
        stripped_ckpt: written by `export.strip_checkpoint`.
        out_dir: the folder; it appears whole or not at all, in place of an older
            artefact. A folder that holds something else is not touched.
        engines: those of `ENGINES` that the artefact is for. "torch" is always in.
        tiles: uint8 (H, W, 3), RGB, on which each engine has to give the boxes of
            torch; a crop of the first checks that other sizes work too. Take tiles
            that were not trained on, with objects. None draws noise: enough for an
            untrained detector, too little to rely on.
        model_name: the model's name in the URL.
        score_threshold: servers return no boxes below, 0..1. The detector's own
            threshold comes before it.
        max_pixels: servers refuse larger pictures; the default is 4096 x 4096.

    Returns:
        `out_dir`. Inside: model.pth (the checkpoint), model.xml and model.bin
        (OpenVINO), model.onnx, and detector.json: what describes the weights, the
        limits, the engines with what parity measured, and the files' SHA-256.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: not a stripped checkpoint, or an argument out of range.
        FileExistsError: `out_dir` holds something that is no artefact.
        ImportError: an engine's library is not installed.
        RuntimeError: an engine cannot run this architecture, or differs from torch by
            more than 0.05 px or 1e-4, or by a box or a label.
    """
    unknown = sorted(set(engines) - set(ENGINES))
    if unknown:
        raise ValueError(f"no engine {unknown}; valid: {', '.join(ENGINES)}")
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must be in 0..1, got {score_threshold}")
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, got {max_pixels}")
    wanted = [e for e in ENGINES if e == "torch" or e in engines]
    for engine in wanted:
        _libraries(engine, "onnx" if engine != "torch" else engine)
    stripped, out = Path(stripped_ckpt), Path(out_dir)
    _check_place(out)
    if not stripped.is_file():
        raise FileNotFoundError(f"no checkpoint at {stripped}")
    model, meta = models.model_from_checkpoint(stripped)
    if set(meta) != set(DESCRIBES):
        odd = ", ".join(sorted(set(meta) ^ set(DESCRIBES)))
        raise ValueError(f"{stripped} is not stripped ({odd}): use strip_checkpoint")
    drawn = tiles is None
    pictures = _noise(meta["tile_size"]) if drawn else _checked(tiles)
    description = {key: meta[key] for key in DESCRIBES}
    description |= {"model_name": model_name, "score_threshold": score_threshold}
    description |= {"max_pixels": max_pixels, "engines": wanted}
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        part.chmod(0o755)  # a server runs as another user
        shutil.copyfile(stripped, part / "model.pth")
        _settle(model, meta["tile_size"])
        eager = _run(model, pictures)
        if not any(len(found["scores"]) for found in eager):
            raise ValueError(
                f"{stripped} finds no box on {len(tiles or [])} tiles (noise is drawn "
                "if there are none), so that parity cannot be checked: pass tiles that "
                "show objects"
            )
        if len(wanted) > 1:
            _export(model, part / "model.onnx", pictures[0], meta["architecture"])
        if "openvino" in wanted:
            _to_openvino(part / "model.onnx", meta["architecture"])
        empty = np.zeros_like(pictures[0])
        if not len(_run(model, [empty])[0]["scores"]):  # nor may others find some there
            pictures, eager = [*pictures, empty], eager + _run(model, [empty])
        parity = {"torch": {"pictures": "noise" if drawn else "tiles"}}
        parity["torch"]["checked"] = len(pictures)
        parity["torch"]["boxes"] = sum(len(found["scores"]) for found in eager)
        for engine in wanted[1:]:
            module = _Compiled(_RUNNERS[engine](part, "fp32", None)[0])
            try:
                found = _run(module, pictures)
            except Exception as error:  # whatever a runtime raises on a graph
                raise _cannot(engine, meta["architecture"], error) from error
            parity[engine] = _compare(engine, meta["architecture"], eager, found)
        if "onnxruntime" not in wanted:
            (part / "model.onnx").unlink(missing_ok=True)
        description["parity"] = parity
        names = [name for engine in wanted for name in FILES[engine]]
        description["files"] = {name: _sha256(part / name) for name in names}
        text = json.dumps(description, indent=2) + "\n"
        (part / "detector.json").write_text(text)
        _put(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def load_engine(
    artefact_dir: str | Path,
    engine: str = "torch",
    precision: str = "fp32",
    threads: int | None = None,
    *,
    at_once: int = 1,
    approved_only: bool = True,
    emulate: bool = False,
) -> tuple[nn.Module, dict]:
    """A detector of an artefact, ready to predict on this CPU.

    Args:
        artefact_dir: written by `write_artefact`.
        engine: one of `ENGINES`.
        precision: "fp32", or "bf16" for those that were approved on one's own tiles
            (kserve_utils.predictor.approve_bf16), on a CPU that computes it natively.
        threads: that one picture uses; None for what the library takes by itself. For
            "torch" it counts for the whole process.
        at_once: how many threads will call the detector at the same time; OpenVINO
            makes their passes wait for each other otherwise.
        approved_only: False for the measurement that approves bf16.
        emulate: let "torch" emulate bf16 where the CPU has none, slowly; for tests.

    Returns:
        (module, meta). module takes a list of float32 (3, H, W) in 0..1 of any sizes
        and returns a list of {"boxes" float32 (N, 4) xyxy in pixels, "labels" int64
        (N,), "scores" float32 (N,)}, best first. Several threads may call it at once.
        meta is detector.json with "engine", "precision" and "threads".

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no such engine or precision; not an artefact, or one without this
            engine, or a damaged file; bf16 is not approved.
        ImportError: the engine's library is not installed.
        RuntimeError: this CPU or engine has no bf16.
    """
    if engine not in ENGINES:
        raise ValueError(f"no engine {engine!r}; valid: {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"no precision {precision!r}; valid: {', '.join(PRECISIONS)}")
    for name, value in (("threads", threads), ("at_once", at_once)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    folder = Path(artefact_dir)
    meta = read_artefact(folder)
    if engine not in meta["engines"]:
        raise ValueError(
            f"{folder} was written for {', '.join(meta['engines'])}, not for {engine}: "
            f"write it again with {engine!r} among its engines"
        )
    _libraries(engine)
    for name in FILES[engine]:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not whole: {name} is missing")
        if _sha256(folder / name) != meta["files"].get(name):
            raise ValueError(
                f"{folder / name} is damaged, or not the file that was written: its "
                "SHA-256 is not that of detector.json"
            )
    if precision == "bf16":
        approval = meta.get("bf16", {}).get(engine, {})
        if approved_only and not approval.get("approved"):
            raise ValueError(
                f"bf16 is not approved for {engine} in {folder}: measure what it costs "
                "on your own tiles with python -m kserve_utils.predictor.approve_bf16"
            )
        _native_bf16(engine, emulate)
    if engine == "torch":
        module, used = _torch(folder, precision, threads, meta["tile_size"])
    else:
        run, used = _RUNNERS[engine](folder, precision, threads, at_once)
        module = _Compiled(run)
    return module.eval(), {
        **meta,
        "engine": engine,
        "precision": precision,
        "threads": used,
    }


def read_artefact(artefact_dir: str | Path) -> dict:
    """detector.json of an artefact; ValueError if the folder is none."""
    folder = Path(artefact_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"no artefact at {folder}: no such folder")
    path = folder / "detector.json"
    try:
        meta = json.loads(path.read_text())
        lacks = [key for key in _TELLS if key not in meta]
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no artefact: it has no detector.json. "
            "`python -m e2e_utils.engines` writes one"
        ) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if lacks:
        raise ValueError(f"{path} is not of an artefact: it lacks {', '.join(lacks)}")
    return meta


class _Compiled(nn.Module):
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


class _Bfloat16(nn.Module):
    """A detector under autocast, its convolutions channels last."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector.to(memory_format=torch.channels_last)
        detector.backbone.register_forward_pre_hook(
            lambda _, args: (args[0].contiguous(memory_format=torch.channels_last),)
        )

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            found = self.detector(images)
        return [
            {key: v.float() if v.is_floating_point() else v for key, v in one.items()}
            for one in found
        ]


@torch.inference_mode()
def _settle(model: nn.Module, tile_size: int) -> None:
    """Let a detector see a square picture first.

    torchvision's pooling of regions takes the scales of the feature maps from the first
    picture, and from one of 13 rows it takes wrong ones, for good.
    """
    model([torch.zeros(3, tile_size, tile_size)])


def _torch(
    folder: Path, precision: str, threads: int | None, tile_size: int
) -> tuple[nn.Module, int]:
    model, _ = models.model_from_checkpoint(folder / "model.pth")
    _settle(model.requires_grad_(False), tile_size)
    if threads is not None:
        torch.set_num_threads(threads)
    module = _Bfloat16(model) if precision == "bf16" else model
    return module, torch.get_num_threads()


def _openvino(
    folder: Path, precision: str, threads: int | None, at_once: int = 1
) -> tuple[Callable, int]:
    import openvino

    # Without the hint a CPU with AMX computes in bf16, and one of ARM in f16.
    options = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision]}
    options |= {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": at_once}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads * at_once
    core = openvino.Core()
    compiled = core.compile_model(str(folder / "model.xml"), "CPU", options)
    if precision == "bf16":
        used = compiled.get_property("INFERENCE_PRECISION_HINT")
        if used != openvino.Type.bf16:
            raise RuntimeError(f"openvino computes in {used} here: take fp32")
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
    options.intra_op_num_threads = threads or _cores()
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    run = lambda image: session.run(None, {"image": image})  # noqa: E731
    return run, options.intra_op_num_threads


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_RUNNERS = {"openvino": _openvino, "onnxruntime": _onnxruntime}


def _libraries(engine: str, *further: str) -> None:
    for name in (engine, *further):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"the engine {engine} needs the library {name} ({error}): pip install "
                f"{name}, in the version of requirements.txt"
            ) from error


def _native_bf16(engine: str, emulate: bool) -> None:
    """RuntimeError where bf16 would be emulated, or computed in another type."""
    if engine == "onnxruntime":
        raise RuntimeError("onnxruntime has no bf16 on a CPU: take openvino or torch")
    if engine == "openvino":
        import openvino

        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        native = "BF16" in able
    else:
        native = torch.cpu._is_avx512_bf16_supported()
        native = native or torch.cpu._is_amx_tile_supported() or emulate
    if not native:
        raise RuntimeError(
            f"{engine}: this CPU has no bf16 (AMX or AVX512-bf16), it would be slower "
            "than fp32: take precision='fp32'"
        )


def _noise(side: int) -> list[np.ndarray]:
    """Pictures of soft blobs: uint8 (H, W, 3) of a tile and of another size."""
    draw, sizes = torch.Generator().manual_seed(0), [(side, side), (side - 37, side)]
    pictures = []
    for size in sizes:
        coarse = torch.rand(1, 3, 20, 20, generator=draw)
        soft = nn.functional.interpolate(coarse, size, mode="bilinear")[0]
        pictures.append((soft * 255).byte().permute(1, 2, 0).contiguous().numpy())
    return pictures


def _checked(tiles: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The tiles and a crop of the first, such as a tile at the scene's edge."""
    for tile in tiles:
        if tile.ndim != 3 or tile.shape[2] != 3 or tile.dtype != np.uint8:
            raise ValueError(
                f"a tile must be uint8 (H, W, 3), got {tile.dtype} {tile.shape}"
            )
    if not len(tiles):
        raise ValueError("tiles is empty: give some, or None for noise")
    height, width = tiles[0].shape[:2]
    return [*tiles, tiles[0][: height * 3 // 4, : width * 5 // 6]]


@torch.inference_mode()
def _run(module: nn.Module, pictures: Sequence[np.ndarray]) -> list[dict]:
    return [module([_tensor(picture)])[0] for picture in pictures]


def _tensor(picture: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(picture))
    return pixels.permute(2, 0, 1).float().div(255)


class _OnePicture(nn.Module):
    """One picture in, three arrays out: what a graph can express."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.detector([image])[0]
        return found["boxes"], found["labels"], found["scores"]


def _nms_of_any_count(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threshold: float
) -> torch.Tensor:
    """torchvision's batched_nms, with one more box that takes no part.

    Of no box at all, OpenVINO's NMS makes one with what its memory happens to hold.
    """
    boxes = torch.cat([boxes, boxes.new_tensor([[-2.0, -2.0, -1.0, -1.0]])])
    scores_ = torch.cat([scores, scores.new_tensor([-1.0])])
    labels = torch.cat([labels, labels.new_zeros(1)])
    keep = box_ops._batched_nms_coordinate_trick(boxes, scores_, labels, threshold)
    return keep[keep < torch.onnx.operators.shape_as_tensor(scores)[0]]


def _decode_of_any_count(
    self: BoxCoder, rel_codes: torch.Tensor, boxes: list[torch.Tensor]
) -> torch.Tensor:
    """torchvision's decode, with a constant number of classes.

    Its own reshape to (boxes, -1) fails in ONNX Runtime where there is no box.
    """
    classes = int(rel_codes.shape[1]) // 4
    return self.decode_single(rel_codes, torch.cat(boxes)).reshape(-1, classes, 4)


@contextmanager
def _for_any_count() -> Iterator[None]:
    """Let a detector be traced so that a picture without boxes goes through too."""
    nms, decode = box_ops.batched_nms, BoxCoder.decode
    box_ops.batched_nms, BoxCoder.decode = _nms_of_any_count, _decode_of_any_count
    try:
        yield
    finally:
        box_ops.batched_nms, BoxCoder.decode = nms, decode


def _export(model: nn.Module, path: Path, picture: np.ndarray, name: str) -> None:
    """Write the ONNX graph of a detector, for pictures of any height and width."""
    axes = {"image": {1: "height", 2: "width"}}
    axes |= {key: {0: "found"} for key in ("boxes", "labels", "scores")}
    try:
        with warnings.catch_warnings(), torch.inference_mode(), _for_any_count():
            warnings.simplefilter("ignore")  # each shape that Python reads is one
            torch.onnx.export(
                _OnePicture(model).eval(),
                (_tensor(picture),),
                str(path),
                input_names=["image"],
                output_names=["boxes", "labels", "scores"],
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,  # the newer exporter fails on torchvision's batched_nms
            )
    except Exception as error:  # an exporter raises whatever a model leads it to
        raise _cannot("onnxruntime", name, error) from error


def _to_openvino(path: Path, name: str) -> None:
    import openvino

    try:  # read_model, not convert_model, which reports its use over the network
        graph = openvino.Core().read_model(str(path))
        openvino.save_model(
            graph, str(path.with_suffix(".xml")), compress_to_fp16=False
        )
    except Exception as error:  # as above
        raise _cannot("openvino", name, error) from error


def _cannot(engine: str, architecture: str, error: Exception) -> RuntimeError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return RuntimeError(
        f"{engine} cannot run {architecture}: {reason}. Leave {engine} out of engines"
    )


def _compare(engine: str, architecture: str, eager: list, found: list) -> dict:
    """The largest differences over all pictures; RuntimeError if they are too large."""
    pixels = scores = 0.0
    for index, (one, other) in enumerate(zip(eager, found, strict=True)):
        where = f"{engine} differs from torch on {architecture}, picture {index}: "
        counts = len(one["scores"]), len(other["scores"])
        if counts[0] != counts[1]:
            raise RuntimeError(f"{where}{counts[1]} boxes instead of {counts[0]}")
        free = torch.ones(counts[1], dtype=torch.bool)
        for box, label, score in zip(
            one["boxes"], one["labels"], one["scores"], strict=True
        ):
            # near ties may change places in the order of scores: pair by what they are
            off = (other["boxes"] - box).abs().amax(dim=1)
            off[~free | (other["labels"] != label)] = torch.inf
            far = (other["scores"] - score).abs()
            best = int((off / BOX_TOLERANCE + far / SCORE_TOLERANCE).argmin())
            moved, changed = float(off[best]), float(far[best])
            # so put that a NaN is refused
            if not (moved <= BOX_TOLERANCE and changed <= SCORE_TOLERANCE):
                raise RuntimeError(
                    f"{where}a box of label {label} moves by {moved:.3g} px and "
                    f"{changed:.2g} of its score; at most {BOX_TOLERANCE} px and "
                    f"{SCORE_TOLERANCE} are taken"
                )
            free[best] = False
            pixels, scores = max(pixels, moved), max(scores, changed)
    return {"box_difference_px": round(pixels, 6), "score_difference": scores}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_place(out: Path) -> None:
    """FileExistsError if writing there would remove what is no artefact."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        read_artefact(out)
        return
    raise FileExistsError(f"{out} holds something that is no artefact: choose another")


def _put(part: Path, out: Path) -> None:
    """Rename the new folder into the place of the old one."""
    old = part.with_name(part.name + ".old")
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(part, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_tiles(folder: str | Path, most: int = 8) -> list[np.ndarray]:
    """Some pictures of a folder, evenly over its sorted names: uint8 (H, W, 3)."""
    from PIL import Image

    kinds = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
    paths = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in kinds)
    if not paths:
        raise FileNotFoundError(f"no pictures in {folder}")
    most = min(most, len(paths))
    chosen = [paths[i * len(paths) // most] for i in range(most)]
    return [np.array(Image.open(path).convert("RGB")) for path in chosen]


def main() -> None:
    parser = argparse.ArgumentParser("e2e_utils.engines")
    parser.add_argument("--stripped-ckpt", required=True, help="of strip_checkpoint")
    parser.add_argument("--out-dir", required=True, help="the artefact's folder")
    parser.add_argument("--tiles-dir", help="pictures for the parity check")
    parser.add_argument("--tiles", type=int, default=8, help="how many of them")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--model-name", default="xview-fasterrcnn")
    parser.add_argument("--score-threshold", type=float, default=0.0)
    parser.add_argument("--max-pixels", type=int, default=16_777_216)
    args = parser.parse_args()
    try:
        out = write_artefact(
            args.stripped_ckpt,
            args.out_dir,
            args.engines,
            tiles=read_tiles(args.tiles_dir, args.tiles) if args.tiles_dir else None,
            model_name=args.model_name,
            score_threshold=args.score_threshold,
            max_pixels=args.max_pixels,
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {out}")
    for engine, measured in read_artefact(out)["parity"].items():
        print(f"  {engine}: {', '.join(f'{k} {v}' for k, v in measured.items())}")


if __name__ == "__main__":
    main()
