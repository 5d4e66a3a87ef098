"""Folders to and from object storage, by one URL: a path, file://, s3://, gs://, az://.

    python -m e2e_utils.storage upload --local_dir tiles --url s3://bucket/xview
    python -m e2e_utils.storage sync --url s3://bucket/xview --local_dir tiles

Settings come from the environment, as each cloud names them: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL_S3, AWS_SKIP_SIGNATURE=true for a
public bucket; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_KEY. For others
give `open_store(url, ...)`, or any store of obstore, in place of the URL.

Copy: this file and files.py.
"""

import json
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url
from tqdm.contrib.concurrent import thread_map

from .files import atomic_path

Url = str | Path | ObjectStore
Stamps = dict[str, list[float]]  # name -> [bytes, time of modification in s, to 1 ms]
Objects = dict[str, Stamps]  # name of an object -> the files that are in it
TARS = ".tars/"  # hidden, so never the name of a file that was uploaded as it is
INDEX = f"{TARS}index.json"  # the Objects that are tars
# http:// only where an endpoint says so; the time is for one part on a slow line
CLIENT: Any = {"allow_http": True, "timeout": timedelta(minutes=10)}
RETRY: Any = {"max_retries": 5, "retry_timeout": timedelta(hours=1)}
FAULTS = (BaseError, FileNotFoundError, EOFError, ValueError, tarfile.TarError)
_process: dict[str, int] = {}


class StorageError(RuntimeError):
    """A transfer failed for good; what was done before is kept and not repeated."""


@dataclass
class TransferReport:
    """Objects moved, and objects left alone because they were there; a tar is one."""

    moved: int
    skipped: int
    bytes_moved: int

    def __str__(self) -> str:
        moved = f"{self.moved} files moved ({self.bytes_moved / 1e6:.1f} MB)"
        return f"{moved}, {self.skipped} already there"


def open_store(url: Url, **options: Any) -> ObjectStore:
    """Open the folder or bucket that a URL names.

    obstore sends requests again after a 5xx, a timeout or a lost connection, and
    resumes downloads that break off, up to five times an object.

    Args:
        url: see the module; or a store of obstore, which is returned as it is.
        options: settings of the store as obstore calls them, such as `endpoint` (for
            MinIO "http://127.0.0.1:9000"), `region` or `skip_signature`.

    Raises:
        ValueError: the URL is of an unknown kind.
        RuntimeError: in a forked child of a process that used obstore before. The
            threads of obstore do not survive a fork: the child would hang.

    Example:
        >>> open_store("xview.zip://tiles")
        Traceback (most recent call last):
            ...
        ValueError: xview.zip://tiles: give a path, file://, s3://, gs:// or az:// URL
    """
    if _process.setdefault("first", os.getpid()) != os.getpid():
        raise RuntimeError("obstore hangs in a forked process; start it with 'spawn'")
    if not isinstance(url, str | Path):
        return url
    if "://" not in str(url):
        return LocalStore(Path(url).absolute(), mkdir=True)
    if str(url).startswith("file://"):
        return LocalStore.from_url(str(url), mkdir=True)
    if not re.match("(s3a?|gs|az|azure|abfss?)://", str(url)):
        raise ValueError(f"{url}: give a path, file://, s3://, gs:// or az:// URL")
    return from_url(str(url), client_options=CLIENT, retry_config=RETRY, **options)


def upload(
    local_dir: str | Path, url: Url, *, shard_mb: float | None = None
) -> TransferReport:
    """Copy a folder to object storage; what is there already is skipped.

    An object is there already if it has the file's size and is not older. A file that
    was exchanged for an older one of the same size (`cp -p`) needs a `touch`.

    Objects appear whole or not at all, so an upload that was killed is continued by
    the same call. Nothing is deleted. Hidden files and folders stay at home.

    Args:
        local_dir: the folder.
        url: where to, see the module.
        shard_mb: pack the files into tars of about so many megabytes, which move much
            faster than small files; `sync` unpacks them. The name of a tar stands for
            the names, sizes and times of its files: where one changed, it is a new tar.

    Returns:
        TransferReport; print it.

    Raises:
        StorageError: refused, or still failing after the retries; names the object.
        OSError: `local_dir` is no folder, or a file cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as tiles, TemporaryDirectory() as bucket:
        ...     _ = Path(tiles, "1.png").write_bytes(b"pixels")
        ...     print(upload(tiles, bucket))
        ...     print(upload(tiles, f"file://{bucket}"))
        1 files moved (0.0 MB), 0 already there
        0 files moved (0.0 MB), 1 already there
    """
    folder, store = Path(local_dir), open_store(url)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    there, found = _remote_stamps(url, store), _local_stamps(folder)
    files = {name: found[name] for name in found if not re.search(r"(^|/)\.", name)}

    def put(name: str) -> None:
        with _named(f"{url}: upload of {name}"):
            obstore.put(store, name, folder / name)

    def put_tar(name: str) -> None:
        with _named(f"{url}: upload of {name}"), tempfile.TemporaryFile() as tar:
            _pack(folder, tars[name], tar)
            obstore.put(store, name, tar)

    if shard_mb is None:
        if INDEX in there:
            raise StorageError(f"{url}: {TARS} is there; give shard_mb or another URL")
        loose = {name: {name: stamp} for name, stamp in files.items()}
        same = {n for n in files if n in there and there[n][0] == files[n][0]}
        current = {n for n in same if there[n][1] >= files[n][1]}
        return _in_threads("upload", put, loose, current)
    tars = _tars(files, shard_mb * 1e6)
    report = _in_threads("upload", put_tar, tars, set(there), threads=4)
    with _named(f"{url}: upload of {INDEX}"):  # last: what it lists is there
        obstore.put(store, INDEX, json.dumps(tars).encode())
    return report


