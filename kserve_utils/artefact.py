"""One artefact for every server: the checkpoint, its exports, and their parity.

    python -m kserve_utils.artefact --stripped-ckpt stripped.pth --out-dir artefact \\
        --tiles-dir tiles/val_images_300_02

Copy: this file, engines.py, models.py and hardware.py.

"torch" runs the checkpoint itself, "openvino" and "onnxruntime" a graph of it that is
exported once. An export can go wrong without an error, therefore an artefact is written
only after each engine gave the boxes of torch on your own tiles.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import nn
from torch.onnx import operators
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import boxes as box_ops
from torchvision.ops import poolers

from .engines import (
    DESCRIBES,
    ENGINES,
    FILES,
    RUNNERS,
    Compiled,
    load_eager,
    read_artefact,
    require_libraries,
    sha256,
)

BOX_TOLERANCE = 0.05  # pixels that a box may move between torch and another engine
SCORE_TOLERANCE = 1e-4
OPSET = 17  # torchvision's detectors are tested with the exporter of this age
# layers of an exported graph by torch's names: boxes, and what stays in the network
_BOXES = re.compile(r"/rpn/(?!head/)|/roi_heads/(?!box_head/|box_predictor/)")
_COMPUTE = ("Const", "Convolution", "MatMul", "ROIAlign")


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
            more than 0.05 px or 1e-4, or by more than one box in a hundred.
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
        require_libraries(engine, "onnx" if engine != "torch" else engine)
    stripped, out = Path(stripped_ckpt), Path(out_dir)
    _check_place(out)
    if not stripped.is_file():
        raise FileNotFoundError(f"no checkpoint at {stripped}")
    model, meta = load_eager(stripped)
    if set(meta) != set(DESCRIBES):
        odd = ", ".join(sorted(set(meta) ^ set(DESCRIBES)))
        raise ValueError(f"{stripped} is not stripped ({odd}): use strip_checkpoint")
    drawn = tiles is None
    pictures = _noise(meta["tile_size"]) if tiles is None else _checked(tiles)
    description = {key: meta[key] for key in DESCRIBES}
    description |= {"model_name": model_name, "score_threshold": score_threshold}
    description |= {"max_pixels": max_pixels, "engines": wanted}
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        part.chmod(0o755)  # a server runs as another user
        shutil.copyfile(stripped, part / "model.pth")
        of_torch = _run(model, pictures)
        if not any(len(found["scores"]) for found in of_torch):
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
            pictures, of_torch = [*pictures, empty], of_torch + _run(model, [empty])
        parity: dict[str, dict] = {"torch": {"pictures": "noise" if drawn else "tiles"}}
        parity["torch"]["checked"] = len(pictures)
        parity["torch"]["boxes"] = sum(len(found["scores"]) for found in of_torch)
        for engine in wanted[1:]:
            module = Compiled(RUNNERS[engine](part, "fp32", None)[0])
            try:
                found = _run(module, pictures)
            except Exception as error:  # whatever a runtime raises on a graph
                raise _cannot(engine, meta["architecture"], error) from error
            parity[engine] = _compare(engine, meta["architecture"], of_torch, found)
        if "onnxruntime" not in wanted:
            (part / "model.onnx").unlink(missing_ok=True)
        description["parity"] = parity
        names = [name for engine in wanted for name in FILES[engine]]
        description["files"] = {name: sha256(part / name) for name in names}
        text = json.dumps(description, indent=2) + "\n"
        (part / "detector.json").write_text(text)
        _put(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


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
    return keep[keep < operators.shape_as_tensor(scores)[0]]


def _decode_of_any_count(
    self: BoxCoder, rel_codes: torch.Tensor, boxes: list[torch.Tensor]
) -> torch.Tensor:
    """torchvision's decode, with a constant number of classes.

    Its own reshape to (boxes, -1) fails in ONNX Runtime where there is no box.
    """
    classes = int(rel_codes.shape[1]) // 4
    return self.decode_single(rel_codes, torch.cat(boxes)).reshape(-1, classes, 4)


def _gather_levels(levels: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
    """Pooled regions, level by level, in the order of their proposals.

    torchvision's own, for tracing, scatters each level into a copy of the whole, by an
    index as large as the whole. With a ResNet-50 that took 8 % of OpenVINO's time for a
    picture, and 26 % of ONNX Runtime's.
    """
    order = torch.cat([torch.where(levels == i)[0] for i in range(len(parts))])
    return torch.cat(parts)[torch.argsort(order)]


@contextmanager
def _for_tracing() -> Iterator[None]:
    """Detectors whose graph takes pictures without boxes, and copies little."""
    places = (
        (box_ops, "batched_nms", _nms_of_any_count),
        (BoxCoder, "decode", _decode_of_any_count),
        (poolers, "_onnx_merge_levels", _gather_levels),
    )
    before = [getattr(owner, name) for owner, name, _ in places]
    try:
        for owner, name, ours in places:
            setattr(owner, name, ours)
        yield
    finally:
        for (owner, name, _), old in zip(places, before, strict=True):
            setattr(owner, name, old)


def _export(model: nn.Module, path: Path, picture: np.ndarray, name: str) -> None:
    """Write the ONNX graph of a detector, for pictures of any height and width."""
    axes = {"image": {1: "height", 2: "width"}}
    axes |= {key: {0: "found"} for key in ("boxes", "labels", "scores")}
    try:
        with warnings.catch_warnings(), torch.inference_mode(), _for_tracing():
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
    import onnx
    import openvino

    graph = onnx.load(str(path))
    _keep_relu_apart(graph.graph)
    try:  # read_model, not convert_model, which reports its use over the network
        graph = openvino.Core().read_model(graph.SerializeToString())
        openvino.save_model(
            graph, str(path.with_suffix(".xml")), compress_to_fp16=False
        )
    except Exception as error:  # as above
        raise _cannot("openvino", name, error) from error
    _keep_coordinates_in_float32(path.with_suffix(".xml"))


def _keep_coordinates_in_float32(path: Path) -> None:
    """Mark what computes proposals and boxes, so that it does so in bf16 too.

    By itself OpenVINO leaves in float32 only what follows the last product. Proposals
    came in bf16, above 256 px in steps of 2, and a fasterrcnn_small of 300 steps on
    drawn shapes fell from an AP of 0.793 to 0.770 on 64 tiles; marked, it stays.
    """
    tree = ElementTree.parse(path)
    layers = tree.getroot().find("layers")
    assert layers is not None, f"{path} has no layers"
    for layer in layers:
        if layer.get("type") in _COMPUTE or not _BOXES.search(layer.attrib["name"]):
            continue
        marks = layer.find("rt_info")
        if marks is None:
            marks = ElementTree.Element("rt_info")
            layer.insert(0 if layer.find("data") is None else 1, marks)
        ElementTree.SubElement(marks, "attribute", name="precise", version="0")
    tree.write(path)


def _keep_relu_apart(graph: Any) -> None:
    """Write Relu after a product of matrices as the maximum with 0, in place.

    OpenVINO computes a product that a Relu is fused into by another kernel, which on
    AVX2 takes 430 ms instead of 330 for the first layer of a ResNet-50 Faster R-CNN's
    box head (1,000 x 12,544 x 1,024).
    """
    import onnx

    made = {output: node.op_type for node in graph.node for output in node.output}
    zero = onnx.numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    graph.initializer.append(zero)
    for node in graph.node:
        if node.op_type == "Relu" and made.get(node.input[0]) == "Gemm":
            node.op_type = "Max"
            node.input.append(zero.name)


def _cannot(engine: str, architecture: str, error: Exception) -> RuntimeError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return RuntimeError(
        f"{engine} cannot run {architecture}: {reason}. Leave {engine} out of engines"
    )


def _compare(engine: str, architecture: str, eager: list, found: list) -> dict:
    """The largest differences over all pictures; RuntimeError if they are too large.

    One box in a hundred may be there on one side alone: where two boxes overlap by just
    the threshold of a suppression, or a score lies on its limit, the last digit of a
    float decides.
    """
    pixels = scores = 0.0
    allowed, alone = sum(len(one["scores"]) for one in eager) // 100, 0
    for index, (one, other) in enumerate(zip(eager, found, strict=True)):
        where = f"{engine} differs from torch on {architecture}, picture {index}: "
        counts = len(one["scores"]), len(other["scores"])
        free = torch.ones(counts[1], dtype=torch.bool)
        told = f"{where}{counts[1]} boxes instead of {counts[0]}"
        for box, label, score in zip(
            one["boxes"], one["labels"], one["scores"], strict=True
        ):
            if not counts[1]:
                alone += 1
                continue
            # near ties may change places in the order of scores: pair by what they are
            off = (other["boxes"] - box).abs().amax(dim=1)
            off[~free | (other["labels"] != label)] = torch.inf
            far = (other["scores"] - score).abs()
            best = int((off / BOX_TOLERANCE + far / SCORE_TOLERANCE).argmin())
            moved, changed = float(off[best]), float(far[best])
            if moved <= BOX_TOLERANCE and changed <= SCORE_TOLERANCE:
                free[best] = False
                pixels, scores = max(pixels, moved), max(scores, changed)
                continue
            if counts[0] == counts[1] or not moved > 1:
                told = (
                    f"{where}a box of label {label} moves by {moved:.3g} px and "
                    f"{changed:.2g} of its score; at most {BOX_TOLERANCE} px and "
                    f"{SCORE_TOLERANCE} are taken"
                )
            if not moved > 1:  # so put that a NaN is refused
                raise RuntimeError(told)
            alone += 1  # no box near it: not moved, but another or none
        alone += int(free.sum())
        if alone > allowed:
            raise RuntimeError(told)
    measured = {"box_difference_px": round(pixels, 6), "score_difference": scores}
    return {**measured, "boxes_of_one_side": alone}


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
    parser = argparse.ArgumentParser("kserve_utils.artefact")
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
