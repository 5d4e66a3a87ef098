"""An archive of scenes on Ray Data against plain processes, and against SAHI's loop.

    python benchmarks/archive.py            # half an hour on two idle cores
    python benchmarks/archive.py --quick    # some minutes
    python benchmarks/archive.py --checkpoint runs/demo/training/best.pt

Efficiency: 1, 2 and 4 actors of one thread, and three on a simulated cluster of three
nodes of this machine, against as many plain processes at once that each run
`predict_scene` over their share of the folder and write the same files; the bytes are
compared. SAHI: against one process that runs `get_sliced_prediction` over the folder,
as benchmarks/predict.py does it, ours with border=0; every box is compared. Scenes a
second are those of each process while it is at work, added up: how long torch takes to
import is no matter of how the work is shared out. All sides in turns; the best counts.

Memory is the peak of all processes of the node (PSS: what they share counts once), with
Ray's own and this one, for ten times the scenes; and that of the actor for a scene four
times as large, where both are above the block size. Linux alone tells it.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import rasterio
import torch
from predict import OVERLAP, SCORE, SIZE, make_model, make_scene, matched, theirs
from rasterio.transform import Affine

from e2e_utils.checkpoint import model_from_checkpoint, save_checkpoint
from e2e_utils.georeference import write_boxes
from e2e_utils.predict import predict_scene

MACHINE = f"{os.cpu_count()} x {platform.machine()}, torch {torch.__version__}"
BATCH = 4


def write_archive(folder: Path, count: int, side: int) -> Path:
    """Tiled, compressed TIFFs of side x side px, no two alike."""
    folder.mkdir()
    pixels = make_scene(side)
    kind = {"width": side, "height": side, "count": 3, "dtype": "uint8"}
    kind |= {"crs": "EPSG:32633", "transform": Affine(0.3, 0, 5e5, 0, -0.3, 5e6)}
    kind |= {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    for i in range(count):
        part = np.roll(pixels, (37 * i, 91 * i), (0, 1)).transpose(2, 0, 1)
        with rasterio.open(folder / f"{i:03}.tif", "w", driver="GTiff", **kind) as file:
            file.write(part)
    return folder


def write_checkpoint(path: Path) -> str:
    """An untrained detector that finds some boxes on a tile."""
    names = ["background", *(f"class {i}" for i in range(1, 61))]
    content = {"model": make_model("fasterrcnn_small", None).state_dict()}
    content |= {"architecture": "fasterrcnn_small", "settings": {}, "stretch": None}
    content |= {"class_names": names, "tile_size": SIZE, "overlap": OVERLAP}
    save_checkpoint(path, content)
    return str(path)


# ---- the peers, each in processes of its own


def be_peer(arguments: argparse.Namespace) -> None:
    """One of the peer's processes: "ready", a line in, its share, and its rate."""
    side, number, of = arguments.peer
    torch.set_num_threads(1)
    model, meta = model_from_checkpoint(arguments.checkpoint)
    output, scenes = Path(arguments.output), sorted(Path(arguments.scenes).iterdir())
    print("ready", flush=True)
    sys.stdin.readline()
    began, mine = time.perf_counter(), scenes[int(number) :: int(of)]
    for path in mine:
        if side == "SAHI":
            with rasterio.open(path) as file:
                pixels = file.read().transpose(1, 2, 0)
            np.save(
                output / path.stem, theirs(model, np.ascontiguousarray(pixels), "cpu")
            )
            continue
        names = {"class_names": meta["class_names"], "score_threshold": SCORE}
        found = predict_scene(model, path, SIZE, OVERLAP, BATCH, **names)
        write_boxes(output / f"{path.name}.geojson", {path.name: found})
    print(len(mine) / (time.perf_counter() - began), flush=True)


