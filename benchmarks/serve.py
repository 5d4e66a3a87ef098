"""The predictor's engines against TorchServe: the same weights, pictures and requests.

    python benchmarks/serve.py            # a ResNet-50 Faster R-CNN: 20 minutes
    python benchmarks/serve.py --quick    # fasterrcnn_small: three minutes
    python benchmarks/serve.py --checkpoint runs/demo/training/best.pt \\
        --tiles runs/demo/tiles           # one's own detector and labelled tiles

Real servers on loopback, all up at once and asked in turns, in four rounds of which the
best one counts, because a neighbour on shared cores takes a third of a round: one
client, then eight, each with a connection of its own and the next request as soon as it
has its answer. All get KServe's V1 request of a JPEG of 320 px. Every server may use
every core. TorchServe runs in both sensible ways, one worker with all cores and a
worker for each core, and the faster at eight clients is the peer. The predictor
computes as many pictures at once as there are cores, each on one thread.

What is equal depends on the precision. In fp32 boxes are compared: each server's with
TorchServe's before, as many, the same labels, within 0.05 px and 1e-4. bf16 and fp16
differ by design, so AP on labelled tiles is, as `approve_precision` does: it may drop
by 0.005. That takes a detector that finds something. fasterrcnn_small is trained here
for it, 120 steps on drawn squares, bars and discs; other architectures are untrained,
their class scores spread until they find boxes, and what a lower precision costs them
is not compared; --checkpoint brings a trained one. It is measured where the CPU
(OpenVINO) or a GPU (torch) has units for it.

Memory is what the processes of a server hold for themselves after the load, shared
pages counted in parts (PSS).
"""

import argparse
import base64
import contextlib
import io
import json
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import psutil
import requests
import torch
from PIL import Image

from e2e_utils.config import TrainConfig
from e2e_utils.hardware import native_precisions
from e2e_utils.models import build_model
from e2e_utils.predict import predict_image
from e2e_utils.tile_set import describe_split, read_tile_set
from e2e_utils.train import fit
from kserve_utils.approve import MAX_DROP, approve_precision
from kserve_utils.artefact import write_artefact
from kserve_utils.client import predict_remote
from kserve_utils.engines import load_engine, read_artefact
from kserve_utils.export import strip_checkpoint, write_mar, write_model_store
from kserve_utils.servers import predictor, torchserve

SIZE, MODEL, CLIENTS = 320, "xview-fasterrcnn", 8
TARGETS = {"fp32": 1.4, "bf16": 4.0}  # times TorchServe's images/s at eight clients


class Subject(NamedTuple):
    """What is served: its stripped checkpoint, pictures, and labelled tiles if any."""

    stripped: Path
    pictures: list[bytes]
    labelled: tuple[Path, Path] | None  # COCO file, folder


def texture(rng: np.random.Generator) -> np.ndarray:
    """uint8 (320, 320, 3) with texture from 64 px down to single pixels."""
    pixels = np.full((SIZE, SIZE, 3), 110, np.float32)
    for cell, strength in ((64, 40), (16, 25), (4, 14), (1, 4)):
        noise = rng.normal(0, strength, (SIZE // cell, SIZE // cell, 3))
        pixels += cv2.resize(noise.astype(np.float32), (SIZE, SIZE))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def draw_tiles(path: Path, folder: Path, count: int, seed: int) -> None:
    """Tiles with twelve shapes each, 12 to 39 px, and their COCO file."""
    rng, names = np.random.default_rng(seed), ("square", "bar", "disc")
    coco = {"images": [], "annotations": []}
    coco["categories"] = [{"id": i, "name": name} for i, name in enumerate(names)]
    folder.mkdir(parents=True)
    for image_id in range(1, count + 1):
        pixels = texture(rng)
        for _ in range(12):
            kind, side = int(rng.integers(0, 3)), int(rng.integers(12, 40))
            width, height = side, side // 3 if kind == 1 else side
            x, y = (int(v) for v in rng.integers(0, SIZE - 40, 2))
            shape = np.ones((height, width), bool)
            if kind == 2:
                up, across = np.ogrid[:side, :side]
                off = np.hypot(up - (side - 1) / 2, across - (side - 1) / 2)
                shape = off <= side / 2
            pixels[y : y + height, x : x + width][shape] = rng.integers(150, 256, 3)
            row = {"id": len(coco["annotations"]) + 1, "image_id": image_id}
            row |= {"category_id": kind, "bbox": [x, y, width, height], "iscrowd": 0}
            coco["annotations"].append({**row, "area": width * height})
        name = f"{image_id}.jpg"
        (folder / name).write_bytes(jpeg(pixels))
        size = {"height": SIZE, "width": SIZE}
        coco["images"].append({"id": image_id, "file_name": name, **size})
    path.write_text(json.dumps(coco))


def trained(folder: Path) -> Subject:
    """fasterrcnn_small after 120 steps on drawn tiles."""
    config = TrainConfig(str(folder), str(folder / "run"), steps=120)
    config.settings = {"min_size": SIZE, "max_size": SIZE}
    config.amp, config.eval_steps = "off", 120  # what bf16 costs is asked of serving
    for split, count, seed in (("train", 40, 0), ("val", 16, 1)):
        images, path = folder / split, folder / f"{split}.json"
        draw_tiles(path, images, count, seed)
        describe_split(folder, split, images, path, tile_size=SIZE, overlap=0.0)
    fit(config, progress=False)
    return own(folder / "run" / "best.pt", folder, folder)


def own(checkpoint: Path, tiles: Path, folder: Path) -> Subject:
    """A checkpoint of e2e_utils.train and the validation tiles below `tiles`."""
    stripped = strip_checkpoint(checkpoint, folder / "stripped.pth")
    images, path = read_tile_set(tiles).split("val")
    rows = json.loads(path.read_text())["images"]
    some = [rows[i * len(rows) // 8]["file_name"] for i in range(8)]
    return Subject(stripped, [(images / n).read_bytes() for n in some], (path, images))


def untrained(name: str, folder: Path) -> Subject:
    """Random weights whose class scores are spread until some boxes are found."""
    torch.manual_seed(0)
    settings = {"min_size": SIZE, "max_size": SIZE}
    classes = ["background"] + [f"class {i}" for i in range(1, 61)]
    model = build_model(name, len(classes), **settings)
    # Some boxes, no ties: of equal scores, chance decides which box stays.
    model.roi_heads.box_predictor.cls_score.weight.data.mul_(2)
    model.roi_heads.box_predictor.cls_score.bias.data[0] = 2.4
    content = {"model": model.state_dict(), "architecture": name, "settings": settings}
    content |= {"class_names": classes, "tile_size": SIZE, "overlap": 0.2}
    torch.save(content, folder / "untrained.pt")
    stripped = strip_checkpoint(folder / "untrained.pt", folder / "stripped.pth")
    rng = np.random.default_rng(1)
    return Subject(stripped, [jpeg(texture(rng)) for _ in range(8)], None)


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def decode(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def self_labelled(artefact: Path, pictures: list[bytes], folder: Path) -> tuple:
    """Pictures labelled with what the detector itself finds: for a detector that knows
    nothing, so that it may be served in a lower precision at all."""
    model, meta = load_engine(artefact)
    names = [{"id": i, "name": n} for i, n in enumerate(meta["class_names"][1:])]
    coco = {"images": [], "annotations": [], "categories": names}
    for index, content in enumerate(pictures, start=1):
        pixels = decode(content)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        coco["images"].append({"id": index, "file_name": f"{index}.png", **size})
        found = predict_image(model, pixels)
        for (x1, y1, x2, y2), label in zip(
            found["boxes_xyxy"].tolist(), found["labels"].tolist(), strict=True
        ):
            row = {"id": len(coco["annotations"]) + 1, "image_id": index, "iscrowd": 0}
            row |= {"category_id": label - 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            coco["annotations"].append({**row, "area": (x2 - x1) * (y2 - y1)})
    (folder / "labels.json").write_text(json.dumps(coco))
    return folder / "labels.json", folder


def approve(artefact: Path, subject: Subject, folder: Path) -> dict:
    """(engine, precision) -> outcome of `approve_precision`; None: nothing can tell.

    Without labelled tiles a precision is allowed whatever it costs: then this compares
    speed alone, and says so.
    """
    asked, outcomes = [("openvino", "bf16")], {}
    if torch.cuda.is_available():
        native = native_precisions(torch.device("cuda"))
        asked += [("torch", precision) for precision in native[1:]]
    known = subject.labelled is not None
    tiles = subject.labelled or self_labelled(artefact, subject.pictures[:3], folder)
    most = MAX_DROP if known else 1.0
    for engine, precision in asked:
        try:
            outcome = approve_precision(
                artefact, engine, *tiles, most, precision=precision
            )
        except RuntimeError as error:
            print(f"no {precision} of {engine}: {error}")
            continue
        except ValueError as error:  # tiles that tell nothing of this detector
            raise SystemExit(f"error: {error}") from error
        outcomes[engine, precision] = outcome if known else None
    return outcomes


def ask(url: str, bodies: list[bytes], count: int, seconds: list[float]) -> None:
    session = requests.Session()
    session.trust_env = False  # a proxy does not know this machine's loopback
    headers = {"Content-Type": "application/json"}
    for index in range(count):
        body = bodies[index % len(bodies)]
        start = time.perf_counter()
        answer = session.post(url, data=body, headers=headers, timeout=300)
        seconds.append(time.perf_counter() - start)
        if answer.status_code != 200:
            raise RuntimeError(f"{url} answered {answer.status_code}: {answer.text}")


def load(base: str, bodies: list[bytes], clients: int, each: int) -> dict:
    """p50 and p99 in ms and images/s of so many clients with `each` requests."""
    url, seconds = f"{base}/v1/models/{MODEL}:predict", [[] for _ in range(clients)]
    threads = [
        threading.Thread(target=ask, args=(url, bodies[i:] + bodies[:i], each, one))
        for i, one in enumerate(seconds)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start
    every = np.array([s for one in seconds for s in one]) * 1000
    if len(every) != clients * each:
        sys.exit(f"{url}: {clients * each - len(every)} requests failed")
    p50, p99 = np.percentile(every, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "rate": len(every) / wall}


def memory(processes: list[psutil.Process]) -> float:
    """MB of all processes of a server."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total / 1e6


def agrees(one: dict, other: dict) -> bool:
    """Whether two servers give the same boxes, see the top of this file."""
    boxes = [torch.from_numpy(found["boxes_xyxy"]) for found in (one, other)]
    labels = [torch.from_numpy(found["labels"]) for found in (one, other)]
    scores = [torch.from_numpy(found["scores"]) for found in (one, other)]
    if len(scores[0]) != len(scores[1]):
        return False
    close = (boxes[0][:, None] - boxes[1][None]).abs().amax(dim=2) <= 0.05
    close &= (scores[0][:, None] - scores[1][None]).abs() <= 1e-4
    close &= labels[0][:, None] == labels[1][None]
    return bool(close.any(dim=1).all() and close.any(dim=0).all())


def with_workers(tree: Path, workers: int, out: Path) -> Path:
    """The model store with another number of TorchServe workers."""
    (out / "config").mkdir(parents=True)
    (out / "model-store").symlink_to(tree / "model-store")
    text = (tree / "config" / "config.properties").read_text()
    for key in ("minWorkers", "maxWorkers"):
        text = text.replace(f'"{key}": 1', f'"{key}": {workers}')
    (out / "config" / "config.properties").write_text(text)
    return out


def start(
    stack: contextlib.ExitStack, server: contextlib.AbstractContextManager
) -> tuple[str, list[psutil.Process]]:
    """(base URL, all processes) of a server that ends with the stack."""
    me = psutil.Process()
    before = set(me.children(recursive=True))
    base = stack.enter_context(server)
    return base, [p for p in me.children(recursive=True) if p not in before]


def start_all(
    stack: contextlib.ExitStack, folder: Path, tree: Path, artefact: Path, engines: list
) -> dict:
    """Name -> (base URL, processes): TorchServe in two layouts, and each engine."""
    cores, servers = len(os.sched_getaffinity(0)), {}
    for workers, threads in sorted({(1, cores), (cores, 1)}):
        store = with_workers(tree, workers, folder / f"store-{workers}")
        server = start(stack, torchserve(store, threads=threads))
        servers[f"TorchServe {workers} x {threads}"] = server
    for engine, precision in engines:
        flags = {"engine": engine, "precision": precision, "at_once": cores}
        server = start(stack, predictor(artefact, **flags))
        servers[f"{engine} {precision}"] = server
    return servers


def measure(servers: dict, bodies: list[bytes], each: int, rounds: int) -> dict:
    """Per server the best round at one client and at eight, and its memory."""
    best: dict = {name: {} for name in servers}
    for base, _ in servers.values():  # every worker's first pictures do not count
        load(base, bodies, CLIENTS, 3)
    for _ in range(rounds):
        for name, (base, processes) in servers.items():
            for clients in (1, CLIENTS):
                found = load(base, bodies, clients, each)
                print(
                    f"  {name:<24}{clients:>3} client(s)  p50 {found['p50']:7.0f} ms  "
                    f"p99 {found['p99']:7.0f} ms  {found['rate']:6.2f} images/s",
                    flush=True,
                )
                old = best[name].get(clients)
                if old is None or found["rate"] > old["rate"]:
                    best[name][clients] = found
            best[name]["MB"] = memory(processes)
    return best


def claims_of(
    name: str, ours: dict, peer_name: str, peer: dict, equal: bool | None
) -> list:
    """Rows of --json for one engine; ratio: how many times better than TorchServe."""
    rows = []
    for clients in (CLIENTS, 1):
        for key, unit in (("rate", "images/s"), ("p50", "ms"), ("p99", "ms")):
            a, b = ours[clients][key], peer[clients][key]
            what = "images/s" if key == "rate" else key
            title = f"served {what}, {clients} client(s): {name} / {peer_name}"
            ratio = a / b if key == "rate" else b / a
            rows.append((title, unit, a, b, ratio))
    title = f"memory of the server: {name} / {peer_name}"
    rows.append((title, "MB", ours["MB"], peer["MB"], peer["MB"] / ours["MB"]))
    return [
        {
            "claim": title,
            "unit": unit,
            "ours": round(a, 3),
            "peer": round(b, 3),
            "ratio": round(ratio, 3),
            "equal": equal,
        }
        for title, unit, a, b, ratio in rows
    ]


def ap_claim(name: str, outcome: dict) -> dict:
    """The row of --json that says what a lower precision costs."""
    engine, precision = name.split()
    ours, peer = outcome[f"AP_{precision}"], outcome["AP_fp32"]
    row = {"claim": f"AP on {outcome['tiles']} tiles: {name} / {engine} fp32"}
    row |= {"unit": "AP", "ours": round(ours, 4), "peer": round(peer, 4)}
    return {**row, "ratio": round(ours / peer, 3), "equal": outcome["approved"]}


def verdict(differ: list[str], outcomes: dict) -> str:
    """The last line of the output; exits with it if something is not as it should be.

    Args:
        differ: fp32 servers whose boxes are not TorchServe's.
        outcomes: of `approve`.
    """
    if differ:
        sys.exit(f"the servers differ: {', '.join(differ)}, boxes against TorchServe")
    lines = ["fp32: the boxes of every engine are TorchServe's"]
    for (engine, precision), outcome in outcomes.items():
        name = f"{precision} of {engine}"
        if outcome is None:
            lines.append(f"{name}: its cost is not compared, the detector is untrained")
            continue
        figures = f"AP {outcome[f'AP_{precision}']:.4f}, fp32 {outcome['AP_fp32']:.4f}"
        if not outcome["approved"]:
            sys.exit(f"{name} costs more than {MAX_DROP} of AP: {figures}; not served")
        lines.append(f"{name}: {figures}, approved")
    return "; ".join(lines)


def show_claims(claims: list[dict]) -> None:
    print(f"\n{'claim':<68}{'ours':>9}{'peer':>9}{'ratio':>7}  equal")
    words = {True: "yes", False: "NO", None: "not compared"}
    for row in claims:
        digits = 4 if row["unit"] == "AP" else 2
        numbers = f"{row['ours']:>9.{digits}f}{row['peer']:>9.{digits}f}"
        numbers += f"{row['ratio']:>7.2f}"
        print(f"{row['claim']:<68}{numbers}  {words[row['equal']]}")


def show_targets(servers: list[str], best: dict, peer: str) -> None:
    """What the best engine of each precision reaches against its target."""
    for precision, target in TARGETS.items():
        of = [server for server in servers if server.endswith(precision)]
        if not of:
            print(f"{precision}: not served here")
            continue
        top = max(of, key=lambda server: best[server][CLIENTS]["rate"])
        ratio = best[top][CLIENTS]["rate"] / best[peer][CLIENTS]["rate"]
        lower = best[top][CLIENTS]["p50"] < best[peer][CLIENTS]["p50"]
        print(
            f"{precision}: {top} {ratio:.2f}x {peer} at {CLIENTS} clients, "
            f"{'lower' if lower else 'higher'} p50; target {target}x: "
            f"{'met' if ratio >= target and lower else 'missed'}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="fasterrcnn_small, fewer rounds")
    add("--json", metavar="FILE", help="write the claims as JSON")
    add("--model", help="a Faster R-CNN of models.MODELS")
    add("--checkpoint", type=Path, help="of e2e_utils.train, instead of --model")
    add("--tiles", type=Path, help="its labelled tiles: the folder of val_*.json")
    add("--requests", type=int, default=5, help="of each client")
    add("--rounds", type=int, help="of which the best counts")
    found = parser.parse_args()
    if (found.checkpoint is None) != (found.tiles is None):
        parser.error("--checkpoint and --tiles come together")
    found.rounds = found.rounds or (2 if found.quick else 4)
    small = "fasterrcnn_small" if found.quick else "fasterrcnn_resnet50_fpn"
    found.model = found.model or small
    if found.checkpoint is None and "fasterrcnn" not in found.model:
        parser.error(f"{found.model}: untrained, only Faster R-CNNs find boxes here")
    return found


def main() -> None:
    arguments = parse()
    cores = len(os.sched_getaffinity(0))
    machine = f"{cores} x {platform.machine()}, torch {torch.__version__}"
    if torch.cuda.is_available():  # torch takes it, and so does TorchServe
        machine += f", {torch.cuda.get_device_name()}"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if arguments.checkpoint:
            subject = own(arguments.checkpoint, arguments.tiles, folder)
        elif arguments.model == "fasterrcnn_small":
            subject = trained(folder)
        else:
            subject = untrained(arguments.model, folder)
        contents = subject.pictures
        tiles = [decode(content) for content in contents[:3]]
        artefact = write_artefact(subject.stripped, folder / "artefact", tiles=tiles)
        meta = read_artefact(artefact)
        name = meta["architecture"]
        print(f"{name}, {tiles[0].shape[1]} px, {machine}")
        tree = write_model_store(write_mar(subject.stripped, folder), folder / "store")
        outcomes = approve(artefact, subject, folder)
        lower = [key for key, o in outcomes.items() if o is None or o["approved"]]
        engines = [(e, "fp32") for e in ("torch", "openvino", "onnxruntime")] + lower
        servers = start_all(stack, folder, tree, artefact, engines)
        answers = {
            server: [
                predict_remote(base, content, class_names=meta["class_names"])
                for content in contents
            ]
            for server, (base, _) in servers.items()
        }
        bodies = [
            json.dumps({"instances": [{"data": base64.b64encode(c).decode()}]}).encode()
            for c in contents
        ]
        best = measure(servers, bodies, arguments.requests, arguments.rounds)
    peers = [server for server in servers if server.startswith("TorchServe")]
    peer = max(peers, key=lambda server: best[server][CLIENTS]["rate"])
    boxes = sum(len(found["scores"]) for found in answers[peer])
    print(f"the peer is {peer} (workers x threads); {boxes} boxes on 8 pictures")
    claims, differ = [], []
    for engine, precision in engines:
        server = f"{engine} {precision}"
        if precision == "fp32":
            pairs = zip(answers[peer], answers[server], strict=True)
            equal = boxes > 0 and all(agrees(one, other) for one, other in pairs)
            differ += [] if equal else [server]
        else:  # by AP, or not at all
            outcome = outcomes[engine, precision]
            equal = None if outcome is None else outcome["approved"]
        claims += claims_of(server, best[server], peer, best[peer], equal)
    for key, outcome in outcomes.items():
        claims += [ap_claim(" ".join(key), outcome)] if outcome else []
    claims = [{**row, "machine": f"{name}, {machine}"} for row in claims]
    show_claims(claims)
    show_targets([" ".join(key) for key in engines], best, peer)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(claims, indent=2) + "\n")
    print(verdict(differ, outcomes))


if __name__ == "__main__":
    main()
