"""What lower precision gains and costs: steps a second, and average precision.

    python benchmarks/precision.py            # all architectures, about 15 CPU minutes
    python benchmarks/precision.py --quick    # two of them, about a minute
    python benchmarks/precision.py --train    # scores too; on a GPU three minutes

The peer is float32 on the same device. Steps of training take turns, on tiles of
300 px: eight a step on a GPU, two on a CPU, where one thread runs and the unit is steps
per second of CPU time; the cheapest step of each precision counts. `CPU_BF16_SPEEDUP`
of e2e_utils/hardware.py is what this prints. Results are equal where the first loss
agrees within 2 %.

--train trains fasterrcnn_small on the drawn data set in each precision, and once more
in float32 from another seed, which tells how much a score moves by itself. Then the
weights that float32 trained are evaluated in each precision, by the loop and by the
torch engine that serves them: equal means at most 0.005 of AP.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.config import TrainConfig
from e2e_utils.data import CocoTiles, eval_loader
from e2e_utils.evaluate import coco_metrics, detect
from e2e_utils.hardware import (
    PRECISIONS,
    find_device,
    grad_scaler,
    memory_format,
    native_precisions,
)
from e2e_utils.models import MODELS, build_model
from e2e_utils.optim import make_optimizer
from e2e_utils.tile_set import read_tile_set
from e2e_utils.train import fit, seed_step, train_step

SIZE, DROP = 300, 0.005
QUICK = ("fasterrcnn_small", "fasterrcnn_resnet50_fpn")


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def drawn_batch(tiles: int) -> tuple[list, list]:
    """Tiles of noise with twenty small boxes each."""
    rng = torch.Generator().manual_seed(0)
    images, targets = [], []
    for _ in range(tiles):
        low = torch.randint(0, SIZE - 40, (20, 2), generator=rng).float()
        size = torch.randint(10, 40, (20, 2), generator=rng)
        labels = torch.randint(1, 61, (20,), generator=rng)
        shape = (3, SIZE, SIZE)
        images.append(torch.randint(0, 256, shape, generator=rng).to(torch.uint8))
        targets.append({"boxes": torch.cat([low, low + size], 1), "labels": labels})
    return images, targets


def step_seconds(
    name: str, device: torch.device, rounds: int, tiles: int
) -> tuple[dict, dict]:
    """({precision: seconds of the cheapest step}, {precision: first loss})."""
    batch, sides, cost, first = drawn_batch(tiles), {}, {}, {}
    fixed = name.startswith("ssd")  # its pictures always have the size it was made for
    settings = {} if fixed else {"min_size": SIZE, "max_size": SIZE}
    for precision in native_precisions(device):
        torch.manual_seed(0)
        model = build_model(name, 61, **settings)
        model.to(device, memory_format=memory_format(precision)).train()
        config = TrainConfig("", "", optimizer="sgd", lr=1e-4)
        optimizer = make_optimizer(model, config)
        sides[precision] = model, optimizer, grad_scaler(precision, device)
    for turn in range(rounds + 1):
        for precision, (model, optimizer, scaler) in sides.items():
            seed_step(0, turn)
            before = clock(device)
            losses = train_step(
                model, optimizer, *batch, PRECISIONS[precision], scaler=scaler
            )
            spent = clock(device) - before
            if turn == 0:  # allocations and the choice of kernels
                first[precision] = losses["loss"].item()
            else:
                cost[precision] = min(spent, cost.get(precision, spent))
    return cost, first


def steps(
    names: list[str], device: torch.device, rounds: int, tiles: int, host: str
) -> list[dict]:
    unit = "steps/s" if device.type == "cuda" else "steps/CPU-s"
    claims = []
    for name in names:
        cost, first = step_seconds(name, device, rounds, tiles)
        for precision in [p for p in cost if p != "fp32"]:
            off = abs(first[precision] - first["fp32"]) / first["fp32"]
            claims.append(
                {
                    "claim": f"step of {tiles} tiles, {name}, {precision}",
                    "unit": unit,
                    "ours": round(1 / cost[precision], 4),
                    "peer": round(1 / cost["fp32"], 4),
                    "ratio": round(cost["fp32"] / cost[precision], 2),
                    "equal": off < 0.02,
                    "machine": host,
                }
            )
            print_row(claims[-1])
    return claims


def drawn_tiles(folder: Path, scenes: int) -> Path:
    """The embedded data set, converted and cut into tiles, below `folder`."""
    from e2e_utils.convert import geojson_to_coco
    from e2e_utils.prepare import prepare_tiles
    from sample_data.dataset import draw_dataset

    data = draw_dataset(folder / "xview", scenes)
    images, labels = data / "train_images", data / "xView_train.geojson"
    coco, tiles = folder / "coco", folder / "tiles"
    with contextlib.redirect_stdout(io.StringIO()):
        geojson_to_coco(images, labels, coco, 0.75)
        prepare_tiles(images, coco / "train.json", tiles, val_coco=coco / "val.json")
    return tiles


def average_precision(model, tiles: CocoTiles, device, precision: str) -> float:
    found = detect(
        model, eval_loader(tiles), device, tiles.category_ids, PRECISIONS[precision]
    )
    return coco_metrics(tiles.coco, found)["AP"]


def trained(folder: Path, tiles: Path, device, arguments, host: str) -> list[dict]:
    """Train in each precision; the scores of those runs."""
    runs = [(p, p, 0) for p in native_precisions(device)] + [("fp32", "another", 1)]
    scores, seconds = {}, {}
    for precision, name, seed in runs:
        config = TrainConfig(
            str(tiles),
            str(folder / name),
            steps=arguments.steps,
            eval_steps=arguments.steps,
            amp="off" if precision == "fp32" else precision,
            cache=True,
            seed=seed,
            device=str(device),
        )
        before = time.perf_counter()
        scores[name] = fit(config, progress=False)["AP50"]
        seconds[name] = time.perf_counter() - before
        print(f"trained in {precision}, seed {seed}: AP50 {scores[name]:.3f}, ", end="")
        print(f"{seconds[name]:.0f} s", flush=True)
    noise = abs(scores["another"] - scores["fp32"])
    print(f"another seed moves AP50 by {noise:.3f}")
    return [
        {
            "claim": f"AP50 after {arguments.steps} steps in {precision}",
            "unit": "AP50",
            "ours": round(scores[precision], 4),
            "peer": round(scores["fp32"], 4),
            "ratio": round(scores[precision] / scores["fp32"], 3),
            "equal": abs(scores[precision] - scores["fp32"]) <= max(0.05, 2 * noise),
            "machine": host,
        }
        for precision in native_precisions(device)[1:]
    ]


def evaluated(folder: Path, tiles: Path, device: torch.device, host: str) -> list[dict]:
    """The weights of the float32 run, in each precision, by the loop and served."""
    from kserve_utils.artefact import read_tiles, write_artefact
    from kserve_utils.engines import load_engine
    from kserve_utils.export import strip_checkpoint

    images, labels = read_tile_set(tiles).split("val")
    data = CocoTiles(images, labels)
    model, _ = model_from_checkpoint(folder / "fp32" / "last.pt", device)
    stripped = strip_checkpoint(folder / "fp32" / "last.pt", folder / "stripped.pth")
    artefact = write_artefact(
        stripped, folder / "artefact", ["torch"], tiles=read_tiles(images)
    )
    scores, rates = {}, {}
    for precision in native_precisions(device):
        scores["loop", precision] = average_precision(model, data, device, precision)
        engine, _ = load_engine(
            artefact, "torch", precision, approved_only=False, device=str(device)
        )
        average_precision(engine, data, device, "fp32")  # the choice of kernels
        before = clock(device)
        served = average_precision(engine, data, device, "fp32")
        scores["engine", precision] = served
        rates[precision] = len(data) / (clock(device) - before)
    claims = []
    for (who, precision), score in scores.items():
        if (who, precision) == ("loop", "fp32"):
            continue
        reference = scores["loop", "fp32"]
        claims.append(
            {
                "claim": f"AP of the same weights, {who} in {precision}",
                "unit": "AP",
                "ours": round(score, 4),
                "peer": round(reference, 4),
                "ratio": round(score / reference, 3),
                "equal": abs(score - reference) <= DROP,
                "machine": host,
            }
        )
    for precision in native_precisions(device)[1:]:
        claims.append(
            {
                "claim": f"torch engine, small detector, {precision}",
                "unit": "tiles/s",
                "ours": round(rates[precision], 1),
                "peer": round(rates["fp32"], 1),
                "ratio": round(rates[precision] / rates["fp32"], 2),
                "equal": abs(scores["engine", precision] - scores["engine", "fp32"])
                <= DROP,
                "machine": host,
            }
        )
    return claims


def print_row(row: dict) -> None:
    numbers = f"{row['ours']:>9.3f}{row['peer']:>9.3f}{row['ratio']:>7.2f}"
    same = "yes" if row["equal"] else "NO"
    print(f"{row['claim']:<60}{row['unit']:>12}{numbers}  {same}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two architectures")
    parser.add_argument("--json", metavar="FILE", help="write the claims as JSON")
    parser.add_argument("--device", help="cuda if there is one")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME")
    parser.add_argument("--rounds", type=int, help="timed steps of each precision")
    parser.add_argument("--batch-size", type=int, help="tiles a step; 8 on a GPU")
    parser.add_argument("--train", action="store_true", help="scores as well")
    parser.add_argument("--steps", type=int, default=640, help="of each training")
    parser.add_argument("--run", type=Path, help="where --train puts what it makes")
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    cuda = device.type == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    host = f"{os.cpu_count()} x {platform.machine()}, one thread"
    host = torch.cuda.get_device_name(device) if cuda else host
    host += f", torch {torch.__version__.partition('+')[0]}"
    print(f"{host}; has units for {', '.join(native_precisions(device))}")
    if native_precisions(device) == ("fp32",):
        print("nothing to compare: this device has units for float32 alone")
        return
    names = arguments.models or (QUICK if arguments.quick else MODELS)
    rounds = arguments.rounds or (20 if cuda else 1 if arguments.quick else 3)
    print(f"{'claim':<60}{'unit':>12}{'ours':>9}{'fp32':>9}{'ratio':>7}  equal")
    tiles = arguments.batch_size or (8 if cuda else 2)
    claims = steps(list(names), device, rounds, tiles, host)
    if arguments.train:
        with contextlib.ExitStack() as stack:
            folder = arguments.run or Path(
                stack.enter_context(tempfile.TemporaryDirectory())
            )
            if (folder / "fp32").exists():  # a finished run would not be trained again
                raise SystemExit(f"error: {folder} holds runs of another measurement")
            tiles = drawn_tiles(folder, 12)
            scored = trained(folder, tiles, device, arguments, host)
            scored += evaluated(folder, tiles, device, host)
        for row in scored:
            print_row(row)
        claims += scored
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(claims, indent=2) + "\n")
    if not all(row["equal"] for row in claims):
        raise SystemExit("lower precision changed a result")


if __name__ == "__main__":
    main()
