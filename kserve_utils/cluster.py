"""What a notebook asks of a Kubernetes cluster by kubectl, and shows of its manifests.

Copy: this file. (It needs kubectl, and PyYAML for `excerpt`.)

Every call names its context, so that nothing ends up on whatever cluster kubectl
happens to point at.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

STORE = "model-store-pod"  # of k8s_files/model-store-pod.yaml
# Envoy Gateway's service of the gateway that kserve_install.sh makes
_GATEWAY = (
    "get service -n envoy-gateway-system -o name "
    "-l gateway.envoyproxy.io/owning-gateway-name=kserve-ingress-gateway"
).split()


def kubectl(context: str, *arguments: str, seconds: float = 60) -> str:
    """What a kubectl command prints.

    Args:
        context: of the kubeconfig, such as "kind-kserve".
        arguments: after `kubectl --context CONTEXT`.
        seconds: that it may take.

    Raises:
        RuntimeError: it failed, with its reason; or it took longer, or is not there.
    """
    said = " ".join(("kubectl", *arguments))
    command = ["kubectl", "--context", context, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except FileNotFoundError as error:
        raise RuntimeError(f"{said}: kubectl is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{said}: no answer in {seconds:g} s") from error
    if done.returncode:
        raise RuntimeError(f"{said}: {done.stderr.strip()}")
    return done.stdout.strip()


def is_there(context: str) -> bool:
    """Whether kubectl is there and a cluster answers under this context."""
    if shutil.which("kubectl") is None:
        return False
    try:
        return kubectl(context, "get", "--raw", "/readyz", seconds=10) == "ok"
    except RuntimeError:
        return False


def apply(context: str, *files: str | Path) -> str:
    """Apply manifests, in this order; what kubectl says. RuntimeError as `kubectl`."""
    named = [word for file in files for word in ("-f", str(file))]
    return kubectl(context, "apply", *named)


def wait(context: str, what: str, minutes: int = 10) -> None:
    """Wait until an object, such as "pod/x", is Ready; RuntimeError if it is not."""
    arguments = ("wait", "--for=condition=Ready", what, f"--timeout={minutes}m")
    kubectl(context, *arguments, seconds=60 * minutes + 10)


def copy_in(context: str, folder: str | Path, target: str) -> str:
    """Put a folder onto the claim of the model-store pod, in place of an older one.

    Args:
        context: see `kubectl`.
        folder: on this machine.
        target: its name on the claim, such as "xview-artefact".

    Returns:
        The list of files that are there then.

    Raises:
        RuntimeError: see `kubectl`.
    """
    wait(context, f"pod/{STORE}", 5)
    inside = ("exec", STORE, "--")
    # `cp` would put the folder inside one that exists
    kubectl(context, *inside, "rm", "-rf", f"/pv/{target}")
    kubectl(context, "cp", str(folder), f"{STORE}:/pv/{target}", seconds=600)
    return kubectl(context, *inside, "ls", f"/pv/{target}")


def host_of(context: str, service: str) -> str:
    """The Host header by which the gateway finds an InferenceService.

    Raises:
        RuntimeError: there is no such service, or it has no address yet.
    """
    arguments = ("get", "inferenceservice", service, "-o", "jsonpath={.status.url}")
    host = urlsplit(kubectl(context, *arguments)).hostname
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
    services = kubectl(context, *_GATEWAY).split()
    if not services:
        raise RuntimeError(f"{context} has no gateway named kserve-ingress-gateway")
    arguments = ("port-forward", "-n", "envoy-gateway-system", services[0], ":80")
    forward = subprocess.Popen(
        ["kubectl", "--context", context, *arguments],
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


def excerpt(path: str | Path, kind: str, *fields: str) -> str:
    """Part of a manifest, as YAML.

    Args:
        path: a YAML file of Kubernetes objects.
        kind: of the object in it; the first of them.
        fields: what is shown of it, such as "spec.predictor.model" or, of a list,
            "spec.containers.0.args"; the rest is left out without a mark, as are the
            comments.

    Raises:
        ValueError: the file has no such object, or this no such field.
    """
    import yaml

    objects = list(yaml.safe_load_all(Path(path).read_text()))
    found = next((one for one in objects if one["kind"] == kind), None)
    if found is None:
        there = ", ".join(one["kind"] for one in objects)
        raise ValueError(f"{path} has no {kind}; it has {there}")
    shown: Any = {"kind": kind}
    for field in fields:
        try:
            shown = _merged(shown, _part(found, field.split(".")))
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ValueError(f"{kind} of {path} has no field {field!r}") from error
    shown = {key: shown[key] for key in found if key in shown}  # in the file's order
    return str(yaml.safe_dump(shown, sort_keys=False, width=1000))


def _part(source: Any, keys: list[str]) -> Any:
    """What lies at a path of keys, in what is around it."""
    if not keys:
        return source
    key, *rest = keys
    if isinstance(source, list):
        return [_part(source[int(key)], rest)]
    return {key: _part(source[key], rest)}


def _merged(one: Any, other: Any) -> Any:
    if isinstance(one, list):
        return [_merged(one[0], other[0])]
    if not isinstance(one, dict):
        return other
    common = {key: _merged(one[key], other[key]) for key in one if key in other}
    return {**one, **other, **common}
