"""One artefact for every server: the checkpoint, its exports, and their parity.

    python -m kserve_utils.artefact --stripped-ckpt stripped.pth --out-dir artefact \\
        --tiles-dir tiles/val_images_300_02

Copy: this file, export.py, engines.py and graphs.py. (And e2e_utils.)

"torch" runs the checkpoint itself, "openvino" and "onnxruntime" a graph of it that is
exported once. An export can go wrong without an error, therefore an artefact is written
only after each engine gave the boxes of torch on your own tiles.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from .engines import (
    ENGINES,
    FILES,
    RUNNERS,
    Compiled,
    read_artefact,
    require_libraries,
    sha256,
)
from .export import MAX_PIXELS, read_stripped
from .graphs import write_onnx, write_openvino

BOX_TOLERANCE = 0.05  # pixels that a box may move between torch and another engine
SCORE_TOLERANCE = 1e-4


def write_artefact(
    stripped_ckpt: str | Path,
    out_dir: str | Path,
    engines: Sequence[str] = ENGINES,
    *,
    tiles: Sequence[np.ndarray] | None = None,
    model_name: str = "xview-fasterrcnn",
    score_threshold: float = 0.0,
    max_pixels: int = MAX_PIXELS,
) -> Path:
    """Write the folder from which every engine serves one detector.

    Args:
        stripped_ckpt: written by `export.strip_checkpoint`.
        out_dir: the folder; it appears whole or not at all, in place of an older
            artefact. A folder that holds something else is not touched.
        engines: those of `ENGINES` that the artefact is for. "torch" is always in.
        tiles: uint8 (H, W, 3), RGB, with objects and not trained on. On them, and on a
            crop of the first, each engine has to give the boxes of torch. None draws
            noise: enough for an untrained detector, too little to rely on.
        model_name: in the URL.
        score_threshold, max_pixels: as for `export.read_stripped`.

    Returns:
        `out_dir`. Inside: model.pth (the checkpoint), model.xml and model.bin
        (OpenVINO), model.onnx, and detector.json: what describes the weights, the
        limits, the engines with what parity measured, and the files' SHA-256.

    Raises:
        FileNotFoundError, ValueError: as `read_stripped`; or an argument is not valid.
        FileExistsError: `out_dir` holds something that is no artefact.
        ImportError: an engine's library is not installed.
        RuntimeError: an engine cannot run this architecture, or `compare` refuses it.
    """
    unknown = sorted(set(engines) - set(ENGINES))
    if unknown:
        raise ValueError(f"no engine {unknown}; valid: {', '.join(ENGINES)}")
    engines = [e for e in ENGINES if e == "torch" or e in engines]
    for engine in engines[1:]:
        require_libraries(engine, "onnx")
    out = Path(out_dir)
    _check_replaceable(out)
    model, description = read_stripped(stripped_ckpt, score_threshold, max_pixels)
    description |= {"model_name": model_name, "engines": engines}
    pictures = _pictures(tiles, description["tile_size"])
    expected = _run(model, pictures)
    if not _count(expected):
        raise ValueError(
            f"{stripped_ckpt} finds no box on {len(tiles or [])} tiles (noise is drawn "
            "if there are none), so that parity cannot be checked: pass tiles that "
            "show objects"
        )
    empty = np.zeros_like(pictures[0])
    if not _count(on_empty := _run(model, [empty])):  # nor may others find some there
        pictures, expected = [*pictures, empty], expected + on_empty
    with _new_folder(out) as folder:
        shutil.copyfile(stripped_ckpt, folder / "model.pth")
        _write_graphs(folder, model, description, pictures[0])
        parity: dict = {"torch": {"pictures": "noise" if tiles is None else "tiles"}}
        parity["torch"] |= {"checked": len(pictures), "boxes": _count(expected)}
        for engine in engines[1:]:
            parity[engine] = _measure(folder, engine, description, pictures, expected)
        names = [name for engine in engines for name in FILES[engine]]
        files = {name: sha256(folder / name) for name in names}
        text = json.dumps({**description, "parity": parity, "files": files}, indent=2)
        (folder / "detector.json").write_text(text + "\n")
    return out


def _pictures(tiles: Sequence[np.ndarray] | None, side: int) -> list[np.ndarray]:
    """What parity is checked on: the tiles, or noise; one of another size is last."""
    if tiles is None:
        draw, pictures = torch.Generator().manual_seed(0), []
        for size in ((side, side), (side - 37, side)):
            coarse = torch.rand(1, 3, 20, 20, generator=draw)
            soft = nn.functional.interpolate(coarse, size, mode="bilinear")[0]
            pictures.append((soft * 255).byte().permute(1, 2, 0).contiguous().numpy())
        return pictures
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


def _count(detections: Sequence[dict]) -> int:
    return sum(len(found["scores"]) for found in detections)


def _write_graphs(
    folder: Path, model: nn.Module, description: dict, picture: np.ndarray
) -> None:
    """The graphs that the engines of the description run."""
    graph, engines = folder / "model.onnx", description["engines"]
    if len(engines) > 1:
        with _explained(", ".join(engines[1:]), description):
            write_onnx(model, graph, _tensor(picture))
    if "openvino" in engines:
        with _explained("openvino", description):
            write_openvino(graph)
    if "onnxruntime" not in engines:
        graph.unlink(missing_ok=True)


def _measure(
    folder: Path, engine: str, description: dict, pictures: list, expected: list
) -> dict:
    """What an engine's boxes differ by from those of torch, which are `expected`."""
    with _explained(engine, description):
        module = Compiled(RUNNERS[engine](folder, "fp32", None)[0])
        found = _run(module, pictures)
    title = f"{engine} differs from torch on {description['architecture']}"
    return compare(expected, found, title)


