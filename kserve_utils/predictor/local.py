"""The predictor as a real server on this machine, for as long as a `with` block lasts.

    with predictor("artefact", engine="openvino") as base_url:
        ...

Copy: the package kserve_utils, whose torchserve_utils/local.py runs the process.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import requests

from kserve_utils.torchserve_utils.local import free_ports, server_process, tail


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
        artefact_dir: written by `e2e_utils.artefact.write_artefact`.
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
    command += ["--host", "127.0.0.1", "--http_port", str(http)]
    command += ["--grpc_port", str(grpc), "--drain_delay", "0"]
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
        _wait_ready(address, server, log, ready_timeout)
        yield address


def _wait_ready(
    address: str, server: subprocess.Popen, log: Path, timeout: float
) -> None:
    session, end = requests.Session(), time.monotonic() + timeout
    session.trust_env = False  # a proxy does not know this machine's loopback
    while True:
        with contextlib.suppress(requests.RequestException):
            if session.get(f"{address}/v2/health/ready", timeout=5).ok:
                return
        if server.poll() is not None:
            raise RuntimeError(f"the predictor ended by itself:\n{_said(log)}")
        if time.monotonic() > end:
            raise RuntimeError(f"not ready after {timeout:g} s:\n{_said(log)}")
        time.sleep(0.1)


def _said(log: Path) -> str:
    return tail(log.read_text(errors="replace"))
