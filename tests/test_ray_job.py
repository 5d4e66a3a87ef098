"""`ray job submit` to a cluster of a head and a second node, both on loopback."""

import json
import os
import secrets
import shutil
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import requests
import torch
from commands import run
from serving import ROOT, checkpoint

from e2e_utils.checkpoint import model_from_checkpoint
from kserve_utils import servers

pytest.importorskip("ray")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="one loopback address there"),
]
RAY = Path(sys.executable).with_name("ray")
# Loopback as well. 127.0.0.1 Ray would replace by the machine's address in its network.
ADDRESSES = ("127.0.0.2", "127.0.0.3")
TOKEN = secrets.token_hex(16)  # some of its ports are open on every address
ENVIRONMENT = {
    "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",  # the job says `python`
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": "",  # the code comes with the job
}
# Both actors first: else the first may be done with these few scenes before the other
# has started. What there is to do then goes to both.
JOB = {"env_vars": {"RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": "300"}}


def get(address: str) -> requests.Response | None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    try:
        return requests.get(address, headers=headers, timeout=10)
    except requests.RequestException:
        return None


def listed(url: str, what: str) -> list[dict]:
    """Rows of Ray's state API."""
    answer = get(f"{url}/api/v0/{what}?limit=1000")
    return answer.json()["data"]["result"]["result"] if answer and answer.ok else []


def alive(url: str) -> set[str]:
    """Ids of the nodes that live."""
    return {row["node_id"] for row in listed(url, "nodes") if row["state"] == "ALIVE"}


@pytest.fixture(scope="module")
def cluster():
    """The dashboard's address of a Ray of two nodes with one CPU each.

    It ends with the tests, whatever becomes of them. All ports are free ones, and no
    `ray stop` runs, which would stop every Ray of this machine.
    """
    gcs, dashboard, client, *others = servers._free_ports(27)
    url = f"http://127.0.0.1:{dashboard}"
    names = ["dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export"]
    names += ["runtime-env-agent"]

    def node(address: str, *flags: str, ready):
        folder = tempfile.mkdtemp(prefix="r")  # short: sockets go there
        command = [str(RAY), "start", "--block", f"--node-ip-address={address}"]
        command += ["--num-cpus=1", "--object-store-memory=100000000", *flags]
        command += [f"--{name}-port={others.pop()}" for name in names]
        command += [f"--temp-dir={folder}"] if "--head" in flags else []
        environment = {**ENVIRONMENT, "TMPDIR": folder}
        return servers._running("Ray", command, environment, ready)

    head = ["--head", f"--port={gcs}", f"--ray-client-server-port={client}"]
    head += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    second = f"--address={ADDRESSES[0]}:{gcs}"
    with ExitStack() as stack:
        for address, flags, nodes in ((0, head, 1), (1, [second], 2)):
            for last in (False, False, True):  # Ray gives a node 30 s, loaded or not
                try:
                    ready = partial(lambda n: len(alive(url)) == n, nodes)
                    started = node(ADDRESSES[address], *flags, ready=ready)
                    stack.enter_context(started)
                    break
                except RuntimeError as error:
                    if last or "timed out during startup" not in str(error):
                        raise
        yield url


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
        *(RAY, "job", "submit", "--address", cluster, "--working-dir", code),
        *("--runtime-env-json", json.dumps(JOB)),
        *("--", "python", f"ray_files/{script}", *rest),
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check(tmp_path)
    rows = [row for row in listed(cluster, "actors") if row["actor_id"] not in before]
    used = [row["node_id"] for row in rows if worker in row["class_name"]]
    assert len(used) >= 2
    assert set(used) == alive(cluster)
