"""Uploads and syncs against a real S3 server on this machine, and through faults."""

import http.client
import io
import json
import multiprocessing
import os
import resource
import runpy
import socket
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import obstore
import pytest
from obstore.store import MemoryStore

from e2e_utils.storage import INDEX, StorageError, open_store, sync, upload

pytestmark = pytest.mark.slow


def client(endpoint):
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)


@pytest.fixture
def bucket(moto, monkeypatch, request):
    """URL of a folder in an empty bucket; the environment has what it takes."""
    for setting in ("ACCESS_KEY_ID=key", "SECRET_ACCESS_KEY=secret"):
        monkeypatch.setenv(*f"AWS_{setting}".split("="))
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto)
    name = f"bucket-{abs(hash(request.node.name)) % 10**10}"
    client(moto).create_bucket(Bucket=name)
    return f"s3://{name}/xview/tiles"


@pytest.fixture
def tiles(tmp_path):
    """A folder with what a real one has: many small files, odd names, a large one."""
    folder = tmp_path / "tiles"
    (folder / "train_images_300_02").mkdir(parents=True)
    for i in range(12):
        file = folder / "train_images_300_02" / f"5_{i}_0_300.jpg"
        file.write_bytes(bytes([i]) * (1000 + i))
    (folder / "train_300_02.json").write_text("{}")
    (folder / "empty").write_bytes(b"")
    (folder / "a b ü#%20.txt").write_text("odd name")
    (folder / "large.bin").write_bytes(os.urandom(9 << 20))
    (folder / ".train_300_02").mkdir()
    (folder / ".train_300_02" / "5_0.json").write_text("stays at home")
    for file in folder.rglob("*"):  # S3 tells times in whole seconds
        os.utime(file, (file.stat().st_mtime - 10.0006,) * 2)
    return folder


@pytest.fixture
def back(tmp_path):
    """Where the files come back to."""
    return tmp_path / "back"


def content(folder):
    files = (f for f in Path(folder).rglob("*") if f.is_file())
    pairs = ((f.relative_to(folder).as_posix(), f.read_bytes()) for f in files)
    return {name: data for name, data in pairs if name[0] != "."}


