"""Measure what bf16 or fp16 costs on your own tiles, and let an artefact be served so.

    python -m kserve_utils.approve --artefact artefact \\
        --engine openvino --json tiles/val_300_02.json --images tiles/val_images_300_02

bf16 keeps 8 bits of a number's 24, fp16 (`--precision fp16`, for torch on a GPU that
has no bf16) 11 of them, but a smaller range. A detector usually loses nothing that its
score shows, but only its own weights and pictures can tell, so `load_engine` takes
either only after this compared AP with that of fp32 on labelled tiles.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from torch import nn

from e2e_utils.data import CocoTiles, eval_loader
from e2e_utils.evaluate import coco_metrics, detect
from e2e_utils.hardware import PRECISIONS

from .engines import load_engine, read_artefact

LOWER = [name for name, dtype in PRECISIONS.items() if dtype]

MAX_DROP = 0.005


def approve_bf16(
    artefact_dir: str | Path,
    engine: str,
    json_path: str | Path,
    image_dir: str | Path,
    max_drop: float = MAX_DROP,
    *,
    precision: str = "bf16",
    device: str | None = None,
    threads: int | None = None,
    emulate: bool = False,
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
        device, threads: for the engine.
        emulate: let "torch" emulate it where the device has no units; for tests.

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
    options: dict = {"approved_only": False, "emulate": emulate, "device": device}
    # first, because it refuses a device without units before anything is measured
    loaded, meta = load_engine(folder, engine, precision, threads, **options)
    tiles = CocoTiles(image_dir, json_path)
    if tiles.class_names != meta["class_names"]:
        raise ValueError(
            f"{json_path} has {len(tiles.class_names) - 1} categories that are not the "
            f"{len(meta['class_names']) - 1} classes of {folder}"
        )
    lower = _ap(loaded, tiles)
    loaded, _ = load_engine(folder, engine, "fp32", threads, device=device)
    full = _ap(loaded, tiles)
    if not full or lower is None:  # without labels both are None
        raise ValueError(
            f"AP of {folder} on {json_path} is {full}: it tells nothing of "
            f"{precision}; take tiles with labels on which the detector finds something"
        )
    drop = full - lower
    outcome = {
        "approved": drop <= max_drop,
        "AP_fp32": full,
        f"AP_{precision}": lower,
        "drop": drop,
        "max_drop": max_drop,
        "tiles": len(tiles),
        "device": meta["device"],
    }
    _record(folder, engine, precision, outcome)
    return outcome


def _ap(detector: nn.Module, tiles: CocoTiles) -> float | None:
    """AP, 0..1; None where nothing is labelled."""
    found = detect(
        detector,
        eval_loader(tiles),
        next(detector.parameters()).device,
        category_ids=tiles.category_ids,
    )
    return coco_metrics(tiles.coco, found)["AP"]


def _record(folder: Path, engine: str, precision: str, outcome: dict) -> None:
    description = read_artefact(folder)
    description.setdefault(precision, {})[engine] = outcome
    handle, beside = tempfile.mkstemp(prefix=".detector-", dir=folder)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(description, indent=2) + "\n")
        os.chmod(beside, 0o644)  # a server runs as another user
        os.replace(beside, folder / "detector.json")
    finally:
        Path(beside).unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser("kserve_utils.approve")
    parser.add_argument("--artefact", required=True, help="folder of write_artefact")
    parser.add_argument("--engine", default="openvino", choices=("openvino", "torch"))
    parser.add_argument("--json", required=True, help="COCO file of labelled tiles")
    parser.add_argument("--images", required=True, help="folder of the tiles")
    parser.add_argument("--max-drop", type=float, default=MAX_DROP, help="of AP, 0..1")
    parser.add_argument("--precision", default="bf16", choices=LOWER)
    parser.add_argument("--device", help="cpu, cuda or cuda:N; of torch, a GPU if any")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    try:
        outcome = approve_bf16(
            args.artefact,
            args.engine,
            args.json,
            args.images,
            args.max_drop,
            precision=args.precision,
            device=args.device,
            threads=args.threads,
        )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    word = "approved" if outcome["approved"] else "not approved"
    print(
        f"{args.precision} is {word} for {args.engine} on {outcome['device']}: "
        f"AP {outcome['AP_fp32']:.4f} in fp32, {outcome[f'AP_{args.precision}']:.4f} "
        f"in {args.precision}, on {outcome['tiles']} tiles"
    )
    raise SystemExit(0 if outcome["approved"] else 1)


if __name__ == "__main__":
    main()
