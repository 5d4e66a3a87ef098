"""Sliced inference of a scene against SAHI's get_sliced_prediction (NMS on IoU).

    python benchmarks/predict.py            # a scene of 4,000 px: some minutes
    python benchmarks/predict.py --quick    # 1,600 px: about a minute
    python benchmarks/predict.py --checkpoint runs/demo/training/best.pt

Both sides get the same model, tiles and thresholds, in turns in one process, after a
first small scene that is not counted; the cheapest run of each counts. SAHI runs its
tiles one by one whatever its batch size, and keeps parts at tile borders, so ours runs
with border=0 and every box is compared. CPU is user plus system time of the process.
With a GPU the wall time there is measured as well.

A second claim is memory: a tiled, compressed TIFF of 20,000 px (--quick: 6,000) is
predicted in a process of its own, and what its peak is above that of a small scene is
held against the decoded scene. Linux alone tells it.

Without --checkpoint the detector is untrained: its class scores are spread until it
finds some boxes on a tile. The scene is noise with the texture of imagery.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from sahi import AutoDetectionModel
from sahi.predict import get_sliced_prediction

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.models import build_model
from e2e_utils.predict import predict_scene

SIZE, OVERLAP, SCORE, IOU = 300, 0.2, 0.05, 0.5


def make_scene(side: int) -> np.ndarray:
    """uint8 (side, side, 3) with texture from 256 px down to single pixels."""
    rng = np.random.default_rng(1)
    pixels = np.full((side, side, 3), 110, np.float32)
    for cell, strength in ((256, 40), (32, 25), (6, 14), (1, 4)):
        noise = rng.normal(0, strength, (side // cell + 1, side // cell + 1, 3))
        pixels += cv2.resize(noise.astype(np.float32), (side, side))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def make_model(name: str, checkpoint: str | None) -> torch.nn.Module:
    if checkpoint:
        return model_from_checkpoint(checkpoint)[0]
    torch.manual_seed(0)
    settings = {} if name == "fasterrcnn_small" else {"min_size": 300, "max_size": 300}
    model = build_model(name, 61, **settings).eval()
    if not hasattr(model, "roi_heads"):
        sys.exit(f"{name}: untrained, only Faster R-CNNs find boxes; give --checkpoint")
    model.roi_heads.box_predictor.cls_score.weight.data.mul_(20)
    model.roi_heads.box_predictor.cls_score.bias.data[0] = 24  # few are no background
    return model


def theirs(model: torch.nn.Module, scene: np.ndarray, device: str) -> np.ndarray:
    """SAHI's boxes, float64 (N, 6): xyxy, label, score."""
    wrapped = AutoDetectionModel.from_pretrained(
        "torchvision",
        model=model,
        category_mapping={str(i): str(i) for i in range(1000)},
        confidence_threshold=SCORE,
        device=device,
    )
    found = get_sliced_prediction(
        scene,
        wrapped,
        slice_height=SIZE,
        slice_width=SIZE,
        overlap_height_ratio=OVERLAP,
        overlap_width_ratio=OVERLAP,
        perform_standard_pred=False,
        postprocess_type="NMS",
        postprocess_match_metric="IOU",
        postprocess_match_threshold=IOU,
        verbose=0,
    ).object_prediction_list
    rows = [[*b.bbox.to_xyxy(), b.category.id, b.score.value] for b in found]
    return np.array(rows, np.float64).reshape(-1, 6)


def ours(model: torch.nn.Module, scene: np.ndarray, batch_size: int) -> np.ndarray:
    found = predict_scene(model, scene, SIZE, OVERLAP, batch_size, SCORE, IOU, border=0)
    columns = (found[key] for key in ("boxes_xyxy", "labels", "scores"))
    return np.column_stack([*columns]).astype(np.float64)


def matched(one: np.ndarray, other: np.ndarray) -> float:
    """Share of boxes that the other side has too: class, 0.1 px, 0.01 of the score."""
    if len(one) == len(other) == 0:
        return 1.0
    scale = np.array([0.1, 0.1, 0.1, 0.1, 0.5, 0.01])
    near, far = sorted((one, other), key=len)
    hits = sum(
        bool((np.abs(near - row) < scale).all(axis=1).any()) if len(near) else False
        for row in far
    )
    return hits / len(far)


def measure(sides: dict, runs: int) -> tuple[dict, dict]:
    """The cheapest CPU and wall seconds of each side in turns, and what it found."""
    cost = {name: {"cpu": np.inf, "wall": np.inf} for name in sides}
    found = {}
    for _ in range(runs):
        for name, work in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            found[name] = work()
            spent = {
                "cpu": time.process_time() - cpu,
                "wall": time.perf_counter() - wall,
            }
            cost[name] = {key: min(cost[name][key], spent[key]) for key in spent}
            print(f"  {name:<5} {spent['cpu']:7.2f} s CPU {spent['wall']:7.2f} s wall")
    return cost, found


def devices(wanted: str | None) -> list[tuple[str, str]]:
    """(device, the machine in words), the CPU first; of one kind if it is wanted."""
    host = f"{os.cpu_count()} x {platform.machine()}, {torch.get_num_threads()} "
    host += f"thread(s), torch {torch.__version__}"
    here = [("cpu", host)]
    if torch.cuda.is_available():
        here.append(("cuda:0", f"{torch.cuda.get_device_name()}, {host}"))
    chosen = [row for row in here if row[0].startswith(wanted or "")]
    if not chosen:
        sys.exit(f"error: torch {torch.__version__} finds no GPU here")
    return chosen


