"""What is installed: the lock files, and what `make` does with them."""

import itertools
import os
import re
import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from commands import python, run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK, REST = "requirements.lock", "requirements-without-torch.lock"
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def read(file: str) -> str:
    return (ROOT / file).read_text()


def pin(name: str) -> str:
    """name==version as requirements.txt has it."""
    return re.search(rf"^{name}==\S+", read("requirements.txt"), re.M)[0]


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
            name = canonicalize_name(asked.name)
            assert name not in found, f"{name} twice in {file} for {environment}"
            found[name] = only.version
    return found


# ---- the lock files


@pytest.mark.parametrize(
    ("version", "platform"), itertools.product(PYTHONS, PLATFORMS), ids=str
)
def test_the_lock_holds_every_pin_and_never_opencv_python(version, platform):
    system, machine = platform
    environment = {
        "python_version": version,
        "python_full_version": f"{version}.9",
        "sys_platform": system,
        "platform_system": system.capitalize(),
        "platform_machine": machine,
    }
    pins = requirements("requirements.txt", environment)
    locked, rest = (requirements(file, environment) for file in (LOCK, REST))
    assert len(pins) > 40
    assert {name: locked.get(name) for name in pins} == pins
    assert "opencv-python" not in locked and "opencv-python-headless" in locked
    assert rest.items() <= locked.items()


def test_the_lock_files_are_what_make_lock_wrote_with_a_hash_for_every_package():
    assert python(".ci/lock.py", "check", cwd=ROOT) == ""
    for file in (LOCK, REST):
        assert len(re.findall(r"^[a-z0-9-]+==", read(file), re.M)) > 250


def test_nothing_that_is_installed_from_names_an_index_or_a_path():
    container = "kserve_utils/predictor/Containerfile"
    for file in (LOCK, REST, "requirements.txt", container):
        text = read(file)
        assert not re.search(r"://|pypi\.|pythonhosted|(?<!\w)/(opt|root|home)", text)
        assert file == container or not re.search("^-", text, re.M)  # an option of pip


def test_the_lock_without_torch_lacks_what_torchs_cuda_build_alone_asks_for():
    whole, rest = (
        set(re.findall(r"^([a-z0-9-]+)==", read(file), re.M)) for file in (LOCK, REST)
    )
    gone = whole - rest
    assert {"torch", "torchvision", "triton"} <= gone
    assert {"filelock", "jinja2", "sympy"} <= rest  # the CPU build asks for these
    for name in gone - {"torch", "torchvision"}:
        block = re.search(rf"^{name}==.*\n(?:    .*\n)+", read(LOCK), re.M)
        by = set(re.findall(r"^    #(?: via)? +([\w-]+)$", block[0], re.M)) - {"via"}
        assert by and by <= gone, f"{name} via {by}"


# ---- a lock that does not fit


@pytest.fixture
def copy(tmp_path):
    """What `make` needs to install, in a folder of its own."""
    (tmp_path / ".ci").mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.txt", LOCK, REST):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / ".ci" / "lock.py", tmp_path / ".ci" / "lock.py")
    return tmp_path


def make(folder: Path, *arguments: str, path: str = "") -> CompletedProcess:
    """`make` installs in a folder, as a user types it; path goes in front of PATH."""
    env = {n: None for n in os.environ if n.startswith(("MAKE", "UV_"))}
    env |= {"LC_ALL": "C", "PATH": ":".join(filter(None, [path, os.environ["PATH"]]))}
    return run("make", ".venv/installed", *arguments, cwd=folder, env=env)


def printed(done: CompletedProcess) -> list[str]:
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
    (LOCK, r"^idna==.*\n(    --hash.*\n)+", "", "idna==.* was taken out by hand"),
    (LOCK, r"^(idna==\S+) .*\n(    --hash.*\n)+", r"\1\n", "idna==.* has no hash"),
    (LOCK, r"^idna==", "idna>=", r"line \d+: .idna>="),
    (LOCK, r"^# sum (.*\n)+", "", "has no sums at its end"),
    (REST, r"(?<=^certifi==2)", "9", r"certifi==29\S+ was put in"),
    (REST, r"^    # via.*\n", "", f"does not follow from {LOCK}"),
    (TXT, r"^tqdm==.*\n", "", f"from another {TXT}"),
    (TXT, r"^tqdm==\S+", "tqdm", f"{TXT}: 'tqdm' is not pinned"),
    ("pyproject.toml", '"opencv-python"', '"sahi"', "from another pyproject.toml"),
]


