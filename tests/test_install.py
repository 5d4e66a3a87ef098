"""What is installed: the lock files, and what `make` does with them."""

import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCK, REST = "requirements.lock", "requirements-without-torch.lock"
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]
ENVIRONMENTS = [
    {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": system,
        "platform_system": system.capitalize(),
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "os_name": "posix",
        "extra": "",
    }
    for python, (system, machine) in itertools.product(
        ("3.10", "3.11", "3.12", "3.13"), PLATFORMS
    )
]


IDNA_HASH = r"^(idna==.*\n    --hash=sha256:)...."


def read(file: str) -> str:
    return (ROOT / file).read_text()


def pin(name: str) -> str:
    """name==version as requirements.txt has it."""
    return re.findall(rf"^{name}==\S+", read("requirements.txt"), re.M)[0]


def requirements(file: str, environment: dict) -> dict[str, str]:
    """Name -> version of what a file pins in an environment."""
    found = {}
    for line in read(file).splitlines():
        line = re.sub(r"(^|\s)#.*|\\$", "", line).strip()
        if not line or line.startswith("--hash="):
            continue
        asked = Requirement(line)
        if asked.marker is None or asked.marker.evaluate(environment):
            (only,) = asked.specifier
            assert only.operator == "==" and "*" not in only.version, line
            name = re.sub(r"[-_.]+", "-", asked.name).lower()
            assert name not in found, f"{name} twice in {file} for {environment}"
            found[name] = only.version
    return found


def where(environment: dict) -> str:
    keys = ("python_version", "sys_platform", "platform_machine")
    return "-".join(environment[key] for key in keys)


# ---- the lock files


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=where)
def test_the_lock_holds_every_pin_and_never_opencv_python(environment):
    pins = requirements("requirements.txt", environment)
    locked = requirements(LOCK, environment)
    assert len(pins) > 40
    assert {name: locked.get(name) for name in pins} == pins
    assert "opencv-python" not in locked and "opencv-python-headless" in locked


def test_every_package_of_the_lock_has_hashes():
    for file in (LOCK, REST):
        blocks = re.findall(r"^[a-z0-9].*\n(?:    --.*\n)*", read(file), re.M)
        assert len(blocks) > 250
        for block in blocks:
            first, *hashes = block.strip().split(" \\\n    ")
            assert hashes, f"{file}: {first} has no hash"
            for one in hashes:
                assert re.fullmatch("--hash=sha256:[0-9a-f]{64}", one), first


def test_nothing_that_is_installed_from_names_an_index_or_a_path():
    container = "kserve_utils/predictor/Containerfile"
    for file in (LOCK, REST, "requirements.txt", container):
        text = read(file)
        assert not re.search(r"://|pypi\.|pythonhosted|(?<!\w)/(opt|root|home)", text)
        assert file == container or not re.search("^-", text, re.M)  # an option of pip


def test_the_lock_without_torch_lacks_what_torchs_cuda_build_asks_for():
    linux = next(e for e in ENVIRONMENTS if e["python_version"] == "3.11")
    whole, rest = requirements(LOCK, linux), requirements(REST, linux)
    gone = whole.keys() - rest.keys()
    assert rest.items() <= whole.items() and {"torch", "torchvision", "triton"} <= gone
    for line in importlib.metadata.requires("torch"):  # the CPU build asks for these
        asked = Requirement(line)
        if asked.marker is None or "platform_system" not in str(asked.marker):
            name = re.sub(r"[-_.]+", "-", asked.name).lower()
            assert name in rest or "extra" in str(asked.marker), line
        elif asked.marker.evaluate(linux):
            assert asked.name.replace("_", "-") in gone, line
    for name in gone - {"torch", "torchvision"}:  # nobody else asks for what is gone
        block = re.search(rf"^{name}==.*\n(?:    .*\n)+", read(LOCK), re.M)
        by = set(re.findall(r"^    #(?: via)? +([\w-]+)$", block[0], re.M)) - {"via"}
        assert by and by <= gone, f"{name} via {by}"


