"""Write a file whole or not at all.

Copy: this file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which takes its name at the end.

    Whoever reads `path` sees the old file or the new one, never a part of it. If the
    block raises, the temporary file is removed and `path` is as it was.

    Args:
        path: the file to write; replaced if it is there.

    Yields:
        Where to write it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: str | Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file, piece by piece, that appears whole or not at all.

    Args:
        path: the file; replaced if it is there.
        parts: its content.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.writelines(parts)
