"""One artefact for every server: the checkpoint, its exports, and their parity.

    python -m kserve_utils.artefact --stripped-ckpt stripped.pth --out-dir artefact \\
        --tiles-dir tiles

Copy: this file, export.py, engines.py and graphs.py. (And e2e_utils.)

"torch" runs the checkpoint itself, "openvino" and "onnxruntime" a graph of it that is
exported once. An export can go wrong without an error, therefore an artefact is written
only after each engine gave the boxes of torch on your own tiles.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from e2e_utils.tile_set import NAME, read_tile_set

from .engines import ENGINES, FILES, RUNNERS, Compiled, read_artefact, sha256
from .export import read_stripped
from .graphs import write_onnx, write_openvino

BOX_TOLERANCE = 0.05  # pixels that a box may move between torch and another engine
SCORE_TOLERANCE = 1e-4


def write_artefact(
    stripped_ckpt: str | Path,
    out_dir: str | Path,
    engines: Sequence[str] = ENGINES,
    *,
    tiles: Sequence[np.ndarray],
    model_name: str = "xview-fasterrcnn",
) -> Path:
    """Write the folder from which every engine serves one detector.

    Args:
        stripped_ckpt: written by `export.strip_checkpoint`.
        out_dir: the folder; it appears whole or not at all, in place of an older
            artefact. A folder that holds something else is not touched.
        engines: those of `ENGINES` that the artefact is for. "torch" is always in.
        tiles: uint8 (H, W, 3), RGB, with objects and not trained on. On them, and on a
            crop of the first, each engine has to give the boxes of torch.
        model_name: in the URL.

    Returns:
        `out_dir`. Inside: model.pth (the checkpoint), model.xml and model.bin
        (OpenVINO), model.onnx, and detector.json: what describes the weights, the
        limits, the engines with what parity measured, and the files' SHA-256.

    Raises:
        FileNotFoundError, ValueError: as `read_stripped`; or an argument is not valid.
        FileExistsError: `out_dir` holds something that is no artefact.
        RuntimeError: an engine is not installed or cannot run this architecture, or
            `compare` refuses it.

    Example:
        >>> from e2e_utils.models import build_model
        >>> from kserve_utils.engines import load_engine
        >>> from kserve_utils.export import strip_checkpoint
        >>> model = build_model("fasterrcnn_small", 2, box_score_thresh=0.0)
        >>> says = {"architecture": "fasterrcnn_small", "tile_size": 96, "overlap": 0.2}
        >>> says |= {"class_names": ["background", "car"]}
        >>> says |= {"settings": {"box_score_thresh": 0.0}}  # it has learned nothing
        >>> noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
        >>> with tempfile.TemporaryDirectory() as name:
        ...     torch.save(model.state_dict(), f"{name}/last.pth")
        ...     stripped = strip_checkpoint(f"{name}/last.pth", f"{name}/a.pth", **says)
        ...     out = f"{name}/artefact"
        ...     _ = write_artefact(stripped, out, ["torch"], tiles=[noise])
        ...     detector, meta = load_engine(out, "torch", device="cpu")
        >>> meta["engines"], meta["class_names"]
        (['torch'], ['background', 'car'])
    """
    unknown = sorted(set(engines) - set(ENGINES))
    if unknown:
        raise ValueError(f"no engine {unknown}; valid: {', '.join(ENGINES)}")
    engines = [e for e in ENGINES if e == "torch" or e in engines]
    out, pictures = Path(out_dir), _pictures(tiles)
    _check_replaceable(out)
    model, description = read_stripped(stripped_ckpt)
    description |= {"model_name": model_name, "engines": engines}
    expected = _run(model, pictures)
    if not _count(expected):
        raise ValueError(
            f"{stripped_ckpt} finds no box on {len(tiles)} tiles, parity cannot be "
            "checked: pass tiles that show objects"
        )
    empty = np.zeros_like(pictures[0])
    if not _count(on_empty := _run(model, [empty])):  # nor may others find some there
        pictures, expected = [*pictures, empty], expected + on_empty
    parity: dict = {"torch": {"checked": len(pictures), "boxes": _count(expected)}}
    with _new_folder(out) as folder:
        shutil.copyfile(stripped_ckpt, folder / "model.pth")
        architecture = description["architecture"]
        for engine in engines[1:]:
            found = _exported(engine, folder, model, pictures, architecture)
            title = f"{engine} differs from torch on {architecture}"
            parity[engine] = compare(expected, found, title)
        if "onnxruntime" not in engines:
            (folder / "model.onnx").unlink(missing_ok=True)
        names = [name for engine in engines for name in FILES[engine]]
        files = {name: sha256(folder / name) for name in names}
        text = json.dumps({**description, "parity": parity, "files": files}, indent=2)
        (folder / "detector.json").write_text(text + "\n")
    return out


def _pictures(tiles: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The tiles, and a crop of the first, which is of another size."""
    for tile in tiles:
        if tile.ndim != 3 or tile.shape[2] != 3 or tile.dtype != np.uint8:
            raise ValueError(
                f"a tile must be uint8 (H, W, 3), got {tile.dtype} {tile.shape}"
            )
    if not len(tiles):
        raise ValueError("tiles is empty: parity is checked on them")
    height, width = tiles[0].shape[:2]
    return [*tiles, tiles[0][: height * 3 // 4, : width * 5 // 6]]


@torch.inference_mode()
def _run(module: nn.Module, pictures: Sequence[np.ndarray]) -> list[dict]:
    return [module([_tensor(picture)])[0] for picture in pictures]


def _tensor(picture: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(picture))
    return pixels.permute(2, 0, 1).float().div(255)


def _count(detections: Sequence[dict]) -> int:
    return sum(len(found["scores"]) for found in detections)


def _exported(
    engine: str, folder: Path, model: nn.Module, pictures: list, architecture: str
) -> list[dict]:
    """Write an engine's graph; the boxes that it finds on the pictures."""
    graph = folder / "model.onnx"
    try:
        if not graph.exists():
            write_onnx(model, graph, _tensor(pictures[0]))
        if engine == "openvino":
            write_openvino(graph)
        return _run(Compiled(RUNNERS[engine](folder, "fp32", None)[0]), pictures)
    except Exception as error:  # whatever an exporter or a runtime raises
        reason = (str(error).strip() or repr(error)).splitlines()[0][:300]
        raise RuntimeError(
            f"{engine} cannot run {architecture}: {reason}. Leave {engine} out of "
            "engines"
        ) from error


def compare(
    expected: list[dict],
    found: list[dict],
    title: str = "different",
    allowed: int | None = None,
) -> dict:
    """The largest differences of two lists of detections, picture by picture.

    Some boxes may be there on one side alone: where two boxes overlap by just the
    threshold of a suppression, or a score lies on its limit, the last digit of a float
    decides.

    Args:
        expected, found: as a detector of torchvision returns them, or as
            `client.predict_remote` and `predict.predict_image` do.
        title: the error's first words.
        allowed: how many boxes may be on one side alone; one in a hundred by default.

    Returns:
        {"box_difference_px", "score_difference": the largest ones, "boxes_of_one_side":
        their number}.

    Raises:
        RuntimeError: a box moves by more than 0.05 px or a score by more than 1e-4, or
            too many boxes are there on one side alone.

    Example:
        >>> label, score = torch.tensor([1]), torch.tensor([0.5])
        >>> box = torch.tensor([[10.0, 20, 23, 33]])
        >>> one = {"boxes": box, "labels": label, "scores": score}
        >>> compare([one], [{**one, "boxes": box + 0.01}])["box_difference_px"]
        0.01
    """
    pixels = scores = 0.0
    allowed, alone = _count(expected) // 100 if allowed is None else allowed, 0
    pairs = zip(map(_as_tensors, expected), map(_as_tensors, found), strict=True)
    for index, (one, other) in enumerate(pairs):
        moved = (one["boxes"][:, None] - other["boxes"]).abs().amax(dim=2)
        moved[one["labels"][:, None] != other["labels"]] = torch.inf
        changed = (one["scores"][:, None] - other["scores"]).abs()
        # near ties may come in another order, so the place in it does not tell
        apart = moved / BOX_TOLERANCE + changed / SCORE_TOLERANCE
        alone += sum(apart.shape)
        for row in range(len(apart) if apart.numel() else 0):
            best = int(apart[row].argmin())
            px, score = float(moved[row, best]), float(changed[row, best])
            if px > 1 or apart[row, best] == torch.inf:
                continue  # no box near it: not moved, but another or none
            if not (px <= BOX_TOLERANCE and score <= SCORE_TOLERANCE):  # or NaN
                raise RuntimeError(
                    f"{title}, picture {index}: a box of label {one['labels'][row]} "
                    f"moves by {px:.6g} px and {score:.6g} of its score; at most "
                    f"{BOX_TOLERANCE} px and {SCORE_TOLERANCE} are taken"
                )
            apart[:, best] = torch.inf
            alone -= 2
            pixels, scores = max(pixels, px), max(scores, score)
        if alone > allowed:
            raise RuntimeError(
                f"{title}, picture {index}: {len(other['scores'])} boxes instead of "
                f"{len(one['scores'])}; up to here {alone} are on one side alone, at "
                f"most {allowed} are taken"
            )
    measured = {"box_difference_px": round(pixels, 6), "score_difference": scores}
    return {**measured, "boxes_of_one_side": alone}


def _as_tensors(found: dict) -> dict[str, torch.Tensor]:
    boxes = found["boxes"] if "boxes" in found else found["boxes_xyxy"]
    columns = {"boxes": boxes, "labels": found["labels"], "scores": found["scores"]}
    # arrays of gRPC cannot be written to, which torch warns of unless they are copied
    return {
        name: column if isinstance(column, torch.Tensor) else torch.tensor(column)
        for name, column in columns.items()
    }


def _check_replaceable(out: Path) -> None:
    """FileExistsError if writing there would remove what is no artefact."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        read_artefact(out)
        return
    raise FileExistsError(f"{out} holds something that is no artefact: choose another")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `out` if the block raises nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True
    ) as parent:
        new, old = Path(parent, "new"), Path(parent, "old")
        new.mkdir()
        yield new
        if out.exists():
            out.replace(old)
        new.replace(out)


def read_tiles(folder: str | Path) -> list[np.ndarray]:
    """At most 8 pictures, evenly over a folder's sorted names: uint8 (H, W, 3).

    Args:
        folder: of pictures, or of tiles with their `tiles.json`, where the pictures
            are those of "val".

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (96, 64)).save(f"{folder}/1.png")
        ...     [tile.shape for tile in read_tiles(folder)]
        [(64, 96, 3)]
    """
    if Path(folder, NAME).is_file():
        folder = read_tile_set(folder).split("val")[0]
    kinds = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
    paths = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in kinds)
    if not paths:
        raise FileNotFoundError(f"no pictures in {folder}")
    most = min(8, len(paths))
    chosen = [paths[i * len(paths) // most] for i in range(most)]
    return [np.array(Image.open(path).convert("RGB")) for path in chosen]


def main() -> None:
    parser = argparse.ArgumentParser("kserve_utils.artefact")
    add = parser.add_argument
    add("--stripped-ckpt", required=True, help="of strip_checkpoint")
    add("--out-dir", required=True, help="the artefact's folder")
    add("--tiles-dir", required=True, help="tiles, or pictures, for the parity check")
    add("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    add("--model-name", default="xview-fasterrcnn")
    options = vars(parser.parse_args())
    try:
        tiles = read_tiles(options.pop("tiles_dir"))
        out = write_artefact(**options, tiles=tiles)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {out}")
    for engine, measured in read_artefact(out)["parity"].items():
        print(f"  {engine}: {', '.join(f'{k} {v}' for k, v in measured.items())}")


if __name__ == "__main__":
    main()
