"""Evaluation against pycocotools, and against torchmetrics where it is installed.

    python benchmarks/evaluate.py           # 2,000 tiles, some minutes
    python benchmarks/evaluate.py --quick   # 300 tiles, about half a minute
    python benchmarks/evaluate.py --xview xView1_baseline  # a checkout of
        # https://github.com/DIUx-xView/xView1_baseline: its score.py as a peer, too

Each tile has 50 objects of 60 classes and 100 detections: jittered objects, some of a
wrong class, and random boxes. All sides get the same lists of boxes and the caps
(1, 100, 500). CPU is user plus system time of the evaluation without imports, of the
cheapest of three runs, which the sides make by turns. torchmetrics gives no figures
of single classes here, and is no requirement of the package.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from e2e_utils.evaluate import coco_metrics
from e2e_utils.xview_score import XVIEW_TYPE_IDS, xview_score

TILES, OBJECTS, DETECTIONS, CLASSES, SIZE = 2_000, 50, 100, 60, 300
MAX_DETS = (1, 100, 500)


def draw(tiles: int) -> tuple[dict, list[dict]]:
    """Ground truth and detections; all numbers are exact in float32, no score twice."""
    rng = np.random.default_rng(0)

    def boxes(count: int) -> np.ndarray:
        side = np.exp(rng.normal(3, 0.6, (tiles, count, 2))).clip(4, 200)
        corner = rng.uniform(0, SIZE - side)
        return np.concatenate([corner, side], axis=2)

    truth = np.round(boxes(OBJECTS) * 8) / 8
    category = rng.integers(0, CLASSES, (tiles, OBJECTS))
    copies = np.concatenate([truth, truth[:, : DETECTIONS - OBJECTS - 20]], axis=1)
    jitter = rng.normal(0, 0.1, copies.shape) * np.tile(copies[:, :, 2:], 2)
    copies = copies + jitter
    found = np.concatenate([copies, boxes(DETECTIONS - copies.shape[1])], axis=1)
    found[:, :, :2] = found[:, :, :2].clip(0)  # score.py takes no negative numbers
    found = np.round(found * 8).clip([0, 0, 8, 8]) / 8
    label = rng.integers(0, CLASSES, (tiles, DETECTIONS))
    known = np.concatenate([category, category[:, : copies.shape[1] - OBJECTS]], axis=1)
    right = rng.random(known.shape) < 0.8
    label[:, : known.shape[1]][right] = known[right]
    score = (rng.permutation(tiles * DETECTIONS) + 1) / 2**18
    annotations = [
        {"image_id": i // OBJECTS + 1, "category_id": c, "bbox": b, "id": i + 1}
        | {"area": b[2] * b[3], "iscrowd": 0}
        for i, (c, b) in enumerate(
            zip(category.ravel().tolist(), truth.reshape(-1, 4).tolist(), strict=True)
        )
    ]
    rows = zip(
        label.ravel().tolist(),
        found.reshape(-1, 4).tolist(),
        score.tolist(),
        strict=True,
    )
    detections = [
        {"image_id": i // DETECTIONS + 1, "category_id": c, "bbox": b, "score": s}
        for i, (c, b, s) in enumerate(rows)
    ]
    images = [{"id": i, "width": SIZE, "height": SIZE} for i in range(1, tiles + 1)]
    categories = [{"id": i, "name": str(i)} for i in range(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return content, detections


def ours(truth: dict, found: list[dict]) -> Callable[[], dict]:
    return lambda: coco_metrics(truth, found, MAX_DETS, tables=True)


def pycocotools(truth: dict, found: list[dict]) -> Callable[[], dict]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = copy.deepcopy((truth, found))  # it writes into its input

    def work() -> dict:
        with contextlib.redirect_stdout(io.StringIO()):
            reference = COCO()
            reference.dataset = truth
            reference.createIndex()
            run = COCOeval(reference, reference.loadRes(found), "bbox")
            run.params.maxDets = list(MAX_DETS)
            run.evaluate()
            run.accumulate()
        precision, recall = run.eval["precision"][..., -1], run.eval["recall"]

        def mean(values: np.ndarray) -> float | None:
            return float(values[values > -1].mean()) if (values > -1).any() else None

        figures = {"AP": mean(precision[:, :, :, 0])}
        figures |= {"AP50": mean(precision[0, ..., 0])}
        figures |= {"AP75": mean(precision[5, ..., 0])}
        for i, area in enumerate(("small", "medium", "large"), start=1):
            figures[f"AP_{area}"] = mean(precision[..., i])
        for i, cap in enumerate(MAX_DETS):
            figures[f"AR_{cap}"] = mean(recall[:, :, 0, i])
        each = [mean(precision[0, :, i, 0]) for i in range(CLASSES)]
        per_class = {str(i): ap for i, ap in enumerate(each) if ap is not None}
        return figures | {"per_class": per_class}

    return work


def torchmetrics(truth: dict, found: list[dict]) -> Callable[[], dict] | None:
    try:
        from torchmetrics.detection import MeanAveragePrecision
    except ModuleNotFoundError as error:
        print(f"torchmetrics is left out: {error}", file=sys.stderr)
        return None
    import torch

    def by_image(rows: list[dict]) -> list[dict]:
        table: list[list] = [[] for _ in truth["images"]]
        for row in rows:
            table[row["image_id"] - 1].append(row)
        return [
            {
                "boxes": torch.tensor([r["bbox"] for r in part]).reshape(-1, 4),
                "labels": torch.tensor([r["category_id"] for r in part]),
                "scores": torch.tensor([r.get("score", 0) for r in part]),
            }
            for part in table
        ]

    objects, detections = by_image(truth["annotations"]), by_image(found)

    def work() -> dict:
        metric = MeanAveragePrecision(
            "xywh",
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),  # else in float32
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            max_detection_thresholds=list(MAX_DETS),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            metric.update(detections, objects)
            figures = {k: v.tolist() for k, v in metric.compute().items()}
        names = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}
        names |= {f"AP_{a}": f"map_{a}" for a in ("small", "medium", "large")}
        names |= {f"AR_{cap}": f"mar_{cap}" for cap in MAX_DETS}
        return {key: figures[name] for key, name in names.items()}

    return work


def our_xview(truth: dict, found: list[dict]) -> Callable[[], dict]:
    return lambda: xview_score(truth, found)


def official_xview(
    truth: dict, found: list[dict], checkout: Path, folder: Path
) -> Callable[[], dict]:
    """score.py of the challenge on the files that it wants; writing them is not timed.

    It reads whole numbers for objects, so the same files in eighths of a pixel.
    """
    sys.path.insert(0, str(checkout / "scoring"))
    from score import score

    def corners(box: list[float]) -> list[int]:
        x, y, w, h = (round(value * 8) for value in box)
        return [x, y, x + w, y + h]

    features = [
        {
            "properties": {
                "bounds_imcoords": ",".join(map(str, corners(row["bbox"]))),
                "image_id": f"{row['image_id']}.tif",
                "type_id": XVIEW_TYPE_IDS[row["category_id"]],
            }
        }
        for row in truth["annotations"]
    ]
    (folder / "truth.geojson").write_text(json.dumps({"features": features}))
    predictions = folder / "predictions"
    predictions.mkdir()
    lines: dict[str, list[str]] = {f"{i['id']}.tif.txt": [] for i in truth["images"]}
    for row in found:
        fields = [*corners(row["bbox"]), XVIEW_TYPE_IDS[row["category_id"]]]
        text = " ".join(map(str, [*fields, row["score"]]))
        lines[f"{row['image_id']}.tif.txt"].append(text)
    for name, part in lines.items():
        (predictions / name).write_text("\n".join(part))

    def work() -> dict:
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            score(f"{predictions}/", str(folder / "truth.geojson"), str(folder))
        rows = (line.split() for line in (folder / "metrics.txt").open())
        values = {name: float(value) for name, value in rows}
        groups = ("small", "medium", "large", "common", "rare")
        per_class = {str(i): values[str(t)] for i, t in enumerate(XVIEW_TYPE_IDS)}
        return {
            "mAP": values["map"],
            **{f"mAP_{group}": values[f"map/{group}"] for group in groups},
            "precision": values["map_score"],
            "recall": values["mar_score"],
            "f1": values["f1"],
            "per_class": per_class,
        }

    return work


def measure(sides: dict[str, Callable[[], dict]], runs: int = 3) -> list:
    """Per side (CPU seconds of its cheapest run, the figures); they run by turns."""
    costs: dict[str, list[float]] = {name: [] for name in sides}
    figures = {}
    for _ in range(runs):
        for name, work in sides.items():
            start = time.process_time()
            figures[name] = work()
            costs[name].append(time.process_time() - start)
    for name, each in costs.items():
        print(f"  {name:<14}{min(each):8.2f} s CPU", file=sys.stderr)
    return [(min(costs[name]), figures[name]) for name in sides]


def same(mine: dict, theirs: dict, tolerance: float = 1e-6) -> bool:
    """Every figure that the peer gives, those of each class among them."""
    for key, value in theirs.items():
        if isinstance(value, dict):
            if mine[key].keys() != value.keys() or not same(mine[key], value):
                return False
        elif value is None or mine[key] is None:
            if value is not mine[key]:
                return False
        elif abs(mine[key] - value) > tolerance:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="300 tiles")
    parser.add_argument("--json", metavar="FILE", help="write the claims as JSON")
    parser.add_argument("--xview", metavar="DIR", help="a checkout of xView1_baseline")
    arguments = parser.parse_args()
    tiles = 300 if arguments.quick else TILES
    machine = (
        f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}"
    )
    print(f"{tiles:,} tiles, {CLASSES} classes, {DETECTIONS} detections, on {machine}")
    case = draw(tiles)
    tag = f"{tiles:,} tiles x {CLASSES} classes x {DETECTIONS} detections"
    peers = [(f"COCO AP, {tag}: pycocotools", ours, pycocotools(*case))]
    peers.append((f"COCO AP, {tag}: torchmetrics", ours, torchmetrics(*case)))
    with tempfile.TemporaryDirectory() as folder:
        if arguments.xview:
            work = official_xview(*case, Path(arguments.xview), Path(folder))
            peers.append((f"xView score, {tag}: score.py", our_xview, work))
        claims = []
        for claim, side, work in peers:
            if work is None:
                continue
            name = claim.split(": ")[1]
            (own, mine), (cost, theirs) = measure({"ours": side(*case), name: work})
            claims.append(
                {
                    "claim": claim,
                    "unit": "CPU s",
                    "ours": round(own, 4),
                    "peer": round(cost, 4),
                    "ratio": round(cost / own, 3),
                    "equal": same(mine, theirs),
                    "machine": machine,
                }
            )
    print(f"\n{'claim':<68}{'ours':>7}{'peer':>8}{'ratio':>7}  equal")
    for row in claims:
        numbers = f"{row['ours']:>7.2f}{row['peer']:>8.2f}{row['ratio']:>7.1f}"
        print(f"{row['claim']:<68}{numbers}  {'yes' if row['equal'] else 'NO'}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(claims, indent=2) + "\n")
    if not all(row["equal"] for row in claims):
        sys.exit("the two sides differ")


if __name__ == "__main__":
    main()
