"""The notebook on Kubernetes, without a cluster and with a test double of kubectl."""

import os
import re
import shlex

import nbformat
import papermill
import pytest
from fake_kubectl import Kubectl
from test_committed import FOLDER, ROOT, printed


def execute(folder, context: str) -> tuple[str, list[str]]:
    """All that the notebook prints, and the kubectl commands among it."""
    source, output = FOLDER / "kubernetes.ipynb", folder / "run.ipynb"
    parameters = {"run_dir": str(folder), "kube_context": context}
    how = {"kernel_name": "python3", "cwd": FOLDER, "progress_bar": False}
    papermill.execute_notebook(source, output, parameters, **how)
    text = printed(nbformat.read(output, as_version=4))
    return text, re.findall(rf"^\$ kubectl --context {context} (.*)$", text, re.M)


@pytest.mark.notebook
def test_a_cluster_is_asked_what_is_printed_where_there_is_none(tmp_path, monkeypatch):
    text, commands = execute(tmp_path, "nowhere")
    assert "nowhere does not answer" in text
    kubectl = Kubectl(tmp_path, monkeypatch)
    kubectl.says({"get --raw /readyz": (0, "ok"), "logs": (0, "the predictor's log")})
    text, again = execute(tmp_path, "kind-x")
    assert "kind-x answers" in text and "the predictor's log" in text
    assert again == commands
    asked = kubectl.asked("kind-x")
    assert asked[1:] == [" ".join(shlex.split(command)) for command in commands]
    steps = ("apply -f k8s_files/pv-and-pvc", "cp ", "apply -f k8s_files/network")
    places = [[a.startswith(step) for a in asked].index(True) for step in steps]
    assert places == sorted(places)
    artefact = os.path.relpath(tmp_path / "serving" / "artefact", ROOT)
    # nothing that is served is written over: mkdir fails where a model lies already
    copied = asked.index(f"cp {artefact}/. model-store-pod:/pv/xview-artefact")
    assert asked[copied - 1] == "exec model-store-pod -- mkdir /pv/xview-artefact"
    files = re.findall(r"-f (\S+)", " ".join(commands))
    assert files and all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize(
    "name", ["04_cluster_training", "05_kserve_deploy", "kubernetes"]
)
def test_what_is_shown_of_a_file_are_lines_of_the_one_linked_last(name):
    cells = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    blocks = list(re.finditer(r"^```(yaml|properties)\n(.*?)^```", text, re.M | re.S))
    assert len(blocks) > 1
    for block in blocks:
        links = rf"\]\((\.\./\S+\.{block[1]})\)"
        file = re.findall(links, text[: block.start()])[-1]
        lines = iter((FOLDER / file).read_text().splitlines())
        for line in block[2].splitlines():
            assert line in lines, f"{file} has no such line, or not here: {line}"
