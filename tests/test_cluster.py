"""What goes to kubectl and comes back, from a test double of it."""

import subprocess

import pytest
from fake_kubectl import Kubectl
from serving import ROOT

from kserve_utils import cluster


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    return Kubectl(tmp_path, monkeypatch)


def test_a_cluster_answers_if_it_says_so_and_a_failure_has_kubectls_reason(kubectl):
    kubectl.says({"get --raw /readyz": (0, "ok")})
    assert cluster.is_there("kind-x")
    kubectl.says({"get": (1, "context kind-x does not exist")})
    assert not cluster.is_there("kind-x")
    with pytest.raises(RuntimeError, match="^kubectl get pods: .*context kind-x does"):
        cluster.kubectl("kind-x", "get pods")


def test_without_kubectl_no_cluster_answers(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cluster, "_TOOLS", tmp_path)
    assert not cluster.is_there("kind-x")
    with pytest.raises(RuntimeError, match="get pods: kubectl is not installed"):
        cluster.kubectl("kind-x", "get pods")


def test_kubectl_is_found_where_the_install_script_puts_it(monkeypatch, tmp_path):
    (tmp_path / "kubectl").write_text("#!/bin/sh\necho ok\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(cluster, "_TOOLS", tmp_path)
    assert cluster.is_there("kind-x")


def test_what_the_install_script_would_install_is_told_in_its_order():
    script = "kserve_utils/bash_scripts/kserve_install.sh"
    shown = cluster.planned(script, "--with-autoscaling", folder=ROOT)
    assert max(map(len, shown.splitlines())) <= 90
    lines = shown.replace(" \\\n   ", "").splitlines()
    dry_run = ["bash", script, "--with-autoscaling", "--dry-run"]
    said = subprocess.check_output(dry_run, cwd=ROOT, text=True).splitlines()
    assert lines == [line.strip() for line in said if line.strip() in lines]
    assert lines[0].startswith("kind create cluster") and lines[0].endswith("5m")
    charts = [line.split()[3] for line in lines[1:]]
    assert charts[2:] == ["prometheus", "keda", "kserve-crd", "kserve-resources"]
    with pytest.raises(RuntimeError, match="Usage"):
        cluster.planned(script, "--unknown")


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