def sync(url: Url, local_dir: str | Path) -> TransferReport:
    """Copy a folder from object storage; what is there already is skipped.

    A file is there already if it has the size and the time that `sync` gave it: those
    of the object, or, out of a tar, those of the file that was packed. Any other is
    overwritten. S3 tells times in whole seconds: of two objects of the same size that
    were written in one second, the first may be taken for the second.

    Files appear whole or not at all. Nothing is deleted. Where tars were uploaded, they
    alone count.

    Args:
        url: where from, see the module.
        local_dir: made if it is not there.

    Returns:
        TransferReport; print it.

    Raises:
        StorageError: refused, nothing there, or still failing after the retries.
        OSError: the disk is full or not writable.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as bucket, TemporaryDirectory() as tiles:
        ...     _ = Path(bucket, "1.png").write_bytes(b"pixels")
        ...     report = sync(bucket, tiles)
        ...     report.moved, Path(tiles, "1.png").read_bytes()
        (1, b'pixels')
    """
    folder, store = Path(local_dir), open_store(url)
    there, files = _remote_stamps(url, store), _local_stamps(folder)
    with _named(f"{url}: download of {INDEX}"):
        index = bytes(obstore.get(store, INDEX).bytes()) if INDEX in there else "{}"
        tars: Objects = json.loads(index)
    objects = tars or {n: {n: there[n]} for n in there if not n.startswith(TARS)}
    if not objects:
        raise StorageError(f"{url}: nothing is there")

    def get(name: str) -> None:
        with _named(f"{url}: download of {name}"):
            chunks = obstore.get(store, name).stream()
            if name not in tars:
                return _write(folder / name, chunks, there[name])
            with tempfile.TemporaryFile() as tar:
                tar.writelines(chunks)
                tar.seek(0)
                _unpack(tar, folder, tars[name])

    current = {n for n, inside in objects.items() if inside.items() <= files.items()}
    return _in_threads("sync", get, objects, current)


def _local_stamps(folder: Path) -> Stamps:
    found = ((file.relative_to(folder), file) for file in sorted(folder.rglob("*")))
    stats = {name.as_posix(): file.stat() for name, file in found if file.is_file()}
    return {name: [s.st_size, round(s.st_mtime, 3)] for name, s in stats.items()}


def _remote_stamps(url: Url, store: ObjectStore) -> Stamps:
    with _named(f"{url}: list"):
        return {
            meta["path"]: [meta["size"], round(meta["last_modified"].timestamp(), 3)]
            for meta in obstore.list(store).collect()
        }


def _tars(files: Stamps, size: float) -> Objects:
    """Group files, in order, into tars of about `size` bytes, named by their files."""
    tars: dict[float, Stamps] = {}
    end = 0.0
    for name, stamp in files.items():
        end += stamp[0]
        tars.setdefault(end // max(size, 1), {})[name] = stamp
    return {
        f"{TARS}{sha256(json.dumps(tar).encode()).hexdigest()}.tar": tar
        for tar in tars.values()
    }


def _pack(folder: Path, files: Stamps, target: IO[bytes]) -> None:
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name in files:
            member = tarfile.TarInfo(name)
            member.size = (folder / name).stat().st_size
            with open(folder / name, "rb") as content:
                tar.addfile(member, content)
    target.seek(0)


def _unpack(source: IO[bytes], folder: Path, files: Stamps) -> None:
    with tarfile.open(fileobj=source, mode="r|") as tar:
        for member, (name, stamp) in zip(tar, files.items(), strict=True):
            outside = re.search(r"^/|(^|/)\.\.(/|$)", name)
            content = tar.extractfile(member)
            if outside or member.name != name or content is None:
                raise ValueError(f"{member.name!r} in the tar is no file of the folder")
            _write(folder / name, iter(partial(content.read, 1 << 20), b""), stamp)


def _write(target: Path, chunks: Iterable[bytes], stamp: list[float]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        with open(temporary, "wb") as file:
            file.writelines(chunks)
        if temporary.stat().st_size != stamp[0]:
            raise EOFError(f"{temporary.stat().st_size} of {stamp[0]} bytes came")
        os.utime(temporary, (stamp[1], stamp[1]))


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn what a transfer raises, but for errors of the disk, into StorageError."""
    try:
        yield
    except FAULTS as error:
        reason = " ".join(str(error).split())[:400]
        # without credentials obstore asks 169.254.169.254, as machines of a cloud may
        if re.search(r"status code: 40[13]|//169\.254\.", reason):
            reason = f"refused, check the credentials and their rights: {reason}"
        raise StorageError(f"{what}: {type(error).__name__}: {reason}") from error


def _in_threads(
    what: str,
    work: Callable[[str], None],
    objects: Objects,
    done: set,
    threads: int = 16,
) -> TransferReport:
    """Run `work` on the name of every object that is not done."""
    todo = [name for name in objects if name not in done]
    thread_map(work, todo, max_workers=threads, desc=what, unit="file")
    nbytes = sum(int(size) for name in todo for size, _ in objects[name].values())
    return TransferReport(len(todo), len(objects) - len(todo), nbytes)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        print(auto_cli([upload, sync], as_positional=False))
    except (OSError, StorageError, ValueError) as error:
        sys.exit(f"error: {error}")
