"""What a notebook asks of a Kubernetes cluster by kubectl.

Copy: this file. (With e2e_utils/programs.py. It needs kubectl.)

Every call names its context, so that nothing ends up on whatever cluster kubectl
happens to point at.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import TextWrapper
from urllib.parse import urlsplit

from e2e_utils.programs import run_program

# Envoy Gateway's service of the gateway that kserve_install.sh makes
_GATEWAY = (
    "get service -n envoy-gateway-system -o name "
    "-l gateway.envoyproxy.io/owning-gateway-name=kserve-ingress-gateway"
)
_MOST = 60  # s that a command may take
# where kserve_install.sh puts kubectl, which may not be on the path of Jupyter
_TOOLS = Path(__file__).parents[1] / "runs" / "bin"


def _program() -> str:
    """kubectl of the path, or the one that kserve_install.sh has downloaded."""
    downloaded = shutil.which("kubectl", path=_TOOLS)
    return downloaded if downloaded and not shutil.which("kubectl") else "kubectl"


def kubectl(context: str, command: str) -> str:
    """What a kubectl command prints.

    Args:
        context: of the kubeconfig, such as "kind-kserve".
        command: after `kubectl --context CONTEXT`, quoted as for a shell.

    Raises:
        RuntimeError: it failed, with its reason; or it took longer than a minute, or
            kubectl is neither on the path nor in runs/bin.
    """
    words = (_program(), "--context", context, *shlex.split(command))
    try:
        return run_program(*words, seconds=_MOST)
    except RuntimeError as error:
        raise RuntimeError(f"kubectl {command}: {error}") from error


def is_there(context: str) -> bool:
    """Whether kubectl is there and a cluster answers under this context.

    Example:
        >>> is_there("no-such-cluster")
        False
    """
    try:
        return kubectl(context, "get --raw /readyz --request-timeout=10s") == "ok"
    except RuntimeError:
        return False


def planned(script: str | Path, *options: str, folder: str | Path = ".") -> str:
    """The installations of kserve_install.sh, as for a shell; nothing is installed.

    Args:
        script: its path, from `folder`.
        options: of the script.
        folder: from which its paths count.

    Returns:
        Whole commands in its order, each on as many lines of 90 characters as needed.

    Raises:
        RuntimeError: the script failed, with its reason.
    """
    said = run_program("bash", str(script), *options, "--dry-run", folder=folder)
    starts = ("kind create", "helm upgrade")
    lines = [line for line in said.splitlines() if line.startswith(starts)]
    # an option stays beside its value, by a space at which no line is broken
    lines = [re.sub(r"( --\S+) (?!-)", "\\1\xa0", line) for line in lines]
    fold = TextWrapper(
        88, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    folded = "\n".join(" \\\n".join(fold.wrap(line)) for line in lines)
    return folded.replace("\xa0", " ")


def host_of(context: str, service: str) -> str:
    """The Host header by which the gateway finds an InferenceService.

    Raises:
        RuntimeError: there is no such service, or it has no address yet.
    """
    command = f"get inferenceservice {service} -o jsonpath={{.status.url}}"
    host = urlsplit(kubectl(context, command)).hostname
    if not host:
        raise RuntimeError(f"inferenceservice {service} has no URL: it is not ready")
    return host


@contextmanager
def gateway(context: str) -> Iterator[str]:
    """Forward a free port of this machine to the cluster's gateway; its base URL.

    Raises:
        RuntimeError: there is no gateway of kserve_install.sh in Standard mode, or
            kubectl cannot forward to it.
    """
    services = kubectl(context, _GATEWAY).split()
    if not services:
        raise RuntimeError(f"{context} has no gateway named kserve-ingress-gateway")
    arguments = ("port-forward", "-n", "envoy-gateway-system", services[0], ":80")
    forward = subprocess.Popen(
        [_program(), "--context", context, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = forward.stdout.readline() if forward.stdout else ""
        port = re.search(r"127\.0\.0\.1:(\d+)", said)
        if port is None:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {said.strip()}")
        yield f"http://127.0.0.1:{port[1]}"
    finally:
        forward.terminate()
        forward.wait()
