"""What goes to kubectl and comes back; a test double of kubectl stands on PATH."""

import json
import os

import pytest

from kserve_utils import cluster

# A test double: it writes down what it is asked, and says what FAKE has for it. Its
# port-forward leads to a port that somebody else listens on.
FAKE = """#!/usr/bin/env python3
import json, os, sys, time
with open(os.environ["ASKED"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
asked = " ".join(sys.argv[3:])
for start, (code, text) in json.loads(os.environ["FAKE"]).items():
    if asked.startswith(start):
        print(text, file=sys.stderr if code else sys.stdout, flush=True)
        time.sleep(60 if start == "port-forward" and not code else 0)
        sys.exit(code)
"""


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """Sets the answers of the double; what was asked then, without the context."""
    program = tmp_path / "kubectl"
    program.write_text(FAKE)
    program.chmod(0o755)
    asked = tmp_path / "asked"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("ASKED", str(asked))

    def answer(said: dict) -> None:
        monkeypatch.setenv("FAKE", json.dumps(said))

    def lines() -> list[str]:
        rows = [json.loads(line) for line in asked.read_text().splitlines()]
        assert {tuple(row[:2]) for row in rows} == {("--context", "kind-x")}
        return [" ".join(row[2:]) for row in rows]

    answer.asked = lines
    answer({})
    return answer


def test_a_cluster_answers_if_it_says_so_and_a_failure_has_kubectls_reason(kubectl):
    kubectl({"get --raw /readyz": (0, "ok")})
    assert cluster.answers("kind-x")
    kubectl({"get": (1, "context kind-x does not exist")})
    assert not cluster.answers("kind-x")
    with pytest.raises(RuntimeError, match="^kubectl get pods: context kind-x does"):
        cluster.kubectl("kind-x", "get", "pods")


def test_without_kubectl_no_cluster_answers(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not cluster.answers("kind-x")
    with pytest.raises(
        RuntimeError, match="kubectl get pods: kubectl is not installed"
    ):
        cluster.kubectl("kind-x", "get", "pods")


def test_a_folder_takes_the_place_of_an_older_one_once_the_pod_is_ready(kubectl):
    kubectl({"exec model-store-pod -- ls": (0, "detector.json")})
    assert cluster.copy_in("kind-x", "here/artefact", "xview") == "detector.json"
    waited, removed, copied, _ = kubectl.asked()
    assert waited.startswith("wait --for=condition=Ready pod/model-store-pod")
    assert removed == "exec model-store-pod -- rm -rf /pv/xview"
    assert copied == "cp here/artefact model-store-pod:/pv/xview"


def test_the_host_is_that_of_the_services_url_and_missing_while_it_has_none(kubectl):
    kubectl({"get inferenceservice seen": (0, "http://seen-default.example.com")})
    assert cluster.host_of("kind-x", "seen") == "seen-default.example.com"
    with pytest.raises(RuntimeError, match="other has no URL: it is not ready"):
        cluster.host_of("kind-x", "other")


def test_the_gateway_is_reached_by_a_port_that_closes_with_the_block(kubectl):
    service = {"get service": (0, "service/envoy-kserve")}
    forward = (0, "Forwarding from 127.0.0.1:43210 -> 10080")
    kubectl({**service, "port-forward": forward})
    with cluster.gateway("kind-x") as url:
        assert url == "http://127.0.0.1:43210"
    assert kubectl.asked()[-1].endswith("service/envoy-kserve :80")
    kubectl({**service, "port-forward": (1, "unable to forward")})
    with pytest.raises(RuntimeError, match=":80: unable to forward"):
        with cluster.gateway("kind-x"):
            pass
    kubectl({})
    with pytest.raises(RuntimeError, match="kind-x has no gateway"):
        with cluster.gateway("kind-x"):
            pass


MANIFEST = """
kind: Pod
metadata: {name: a}
---
kind: Service
metadata: {name: b, labels: {c: d}}
spec:
  ports: [{port: 1, name: e}, {port: 2, name: f}]
"""


def test_an_excerpt_shows_the_fields_that_are_named_and_no_others(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(MANIFEST)
    fields = ("metadata.name", "spec.ports.1.port", "spec.ports.1.name")
    text = cluster.excerpt(path, "Service", *fields).data
    assert text.splitlines() == [
        "kind: Service",
        "metadata:",
        "  name: b",
        "spec:",
        "  ports:",
        "  - port: 2",
        "    name: f",
    ]
    with pytest.raises(ValueError, match="some.yaml has no Route; it has Pod, Service"):
        cluster.excerpt(path, "Route")
    for field in ("metadata.owner", "spec.ports.2", "spec.ports.x", "kind.of"):
        with pytest.raises(ValueError, match=f"some.yaml has no field '{field}'"):
            cluster.excerpt(path, "Service", field)
