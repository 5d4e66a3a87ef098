"""What holds for the repository as a whole."""

import ast
import re
import shutil
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from commands import python

ROOT = Path(__file__).parent.parent
MODULES = sorted(p for p in (ROOT / "e2e_utils").glob("*.py") if p.stem != "__init__")


def test_exactly_one_distribution_owns_cv2_and_it_is_headless():
    assert set(packages_distributions()["cv2"]) == {"opencv-python-headless"}
    import cv2

    gui = re.search(r"GUI:\s*(\S+)", cv2.getBuildInformation())
    assert gui is None or gui.group(1) == "NONE"


def imports_of(path: Path) -> set[str]:
    """Modules of the same package that a module imports, also inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names |= {node.module} if node.module else {a.name for a in node.names}
    return names


def below(name: str) -> set[str]:
    """The modules that a module of e2e_utils stands on, all the way down."""
    direct = imports_of(ROOT / "e2e_utils" / f"{name}.py")
    return direct.union(*map(below, direct))


def packages_of(path: Path) -> set[str]:
    """Rooms of the repository that a file imports by their names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names & set(MAY_IMPORT)


# which rooms a room stands on
MAY_IMPORT = {
    "e2e_utils": {"sample_data"},  # experiment.py alone, and only for noise
    "sample_data": {"e2e_utils"},
    "kserve_utils": {"e2e_utils"},
    "determined_files": {"e2e_utils", "determined_files"},  # scripts, by their path
    "ray_files": {"e2e_utils", "ray_files"},
}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_stands_on_those_below_and_names_itself_relatively(room):
    for path in (ROOT / room).rglob("*.py"):
        allowed = MAY_IMPORT[room]
        if path.stem == "strip_checkpoint":  # a script, started by its path
            allowed = allowed | {"kserve_utils"}
        assert packages_of(path) <= allowed, path


def told_to_copy(module: Path) -> set[str]:
    """The module, and the files that its sentence "Copy: ..." names."""
    text = ast.get_docstring(ast.parse(module.read_text()))
    sentence = re.search(r"^Copy: (this file.*?)\.(\s|\Z)", text, re.M | re.S)
    assert sentence, f"{module.name} does not say what to copy"
    return {module.name, *re.findall(r"\w+(?:\.py|\.json)", sentence[1])}


IMPORT_EACH = """
import importlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(f"of_{name}.{name}")
    assert f"of_{name}" in module.__file__, module.__file__
"""


@pytest.mark.slow
def test_a_module_copied_as_it_says_works_in_a_folder_of_any_name(tmp_path):
    for module in MODULES:
        files = told_to_copy(module)
        modules = {name[:-3] for name in files if name.endswith(".py")}
        assert modules == {module.stem} | below(module.stem), module.stem
        package = tmp_path / f"of_{module.stem}"
        package.mkdir()
        for name in files:
            shutil.copy(ROOT / "e2e_utils" / name, package)
    python("-c", IMPORT_EACH, *(module.stem for module in MODULES), cwd=tmp_path)


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
