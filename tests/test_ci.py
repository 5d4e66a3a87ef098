"""What CI runs: every test file once, on every Python that the package admits."""

import re
from pathlib import Path

import pytest
import yaml
from commands import run

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
JOBS = ("test-core", "test-cluster", "test-serving", "test-notebooks")


def recipe_of(*targets: str) -> str:
    """What make would run for these targets."""
    done = run("make", "--dry-run", *targets, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_of(target: str) -> list[str]:
    """The test files that a target of the Makefile runs."""
    (line,) = [row for row in recipe_of(target).splitlines() if "-m pytest" in row]
    found = []
    for name in re.findall(r"\btests/\S+", line):
        path = ROOT / name
        assert path.exists(), f"{target} names {name}"
        inside = path.rglob("test_*.py") if path.is_dir() else [path]
        found += [str(file.relative_to(ROOT)) for file in inside]
    return found


def test_every_test_file_belongs_to_exactly_one_job():
    named = sorted(file for job in JOBS for file in files_of(job))
    files = (ROOT / "tests").rglob("test_*.py")
    assert named == sorted(str(file.relative_to(ROOT)) for file in files)


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_the_workflow_runs_targets_of_the_makefile_on_every_python(workflow):
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    further = {row["target"] for row in matrix["include"]}
    assert {*matrix["target"], *further} == set(JOBS)
    admitted = r'requires-python = ">=3\.(\d+),<3\.(\d+)"'
    first, end = re.search(admitted, (ROOT / "pyproject.toml").read_text()).groups()
    assert matrix["python"] == [f"3.{n}" for n in range(int(first), int(end))]
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    ran = {step["run"] for step in steps if "run" in step}
    assert ran == {"make lint types", "make ${{ matrix.target }}"}
    recipe_of(*JOBS, "lint", "types")


def test_the_site_is_published_from_main_alone_by_a_target_of_the_makefile():
    file = ROOT / ".github" / "workflows" / "site.yml"
    workflow = yaml.safe_load(file.read_text())
    assert workflow[True]["push"] == {"branches": ["main"]}  # YAML reads "on" as true
    steps = workflow["jobs"]["publish"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make site"]
    (path,) = (
        step["with"]["path"] for step in steps if "upload" in step.get("uses", "")
    )
    assert path in recipe_of("site")


def test_what_runs_before_a_commit_is_what_make_lint_types_runs():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    recipe = recipe_of("lint", "types").replace("&&", "\n").splitlines()
    commands = [line.strip() for line in recipe if re.search("-m (ruff|mypy)", line)]
    assert [hook["entry"] for hook in local["hooks"]] == commands
    assert not any(hook["pass_filenames"] for hook in local["hooks"])


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
NAMED = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", CONTRIBUTING, flags=re.S))


def test_contributing_names_what_is_there_and_leaves_out_nothing():
    path = re.compile(r"[\w.-]*/[\w./-]*|[\w.-]+\.\w+")
    paths = [name for name in NAMED if path.fullmatch(name)]
    assert len(paths) > 40
    assert [name for name in paths if not (ROOT / name).exists()] == []
    for targets in re.findall(r"\bmake ([a-z -]+)", CONTRIBUTING):
        recipe_of(*targets.split())
    packages = {f"{init.parent.name}/" for init in ROOT.glob("*/__init__.py")}
    benchmarks = {f"benchmarks/{file.name}" for file in ROOT.glob("benchmarks/*.*")}
    assert len(packages) >= 4 and len(benchmarks) >= 7
    assert packages | benchmarks <= set(NAMED)


def test_the_floors_in_contributing_are_those_of_the_imports():
    floors = re.findall(r"^(\d)\. (.*(?:\n   .*)*)", CONTRIBUTING, re.M)
    floor = {
        path: int(number)
        for number, text in floors
        for path in re.findall(r"`(e2e_utils/\w+\.py)`", text)
    }
    modules = {f"e2e_utils/{path.name}" for path in ROOT.glob("e2e_utils/[!_]*.py")}
    assert set(floor) == modules
    for path in floor:
        names = re.findall(r"^ *from \.(\w+) ", (ROOT / path).read_text(), re.M)
        below = {f"e2e_utils/{name}.py" for name in names} & set(floor)
        assert all(floor[other] <= floor[path] for other in below), path