def test_pip_takes_the_lock_and_finds_this_environment_made_from_it():
    """Without an index: pip fails on a line that it cannot read, or would fetch."""
    import torch

    file = LOCK if torch.version.cuda or sys.platform == "darwin" else REST
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index"]
    command += ["--no-deps", "--require-hashes", "-q", "-r", file]
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**alone, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"run make: {done.stderr[-600:]}"


# ---- a lock that does not fit


@pytest.fixture
def copy(tmp_path):
    """What `make` needs to install, in a folder of its own."""
    (tmp_path / ".ci").mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.txt", LOCK, REST):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / ".ci" / "lock.py", tmp_path / ".ci" / "lock.py")
    return tmp_path


def make(folder: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess:
    """`make` as a user types it, in a folder; path goes in front of PATH."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "UV_"))}
    outside["PATH"] = f"{path}:{outside['PATH']}" if path else outside["PATH"]
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env={**outside, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def said(done: subprocess.CompletedProcess) -> list[str]:
    """What was printed, without make's own line on the failed recipe."""
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if not line.startswith("make: ***")]


def edit(folder: Path, file: str, pattern: str, new: str) -> None:
    text = (folder / file).read_text()
    changed = re.sub(pattern, new, text, count=1, flags=re.M)
    assert changed != text
    (folder / file).write_text(changed)


TXT = "requirements.txt"
HAND = [
    (LOCK, r"^torch==\S+", "torch==2.0.0", rf"torch is 2\.0\.0, {TXT} pins 2"),
    (LOCK, r"^torch==", "torchx==", f"torch is missing, {TXT} pins 2"),
    (LOCK, r"^(certifi==)\S+", r"\g<1>2000.1.1", "certifi==2000.1.1 was put in"),
    (LOCK, IDNA_HASH, r"\g<1>0000", "idna==.* was changed"),
    (LOCK, "(?<=^appnope==1.0.0 ;).*'darwin'", " os_name == 'nt'", "appnope.* changed"),
    (LOCK, r"^idna==.*\n(    --hash.*\n)+", "", "idna==.* was taken out by hand"),
    (LOCK, r"^(idna==\S+) .*\n(    --hash.*\n)+", r"\1\n", "idna==.* has no hash"),
    (LOCK, r"^# sum idna==.*\n", "", "idna==.* was put in by hand"),
    (LOCK, r"^idna==", "idna>=", r"line \d+: .idna>="),
    (LOCK, r"^# sum (.*\n)+", "", "has no sums at its end"),
    (REST, IDNA_HASH, r"\g<1>0000", "idna==.* was changed"),
    (REST, r"^    # via.*\n", "", f"does not follow from {LOCK}"),
    (TXT, r"^tqdm==\S+", "tqdm==4.0.0", r"tqdm is .*, .* pins 4\.0\.0"),
    (TXT, r"^tqdm==", "new==1.0 # r\ntqdm==", "new is missing, .* pins 1"),
    (TXT, r"^tqdm==.*\n", "", f"from another {TXT}"),
    (TXT, r"^tqdm==\S+", "tqdm", f"{TXT}: 'tqdm' is not pinned"),
    (TXT, r"^ray\[.*?\]", "ray", f"from another {TXT}"),
    ("pyproject.toml", '"opencv-python"', '"sahi"', "from another pyproject.toml"),
]


@pytest.mark.parametrize("file, old, new, reason", HAND, ids=[h[3] for h in HAND])
def test_make_refuses_what_was_edited_by_hand(copy, file, old, new, reason):
    edit(copy, file, old, new)
    done = make(copy, ".venv/installed", f"PYTHON={sys.executable}")
    (line,) = said(done)
    assert done.returncode and re.search(reason, line)
    assert not (copy / ".venv").exists()


def test_a_missing_lock_is_named(copy):
    (copy / LOCK).unlink()
    done = checked(copy)
    assert done.returncode == 1 and done.stderr.startswith(f"{LOCK} is missing")


def test_a_comment_in_requirements_txt_makes_no_lock_stale(copy):
    edit(copy, "requirements.txt", r"#.*", "# another comment")
    assert checked(copy).returncode == 0


