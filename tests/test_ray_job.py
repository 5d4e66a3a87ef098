"""`ray job submit` to a cluster of a head and a second node, both on loopback."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import requests
import torch
from commands import run
from serving import ROOT, checkpoint

from e2e_utils.checkpoint import model_from_checkpoint
from kserve_utils.servers import _free_ports

pytest.importorskip("ray")

pytestmark = pytest.mark.slow
RAY = Path(sys.executable).with_name("ray")
PATIENCE = 120  # seconds for what takes five on idle cores
ENVIRONMENT = {
    "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",  # the job says `python`
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ADDRESS": None,  # of somebody's own cluster
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": None,  # the code comes with the job
}


def get(address: str) -> requests.Response | None:
    with contextlib.suppress(requests.RequestException):
        return requests.get(address, timeout=10)
    return None


def wait_for(what: str, true, logs: list[Path]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            told = "\n".join(log.read_text(errors="replace") for log in logs)
            pytest.fail(f"no {what} after {PATIENCE} s:\n{told}")
        time.sleep(0.2)


def tree(process: subprocess.Popen) -> set[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        own = psutil.Process(process.pid)
        return {own, *own.children(recursive=True)}
    return set()


@pytest.fixture(scope="module")
def cluster():
    """The dashboard's address of a Ray of two nodes with one CPU each.

    Nothing outside is touched: all ports are free ones, and what is stopped at the end
    are the processes below the two that were started here.
    """
    folder = Path(tempfile.mkdtemp(prefix="r"))  # short: sockets go there
    gcs, dashboard, client, *others = _free_ports(11)
    url = f"http://127.0.0.1:{dashboard}"
    names = ["agent-listen", "agent-grpc"]
    names = [f"dashboard-{name}" for name in names] + ["metrics-export"]
    names += ["runtime-env-agent"]
    head = ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    head += ["--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}"]
    head += ["--include-dashboard=true", f"--temp-dir={folder}"]
    env = {**os.environ, **ENVIRONMENT}
    env = {name: value for name, value in env.items() if value is not None}
    nodes, logs = [], []
    try:
        for special in (head, [f"--address=127.0.0.1:{gcs}"]):
            ports = [f"--{name}-port={others.pop()}" for name in names]
            command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1"]
            command += ["--num-cpus=1", "--object-store-memory=100000000"]
            logs.append(folder / f"node-{len(nodes)}.log")
            with logs[-1].open("wb") as log:
                node = subprocess.Popen(
                    [*command, *special, *ports],
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            nodes.append(node)
            if special is head:
                wait_for("dashboard", lambda: get(f"{url}/api/version"), logs)
        wait_for("second node", lambda: len(alive(url)) == 2, logs)
        yield url
    finally:
        started = set().union(*map(tree, nodes))
        for process in started:  # `ray stop` would stop every Ray of this machine
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=30)
        for node in nodes:
            node.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def alive(url: str) -> set[str]:
    """Ids of the nodes that live."""
    return {row["node_id"] for row in listed(url, "nodes") if row["state"] == "ALIVE"}


def listed(url: str, what: str) -> list[dict]:
    """Rows of Ray's state API."""
    answer = get(f"{url}/api/v0/{what}?limit=1000")
    return answer.json()["data"]["result"]["result"] if answer and answer.ok else []


def train(tiles: Path, folder: Path) -> list:
    command = ["train.py", "--config", "determined_files/fake.yaml"]
    command += ["--tiles", tiles, "--storage", folder, "--no-gpu", "--workers", 2]
    return [*command, "max_batches=2", "global_batch_size=2"]


def check_training(folder: Path) -> None:
    (best,) = folder.glob("xview_fake/checkpoint_*/best.pt")
    _, meta = model_from_checkpoint(best)
    assert meta["class_names"] == ["background", "square", "bar", "dot"]


def predict(tiles: Path, folder: Path) -> list:
    torch.save(checkpoint(), folder / "best.pt")
    scenes = folder / "scenes"
    scenes.mkdir()
    for index in range(4):
        rng = np.random.default_rng(index)
        scene = rng.integers(0, 256, (320, 320, 3), np.uint8)
        cv2.imwrite(str(scenes / f"scene_{index}.png"), scene)
    command = ["predict.py", "--scenes", scenes, "--checkpoint", folder / "best.pt"]
    return [*command, "--output", folder / "boxes", "--workers", 2]


def check_prediction(folder: Path) -> None:
    for index in range(4):
        assert list((folder / "boxes").rglob(f"scene_{index}*"))


@pytest.mark.parametrize(
    ("arguments", "worker", "check"),
    [
        pytest.param(train, "RayTrainWorker", check_training, id="train"),
        pytest.param(predict, "MapWorker", check_prediction, id="predict"),
    ],
)
def test_a_submitted_job_runs_on_both_nodes(
    cluster, tiles, tmp_path, arguments, worker, check
):
    script, *rest = arguments(tiles, tmp_path)
    if not (ROOT / "ray_files" / script).is_file():
        pytest.skip(f"no ray_files/{script}")
    code = tmp_path / "code"
    for room in ("e2e_utils", "ray_files", "determined_files"):
        shutil.copytree(ROOT / room, code / room)
    before = {row["actor_id"] for row in listed(cluster, "actors")}
    done = run(
        *(RAY, "job", "submit", "--address", cluster, "--working-dir", code, "--"),
        *("python", f"ray_files/{script}", *rest),
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check(tmp_path)
    rows = [row for row in listed(cluster, "actors") if row["actor_id"] not in before]
    used = {row["node_id"] for row in rows if worker in row["class_name"]}
    assert used == alive(cluster)
