"""The notebook on Kubernetes, without a cluster and with a test double of kubectl."""

import nbformat
import papermill
import pytest
from fake_kubectl import Kubectl
from test_committed import FOLDER, printed

pytestmark = pytest.mark.notebook


def execute(folder, context: str) -> str:
    """All that the notebook prints."""
    source, output = FOLDER / "kubernetes.ipynb", folder / "run.ipynb"
    parameters = {"run_dir": str(folder), "kube_context": context}
    how = {"kernel_name": "python3", "cwd": FOLDER, "progress_bar": False}
    papermill.execute_notebook(source, output, parameters, **how)
    return printed(nbformat.read(output, as_version=4))


def test_without_a_cluster_it_runs_to_its_end_and_says_so(tmp_path):
    text = execute(tmp_path, "nowhere")
    assert text.count("no cluster answers as nowhere: nothing was done") == 5


def test_a_cluster_gets_the_volume_then_the_artefact_then_the_service(
    tmp_path, monkeypatch
):
    kubectl = Kubectl(tmp_path, monkeypatch)
    kubectl.says({"get --raw /readyz": (0, "ok"), "logs": (0, "the predictor's log")})
    text = execute(tmp_path, "kind-x")
    assert "no cluster" not in text and "the predictor's log" in text
    asked = kubectl.asked("kind-x")
    steps = ("apply -f ../k8s_files/pv-and-pvc", "cp ", "apply -f ../k8s_files/network")
    places = [[a.startswith(step) for a in asked].index(True) for step in steps]
    assert places == sorted(places)
    assert f"cp {tmp_path}/serving/artefact model-store-pod:/pv/xview-artefact" in asked