def checked(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ".ci/lock.py", "check"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


# ---- what make does

STUB_PYTHON = """#!/bin/sh
case "$*" in
  *{refused}*) exit 1 ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; touch .venv/bin/pip
     chmod +x .venv/bin/pip ;;
  .ci/lock.py*) exec {python} "$@" ;;
esac
echo "python $*" >> log
"""


@pytest.fixture
def stubs(copy):
    """A python and a uv that write down what they are told, and install nothing."""

    def build(refused: str = "nothing-at-all", uv: int = 0) -> tuple[str, str]:
        tools = copy / "tools"
        tools.mkdir(exist_ok=True)
        text = STUB_PYTHON.format(refused=refused, python=sys.executable)
        (tools / "python").write_text(text)
        (tools / "uv").write_text(f'#!/bin/sh\necho "uv $*" >> log\nexit {uv}\n')
        for tool in tools.iterdir():
            tool.chmod(0o755)
        return f"PYTHON={tools / 'python'}", str(tools)

    return build


def log_of(folder: Path) -> list[str]:
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    kept = [line for line in lines if line.startswith(("uv pip", "python -m pip"))]
    return [re.sub(r" --python \S+|uv pip | -q", "", line) for line in kept]


def test_make_installs_the_lock_once_and_again_when_it_was_renewed(copy, stubs):
    python, path = stubs()
    lines = said(make(copy, ".venv/installed", python, path=path))
    assert len(lines) == 1 and lines[0].startswith("installing into .venv")
    installs = [
        f"sync --require-hashes {LOCK}",
        "install --no-deps --no-build-isolation -e .",
    ]
    assert log_of(copy) == installs
    make(copy, ".venv/installed", python, path=path)
    assert log_of(copy) == []
    os.utime(copy / ".venv" / "installed", (1, 1))  # older than the lock
    make(copy, ".venv/installed", python, path=path)
    assert log_of(copy) == installs


def test_an_installation_that_failed_is_done_again(copy, stubs):
    python, path = stubs(uv=2)
    assert make(copy, ".venv/installed", python, path=path).returncode
    assert not (copy / ".venv" / "installed").exists()


def test_uv_comes_in_the_pinned_version_where_it_is_not_on_path(copy, stubs):
    python, path = stubs(uv=127)  # one that does not run is none
    make(copy, ".venv/installed", python, path=path)
    assert log_of(copy)[0].endswith(f"install {pin('uv')}")


def test_the_cpu_build_of_torch_comes_from_the_index_that_the_user_names(copy, stubs):
    python, path = stubs()
    index = "TORCH_INDEX=https://index.example/cpu"
    assert not make(
        copy, ".venv/installed", python, "TORCH=cpu", index, path=path
    ).returncode
    first, second, third = log_of(copy)
    assert first == f"sync --require-hashes {REST}"
    assert second == (
        "install --no-deps --default-index https://index.example/cpu "
        f"{pin('torch')} {pin('torchvision')}"
    )
    assert third.endswith("-e .")
    make(copy, ".venv/installed", python, path=path)
    assert log_of(copy) == []
    os.utime(copy / ".venv" / "installed", (1, 1))  # older than the lock
    (line,) = said(make(copy, ".venv/installed", python, path=path))
    assert "TORCH=cpu needs TORCH_INDEX" in line and log_of(copy) == []
    make(copy, ".venv/installed", python, "TORCH=", path=path)
    assert log_of(copy)[0] == f"sync --require-hashes {LOCK}"


@pytest.mark.parametrize(
    "refused, arguments, message",
    [
        ("version_info", [], "Python 3.10 to 3.13 is needed"),
        ("ensurepip", [], "has no venv .*apt install python3-venv"),
        ("none", ["TORCH=cpu"], "TORCH=cpu needs TORCH_INDEX"),
        ("none", ["TORCH=rocm"], "TORCH=rocm is unknown"),
    ],
)
def test_what_hinders_the_installation_is_said_in_one_line(
    copy, stubs, refused, arguments, message
):
    python, path = stubs(refused)
    done = make(copy, ".venv/installed", python, *arguments, path=path)
    (line,) = said(done)
    assert done.returncode and re.search(message, line)
    assert not (copy / ".venv").exists()
