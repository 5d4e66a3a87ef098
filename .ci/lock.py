"""The lock files: written by `make lock`, checked by `make` before it installs.

    python .ci/lock.py check              one line and status 1 where a file is stale
    python .ci/lock.py write [--upgrade]  resolves requirements.txt; needs the network

requirements.lock is what uv resolves requirements.txt to, for every platform at once;
requirements-without-torch.lock is the same without PyTorch and CUDA. At the end of each
stands a sum of every package, by which an edit by hand is found and named. Nothing but
the standard library is needed: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK, REST = "requirements.lock", "requirements-without-torch.lock"
PINS, SETTINGS = "requirements.txt", "pyproject.toml"
MEND = "run `make lock`"

# What is left out of REST: PyTorch, and what its build for CUDA alone asks for.
TORCH = re.compile(r"(torch|torchvision|triton|(nvidia|cuda)-.*)==")
PACKAGE = re.compile(r"([a-z0-9-]+==[^\s;\\]+)( ; [^\\]+)?( \\)?")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
SUM = re.compile(r"# sum (\S+) ([0-9a-f]{16})")

HEADERS = {
    LOCK: """\
# Every package that requirements.txt leads to, with its hashes, for Python 3.10 to 3.13
# on Linux and macOS. `make lock` writes it and `make` installs it; without make:
#   pip install --no-deps -r requirements.lock
# --no-deps because sahi asks for opencv-python, which must not join the headless build.
""",
    REST: """\
