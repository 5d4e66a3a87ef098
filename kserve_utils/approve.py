"""Measure what bf16 or fp16 costs on your own tiles, and let an artefact be served so.

    python -m kserve_utils.approve --artefact artefact \\
        --engine openvino --tiles tiles

Copy: this file and engines.py. (And e2e_utils.)

bf16 keeps 8 bits of a number's 24, fp16 (`--precision fp16`, for torch on a GPU that
has no bf16) 11 of them, but a smaller range. A detector usually loses nothing that its
score shows, but only its own weights and pictures can tell, so `load_engine` takes
either only after this compared AP with that of fp32 on labelled tiles.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import nn

from e2e_utils.data import CocoTiles, eval_loader
from e2e_utils.evaluate import coco_metrics, detect
from e2e_utils.files import write_file
from e2e_utils.hardware import PRECISIONS
from e2e_utils.tile_set import read_tile_set

from .engines import load_engine, read_artefact

LOWER = [name for name, dtype in PRECISIONS.items() if dtype]
MAX_DROP = 0.005


def approve_precision(
    artefact_dir: str | Path,
    engine: str,
    json_path: str | Path,
    image_dir: str | Path,
    max_drop: float = MAX_DROP,
    *,
    precision: str = "bf16",
    device: str | None = None,
) -> dict:
    """Compare AP in fp32 and a lower precision; write the outcome into detector.json.

    Args:
        artefact_dir: written by `artefact.write_artefact`; detector.json is replaced.
        engine: "openvino" or "torch", which compute in bf16 on a CPU that has it, and
            "torch" on a GPU.
        json_path, image_dir: labelled tiles that the detector was not trained on.
        max_drop: of AP (0..1, the mean over IoU 0.50:0.95, at most 500 detections a
            tile and class) that is accepted. Half a point by default.
        precision: "bf16" or "fp16".
        device: for the engine.

    Returns:
        {"approved": bool, "AP_fp32", "AP_bf16" (or "AP_fp16"), "drop", "max_drop",
        "tiles": their number, "device": where it was measured}, as it stands in
        detector.json under the precision and the engine. An engine that was not
        approved is refused by `load_engine`, also if it once was.

    Raises:
        ValueError: as `load_engine`; the classes of the tiles are not the detector's;
            or the detector finds so little that AP is 0 and tells nothing.
        RuntimeError: this device or engine has no such precision.
    """
    if precision not in LOWER:
        valid = ", ".join(LOWER)
        raise ValueError(f"no lower precision {precision!r}; valid: {valid}")
    folder = Path(artefact_dir)
    # first, because it refuses a device without units before anything is measured
    lower, meta = load_engine(
        folder, engine, precision, device=device, approved_only=False
    )
    tiles = CocoTiles(image_dir, json_path)
    if tiles.class_names != meta["class_names"]:
        raise ValueError(
            f"{json_path} has {len(tiles.class_names) - 1} categories that are not the "
            f"{len(meta['class_names']) - 1} classes of {folder}"
        )
    ap = _ap(lower, tiles)
    full = _ap(load_engine(folder, engine, device=device)[0], tiles)
    if not full or ap is None:  # without labels both are None
        raise ValueError(
            f"AP of {folder} on {json_path} is {full}: it tells nothing of "
            f"{precision}; take tiles with labels on which the detector finds something"
        )
    outcome = {"approved": full - ap <= max_drop, "AP_fp32": full}
    outcome |= {f"AP_{precision}": ap, "drop": full - ap, "max_drop": max_drop}
    outcome |= {"tiles": len(tiles), "device": meta["device"]}
    description = read_artefact(folder)
    description.setdefault(precision, {})[engine] = outcome
    text = json.dumps(description, indent=2) + "\n"
    write_file(folder / "detector.json", [text.encode()])
    return outcome


def approve_or_say_why_not(
    artefact_dir: str | Path,
    engine: str,
    json_path: str | Path,
    image_dir: str | Path,
    *,
    most_tiles: int,
    device: str | None = None,
) -> dict:
    """`approve_precision` of bf16, for a notebook that goes on without it.

    Args:
        artefact_dir, engine, json_path, image_dir, device: see `approve_precision`.
        most_tiles: that are measured; more would take long.

    Returns:
        What `approve_precision` returns; {}, and a printed line says why, where there
        are more tiles, no units for bf16, or a detector that finds nothing.
    """
    count = len(json.loads(Path(json_path).read_text())["images"])
    try:
        if count <= most_tiles:
            labelled = json_path, image_dir
            return approve_precision(artefact_dir, engine, *labelled, device=device)
        print(f"not measured: {count} tiles take long, and {most_tiles} are allowed")
    except (RuntimeError, ValueError) as error:
        print(f"not measured: {error}")
    return {}


def _ap(detector: nn.Module, tiles: CocoTiles) -> float | None:
    """AP, 0..1; None where nothing is labelled."""
    device, ids = next(detector.parameters()).device, tiles.category_ids
    found = detect(detector, eval_loader(tiles), device, category_ids=ids)
    return coco_metrics(tiles.coco, found)["AP"]


def main() -> None:
    parser = argparse.ArgumentParser("kserve_utils.approve")
    add = parser.add_argument
    add("--artefact", dest="artefact_dir", required=True, help="of write_artefact")
    add("--engine", default="openvino", choices=("openvino", "torch"))
    add("--tiles", required=True, help='folder of tiles.json; its "val" is measured')
    add("--max-drop", type=float, default=MAX_DROP, help="of AP, 0..1")
    add("--precision", default="bf16", choices=LOWER)
    add("--device", help="cpu, cuda or cuda:N; of torch, a GPU if any")
    args = parser.parse_args()
    options = vars(args)
    try:
        images, labels = read_tile_set(options.pop("tiles")).split("val")
        outcome = approve_precision(**options, json_path=labels, image_dir=images)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    word = "approved" if outcome["approved"] else "not approved"
    print(
        f"{args.precision} is {word} for {args.engine} on {outcome['device']}: "
        f"AP {outcome['AP_fp32']:.4f} in fp32, {outcome[f'AP_{args.precision}']:.4f} "
        f"in {args.precision}, on {outcome['tiles']} tiles"
    )
    raise SystemExit(not outcome["approved"])


if __name__ == "__main__":
    main()
