"""Find files, and write a file whole or not at all.

Copy: this file.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path


def find_files(given: Iterable[str | Path], endings: Sequence[str]) -> dict[str, Path]:
    """The files that paths, folders and patterns name.

    Args:
        given: a file; a folder, of which the files with one of `endings` are taken
            (hidden ones and folders in it are not); or a pattern such as "a/**/*.tif".
        endings: in lower case, such as ".tif".

    Returns:
        {name: path}, sorted within each of `given`. A name is the path below the
        folder that all have in common, so that files of one name in two folders stay
        apart.

    Raises:
        FileNotFoundError: one of `given` names nothing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("1.tif", "2.tif", "notes.txt"):
        ...         Path(folder, name).touch()
        ...     list(find_files([folder], [".tif"]))
        ['1.tif', '2.tif']
    """
    paths: dict[str, None] = {}
    for text in map(str, given):
        found = [text] if os.path.exists(text) else glob.glob(text, recursive=True)
        if os.path.isdir(text):
            found = [
                path
                for path in glob.glob(f"{glob.escape(text)}/*")
                if path.lower().endswith(tuple(endings))
            ]
        files = sorted(os.path.abspath(path) for path in found if os.path.isfile(path))
        if not files:
            raise FileNotFoundError(f"{text}: no file there ({', '.join(endings)})")
        paths |= dict.fromkeys(files)
    root = os.path.commonpath([os.path.dirname(path) for path in paths] or [""])
    return {Path(path).relative_to(root).as_posix(): Path(path) for path in paths}


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which takes its name at the end.

    Whoever reads `path` sees the old file or the new one, never a part of it. If the
    block raises, the temporary file is removed and `path` is as it was.

    Args:
        path: the file to write; replaced if it is there.

    Yields:
        Where to write it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with atomic_path(f"{folder}/a.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     Path(folder, "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: str | Path) -> str:
    """SHA-256 of a file that memory holds, in hexadecimal.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.txt").write_text("onetwo")
        ...     digest(f"{folder}/a.txt")[:8]
        '25b6746d'
    """
    return sha256(Path(path).read_bytes()).hexdigest()


def relative_path(path: str | Path, folder: str | Path) -> str:
    """A path as seen from a folder: the two may move, or be copied, together.

    Example:
        >>> relative_path("/data/scenes/1.tif", "/data/tiles")
        '../scenes/1.tif'
    """
    path = Path(path).resolve()
    try:
        return Path(os.path.relpath(path, Path(folder).resolve())).as_posix()
    except ValueError:  # on another drive
        return path.as_posix()


def write_file(path: str | Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file, piece by piece, that appears whole or not at all.

    Args:
        path: the file; replaced if it is there.
        parts: its content.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_file(f"{folder}/a.bin", [b"one", b"two"])
        ...     digest(f"{folder}/a.bin")[:8]
        '25b6746d'
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.writelines(parts)