def peers(side: str, count: int, scenes: Path, checkpoint: str, output: Path) -> float:
    """Scenes a second of so many processes at once."""
    output.mkdir()
    line = [sys.executable, __file__, "--checkpoint", checkpoint]
    line += ["--scenes", str(scenes), "--output", str(output)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([*line, "--peer", side, str(i), str(count)], **pipes)
        for i in range(count)
    ]
    for process in started:
        process.stdout.readline()
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    rates = [process.communicate()[0].split() for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"a process of {side} failed")
    return sum(float(words[-1]) for words in rates)


# ---- ours


def ours(count: int, scenes: Path, checkpoint: str, output: Path, **options) -> float:
    """Scenes a second of so many actors."""
    from ray_files.predict import predict_archive

    options = {"score_threshold": SCORE, "batch_size": BATCH, "gpu": False, **options}
    options |= {"size": SIZE, "overlap": OVERLAP}
    report = predict_archive(
        str(scenes), checkpoint, str(output), workers=count, **options
    )
    if report.failed:
        sys.exit(str(report))
    at_work = (a for a in report.actors.values() if a["to"] > a["from"])
    return sum(a["scenes"] / (a["to"] - a["from"]) for a in at_work)


def same_bytes(one: Path, other: Path) -> bool:
    files = sorted(file.name for file in one.glob("*.tif.geojson"))
    return bool(files) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in files
    )


def same_boxes(sahi: Path, output: Path) -> bool:
    """Every box of SAHI, class and score, in our COCO results, and no other."""
    for file in sahi.glob("*.npy"):
        rows = json.loads((output / f"{file.stem}.tif.json").read_text())
        xywh = np.array([row["bbox"] for row in rows]).reshape(-1, 4)
        labels = [row["category_id"] + 1 for row in rows]
        scores = [row["score"] for row in rows]
        corners = np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])
        if matched(np.load(file), np.column_stack([corners, labels, scores])) < 1:
            return False
    return True


