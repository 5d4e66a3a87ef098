"""What CI runs: every test file once, on every Python that the package admits."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
JOBS = ("test-core", "test-cluster", "test-serving", "test-notebooks")


def files_of(target: str) -> list[str]:
    """The test files that a target of the Makefile runs."""
    told = subprocess.run(
        ["make", "--dry-run", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = [row for row in told.stdout.splitlines() if "-m pytest" in row]
    found = []
    for name in re.findall(r"\btests/\S+", line):
        path = ROOT / name
        assert path.exists(), f"{target} names {name}"
        inside = path.rglob("test_*.py") if path.is_dir() else [path]
        found += [str(file.relative_to(ROOT)) for file in inside]
    return found


def test_every_test_file_belongs_to_exactly_one_job():
    told = sorted(file for job in JOBS for file in files_of(job))
    files = (ROOT / "tests").rglob("test_*.py")
    assert told == sorted(str(file.relative_to(ROOT)) for file in files)


def test_make_test_leaves_nothing_out():
    assert files_of("test") == []  # no file named: all of testpaths
    recipe = re.search(r"^test:.*\n\t(.*)$", MAKEFILE, re.M)[1]
    assert "-m" not in recipe.split() and "-k" not in recipe.split()


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_the_workflow_runs_targets_of_the_makefile_on_every_python(workflow):
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    rows = [
        *(
            (python, target)
            for python in matrix["python"]
            for target in matrix["target"]
        ),
        *((row["python"], row["target"]) for row in matrix["include"]),
    ]
    assert {target for _, target in rows} == set(JOBS)
    asked = re.search(
        r'requires-python = ">=3\.(\d+),<3\.(\d+)"',
        (ROOT / "pyproject.toml").read_text(),
    )
    assert matrix["python"] == [
        f"3.{minor}" for minor in range(*map(int, asked.groups()))
    ]
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    ran = {step["run"] for step in steps if "run" in step}
    assert ran == {"make lint types", "make ${{ matrix.target }}"}
    for target in {*JOBS, "lint", "types"}:
        assert re.search(rf"^{target}: ", MAKEFILE, re.M), target


def test_actions_are_pinned_to_a_major(workflow):
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])


def test_the_local_run_is_style_types_and_the_command_of_the_readme():
    last = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert last == "exec make lint types test"
    assert "`make test`" in (ROOT / "README.md").read_text()
