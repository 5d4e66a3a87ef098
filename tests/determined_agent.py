"""The agent of the test double in determined_master.py: trials as processes.

A trial is the experiment's entrypoint, run by determined.exec.launch among the files
that `det e create` uploaded. It learns of its cluster from the info files that a
container has, written by Determined's own classes. There is no container: the process
is this machine's, in a folder of its own.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import determined as det
import psutil

# Of a container's /run/determined Determined reads the info files and the uploaded
# code. A test must not write there: with this every Python below the agent looks
# elsewhere for both.
SITECUSTOMIZE = """
import importlib.machinery, os, sys

def redirect(module):
    if module.__name__ == "determined.constants":
        module.MANAGED_TRAINING_MODEL_COPY = os.environ["E2E_CONTEXT_DIR"]
        return
    for kind in ("Cluster", "Trial", "Rendezvous", "Resources"):
        file = os.path.join(os.environ["E2E_INFO_DIR"], kind.lower() + ".json")
        getattr(module, kind + "Info")._from_file.__func__.__defaults__ = (file,)

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in ("determined._info", "determined.constants"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), redirect(module))
        return spec

sys.meta_path.insert(0, Finder)
"""


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def kill_tree(started: subprocess.Popen) -> None:
    """End a process and all that it started (torchrun's workers leave its group)."""
    if started.poll() is not None:
        return
    family = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=10)


def run_trial(trial, folder: Path, address: str, token: str) -> int:
    """Run a trial until it ends; its exit code."""
    allocation = f"{trial.id}.{trial.runs}.{os.getpid()}"
    work = folder / f"trial_{trial.id}_{trial.runs}"
    info, temporary = work / "info", work / "tmp"
    for each in (work / "context", work / "site", info, temporary):
        each.mkdir(parents=True)
    (work / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    for file in trial.experiment.files:
        path = work / "context" / file.path
        if file.type == ord(tarfile.DIRTYPE):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(file.content))
    _write_info(trial, allocation, info, address, token)
    ports = free_ports(3)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(work / "site"),
        "E2E_INFO_DIR": str(info),
        "E2E_CONTEXT_DIR": str(work / "context"),
        "TMPDIR": str(temporary),
        "DET_MASTER": address,
        "DET_USER": "determined",
        "DET_SESSION_TOKEN": token,
        "DET_ALLOCATION_ID": allocation,
        "DET_RESOURCES_ID": f"resources-{allocation}",
        "C10D_PORT": ports[0],
        "INTER_TRAIN_PROCESS_COMM_PORT_1": ports[1],
        "INTER_TRAIN_PROCESS_COMM_PORT_2": ports[2],
    }
    trial.logs.append(work / "log.txt")
    with trial.logs[-1].open("w") as log:
        trial.process = subprocess.Popen(
            [sys.executable, "-m", "determined.exec.launch"],
            cwd=work / "context",
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        code = trial.process.wait()
    # Determined's fixed places for the events of a run and its launcher's socket
    shutil.rmtree(f"/tmp/tensorboard-{allocation}-0", ignore_errors=True)
    Path(f"/tmp/pid_server-{allocation}").unlink(missing_ok=True)
    return code


def _write_info(trial, allocation: str, folder: Path, address: str, token: str) -> None:
    config = trial.experiment.config
    slots = config["resources"]["slots_per_trial"]
    latest = trial.checkpoints[-1] if trial.checkpoints else None
    det.ClusterInfo(
        master_url=address,
        cluster_id="test-double",
        agent_id="agent",
        slot_ids=list(range(slots)),
        task_id=f"task-{trial.id}",
        allocation_id=allocation,
        session_token=token,
        task_type="TRIAL",
        latest_checkpoint=latest.uuid if latest else None,
    )._to_file(str(folder / "cluster.json"))
    det.TrialInfo(
        trial_id=trial.id,
        experiment_id=trial.experiment.id,
        trial_seed=trial.id,
        hparams=trial.hparams,
        config=config,
        steps_completed=latest.metadata["steps_completed"] if latest else 0,
        trial_run_id=trial.runs,
        debug=False,
        inter_node_network_interface=None,
    )._to_file(str(folder / "trial.json"))
    det.RendezvousInfo(["127.0.0.1"], 0, [slots])._to_file(
        str(folder / "rendezvous.json")
    )
    det.ResourcesInfo(gpu_uuids=[])._to_file(str(folder / "resources.json"))