@contextlib.contextmanager
def three_nodes() -> Iterator[None]:
    """A cluster of three nodes of a CPU each, on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    one = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=one)
    for _ in range(2):
        cluster.add_node(**one)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def is_actor(process: psutil.Process) -> bool:
    return "MapWorker" in " ".join(process.cmdline())


def peak_of(work: Callable[[], object], actors_alone: bool = False) -> float:
    """The most MB that the processes from here down had while `work` ran."""
    most, done = 0.0, threading.Event()
    there = psutil.Process().children(recursive=True)
    psutil.wait_procs(filter(is_actor, there), timeout=60)  # of the run before

    def watch() -> None:
        nonlocal most
        while not done.wait(0.3):
            this, sizes = psutil.Process(), [0]
            for process in [this, *this.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    if not actors_alone or is_actor(process):
                        sizes.append(process.memory_full_info().pss)
            # an actor of the blocks may start before that of the scenes has ended
            most = max(most, (max if actors_alone else sum)(sizes) / 1e6)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return most


# ---- claims


def claim(what: str, unit: str, ours: float, peer: float, equal: bool, **more) -> dict:
    row = {"claim": what, "unit": unit, "ours": round(ours, 4), "peer": round(peer, 4)}
    ratio = {"ratio": round(ours / peer, 3), "equal": bool(equal), "machine": MACHINE}
    print(f"  {what}: {ours:.3f}, {peer:.3f} {unit}, {ours / peer:.2f}", flush=True)
    return {**row, **ratio, **more}


class Bench:
    """The folder that all sides work in, and how often they do."""

    def __init__(self, root: Path, arguments: argparse.Namespace) -> None:
        self.root, self.runs, self.quick = root, arguments.runs, arguments.quick
        best = root / "best.pt"
        self.checkpoint = arguments.checkpoint or write_checkpoint(best)
        count, side = (8, 900) if self.quick else (24, 1500)
        self.scenes = write_archive(root / "scenes", count, side)
        self.kind = f"{count} scenes of {side:,} px"
        self.outputs = 0

    def new(self) -> Path:
        self.outputs += 1
        return self.root / f"out{self.outputs}"

    def against(self, side: str, count: int, nodes: int = 1, **options) -> dict:
        """So many actors against as many of the peer's processes, in turns."""
        rates, same = {"ours": 0.0, "peer": 0.0}, True
        for _ in range(self.runs):
            one, other = self.new(), self.new()
            given = (count, self.scenes, self.checkpoint)
            rates["peer"] = max(rates["peer"], peers(side, *given, other))
            rates["ours"] = max(rates["ours"], ours(*given, one, **options))
            same &= same_boxes(other, one) if side == "SAHI" else same_bytes(other, one)
        where = f"{nodes} nodes, " if nodes > 1 else ""
        peer = "SAHI's loop" if side == "SAHI" else f"{count} plain process(es)"
        what = f"{where}{count} actor(s), {self.kind}: {peer}"
        return claim(what, "scenes/s", **rates, equal=same, actors=count, nodes=nodes)

    def memory_of_scenes(self) -> dict:
        few, many, side = (10, 100, 320) if self.quick else (20, 200, 450)
        peaks = []
        for count in (few, many):
            scenes = write_archive(self.root / f"many{count}", count, side)
            given = (2, scenes, self.checkpoint, self.new())
            peaks.append(peak_of(lambda given=given: ours(*given)))
        what = f"memory of a node, {many} scenes: {few} scenes"
        return claim(what, "MB", peaks[1], peaks[0], peaks[1] < 1.1 * peaks[0])

    def memory_of_size(self) -> dict:
        side, block_mb = (1500, 3.0) if self.quick else (4000, 24.0)
        peaks = []
        for pixels in (side, 2 * side):
            scenes = write_archive(self.root / f"large{pixels}", 1, pixels)
            given = (1, scenes, self.checkpoint, self.new())
            work = lambda given=given: ours(*given, block_mb=block_mb)  # noqa: E731
            peaks.append(peak_of(work, actors_alone=True))
        what = f"memory of an actor, {2 * side:,} px: {side:,} px"
        return claim(what, "MB", peaks[1], peaks[0], peaks[1] < 1.1 * peaks[0])


def measure(arguments: argparse.Namespace) -> list[dict]:
    from ray_files import adapter

    os.environ |= {**adapter.ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    os.environ.pop("RAY_ADDRESS", None)
    paths = [str(adapter.ROOT), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments)
        print(f"{bench.kind} on {MACHINE}", flush=True)
        with adapter.ray_session(4):
            claims = [bench.against("plain", count) for count in (1, 2, 4)]
            sahi = {"border": 0.0, "format": "json"}
            claims.append(bench.against("SAHI", 1, **sahi))
            if Path("/proc/self/smaps_rollup").exists():
                claims += [bench.memory_of_scenes(), bench.memory_of_size()]
        with three_nodes():
            claims.append(bench.against("plain", 3, nodes=3))
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer, smaller scenes")
    parser.add_argument("--json", metavar="FILE", help="write the claims as JSON")
    parser.add_argument("--checkpoint", help="a trained detector, tiles of 300 px")
    parser.add_argument("--runs", type=int, help="of each side, in turns")
    for name in ("--scenes", "--output"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return be_peer(arguments)
    arguments.runs = arguments.runs or (1 if arguments.quick else 2)
    claims = measure(arguments)
    print(f"\n{'claim':<58}{'unit':>9}{'ours':>9}{'peer':>9}{'ratio':>7}  equal")
    for row in claims:
        numbers = f"{row['ours']:>9.2f}{row['peer']:>9.2f}{row['ratio']:>7.2f}"
        same = "yes" if row["equal"] else "NO"
        print(f"{row['claim']:<58}{row['unit']:>9}{numbers}  {same}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(claims, indent=2) + "\n")
    if not all(row["equal"] for row in claims):
        sys.exit("the two sides differ, or memory grew")


if __name__ == "__main__":
    main()