class Faults(BaseHTTPRequestHandler):
    """Passes requests on to the real server, and fails where the test says so."""

    protocol_version = "HTTP/1.1"

    def forward(self):
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with server.lock:
            server.seen.append((self.command, self.path, dict(self.headers)))
            fault = server.fault(self.command, self.path)
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "cut" and self.command == "PUT":
            self.hang_up()
            return
        real = http.client.HTTPConnection(server.target, timeout=20)
        real.request(self.command, self.path, body, dict(self.headers))
        answer = real.getresponse()
        data = answer.read()
        size = answer.headers["Content-Length"] if self.command == "HEAD" else len(data)
        if fault == "short":
            size, data = len(data) // 2, data[: len(data) // 2]
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            hop = ("connection", "transfer-encoding", "date", "server")
            if name.lower() not in (*hop, "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "cut":
            self.hang_up()

    def hang_up(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def log_message(self, *_):
        pass


@pytest.fixture
def proxy(moto, bucket, monkeypatch):
    """A server with faults on the way to the bucket."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faults)
    server.target = moto.removeprefix("http://")
    server.lock, server.seen, server.fault = threading.Lock(), [], lambda *_: None
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def first(times, command, part, fault):
    """The first `times` requests of a kind fail."""
    left = [times]

    def decide(seen, path):
        if seen == command and part in path and left[0] > 0:
            left[0] -= 1
            return fault
        return None

    return decide


# The same for every kind of URL, one by one and in tars


@pytest.mark.parametrize("kind", ["path", "file url", "memory", "s3"])
@pytest.mark.parametrize("shard_mb", [None, 0.005])
def test_folder_comes_back_whole_and_is_not_moved_twice(
    tiles, tmp_path, back, bucket, kind, shard_mb
):
    url = {
        "path": tmp_path / "remote folder",
        "file url": (tmp_path / "remote folder").as_uri(),
        "memory": MemoryStore(),
        "s3": bucket,
    }[kind]
    up = upload(tiles, url, shard_mb=shard_mb)
    down = sync(url, back)
    assert content(back) == content(tiles)
    assert not (back / ".train_300_02").exists() and not (back / ".tars").exists()
    assert up.skipped == down.skipped == 0
    assert up.moved == down.moved == (16 if shard_mb is None else 4)
    assert up.bytes_moved == down.bytes_moved == sum(map(len, content(tiles).values()))
    for folder in (tiles, back):
        again = upload(folder, url, shard_mb=shard_mb)
        assert (again.moved, again.skipped) == (0, up.moved)
        again = sync(url, back)
        assert (again.moved, again.skipped) == (0, up.moved)
        assert again.bytes_moved == 0 and "already there" in str(again)


@pytest.mark.parametrize("shard_mb", [None, 0.005])
def test_what_changed_on_either_side_is_moved_again_and_nothing_else(
    tiles, tmp_path, back, shard_mb
):
    remote = tmp_path / "remote"
    upload(tiles, remote, shard_mb=shard_mb)
    sync(remote, back)
    (tiles / "train_images_300_02" / "5_3_0_300.jpg").write_bytes(b"x" * 1003)
    assert upload(tiles, remote, shard_mb=shard_mb).moved == 1
    assert sync(remote, back).moved == 1
    assert content(back) == content(tiles)
    (back / "train_300_02.json").write_text("[]")
    (back / "a b ü#%20.txt").unlink()
    assert sync(remote, back).moved in (1, 2)  # both may be in one tar
    assert content(back) == content(tiles)


def test_tars_are_listed_last_and_hide_files_that_were_there_before(
    tiles, bucket, proxy, back
):
    (tiles / "old").touch()
    upload(tiles, bucket)
    (tiles / "old").unlink()
    proxy.fault = first(10**6, "PUT", "index.json", 503)
    with pytest.raises(StorageError, match="upload of .tars/index.json"):
        upload(tiles, bucket, shard_mb=0.005)
    assert sync(bucket, back).moved == len(content(tiles)) + 1
    proxy.fault = lambda *_: None
    assert upload(tiles, bucket, shard_mb=0.005).moved == 0
    assert sync(bucket, back / "new").skipped == 0
    assert content(back / "new") == content(tiles)
    with pytest.raises(StorageError, match=".tars/ is there; give shard_mb or another"):
        upload(tiles, bucket)


# Faults


@pytest.mark.parametrize("fault", [500, "cut"])
@pytest.mark.parametrize("shard_mb", [None, 5])
def test_fault_that_passes_is_overcome(tiles, back, bucket, proxy, fault, shard_mb):
    proxy.fault = first(3, "PUT", "", fault)
    upload(tiles, bucket, shard_mb=shard_mb)
    proxy.fault = first(3, "GET", "tiles/" if shard_mb is None else ".tar", fault)
    sync(bucket, back)
    assert content(back) == content(tiles)


@pytest.mark.parametrize("fault", [500, "cut", "short"])
def test_lasting_fault_names_the_object_and_is_continued_from(
    tiles, back, bucket, proxy, fault
):
    proxy.fault = first(10**6, "PUT", "5_7_0_300.jpg", 503)
    with pytest.raises(StorageError, match="upload of train_images.*5_7_0_300.jpg"):
        upload(tiles, bucket)
    there = len(obstore.list(open_store(bucket)).collect())
    proxy.fault = first(10**6, "GET", "5_7_0_300.jpg", fault)
    assert upload(tiles, bucket).skipped == there
    with pytest.raises(StorageError, match="download of train_images.*5_7_0_300.jpg"):
        sync(bucket, back)
    got = content(back)
    assert "train_images_300_02/5_7_0_300.jpg" not in got
    assert all(content(tiles)[name] == data for name, data in got.items())
    assert not list(back.rglob("*.part"))
    proxy.fault = lambda *_: None
    assert sync(bucket, back).skipped == len(got)
    assert content(back) == content(tiles)


@pytest.mark.parametrize("command", ["GET", "PUT"])
def test_wrong_credentials_are_refused_at_once(tiles, bucket, proxy, command):
    proxy.fault = lambda seen, _: 403 if seen == command else None
    with pytest.raises(StorageError, match=f"{bucket}: .*refused, check the credent"):
        upload(tiles, bucket)
    refused = [path for seen, path, _ in proxy.seen if seen == command]
    assert len(set(refused)) == len(refused)


def test_public_bucket_is_read_without_credentials(
    tiles, back, bucket, moto, proxy, monkeypatch
):
    upload(tiles, bucket)
    assert all("authorization" in seen[2] for seen in proxy.seen)
    everyone = {"Effect": "Allow", "Principal": "*", "Resource": "arn:aws:s3:::*"}
    rules = [{**everyone, "Action": ["s3:GetObject", "s3:ListBucket"]}]
    policy = json.dumps({"Version": "2012-10-17", "Statement": rules})
    client(moto).put_bucket_policy(Bucket=bucket.split("/")[2], Policy=policy)
    proxy.seen.clear()
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    sync(bucket, back)
    assert content(back) == content(tiles)
    assert not any("authorization" in seen[2] for seen in proxy.seen)


def test_full_disk_is_an_error_and_the_sync_continues_with_room(tiles, tmp_path, back):
    upload(tiles, tmp_path / "remote")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            sync(tmp_path / "remote", back)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(back.rglob("*.part")) and not (back / "large.bin").exists()
    sync(tmp_path / "remote", back)
    assert content(back) == content(tiles)


# Use and misuse


def _in_child(url, result):
    try:
        open_store(url)
        result.put("worked")
    except RuntimeError as error:
        result.put(str(error))


@pytest.mark.parametrize("method, said", [("fork", "forked"), ("spawn", "worked")])
def test_forked_child_is_refused_instead_of_hanging(tmp_path, method, said):
    open_store(tmp_path)
    context = multiprocessing.get_context(method)
    result = context.Queue()
    child = context.Process(target=_in_child, args=(tmp_path, result))
    child.start()
    assert said in result.get(timeout=60)
    child.join(timeout=30)
    assert child.exitcode == 0


@pytest.mark.parametrize(
    "listed, packed, message",
    [
        ("../evil", "../evil", "'../evil' in the tar is no file of the folder"),
        ("/evil", "/evil", "'/evil' in the tar is no file of the folder"),
        ("a", "b", "'b' in the tar is no file of the folder"),
        ("a", None, "ValueError"),
    ],
)
def test_tar_with_other_files_than_listed_is_refused(
    tmp_path, back, listed, packed, message
):
    buffer, remote = io.BytesIO(), MemoryStore()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        if packed:
            tar.addfile(tarfile.TarInfo(packed))
    obstore.put(remote, ".tars/1.tar", buffer.getvalue())
    index = {".tars/1.tar": {listed: [0, 1.0]}}
    obstore.put(remote, INDEX, json.dumps(index).encode())
    with pytest.raises(StorageError, match=f"download of .tars/1.tar: .*{message}"):
        sync(remote, back)
    assert not list(tmp_path.rglob("*evil"))


def test_missing_tar_bucket_folder_and_server_are_named(
    tiles, tmp_path, bucket, back, monkeypatch
):
    remote = MemoryStore()
    obstore.put(remote, INDEX, b'{".tars/1.tar": {"a": [0, 1.0]}}')
    with pytest.raises(StorageError, match="download of .tars/1.tar: .*not found"):
        sync(remote, back)
    with pytest.raises(StorageError, match="s3://no-such-bucket/t: .*404"):
        upload(tiles, "s3://no-such-bucket/t")
    with pytest.raises(StorageError, match=f"{bucket}: nothing is there"):
        sync(bucket, back)
    with pytest.raises(OSError, match="nowhere is no folder"):
        upload(tmp_path / "nowhere", bucket)
    with pytest.raises(ValueError, match="ftp://host/x: give a path"):
        open_store("ftp://host/x")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    with pytest.raises(StorageError, match=f"{bucket}: list: .*error sending request"):
        sync(bucket, back)


@pytest.mark.filterwarnings("ignore:'e2e_utils.storage' found in sys.modules")
def test_commands_upload_sync_and_say_what_is_wrong_in_a_line(
    tiles, back, bucket, monkeypatch, capsys
):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["storage", *map(str, arguments)])
        runpy.run_module("e2e_utils.storage", run_name="__main__", alter_sys=True)
        return capsys.readouterr().out

    assert "16 files moved" in run("upload", "--local_dir", tiles, "--url", bucket)
    assert "16 files moved" in run("sync", "--url", bucket, "--local_dir", back)
    assert content(back) == content(tiles)
    with pytest.raises(SystemExit, match=f"^error: {bucket}/x: nothing is there"):
        run("sync", "--url", f"{bucket}/x", "--local_dir", back)