# requirements.lock without torch, torchvision and CUDA's packages: for PyTorch's build
# for CPUs (`make lab TORCH=cpu`), and for a container that brings a PyTorch of its own.
# torch and torchvision have no hash here: such a build comes from elsewhere, and is
# pinned by its version in requirements.txt alone. Written by `make lock`.
""",
}


class Stale(Exception):
    """A lock file that may not be installed; the text is for the user."""


def pins(text: str) -> dict[str, set[str]]:
    """Name -> versions of the direct dependencies; one for each marker."""
    found: dict[str, set[str]] = {}
    for line in _without_comments(text):
        match = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?==([^\s;]+)", line)
        if not match:
            raise Stale(f"{PINS}: {line!r} is not pinned: write name==version")
        name = re.sub(r"[-_.]+", "-", match[1]).lower()
        found.setdefault(name, set()).add(match[2])
    return found


def packages(text: str, file: str) -> dict[str, str]:
    """Blocks of a lock file: name==version -> its lines, marker and hashes among them.

    Raises:
        Stale: a line that uv does not write, or a package without a hash.
    """
    found: dict[str, str] = {}
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not line:
            continue
        match = PACKAGE.fullmatch(line)
        if match and match[1] not in found:
            current = match[1]
            found[current] = line
        elif HASH.fullmatch(line) and current and found[current].endswith("\\"):
            found[current] += "\n" + line
        else:
            raise Stale(f"{file}, line {number}: {line!r} was not written by make lock")
    for package, block in found.items():
        if "--hash=" not in block or block.endswith("\\"):
            raise Stale(f"{file}: {package} has no hash; {MEND}")
    return found


def sources(root: Path) -> dict[str, str]:
    """What the lock is resolved from, without comments: file -> text."""
    settings = (root / SETTINGS).read_text()
    table = re.search(r"^\[tool\.uv\]\n(.*?)(?=^\[|\Z)", settings, re.M | re.S)
    return {
        PINS: "\n".join(_without_comments((root / PINS).read_text())),
        SETTINGS: "\n".join(_without_comments(table[1] if table else "")),
    }


def check(root: Path) -> None:
    """Raise Stale unless both lock files are as `make lock` wrote them, and fit."""
    for file in (LOCK, REST):
        if not (root / file).is_file():
            raise Stale(f"{file} is missing; {MEND}")
    whole = (root / LOCK).read_text()
    found = packages(whole, LOCK)
    wanted = pins((root / PINS).read_text())
    for name, versions in wanted.items():
        held = {p.partition("==")[2] for p in found if p.startswith(f"{name}==")}
        if held != versions:
            one, other = (", ".join(sorted(v)) or "missing" for v in (held, versions))
            raise Stale(f"{LOCK}: {name} is {one}, {PINS} pins {other}; {MEND}")
    _check_sums(whole, {**sources(root), **found}, LOCK)
    rest = (root / REST).read_text()
    _check_sums(rest, packages(rest, REST), REST)
    if body(rest) != without_torch(body(whole)):
        raise Stale(f"{REST} does not follow from {LOCK}; {MEND}")


def _check_sums(text: str, parts: dict[str, str], file: str) -> None:
    """Compare the parts of a file with the sums at its end."""
    sums = dict(SUM.findall(text))
    if not sums:
        raise Stale(f"{file} has no sums at its end: not written by make lock; {MEND}")
    for part, content in parts.items():
        if part in (PINS, SETTINGS):
            if sums.get(part) != _sum(content):
                raise Stale(f"{file} was resolved from another {part}; {MEND}")
        elif sums.get(part) != _sum(content):
            done = "changed" if part in sums else "put in"
            raise Stale(f"{file}: {part} was {done} by hand; {MEND}")
    for part in sums.keys() - parts.keys():
        raise Stale(f"{file}: {part} was taken out by hand; {MEND}")


def body(text: str) -> str:
    """The packages of a lock file as uv wrote them, without header and sums."""
    lines = [n for n in text.splitlines(keepends=True) if not n.startswith("#")]
    return "".join(lines)


def without_torch(resolved: str) -> str:
    """A body without the packages that TORCH matches."""
    blocks = re.split(r"^(?=[a-z0-9])", resolved, flags=re.M)
    return "".join(block for block in blocks if not TORCH.match(block))


def write(root: Path, upgrade: bool) -> None:
    """Resolve requirements.txt and write both files, or neither.

    Args:
        root: folder of requirements.txt and pyproject.toml.
        upgrade: take the newest of what is not pinned; else the versions of the lock
            stay where requirements.txt admits them.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / LOCK
        if not upgrade and (root / LOCK).is_file():  # versions alone: hashes come anew
            known = re.findall(r"^[a-z0-9].*?(?= \\$)", (root / LOCK).read_text(), re.M)
            target.write_text("\n".join(known) + "\n")
        command = [Path(sys.executable).with_name("uv"), "pip", "compile", "--quiet"]
        command += ["--universal", "--python-version", "3.10", "--generate-hashes"]
        command += ["--no-header", "--output-file", target, PINS]
        if subprocess.run(command, cwd=root).returncode:
            raise Stale(f"{PINS} could not be resolved, {LOCK} stays as it was")
        resolved = target.read_text()
    rest = without_torch(resolved)
    parts = {
        LOCK: {**sources(root), **packages(resolved, LOCK)},
        REST: packages(rest, REST),
    }
    for file, text in ((LOCK, resolved), (REST, rest)):
        sums = [f"# sum {part} {_sum(of)}\n" for part, of in parts[file].items()]
        temporary = root / f"{file}.tmp"
        temporary.write_text(HEADERS[file] + text + "".join(sums))
        os.replace(temporary, root / file)


def _without_comments(text: str) -> list[str]:
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description="check or write the lock files")
    parser.add_argument("do", choices=["check", "write"])
    parser.add_argument("--upgrade", action="store_true", help="newest of the unpinned")
    args = parser.parse_args()
    try:
        if args.do == "check":
            check(ROOT)
        else:
            write(ROOT, args.upgrade)
    except Stale as error:
        sys.exit(str(error))
    except UnicodeDecodeError as error:
        sys.exit(f"{LOCK} or {PINS} is no text ({error}); {MEND}")


if __name__ == "__main__":
    main()
