"""metrics.jsonl: what a run reports, a line of JSON for each report.

Copy: this file and files.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from .files import write_file


class MetricsLog:
    """The file that a run writes; one that goes on drops what came after its step.

    Args:
        path: of the file; its folder is made if it is not there.
        step: of the run as it begins, or goes on.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "metrics.jsonl")
        ...     MetricsLog(path, step=0).write(20, {"loss": 1.5})
        ...     MetricsLog(path, step=10).write(20, {"loss": 1.4})
        ...     path.read_text()
        '{"step": 20, "loss": 1.4}\\n'
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if step and path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                # a kill may have cut the last line, which is of a later step
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
                kept.append(line)
        write_file(path, kept)

    def write(self, step: int, values: dict) -> None:
        """Add a line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
