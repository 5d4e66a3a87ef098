"""Copy: this file.

Folders to and from object storage, by one URL for every place: a path or file://,
s3://bucket/prefix, gs://bucket/prefix, az://account/container/prefix.

    python -m e2e_utils.storage upload --local_dir tiles --url s3://bucket/xview
    python -m e2e_utils.storage sync --url s3://bucket/xview --local_dir tiles

Credentials come from the environment, as each cloud names them: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL_S3; GOOGLE_APPLICATION_CREDENTIALS;
AZURE_STORAGE_ACCOUNT_KEY. For anything else, such as profiles, give an obstore store in
place of the URL.

obstore runs threads that do not survive a fork: a forked child would hang in its first
call, so it is refused here. Start worker processes with "spawn" or "forkserver".
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

import obstore
from obstore import exceptions
from obstore.store import LocalStore, ObjectStore, from_url
from tqdm.auto import tqdm

PART = 8 << 20  # bytes of a multipart upload's part; decides its ETag
INDEX = "shards.json"
DENIED = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
FINAL = r"status code: 4(?!08|29)\d\d"  # no use to try again
_pid: list[int] = []  # the process that first used obstore


class StorageError(RuntimeError):
    """A transfer failed for good; what was done before is kept and not repeated."""


@dataclass
class TransferReport:
    """Files moved and files left alone because they were there, with their bytes."""

    moved: int = 0
    skipped: int = 0
    bytes_moved: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        megabytes = self.bytes_moved / 1e6
        rate = megabytes / max(self.seconds, 1e-9)
        return (
            f"{self.moved} files moved ({megabytes:.1f} MB, {rate:.1f} MB/s), "
            f"{self.skipped} already there"
        )


def open_store(
    url: str | Path | ObjectStore,
    *,
    endpoint: str | None = None,
    anonymous: bool = False,
    retries: int = 5,
) -> ObjectStore:
    """Open the place a URL names.

    Args:
        url: see the module; or a store of obstore, which is returned as it is.
        endpoint: address of the service if it is not the cloud's own, such as
            http://127.0.0.1:9000 for MinIO. s3:// and az:// only.
        anonymous: send no credentials, for public buckets.
        retries: times that a request is sent again after a 5xx, a timeout or a lost
            connection, with growing pauses.

    Raises:
        ValueError: the URL is of an unknown kind.
        RuntimeError: in a forked child of a process that used obstore before.
    """
    if _pid and _pid[0] != os.getpid():
        raise RuntimeError(
            "obstore was used before this process was forked and would hang now; "
            "start processes with the 'spawn' or 'forkserver' method"
        )
    _pid[:] = [os.getpid()]
    if not isinstance(url, str | Path):
        return url
    parts = urlparse(str(url))
    if isinstance(url, Path) or parts.scheme in ("", "file"):
        path = url if isinstance(url, Path) or not parts.scheme else unquote(parts.path)
        return LocalStore(os.path.abspath(path), mkdir=True)
    if parts.scheme == "memory":
        raise ValueError(
            f"{url}: give obstore.store.MemoryStore() itself, it has no URL"
        )
    if parts.scheme not in ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss"):
        raise ValueError(f"{url}: give a path, file://, s3://, gs:// or az:// URL")
    options: dict[str, Any] = {"skip_signature": True} if anonymous else {}
    if endpoint:
        options["endpoint"] = endpoint
    named = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3", "")
    named = named or os.environ.get("AWS_ENDPOINT_URL", "")
    return from_url(
        str(url),
        client_options={"allow_http": named.startswith("http://")},
        retry_config={
            "max_retries": retries,
            "backoff": {"max_backoff": timedelta(seconds=5)},
            "retry_timeout": timedelta(minutes=2),
        },
        **options,
    )


def _listing(store: ObjectStore) -> dict[str, dict[str, Any]]:
    metas = (meta for batch in obstore.list(store) for meta in batch)
    found = {meta["path"]: dict(meta) for meta in metas}
    for path in found:
        if ".." in PurePosixPath(path).parts or path.startswith("/"):
            raise StorageError(f"object {path!r} would be written outside the folder")
    return found


def _is_same(file: Path, meta: dict[str, Any], checksum: bool, upload: bool) -> bool:
    """Whether a file and an object are equal: size, then MD5 or else age.

    The ETag of S3 and GCS is the MD5 of the content, or, ending in "-N", of the MD5s of
    its N parts, which another program may have cut elsewhere.
    """
    if not file.is_file() or file.stat().st_size != meta["size"]:
        return False
    etag = re.fullmatch(r'"?([0-9a-f]{32})(-\d+)?"?', meta["e_tag"] or "")
    if checksum and etag:
        same = _etag(file, bool(etag[2])) == etag[0].strip('"')
        if same or upload or not etag[2]:
            return same
    age = file.stat().st_mtime - meta["last_modified"].timestamp()
    return age < 1e-3 if upload else age > -1e-3


def _etag(file: Path, multipart: bool) -> str:
    sums = []
    with open(file, "rb") as content:
        while part := content.read(PART):
            sums.append(hashlib.md5(part, usedforsecurity=False))
    if multipart:
        joined = b"".join(part.digest() for part in sums)
        return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(sums)}"
    whole = hashlib.md5(usedforsecurity=False)
    with open(file, "rb") as content:
        while part := content.read(PART):
            whole.update(part)
    return whole.hexdigest()


def _again(what: str, action: Callable[[], object], retries: int) -> None:
    """Do, and do again after a fault that may pass, such as a download cut short."""
    for attempt in range(retries + 1):
        try:
            action()
            return
        except (exceptions.BaseError, StorageError) as error:
            reason = " ".join(str(error).split())[:400]
            if isinstance(error, DENIED) or re.search("status code: 40[13]", reason):
                reason = f"refused, check the credentials and their rights: {reason}"
            elif not re.search(FINAL, reason) and attempt < retries:
                time.sleep(min(5, 0.1 * 2**attempt))
                continue
            raise StorageError(f"{what}: {type(error).__name__}: {reason}") from error
    return None


def _in_threads(
    jobs: list[Any], work: Callable[[Any], int], workers: int, progress: bool, what: str
) -> TransferReport:
    """Run `work` on every job; it returns the bytes moved, or -1 for skipped."""
    report, start = TransferReport(), time.perf_counter()
    bar = tqdm(total=len(jobs), desc=what, unit="file", disable=not progress)
    pool = ThreadPoolExecutor(workers)
    try:
        for done in as_completed([pool.submit(work, job) for job in jobs]):
            size = done.result()
            report.moved += size >= 0
            report.skipped += size < 0
            report.bytes_moved += max(size, 0)
            bar.update()
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    report.seconds = time.perf_counter() - start
    return report


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    files = (f.relative_to(folder) for f in folder.rglob("*") if f.is_file())
    return sorted(f for f in files if not any(part[0] == "." for part in f.parts))


def _shards(folder: Path, files: list[Path], size: float) -> Iterator[list[Path]]:
    """Group files, in order, into lists of at most `size` bytes (or of one file)."""
    group: list[Path] = []
    held = 0
    for file in files:
        nbytes = (folder / file).stat().st_size
        if group and held + nbytes > size:
            yield group
            group, held = [], 0
        group.append(file)
        held += nbytes
    if group:
        yield group


def _pack(folder: Path, files: list[Path], target: Path) -> None:
    """Write a tar that is the same for the same files, so that its ETag is too."""
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for file in files:
            info = tarfile.TarInfo(file.as_posix())
            info.size = (folder / file).stat().st_size
            with open(folder / file, "rb") as content:
                tar.addfile(info, content)
    newest = max((folder / file).stat().st_mtime for file in files)
    os.utime(target, (newest, newest))


def upload(
    local_dir: str | Path,
    url: str | Path | ObjectStore,
    *,
    shard_mb: float | None = None,
    workers: int = 16,
    checksum: bool = True,
    endpoint: str | None = None,
    anonymous: bool = False,
    retries: int = 5,
    progress: bool = True,
) -> TransferReport:
    """Copy a folder to object storage; what is there already is skipped.

    Objects appear whole or not at all, so an upload that was killed is continued by
    the same call. Nothing is deleted. Hidden files and folders stay at home.

    Args:
        local_dir: the folder.
        url: where to, see the module.
        shard_mb: pack the files into tars of about so many megabytes, which move a
            hundred times faster than small files; `sync` unpacks them.
        workers: transfers at a time.
        checksum: compare by the MD5 in the ETag where there is one. False compares
            size and age; needed where the bucket encrypts with KMS.
        endpoint: see `open_store`.
        anonymous: see `open_store`.
        retries: see `open_store`.
        progress: show a progress bar.

    Returns:
        TransferReport; print it.

    Raises:
        StorageError: refused, or still failing after the retries; names the object.
        OSError: `local_dir` is no folder, or a file cannot be read.
    """
    folder, files = Path(local_dir), _visible(Path(local_dir))
    store = open_store(url, endpoint=endpoint, anonymous=anonymous, retries=retries)
    there: dict[str, dict[str, Any]] = {}
    _again(str(url), lambda: there.update(_listing(store)), retries)

    def put(name: str, file: Path) -> int:
        if name in there and _is_same(file, there[name], checksum, upload=True):
            return -1
        send = lambda: obstore.put(store, name, file, chunk_size=PART)  # noqa: E731
        _again(f"{url}: upload of {name}", send, retries)
        return file.stat().st_size

    if shard_mb is None:
        send = lambda file: put(file.as_posix(), folder / file)  # noqa: E731
        return _in_threads(files, send, workers, progress, "upload")

    groups = list(_shards(folder, files, shard_mb * 1e6))
    names = [f"shard-{i:05}-of-{len(groups):05}.tar" for i in range(len(groups))]
    with tempfile.TemporaryDirectory() as beside:

        def put_shard(job: tuple[str, list[Path]]) -> int:
            tar = Path(beside, job[0])
            _pack(folder, job[1], tar)
            try:
                return put(job[0], tar)
            finally:
                tar.unlink()

        jobs = list(zip(names, groups, strict=True))
        report = _in_threads(jobs, put_shard, min(workers, 4), progress, "upload")
        index = Path(beside, INDEX)
        index.write_text(json.dumps(names))
        os.utime(index, (0, 0))  # the names say all: of equal size is equal
        put(INDEX, index)  # last: an index names only shards that are there
    return report


def sync(
    url: str | Path | ObjectStore,
    local_dir: str | Path,
    *,
    workers: int = 16,
    checksum: bool = True,
    endpoint: str | None = None,
    anonymous: bool = False,
    retries: int = 5,
    progress: bool = True,
) -> TransferReport:
    """Copy a folder from object storage; what is there already is skipped.

    Files appear whole or not at all, checked by size and, where the ETag is one, MD5.
    Tars of `upload(shard_mb=...)` are unpacked. Nothing is deleted.

    Args:
        url: where from, see the module.
        local_dir: made if it is not there.
        workers: transfers at a time.
        checksum: compare by the MD5 in the ETag where there is one. False compares
            size and age; needed where the bucket encrypts with KMS.
        endpoint: see `open_store`.
        anonymous: see `open_store`.
        retries: see `open_store`.
        progress: show a progress bar.

    Returns:
        TransferReport; a tar counts as one file. Print it.

    Raises:
        StorageError: refused, nothing there, or still failing after the retries.
        OSError: the disk is full or not writable.
    """
    folder = Path(local_dir)
    store = open_store(url, endpoint=endpoint, anonymous=anonymous, retries=retries)
    there: dict[str, dict[str, Any]] = {}
    _again(str(url), lambda: there.update(_listing(store)), retries)
    if not there:
        raise StorageError(f"{url}: nothing is there")
    folder.mkdir(parents=True, exist_ok=True)

    def fetch(name: str, file: Path) -> None:
        meta = there[name]

        def attempt() -> None:
            with open(file, "wb") as content:
                for chunk in obstore.get(store, name).stream():
                    content.write(chunk)
            seen = meta["last_modified"].timestamp()
            os.utime(file, (seen, seen))
            if not _is_same(file, meta, checksum, upload=False):
                size = file.stat().st_size
                raise StorageError(f"{size} of {meta['size']} bytes, or another MD5")

        _again(f"{url}: download of {name}", attempt, retries)

    def get(name: str) -> int:
        target, meta = folder / name, there[name]
        if _is_same(target, meta, checksum, upload=False):
            return -1
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            fetch(name, part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
        return meta["size"]

    def get_shard(name: str) -> int:
        meta, record = there[name], folder / ".shards" / f"{name}.json"
        version = [meta["size"], meta["e_tag"], str(meta["last_modified"])]
        if record.exists():
            old = json.loads(record.read_text())
            files = ((folder / file, size) for file, size in old["files"].items())
            whole = all(f.is_file() and f.stat().st_size == size for f, size in files)
            if old["version"] == version and whole:
                return -1
        record.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=record.parent) as beside:
            fetch(name, Path(beside, "tar"))
            unpacked = _unpack(Path(beside, "tar"), folder, Path(beside, "file"))
            done = Path(beside, "record")
            done.write_text(json.dumps({"version": version, "files": unpacked}))
            os.replace(done, record)
        return meta["size"]

    shards: list[str] = []
    if INDEX in there:
        with tempfile.TemporaryDirectory() as beside:
            fetch(INDEX, Path(beside, INDEX))
            shards = json.loads(Path(beside, INDEX).read_text())
        if missing := sorted(set(shards).difference(there)):
            raise StorageError(f"{url}: {INDEX} lists {missing[0]}, which is not there")
    old = re.compile(r"shard-\d+-of-\d+\.tar")
    loose = [name for name in there if name != INDEX and not old.fullmatch(name)]
    work = {name: get_shard for name in shards} | {name: get for name in loose}
    return _in_threads(
        list(work), lambda name: work[name](name), workers, progress, "sync"
    )


def _unpack(tar: Path, folder: Path, part: Path) -> dict[str, int]:
    files = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            content = archive.extractfile(member) if member.isfile() else None
            if content is None or path.is_absolute() or ".." in path.parts:
                raise StorageError(f"{member.name!r} in a tar is no file of the folder")
            with open(part, "wb") as target:
                shutil.copyfileobj(content, target)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, folder / path)
            files[member.name] = member.size
    return files


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        print(auto_cli([upload, sync], as_positional=False))
    except (OSError, StorageError, ValueError) as error:
        sys.exit(f"error: {error}")