@contextmanager
def _explained(engine: str, description: dict) -> Iterator[None]:
    """Whatever an exporter or a runtime raises on a graph, as a RuntimeError."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise RuntimeError(
            f"{engine} cannot run {description['architecture']}: {reason}. Leave "
            f"{engine} out of engines"
        ) from error


def compare(expected: list[dict], found: list[dict], title: str = "different") -> dict:
    """The largest differences of two lists of detections, picture by picture.

    One box in a hundred may be there on one side alone: where two boxes overlap by just
    the threshold of a suppression, or a score lies on its limit, the last digit of a
    float decides.

    Args:
        expected, found: as a detector of torchvision returns them.
        title: the error's first words.

    Raises:
        RuntimeError: a box moves by more than 0.05 px or a score by more than 1e-4, or
            too many boxes are there on one side alone.
    """
    pixels = scores = 0.0
    allowed, alone = _count(expected) // 100, 0
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        counts = len(one["scores"]), len(other["scores"])
        free = torch.ones(counts[1], dtype=torch.bool)
        problem = f"{counts[1]} boxes instead of {counts[0]}"
        for row in range(counts[0]):
            best, moved, changed = _nearest(one, row, other, free)
            if moved <= BOX_TOLERANCE and changed <= SCORE_TOLERANCE:
                free[best] = False
                pixels, scores = max(pixels, moved), max(scores, changed)
                continue
            near = not moved > 1  # so put that a NaN is refused
            if near or counts[0] == counts[1]:
                problem = (
                    f"a box of label {one['labels'][row]} moves by {moved:.3g} px and "
                    f"{changed:.2g} of its score; at most {BOX_TOLERANCE} px and "
                    f"{SCORE_TOLERANCE} are taken"
                )
            if near:
                raise RuntimeError(f"{title}, picture {index}: {problem}")
            alone += 1  # no box near it: not moved, but another or none
        alone += int(free.sum())
        if alone > allowed:
            raise RuntimeError(f"{title}, picture {index}: {problem}")
    measured = {"box_difference_px": round(pixels, 6), "score_difference": scores}
    return {**measured, "boxes_of_one_side": alone}


def _nearest(
    one: dict, row: int, other: dict, free: torch.Tensor
) -> tuple[int, float, float]:
    """The free box of another engine that differs least: (index, by px, by score).

    Near ties may come in another order of scores, so the place in it does not tell.
    """
    if not len(free):
        return 0, torch.inf, torch.inf
    moved = (other["boxes"] - one["boxes"][row]).abs().amax(dim=1)
    moved[~free | (other["labels"] != one["labels"][row])] = torch.inf
    changed = (other["scores"] - one["scores"][row]).abs()
    best = int((moved / BOX_TOLERANCE + changed / SCORE_TOLERANCE).argmin())
    return best, float(moved[best]), float(changed[best])


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
            os.replace(out, old)
        try:
            os.replace(new, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise


def read_tiles(folder: str | Path, most: int = 8) -> list[np.ndarray]:
    """Some pictures of a folder, evenly over its sorted names: uint8 (H, W, 3)."""
    kinds = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
    paths = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in kinds)
    if not paths:
        raise FileNotFoundError(f"no pictures in {folder}")
    most = min(most, len(paths))
    chosen = [paths[i * len(paths) // most] for i in range(most)]
    return [np.array(Image.open(path).convert("RGB")) for path in chosen]


def main() -> None:
    parser = argparse.ArgumentParser("kserve_utils.artefact")
    add = parser.add_argument
    add("--stripped-ckpt", required=True, help="of strip_checkpoint")
    add("--out-dir", required=True, help="the artefact's folder")
    add("--tiles-dir", help="pictures for the parity check")
    add("--tiles", type=int, default=8, help="how many of them")
    add("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    add("--model-name", default="xview-fasterrcnn")
    add("--score-threshold", type=float, default=0.0)
    add("--max-pixels", type=int, default=MAX_PIXELS)
    options = vars(parser.parse_args())
    folder, most = options.pop("tiles_dir"), options.pop("tiles")
    try:
        tiles = read_tiles(folder, most) if folder else None
        out = write_artefact(**options, tiles=tiles)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {out}")
    for engine, measured in read_artefact(out)["parity"].items():
        print(f"  {engine}: {', '.join(f'{k} {v}' for k, v in measured.items())}")


if __name__ == "__main__":
    main()
