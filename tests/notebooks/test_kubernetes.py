"""The notebook on Kubernetes: its cells, and its commands to a double of kubectl."""

import json
import re
import shlex
import subprocess

import nbformat
import papermill
import pytest
from fake_kubectl import Kubectl
from test_committed import FOLDER, ROOT, printed

from kserve_utils import cluster


@pytest.mark.notebook
def test_its_cells_tell_what_would_be_installed_and_what_is_copied(tmp_path):
    artefact, output = tmp_path / "serving" / "artefact", tmp_path / "run.ipynb"
    artefact.mkdir(parents=True)
    described = {"files": {"model.pth": "0123456789abcdef"}}
    (artefact / "detector.json").write_text(json.dumps(described))
    how = {"kernel_name": "python3", "cwd": FOLDER, "progress_bar": False}
    source, parameters = FOLDER / "kubernetes.ipynb", {"run_dir": str(tmp_path)}
    papermill.execute_notebook(source, output, parameters, **how)
    text = printed(nbformat.read(output, as_version=4))
    assert "kind create cluster" in text and "kserve-resources" in text
    assert "version 0123456789ab\n" in text and "detector.json" in text
    assert "kind-kserve does not answer: it was asked nothing" in text


def test_it_asks_a_cluster_that_answers_all_questions_and_no_other_cluster(
    tmp_path, monkeypatch, capsys
):
    kubectl = Kubectl(tmp_path, monkeypatch)
    fails = {"get httproute": (1, "no such kind"), "logs": (1, "it waits to start")}
    kubectl.says({"get --raw /readyz": (0, "ok"), **fails, "get events": (0, "Pulled")})
    cells = nbformat.read(FOLDER / "kubernetes.ipynb", as_version=4).cells
    (asks,) = [cell.source for cell in cells if cell.get("id") == "ask-cluster"]
    exec(asks, {"cluster": cluster, "kube_context": "mine"})
    asked = kubectl.asked("mine")
    assert asked[0].startswith("get --raw /readyz")
    assert [line.split()[0] for line in asked[1:]] == ["get", "get", "get", "logs"]
    told = capsys.readouterr().out
    parts = ("no such kind", "Pulled", "it waits to start", "mine answers")
    places = [told.index(part) for part in parts]
    assert places == sorted(places)


def test_its_commands_are_whole_name_their_context_and_copy_over_nothing(
    tmp_path, monkeypatch
):
    cells = nbformat.read(FOLDER / "kubernetes.ipynb", as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))
    lines = blocks.replace("\\\n", " ").splitlines()
    commands = [line for line in lines if "kubectl " in line and "<" not in line]
    kubectl = Kubectl(tmp_path, monkeypatch)
    script = "\n".join(["set -euo pipefail", *commands])
    subprocess.run(["bash", "-c", script], cwd=ROOT, check=True)
    asked = kubectl.asked("kind-kserve")
    assert len(asked) == len(commands) > 20
    steps = ("apply -f k8s_files/pv-and-pvc", "cp ", "apply -f k8s_files/network")
    places = [[a.startswith(step) for a in asked].index(True) for step in steps]
    assert places == sorted(places)
    files = re.findall(r" -f (k8s_files/\S+)", blocks)
    assert files and all((ROOT / file).is_file() for file in files)
    # nothing that is served is written over: mkdir fails where a model lies already
    made: set[str] = set()
    for command in map(shlex.split, asked):
        if "mkdir" in command:
            made.update(command[command.index("mkdir") + 1 :])
        if command[0] == "cp":
            assert command[2].removeprefix("model-store-pod:") in made


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
