"""What holds for the repository as a whole."""

import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(p for p in (ROOT / "e2e_utils").glob("*.py") if p.stem != "__init__")


def test_exactly_one_distribution_owns_cv2_and_it_is_headless():
    assert set(packages_distributions()["cv2"]) == {"opencv-python-headless"}
    import cv2

    gui = re.search(r"GUI:\s*(\S+)", cv2.getBuildInformation())
    assert gui is None or gui.group(1) == "NONE"


def imports_of(module: Path) -> set[str]:
    """The other modules of the package that a module imports."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "e2e_utils":
                names |= {alias.name for alias in node.names}
            elif node.module.startswith("e2e_utils."):
                names.add(node.module.split(".")[1])
    return names


def told_to_copy(module: Path) -> set[str]:
    """The module, and the files and folders that its sentence "Copy: ..." names."""
    text = ast.get_docstring(ast.parse(module.read_text()))
    sentence = re.search(r"^Copy: (this file.*?)\.(\s|\Z)", text, re.M | re.S)
    assert sentence, f"{module.name} does not say what to copy"
    return {module.name, *re.findall(r"\w+(?:\.py|\.json|/)", sentence[1])}


IMPORT_EACH = """
import importlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
for name in sys.argv[2:]:
    for old in [m for m in sys.modules if m.split(".")[0] == "e2e_utils"]:
        del sys.modules[old]
    sys.path.insert(0, str(root / name))
    module = importlib.import_module("e2e_utils." + name)
    assert str(root / name) in module.__file__, module.__file__
    sys.path.pop(0)
"""


@pytest.mark.slow
def test_a_module_copied_as_it_says_can_be_imported(tmp_path):
    for module in MODULES:
        package = tmp_path / module.stem / "e2e_utils"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        for name in told_to_copy(module):
            source = ROOT / "e2e_utils" / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, package / name)
    names = [module.stem for module in MODULES]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, tmp_path, *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_a_module_imports_at_most_one_other(module):
    if module.stem != "train":  # train.py alone composes
        assert len(imports_of(module) - {"grid", "hardware"}) <= 1  # the ground floor


def test_every_direct_dependency_is_pinned_with_a_reason():
    reasons = set()
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.match(r"([\w.-]+)(\[[\w,]+\])?==[\w.]+", line)
        assert match, f"not pinned: {line}"
        if "  # " in line:
            reasons.add(match[1])
        assert match[1] in reasons, f"no reason given: {line}"


def test_the_installed_package_asks_for_the_requirements():
    wanted = {re.match(r"[\w-]+", r)[0].lower() for r in requires("e2e_utils")}
    assert {"torch", "torchvision", "sahi", "papermill", "nbval"} <= wanted