@pytest.mark.parametrize("file, old, new, reason", HAND, ids=[h[3] for h in HAND])
def test_make_refuses_what_was_edited_by_hand(copy, file, old, new, reason):
    edit(copy, file, old, new)
    done = make(copy, f"PYTHON={sys.executable}")
    (line,) = printed(done)
    assert done.returncode and re.search(reason, line)
    assert not (copy / ".venv").exists()


def test_a_missing_lock_is_named_and_a_changed_comment_is_no_change(copy):
    edit(copy, TXT, r"#.*", "# another comment")
    python(".ci/lock.py", "check", cwd=copy)
    (copy / LOCK).unlink()
    done = run(sys.executable, ".ci/lock.py", "check", cwd=copy)
    assert done.returncode == 1 and done.stderr.startswith(f"{LOCK} is missing")


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
def install(copy):
    """`make` with a python and a uv that write down their arguments, and do nothing.

    Returns a function that runs it: make's end, and the installs that were asked for.
    """

    def build(*arguments: str, refused: str = "nothing-at-all", uv: int = 0):
        tools = copy / "tools"
        tools.mkdir(exist_ok=True)
        text = STUB_PYTHON.format(refused=refused, python=sys.executable)
        (tools / "python").write_text(text)
        (tools / "uv").write_text(f'#!/bin/sh\necho "uv $*" >> log\nexit {uv}\n')
        for tool in tools.iterdir():
            tool.chmod(0o755)
        (copy / "log").write_text("")
        done = make(copy, f"PYTHON={tools / 'python'}", *arguments, path=str(tools))
        lines = (copy / "log").read_text().splitlines()
        kept = [n for n in lines if n.startswith(("uv pip", "python -m pip"))]
        return done, [re.sub(r" --python \S+|uv pip | -q", "", line) for line in kept]

    return build


def test_make_installs_the_lock_once_and_again_when_it_was_renewed(copy, install):
    done, installs = install()
    (line,) = printed(done)
    assert line.startswith("installing into .venv")
    assert installs == [
        f"sync --require-hashes {LOCK}",
        "install --no-deps --no-build-isolation -e .",
    ]
    assert install()[1] == []
    os.utime(copy / ".venv" / "installed", (1, 1))  # the lock is newer
    assert install()[1] == installs


def test_an_installation_that_failed_is_done_again(copy, install):
    _, installs = install(uv=127)  # one that does not run is none
    assert installs[0].endswith(f"install {pin('uv')}")
    done, _ = install(uv=2)
    assert done.returncode and not (copy / ".venv" / "installed").exists()


def test_the_cpu_build_of_torch_comes_from_the_index_that_the_user_names(copy, install):
    index = "https://index.example/cpu"
    done, installs = install("TORCH=cpu", f"TORCH_INDEX={index}")
    assert done.returncode == 0
    torch = f"{pin('torch')} {pin('torchvision')}"
    assert installs == [
        f"sync --require-hashes {REST}",
        f"install --no-deps --default-index {index} {torch}",
        "install --no-deps --no-build-isolation -e .",
    ]
    assert install()[1] == []
    os.utime(copy / ".venv" / "installed", (1, 1))  # the lock is newer
    done, installs = install()
    (line,) = printed(done)
    assert "TORCH=cpu needs TORCH_INDEX" in line and installs == []
    assert install("TORCH=")[1][0] == f"sync --require-hashes {LOCK}"


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
    copy, install, refused, arguments, message
):
    done, _ = install(*arguments, refused=refused)
    (line,) = printed(done)
    assert done.returncode and re.search(message, line)
    assert not (copy / ".venv").exists()
