"""Measure what bf16 costs on your own tiles, and let an artefact be served so.

    python -m kserve_utils.predictor.approve_bf16 --artefact artefact \\
        --engine openvino --json tiles/val_300_02.json --images tiles/val_images_300_02

bf16 keeps 8 bits of a number's 24. A detector usually loses nothing that its score
shows, but only its own weights and pictures can tell, so `load_engine` takes bf16 only
after this compared AP in both precisions on labelled tiles.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from e2e_utils.data import CocoTiles, eval_loader
from e2e_utils.engines import load_engine, read_artefact
from e2e_utils.evaluate import coco_metrics, detect


def approve_bf16(
    artefact_dir: str | Path,
    engine: str,
    json_path: str | Path,
    image_dir: str | Path,
    max_drop: float = 0.005,
    *,
    threads: int | None = None,
    emulate: bool = False,
) -> dict:
    """Compare AP in fp32 and bf16 and write the outcome into detector.json.

    Args:
        artefact_dir: written by `engines.write_artefact`; detector.json is replaced.
        engine: "openvino" or "torch", which compute in bf16 on a CPU that has it.
        json_path, image_dir: labelled tiles that the detector was not trained on.
        max_drop: of AP (0..1, the mean over IoU 0.50:0.95, at most 500 detections a
            tile and class) that is accepted. Half a point by default.
        threads: for the engine.
        emulate: let "torch" emulate bf16 where the CPU has none; for tests.

    Returns:
        {"approved": bool, "AP_fp32", "AP_bf16", "drop", "max_drop", "tiles": their
        number}, as it stands in detector.json under "bf16" and the engine. An engine
        that was not approved is refused by `load_engine`, also if it once was.

    Raises:
        ValueError: as `load_engine`; the classes of the tiles are not the detector's;
            or the detector finds so little that AP is 0 and tells nothing.
        RuntimeError: this CPU or engine has no bf16.
    """
    folder = Path(artefact_dir)
    # first, because it refuses a CPU without bf16 before anything is measured
    loaded, meta = load_engine(
        folder, engine, "bf16", threads, approved_only=False, emulate=emulate
    )
    tiles = CocoTiles(image_dir, json_path)
    if tiles.class_names != meta["class_names"]:
        raise ValueError(
            f"{json_path} has {len(tiles.class_names) - 1} categories that are not the "
            f"{len(meta['class_names']) - 1} classes of {folder}"
        )
    figures = {}
    for precision in ("bf16", "fp32"):
        if precision == "fp32":
            loaded, _ = load_engine(folder, engine, "fp32", threads)
        found = detect(loaded, eval_loader(tiles), category_ids=tiles.category_ids)
        figures[precision] = coco_metrics(tiles.coco, found)["AP"]
    if not figures["fp32"]:
        raise ValueError(
            f"AP of {folder} on {json_path} is {figures['fp32']}: it tells nothing of "
            "bf16; take tiles with labels, on which the detector finds something"
        )
    drop = figures["fp32"] - figures["bf16"]
    outcome = {
        "approved": drop <= max_drop,
        "AP_fp32": figures["fp32"],
        "AP_bf16": figures["bf16"],
        "drop": drop,
        "max_drop": max_drop,
        "tiles": len(tiles),
    }
    _record(folder, engine, outcome)
    return outcome


def _record(folder: Path, engine: str, outcome: dict) -> None:
    description = read_artefact(folder)
    description.setdefault("bf16", {})[engine] = outcome
    handle, beside = tempfile.mkstemp(prefix=".detector-", dir=folder)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(description, indent=2) + "\n")
        os.chmod(beside, 0o644)  # a server runs as another user
        os.replace(beside, folder / "detector.json")
    finally:
        Path(beside).unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser("kserve_utils.predictor.approve_bf16")
    parser.add_argument("--artefact", required=True, help="folder of write_artefact")
    parser.add_argument("--engine", default="openvino", choices=("openvino", "torch"))
    parser.add_argument("--json", required=True, help="COCO file of labelled tiles")
    parser.add_argument("--images", required=True, help="folder of the tiles")
    parser.add_argument("--max-drop", type=float, default=0.005, help="of AP, 0..1")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    try:
        outcome = approve_bf16(
            args.artefact,
            args.engine,
            args.json,
            args.images,
            args.max_drop,
            threads=args.threads,
        )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    word = "approved" if outcome["approved"] else "not approved"
    print(
        f"bf16 is {word} for {args.engine}: AP {outcome['AP_fp32']:.4f} in fp32, "
        f"{outcome['AP_bf16']:.4f} in bf16, on {outcome['tiles']} tiles"
    )
    raise SystemExit(0 if outcome["approved"] else 1)


if __name__ == "__main__":
    main()
