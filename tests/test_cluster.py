"""What goes to kubectl and comes back, from a test double of it."""

import pytest
from fake_kubectl import Kubectl

from kserve_utils import cluster


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    return Kubectl(tmp_path, monkeypatch)


def test_a_cluster_answers_if_it_says_so_and_a_failure_has_kubectls_reason(kubectl):
    kubectl.says({"get --raw /readyz": (0, "ok")})
    assert cluster.is_there("kind-x")
    kubectl.says({"get": (1, "context kind-x does not exist")})
    assert not cluster.is_there("kind-x")
    with pytest.raises(RuntimeError, match="^kubectl get pods: context kind-x does"):
        cluster.kubectl("kind-x", "get", "pods")


def test_without_kubectl_no_cluster_answers(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not cluster.is_there("kind-x")
    with pytest.raises(
        RuntimeError, match="kubectl get pods: kubectl is not installed"
    ):
        cluster.kubectl("kind-x", "get", "pods")


def test_a_folder_takes_the_place_of_an_older_one_once_the_pod_is_ready(kubectl):
    kubectl.says(
        {"apply": (0, "made"), "exec model-store-pod -- ls": (0, "detector.json")}
    )
    assert cluster.apply("kind-x", "a.yaml", "b.yaml") == "made"
    assert cluster.copy_in("kind-x", "here/artefact", "xview") == "detector.json"
    applied, waited, removed, copied, _ = kubectl.asked("kind-x")
    assert applied == "apply -f a.yaml -f b.yaml"
    assert waited.startswith("wait --for=condition=Ready pod/model-store-pod")
    assert removed == "exec model-store-pod -- rm -rf /pv/xview"
    assert copied == "cp here/artefact model-store-pod:/pv/xview"


def test_the_host_is_that_of_the_services_url_and_missing_while_it_has_none(kubectl):
    kubectl.says({"get inferenceservice seen": (0, "http://seen-default.example.com")})
    assert cluster.host_of("kind-x", "seen") == "seen-default.example.com"
    with pytest.raises(RuntimeError, match="other has no URL: it is not ready"):
        cluster.host_of("kind-x", "other")


def test_the_gateway_is_reached_by_a_port_that_closes_with_the_block(kubectl):
    service = {"get service": (0, "service/envoy-kserve")}
    forward = (0, "Forwarding from 127.0.0.1:43210 -> 10080")
    kubectl.says({**service, "port-forward": forward})
    with cluster.gateway("kind-x") as url:
        assert url == "http://127.0.0.1:43210"
    assert kubectl.asked("kind-x")[-1].endswith("service/envoy-kserve :80")
    kubectl.says({**service, "port-forward": (1, "unable to forward")})
    with pytest.raises(RuntimeError, match=":80: unable to forward"):
        with cluster.gateway("kind-x"):
            pass
    kubectl.says({})
    with pytest.raises(RuntimeError, match="kind-x has no gateway"):
        with cluster.gateway("kind-x"):
            pass


MANIFEST = """
kind: Pod
metadata: {name: a}
---
apiVersion: v1
kind: Service
metadata: {name: b, labels: {c: d}}
spec:
  ports: [{port: 1, name: e}, {port: 2, name: f}]
"""


def test_an_excerpt_shows_the_fields_that_are_named_and_no_others(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(MANIFEST)
    fields = ("spec.ports.1.port", "metadata.name", "spec.ports.1.name", "apiVersion")
    text = cluster.excerpt(path, "Service", *fields)
    assert text.splitlines() == [
        "apiVersion: v1",
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