def claims_on(
    device: str, machine: str, scene: np.ndarray, arguments: argparse.Namespace
) -> list[dict]:
    """Both sides on one device, side by side."""
    model = make_model(arguments.model, arguments.checkpoint).to(device)
    batch_size = arguments.batch_size or (4 if device == "cpu" else 32)
    what = f"{arguments.checkpoint or arguments.model}, scene of {len(scene)} px"
    print(f"{what}, {batch_size} tiles a pass, on {machine}")
    theirs(model, scene[:700, :700], device)  # the first run of each: not counted
    ours(model, scene[:700, :700], batch_size)
    sides = {
        "SAHI": lambda: theirs(model, scene, device),
        "ours": lambda: ours(model, scene, batch_size),
    }
    cost, found = measure(sides, arguments.runs)
    share = matched(found["SAHI"], found["ours"])
    counts = {name: len(boxes) for name, boxes in found.items()}
    print(f"  boxes {counts}, {share:.4%} the same")
    return [
        {
            "claim": f"sliced inference, {len(scene):,} px, on the {device[:4]}: SAHI",
            "unit": "CPU s" if kind == "cpu" else "s",
            "ours": round(cost["ours"][kind], 4),
            "peer": round(cost["SAHI"][kind], 4),
            "ratio": round(cost["SAHI"][kind] / cost["ours"][kind], 3),
            # other batches, other kernels: on a GPU a score may cross the threshold
            "equal": share == 1.0 if device == "cpu" else share > 0.99,
            "machine": machine,
        }
        for kind in (["cpu", "wall"] if device == "cpu" else ["wall"])
    ]


def write_large(path: Path, side: int) -> None:
    """A tiled, compressed TIFF of side x side px, block by block."""
    import rasterio  # not needed on a GPU

    size = {"width": side, "height": side, "count": 3, "dtype": "uint8"}
    tiles = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
    block = make_scene(1024).transpose(2, 0, 1)
    with rasterio.open(path, "w", driver="GTiff", **size, **tiles) as file:
        for y in range(0, side, 1024):
            for x in range(0, side, 1024):
                height, width = min(1024, side - y), min(1024, side - x)
                window = ((y, y + height), (x, x + width))
                file.write(block[:, :height, :width], window=window)


def print_peak(path: str, arguments: argparse.Namespace) -> None:
    """In a process of its own: MB of the scene's prediction above a small one's."""

    def peak() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6

    model = make_model(arguments.model, arguments.checkpoint)
    predict_scene(model, make_scene(1024), SIZE, OVERLAP, score_threshold=SCORE)
    before = peak()
    predict_scene(model, path, SIZE, OVERLAP, score_threshold=SCORE)
    print(peak() - before)


def claim_memory(side: int, arguments: argparse.Namespace) -> dict:
    """Peak memory of predicting a large file, against the decoded scene."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "scene.tif")
        write_large(path, side)
        line = [sys.executable, __file__, "--peak-of", str(path)]
        line += ["--model", arguments.model]
        if arguments.checkpoint:
            line += ["--checkpoint", arguments.checkpoint]
        done = subprocess.run(line, capture_output=True, text=True, timeout=3600)
        if done.returncode:
            sys.exit(f"the memory of {path} failed:\n{done.stderr[-3000:]}")
    ours, whole = float(done.stdout.split()[-1]), side * side * 3 / 1e6
    return {
        "claim": f"memory of a tiled TIFF, {side:,} px: decoded whole",
        "unit": "MB",
        "ours": round(ours),
        "peer": round(whole),
        "ratio": round(whole / max(ours, 1), 3),
        "equal": ours < 1000,
        "machine": f"{os.cpu_count()} x {platform.machine()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a scene of 1,600 px")
    parser.add_argument("--json", metavar="FILE", help="write the claims as JSON")
    parser.add_argument("--model", default="fasterrcnn_small")
    parser.add_argument("--checkpoint", help="a trained detector instead of --model")
    parser.add_argument("--batch-size", type=int, help="tiles a pass of ours")
    parser.add_argument("--runs", type=int, default=2, help="of each side, in turns")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="this alone, not both"
    )
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        return print_peak(arguments.peak_of, arguments)
    scene = make_scene(1600 if arguments.quick else 4000)
    claims = []
    for device, machine in devices(arguments.device):
        claims += claims_on(device, machine, scene, arguments)
    if arguments.device != "cuda" and Path("/proc/self/status").exists():
        claims.append(claim_memory(6000 if arguments.quick else 20_000, arguments))
    print(f"\n{'claim':<46}{'unit':>6}{'ours':>8}{'peer':>9}{'ratio':>8}  equal")
    for row in claims:
        numbers = f"{row['ours']:>8.2f}{row['peer']:>9.2f}{row['ratio']:>8.2f}"
        same = "yes" if row["equal"] else "NO"
        print(f"{row['claim']:<46}{row['unit']:>6}{numbers}  {same}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(claims, indent=2) + "\n")
    if not all(row["equal"] for row in claims):
        sys.exit("the two sides differ")


if __name__ == "__main__":
    main()
