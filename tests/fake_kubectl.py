"""A test double of kubectl, which stands on PATH in front of the real one."""

import json
import os
from pathlib import Path

import pytest

# It writes down what it is asked, and says what FAKE has for it, or nothing; a
# port-forward goes on until it is ended.
FAKE = """#!/usr/bin/env python3
import json, os, sys, time
with open(os.environ["ASKED"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
asked = " ".join(sys.argv[3:])
for start, (code, text) in json.loads(os.environ["FAKE"]).items():
    if asked.startswith(start):
        print(text, file=sys.stderr if code else sys.stdout, flush=True)
        time.sleep(60 if start == "port-forward" and not code else 0)
        sys.exit(code)
"""


class Kubectl:
    """Sets the answers of the double, and tells what it was asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program, self.log = folder / "kubectl", folder / "asked"
        program.write_text(FAKE)
        program.chmod(0o755)
        self.setenv = monkeypatch.setenv
        self.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        self.setenv("ASKED", str(self.log))
        self.says({})

    def says(self, answers: dict) -> None:
        """{how a command begins: (exit status, text)}; the others print nothing."""
        self.setenv("FAKE", json.dumps(answers))

    def asked(self, context: str) -> list[str]:
        """The commands so far, without the context, which all of them named."""
        rows = [json.loads(line) for line in self.log.read_text().splitlines()]
        assert {tuple(row[:2]) for row in rows} == {("--context", context)}
        return [" ".join(row[2:]) for row in rows]
