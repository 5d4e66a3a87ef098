"""The predictor's engines against TorchServe: the same weights, pictures and requests.

    python benchmarks/serve.py            # a ResNet-50 Faster R-CNN: 20 minutes
    python benchmarks/serve.py --quick    # fasterrcnn_small: three minutes
    python benchmarks/serve.py --checkpoint runs/demo/training/best.pt \\
        --tiles runs/demo/tiles           # one's own detector and labelled tiles
    python benchmarks/serve.py --url http://localhost:8080 \\
        --host xview-predictor-default.example.com --clients 8 --requests 50

The last puts load to a server that runs somewhere, a predictor in a cluster behind its
gateway or TorchServe, and prints pictures a second, what a client waits, and errors by
kind: nothing is started or compared. Without --url:

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
import contextlib
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from served.claims import (
    CLIENTS,
    ap_claim,
    claims_of,
    show_claims,
    show_targets,
    verdict,
)
from served.load import body_of, load, measure_url
from served.subject import (
    Subject,
    decode,
    drawn,
    own,
    self_labelled,
    trained,
    untrained,
)

from e2e_utils.hardware import native_precisions
from kserve_utils.approve import MAX_DROP, approve_precision
from kserve_utils.artefact import write_artefact
from kserve_utils.client import predict_remote
from kserve_utils.engines import read_artefact
from kserve_utils.export import write_mar, write_model_store
from kserve_utils.servers import predictor, torchserve

MODEL = "xview-fasterrcnn"


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


def checked(base: str, bodies: list[bytes], clients: int, each: int) -> dict:
    """`load` of a server of which no request may fail."""
    found = load(base, MODEL, bodies, clients, each)
    if found["errors"]:
        sys.exit(f"{base}: requests failed: {dict(found['errors'])}")
    return found


def measure(servers: dict, bodies: list[bytes], each: int, rounds: int) -> dict:
    """Per server the best round at one client and at eight, and its memory."""
    best: dict = {name: {} for name in servers}
    for base, _ in servers.values():  # every worker's first pictures do not count
        checked(base, bodies, CLIENTS, 3)
    for _ in range(rounds):
        for name, (base, processes) in servers.items():
            for clients in (1, CLIENTS):
                found = checked(base, bodies, clients, each)
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
    add("--url", help="put load to this server, or to the gateway before it")
    add("--host", help="of --url: Host header by which a gateway finds it")
    add("--model-name", default=MODEL, help="of --url: the model in the path")
    add("--clients", type=int, default=CLIENTS, help="of --url: at the same time")
    add("--picture", type=Path, nargs="+", help="of --url: files, else drawn ones")
    found = parser.parse_args()
    if min(found.clients, found.requests) < 1:
        parser.error("--clients and --requests begin at 1")
    if (found.checkpoint is None) != (found.tiles is None):
        parser.error("--checkpoint and --tiles come together")
    found.rounds = found.rounds or (2 if found.quick else 4)
    small = "fasterrcnn_small" if found.quick else "fasterrcnn_resnet50_fpn"
    found.model = found.model or small
    if found.checkpoint is None and "fasterrcnn" not in found.model:
        parser.error(f"{found.model}: untrained, only Faster R-CNNs find boxes here")
    return found


def put_load(arguments: argparse.Namespace) -> None:
    """What --url asks for."""
    try:
        pictures = [path.read_bytes() for path in arguments.picture or []] or drawn(8)
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
    where = (arguments.url, arguments.model_name, arguments.host)
    measure_url(*where, pictures, arguments.clients, arguments.requests, arguments.json)


def main() -> None:
    arguments = parse()
    if arguments.url:
        put_load(arguments)
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
        bodies = [body_of(content) for content in contents]
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
