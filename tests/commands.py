"""Programs that a test starts and waits for."""

import os
import subprocess
import sys


def run(*command, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    """Run a program to its end: its status, stdout and stderr as text.

    Args:
        command: the program and its arguments; paths are turned into strings.
        env: joins this process's environment; a variable that is None is left out.
        options: of subprocess.run, such as cwd.
    """
    joined = {**os.environ, **(env or {})}
    return subprocess.run(
        [str(part) for part in command],
        env={name: value for name, value in joined.items() if value is not None},
        capture_output=True,
        text=True,
        **{"timeout": 300, **options},
    )


def python(*arguments, **options) -> str:
    """What this Python prints; a status other than 0 fails the test, with stderr."""
    done = run(sys.executable, *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout
