"""A program from a notebook, whose failure cannot be overlooked.

Copy: this file.

`!program` in a notebook goes on when the program fails, and so does a headless run
(nteract/papermill#539).
"""

import os
import subprocess
from pathlib import Path


def run_program(
    *command: str | Path,
    seconds: float = 120,
    folder: str | Path = ".",
    **environment: str,
) -> str:
    """What a program prints.

    Args:
        command: the program and its arguments; no shell reads them.
        seconds: that it may take.
        folder: in which it runs.
        environment: variables beside those of this process.

    Raises:
        RuntimeError: it is not there, failed, or took longer; with the end of what it
            said.

    Example:
        >>> run_program("python3", "-c", "print(6 * 7)")
        '42'
    """
    words = [str(word) for word in command]
    options: dict = {"capture_output": True, "text": True, "timeout": seconds}
    options |= {"env": {**os.environ, **environment}, "cwd": folder}
    try:
        done = subprocess.run(words, **options)
    except FileNotFoundError as error:
        what = "is no folder" if error.filename == str(folder) else "is not installed"
        raise RuntimeError(f"{error.filename} {what}") from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{words[0]} took longer than {seconds:g} s") from error
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-3000:]
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {said}")
    return done.stdout.strip()
