"""The predictor's engines against TorchServe: the same weights, pictures and requests.

    python benchmarks/serve.py            # a ResNet-50 Faster R-CNN: 20 minutes
    python benchmarks/serve.py --quick    # fasterrcnn_small: two minutes

Real servers on loopback, all up at once and asked in turns, in four rounds of which the
best one counts, because a neighbour on shared cores takes a third of a round: one
client, then eight, each with a connection of its own and the next request as soon as it
has its answer. All get KServe's V1 request of a JPEG of 320 px. Every server may use
every core. TorchServe runs in both sensible ways, one worker with all cores and a
worker for each core, and the faster at eight clients is the peer. The predictor
computes as many pictures at once as there are cores, each on one thread.

Before, each server's boxes are compared with TorchServe's: as many, the same labels,
within 0.05 px and 1e-4. The detector is untrained, its class scores are spread until
it finds boxes. Where the CPU computes in bf16 it is measured too; its boxes may differ,
and "equal" then says that nine of ten are found again with an IoU of at least 0.5.

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

import cv2
import numpy as np
import psutil
import requests
import torch
from PIL import Image
from torchvision.ops import box_iou

from e2e_utils.artefact import write_artefact
from e2e_utils.client import predict_remote
from e2e_utils.engines import load_engine
from e2e_utils.export import strip_checkpoint, write_mar, write_model_store
from e2e_utils.models import build_model
from e2e_utils.predict import predict_image
from kserve_utils.predictor.approve_bf16 import approve_bf16
from kserve_utils.predictor.local import predictor
from kserve_utils.torchserve_utils.local import torchserve

SIZE, MODEL, CLIENTS = 320, "xview-fasterrcnn", 8
TARGETS = {"fp32": 1.4, "bf16": 4.0}  # times TorchServe's images/s at eight clients


def make_pictures(count: int) -> list[np.ndarray]:
    """uint8 (320, 320, 3) each, with texture from 64 px down to single pixels."""
    rng, pictures = np.random.default_rng(1), []
    for _ in range(count):
        pixels = np.full((SIZE, SIZE, 3), 110, np.float32)
        for cell, strength in ((64, 40), (16, 25), (4, 14), (1, 4)):
            noise = rng.normal(0, strength, (SIZE // cell, SIZE // cell, 3))
            pixels += cv2.resize(noise.astype(np.float32), (SIZE, SIZE))
        pictures.append(np.clip(pixels, 0, 255).astype(np.uint8))
    return pictures


def make_checkpoint(name: str, folder: Path) -> Path:
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
    return strip_checkpoint(folder / "untrained.pt", folder / "stripped.pth")


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def decode(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def approve(artefact: Path, engine: str, pictures: list[bytes], folder: Path) -> bool:
    """Allow bf16, whatever it costs, if the CPU has it: this compares only speed."""
    model, meta = load_engine(artefact)
    names = [{"id": i, "name": n} for i, n in enumerate(meta["class_names"][1:])]
    coco = {"images": [], "annotations": [], "categories": names}
    for index, content in enumerate(pictures, start=1):
        Image.fromarray(decode(content)).save(folder / f"{index}.png")
        row = {"id": index, "file_name": f"{index}.png", "height": SIZE, "width": SIZE}
        coco["images"].append(row)
        found = predict_image(model, decode(content))
        for (x1, y1, x2, y2), label in zip(
            found["boxes_xyxy"].tolist(), found["labels"].tolist(), strict=True
        ):
            row = {"id": len(coco["annotations"]) + 1, "image_id": index, "iscrowd": 0}
            row |= {"category_id": label - 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            coco["annotations"].append({**row, "area": (x2 - x1) * (y2 - y1)})
    (folder / "tiles.json").write_text(json.dumps(coco))
    try:
        approve_bf16(artefact, engine, folder / "tiles.json", folder, max_drop=1.0)
    except RuntimeError as error:
        print(f"no bf16: {error}")
        return False
    return True


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


def agrees(one: dict, other: dict, exact: bool) -> bool:
    """Whether two servers give the same boxes, see the top of this file."""
    boxes = [torch.from_numpy(found["boxes_xyxy"]) for found in (one, other)]
    labels = [torch.from_numpy(found["labels"]) for found in (one, other)]
    scores = [torch.from_numpy(found["scores"]) for found in (one, other)]
    if not exact:
        close = box_iou(*boxes) >= 0.5
        close &= labels[0][:, None] == labels[1][None]
        return close.any(dim=1).float().mean().item() >= 0.9
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


def claims_of(name: str, ours: dict, peer_name: str, peer: dict, equal: bool) -> list:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fasterrcnn_small")
    parser.add_argument("--json", metavar="FILE", help="write the claims as JSON")
    parser.add_argument("--model", help="a Faster R-CNN of models.MODELS")
    parser.add_argument("--requests", type=int, help="of each client")
    parser.add_argument("--rounds", type=int, help="of which the best counts")
    arguments = parser.parse_args()
    quick = arguments.quick
    name = arguments.model or (
        "fasterrcnn_small" if quick else "fasterrcnn_resnet50_fpn"
    )
    if "fasterrcnn" not in name:
        sys.exit(f"{name}: untrained, only Faster R-CNNs find boxes here")
    each = arguments.requests or 5
    rounds = arguments.rounds or (2 if quick else 4)
    cores = len(os.sched_getaffinity(0))
    machine = f"{cores} x {platform.machine()}, torch {torch.__version__}"
    print(f"{name}, {SIZE} px, {machine}")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stripped = make_checkpoint(name, folder)
        contents = [jpeg(picture) for picture in make_pictures(8)]
        tiles = [decode(content) for content in contents[:3]]
        artefact = write_artefact(stripped, folder / "artefact", tiles=tiles)
        tree = write_model_store(write_mar(stripped, folder), folder / "store")
        engines = [(e, "fp32") for e in ("torch", "openvino", "onnxruntime")]
        if approve(artefact, "openvino", contents[:3], folder):
            engines.append(("openvino", "bf16"))
        servers, layouts = {}, {(1, cores), (cores, 1)}
        for workers, threads in sorted(layouts):
            place = with_workers(tree, workers, folder / f"store-{workers}")
            servers[f"TorchServe {workers} x {threads}"] = start(
                stack, torchserve(place, threads=threads)
            )
        for engine, precision in engines:
            servers[f"{engine} {precision}"] = start(
                stack,
                predictor(
                    artefact,
                    engine=engine,
                    precision=precision,
                    threads=1,
                    arguments=["--at_once", str(cores)],
                ),
            )
        classes = ["background"] + [f"class {i}" for i in range(1, 61)]
        answers = {
            server: [
                predict_remote(base, content, class_names=classes)
                for content in contents
            ]
            for server, (base, _) in servers.items()
        }
        bodies = [
            json.dumps({"instances": [{"data": base64.b64encode(c).decode()}]}).encode()
            for c in contents
        ]
        best = measure(servers, bodies, each, rounds)
    peers = [server for server in servers if server.startswith("TorchServe")]
    peer = max(peers, key=lambda server: best[server][CLIENTS]["rate"])
    boxes = sum(len(found["scores"]) for found in answers[peer])
    print(f"the peer is {peer} (workers x threads); {boxes} boxes on 8 pictures")
    claims, missed = [], []
    for engine, precision in engines:
        server = f"{engine} {precision}"
        equal = boxes > 0 and all(
            agrees(one, other, precision == "fp32")
            for one, other in zip(answers[peer], answers[server], strict=True)
        )
        rows = claims_of(server, best[server], peer, best[peer], equal)
        claims += [{**row, "machine": f"{name}, {machine}"} for row in rows]
    print(f"\n{'claim':<68}{'ours':>9}{'peer':>9}{'ratio':>7}  equal")
    for row in claims:
        numbers = f"{row['ours']:>9.2f}{row['peer']:>9.2f}{row['ratio']:>7.2f}"
        print(f"{row['claim']:<68}{numbers}  {'yes' if row['equal'] else 'NO'}")
    for precision, target in TARGETS.items():
        own = [f"{e} {p}" for e, p in engines if p == precision]
        if not own:
            print(f"{precision}: not on this CPU")
            continue
        top = max(own, key=lambda server: best[server][CLIENTS]["rate"])
        ratio = best[top][CLIENTS]["rate"] / best[peer][CLIENTS]["rate"]
        lower = best[top][CLIENTS]["p50"] < best[peer][CLIENTS]["p50"]
        verdict = "met" if ratio >= target and lower else "missed"
        missed += [precision] if verdict == "missed" else []
        print(
            f"{precision}: {top} {ratio:.2f}x {peer} at {CLIENTS} clients, "
            f"{'lower' if lower else 'higher'} p50; target {target}x: {verdict}"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(claims, indent=2) + "\n")
    if not all(row["equal"] for row in claims):
        sys.exit("the servers differ")


if __name__ == "__main__":
    main()
