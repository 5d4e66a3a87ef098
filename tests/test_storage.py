"""Uploads and syncs against a real S3 server on this machine, and through faults."""

import functools
import http.client
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import obstore
import pytest
from obstore.store import MemoryStore

from e2e_utils.storage import StorageError, open_store, sync, upload

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


def start_moto(**environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=1)
            return server, f"http://127.0.0.1:{port}"
        except OSError:
            time.sleep(0.1)
    server.kill()
    raise RuntimeError("moto's server did not start in 30 s")


def client(endpoint, service="s3", key="key", secret="secret"):
    return boto3.client(
        service,
        endpoint_url=endpoint,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name="us-east-1",
    )


@pytest.fixture(scope="module")
def moto():
    server, endpoint = start_moto()
    yield endpoint
    server.kill()
    server.wait()


@pytest.fixture
def bucket(moto, monkeypatch, request):
    for name, value in {**KEYS, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{abs(hash(request.node.name)) % 10**10}"
    client(moto).create_bucket(Bucket=name)
    return name


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
    return folder


def content(folder):
    files = (f for f in Path(folder).rglob("*") if f.is_file())
    pairs = ((f.relative_to(folder).as_posix(), f.read_bytes()) for f in files)
    return {name: data for name, data in pairs if name[0] != "."}


class Faults(BaseHTTPRequestHandler):
    """Passes requests on to the real server, and fails where the test says so."""

    protocol_version = "HTTP/1.1"

    def forward(self):
        with self.server.lock:
            self.server.busy += 1
        try:
            self.answer()
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def answer(self):
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with server.lock:
            server.seen.append((self.command, self.path, dict(self.headers)))
            fault = server.fault(self.command, self.path)
        if fault == "500":
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "cut" and self.command == "PUT":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "slow":
            time.sleep(0.2)
        real = http.client.HTTPConnection(server.target, timeout=20)
        real.request(self.command, self.path, body, dict(self.headers))
        answer = real.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in (
                "connection",
                "transfer-encoding",
                "date",
                "server",
            ):
                if name.lower() != "content-length" or self.command == "HEAD":
                    self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def log_message(self, *_):
        pass


@pytest.fixture
def proxy(moto):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faults)
    server.target = moto.removeprefix("http://")
    server.lock, server.seen, server.fault = threading.Lock(), [], lambda *_: None
    server.busy = 0  # requests under way
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
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


# The same for every place


@pytest.mark.parametrize("place", ["path", "file url", "memory", "s3"])
@pytest.mark.parametrize("shard_mb", [None, 0.005])
def test_folder_comes_back_whole_and_is_not_moved_twice(
    tiles, tmp_path, bucket, moto, place, shard_mb
):
    url = {
        "path": tmp_path / "remote folder",
        "file url": (tmp_path / "remote folder").as_uri(),
        "memory": MemoryStore(),
        "s3": f"s3://{bucket}/xview/tiles",
    }[place]
    options = {"progress": False, "endpoint": moto if place == "s3" else None}
    up = upload(tiles, url, shard_mb=shard_mb, **options)
    down = sync(url, tmp_path / "back", **options)
    assert content(tmp_path / "back") == content(tiles)
    assert not (tmp_path / "back" / ".train_300_02").exists()
    assert up.skipped == down.skipped == 0 and up.moved > 3
    again = upload(tiles, url, shard_mb=shard_mb, **options)
    assert (again.moved, again.skipped) == (0, up.moved)
    again = sync(url, tmp_path / "back", **options)
    assert (again.moved, again.skipped) == (0, down.moved)
    assert again.bytes_moved == 0 and "already there" in str(again)


def test_files_of_the_same_size_but_other_bytes_are_moved_again(
    tiles, tmp_path, bucket, moto
):
    url, options = f"s3://{bucket}/t", {"endpoint": moto, "progress": False}
    upload(tiles, url, **options)
    sync(url, tmp_path / "back", **options)
    for folder, name in (
        (tiles, "train_300_02.json"),
        (tmp_path / "back", "large.bin"),
    ):
        file = folder / name
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        os.utime(file, (0, 0))
    assert upload(tiles, url, **options).moved == 1
    assert sync(url, tmp_path / "back", **options).moved == 2
    assert content(tmp_path / "back") == content(tiles)


def test_only_the_shard_of_a_changed_file_is_moved_again(tiles, tmp_path, bucket, moto):
    url = f"s3://{bucket}/t"
    options = {"endpoint": moto, "progress": False}
    upload(tiles, url, shard_mb=0.005, **options)
    sync(url, tmp_path / "back", **options)
    (tiles / "train_images_300_02" / "5_3_0_300.jpg").write_bytes(b"x" * 1003)
    assert upload(tiles, url, shard_mb=0.005, **options).moved == 1
    assert sync(url, tmp_path / "back", **options).moved == 1
    assert content(tmp_path / "back") == content(tiles)
    upload(tiles, url, shard_mb=100, **options)
    assert sync(url, tmp_path / "one", **options).moved == 1
    assert content(tmp_path / "one") == content(tiles)


def test_deleted_file_of_a_shard_comes_back(tiles, tmp_path):
    remote, back = tmp_path / "remote", tmp_path / "back"
    upload(tiles, remote, shard_mb=100, progress=False)
    sync(remote, back, progress=False)
    (back / "empty").unlink()
    sync(remote, back, progress=False)
    assert content(back) == content(tiles)


# Faults


def test_500_is_tried_again(tiles, tmp_path, bucket, proxy):
    url, options = f"s3://{bucket}/t", {"endpoint": proxy.endpoint, "progress": False}
    proxy.fault = first(3, "PUT", "jpg", "500")
    upload(tiles, url, **options)
    proxy.fault = first(3, "GET", "jpg", "500")
    sync(url, tmp_path / "back", **options)
    assert content(tmp_path / "back") == content(tiles)


@pytest.mark.parametrize("fault", ["500", "cut"])
def test_lasting_fault_names_the_object_and_leaves_no_half_file(
    tiles, tmp_path, bucket, proxy, fault
):
    url = f"s3://{bucket}/t"
    options = {"endpoint": proxy.endpoint, "progress": False, "retries": 1}
    upload(tiles, url, **options)
    proxy.fault = first(10**6, "GET", "5_7_0_300.jpg", fault)
    with pytest.raises(StorageError, match="download of train_images.*5_7_0_300.jpg"):
        sync(url, tmp_path / "back", **options)
    got = content(tmp_path / "back")
    assert all(content(tiles)[name] == data for name, data in got.items())
    assert not list((tmp_path / "back").rglob("*.part"))
    proxy.fault = lambda *_: None
    sync(url, tmp_path / "back", **options)
    assert content(tmp_path / "back") == content(tiles)
    if fault == "500":
        proxy.fault = first(10**6, "PUT", "new.jpg", fault)
        (tiles / "new.jpg").write_bytes(b"x")
        with pytest.raises(StorageError, match="upload of new.jpg"):
            upload(tiles, url, **options)


def test_cut_connections_are_tried_again(tiles, tmp_path, bucket, proxy):
    url, options = f"s3://{bucket}/t", {"endpoint": proxy.endpoint, "progress": False}
    proxy.fault = first(2, "PUT", "", "cut")
    upload(tiles, url, **options)
    proxy.fault = first(3, "GET", "jpg", "cut")
    sync(url, tmp_path / "back", **options)
    assert content(tmp_path / "back") == content(tiles)


def test_no_server_is_an_error_in_bounded_time(tiles, bucket):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(StorageError, match=f"s3://{bucket}/t"):
        upload(tiles, f"s3://{bucket}/t", endpoint=endpoint, retries=1, progress=False)


def test_wrong_key_is_refused_at_once_and_the_right_one_works(
    tiles, tmp_path, monkeypatch
):
    # moto checks signatures and policies after so many requests
    server, endpoint = start_moto(INITIAL_NO_AUTH_ACTION_COUNT="4")
    try:
        client(endpoint).create_bucket(Bucket="guarded")
        iam = client(endpoint, "iam")
        iam.create_user(UserName="me")
        pair = iam.create_access_key(UserName="me")["AccessKey"]
        rule = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
        iam.put_user_policy(UserName="me", PolicyName="p", PolicyDocument=policy)
        options = {"endpoint": endpoint, "progress": False}
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", pair["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", pair["SecretAccessKey"])
        upload(tiles, "s3://guarded/t", **options)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        for transfer in (
            functools.partial(upload, tiles, "s3://guarded/t"),
            functools.partial(sync, "s3://guarded/t", tmp_path / "back"),
        ):
            with pytest.raises(StorageError, match="refused, check the credentials"):
                transfer(**options)
        assert not (tmp_path / "back").exists()
    finally:
        server.kill()
        server.wait()


def test_missing_bucket_and_empty_place_are_named(tiles, tmp_path, bucket, moto):
    options = {"endpoint": moto, "progress": False}
    with pytest.raises(StorageError, match="s3://no-such-bucket/t.*404"):
        upload(tiles, "s3://no-such-bucket/t", **options)
    with pytest.raises(StorageError, match=f"s3://{bucket}/nothing: nothing is there"):
        sync(f"s3://{bucket}/nothing", tmp_path / "back", **options)


def test_public_bucket_is_read_without_credentials(
    tiles, tmp_path, bucket, moto, proxy, monkeypatch
):
    options = {"endpoint": proxy.endpoint, "progress": False}
    upload(tiles, f"s3://{bucket}/t", **options)
    assert all("Authorization" in map(str.title, seen[2]) for seen in proxy.seen)
    everyone = {"Effect": "Allow", "Principal": "*", "Resource": "arn:aws:s3:::*"}
    rules = [{**everyone, "Action": ["s3:GetObject", "s3:ListBucket"]}]
    policy = json.dumps({"Version": "2012-10-17", "Statement": rules})
    client(moto).put_bucket_policy(Bucket=bucket, Policy=policy)
    proxy.seen.clear()
    for name in KEYS:
        monkeypatch.delenv(name)
    sync(f"s3://{bucket}/t", tmp_path / "back", anonymous=True, **options)
    assert content(tmp_path / "back") == content(tiles)
    assert not any("Authorization" in map(str.title, seen[2]) for seen in proxy.seen)


def test_full_disk_is_an_error_and_the_sync_continues_with_room(tiles, tmp_path):
    disk, remote = tmp_path / "disk", tmp_path / "remote"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode
    ):
        pytest.skip("mounting a small disk needs root and the command mount")
    try:
        upload(tiles, remote, progress=False)
        with pytest.raises(OSError, match="No space left"):
            sync(remote, disk / "back", progress=False)
        assert not list(disk.rglob("*.part"))
        whole = content(tiles)
        assert all(whole[name] == data for name, data in content(disk / "back").items())
        more = ["mount", "-o", "remount,size=20m", str(disk)]
        subprocess.run(more, check=True)
        sync(remote, disk / "back", progress=False)
        assert content(disk / "back") == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_quota_is_an_error_that_leaves_no_half_file(tiles, tmp_path):
    upload(tiles, tmp_path / "remote", progress=False)
    code = "import sys; from e2e_utils.storage import sync; sync(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "remote", tmp_path / "back"],
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)
        ),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 1 and "File too large" in done.stderr
    assert not list((tmp_path / "back").rglob("*.part"))
    assert "large.bin" not in content(tmp_path / "back")


def test_killed_upload_is_continued(tiles, tmp_path, bucket, proxy):
    proxy.fault = lambda command, _: "slow" if command == "PUT" else None
    url = f"s3://{bucket}/t"
    code = (
        "import sys; from e2e_utils.storage import upload;"
        "upload(sys.argv[1], sys.argv[2], endpoint=sys.argv[3], workers=2)"
    )
    arguments = [sys.executable, "-c", code, str(tiles), url, proxy.endpoint]
    child = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)

    def stored():
        batches = obstore.list(open_store(url, endpoint=proxy.endpoint))
        return sum(len(batch) for batch in batches)

    deadline = time.monotonic() + 60
    while stored() < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    while proxy.busy and time.monotonic() < deadline:  # what the proxy holds arrives
        time.sleep(0.05)
    before = stored()
    assert 4 <= before < len(content(tiles))
    proxy.fault = lambda *_: None
    report = upload(tiles, url, endpoint=proxy.endpoint, progress=False)
    assert (report.skipped, report.moved) == (before, len(content(tiles)) - before)
    sync(url, tmp_path / "back", endpoint=proxy.endpoint, progress=False)
    assert content(tmp_path / "back") == content(tiles)


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


def test_tar_with_a_path_outside_the_folder_is_refused(tmp_path):
    remote = tmp_path / "remote"
    remote.mkdir()
    name = "shard-00000-of-00001.tar"
    with tarfile.open(remote / name, "w") as tar:
        tar.addfile(tarfile.TarInfo("../evil"))
    (remote / "shards.json").write_text(json.dumps([name]))
    with pytest.raises(StorageError, match="'../evil' in a tar"):
        sync(remote, tmp_path / "back", progress=False)
    assert not (tmp_path / "evil").exists()


def test_index_of_a_missing_shard_is_named(tmp_path):
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "shards.json").write_text('["shard-00000-of-00001.tar"]')
    with pytest.raises(StorageError, match="shard-00000-of-00001.tar, which is not"):
        sync(remote, tmp_path / "back", progress=False)


def test_unknown_url_memory_url_and_missing_folder_are_quoted(tmp_path):
    with pytest.raises(ValueError, match="ftp://host/x: give a path"):
        open_store("ftp://host/x")
    with pytest.raises(ValueError, match="MemoryStore"):
        open_store("memory:///x")
    with pytest.raises(OSError, match="nowhere is no folder"):
        upload(tmp_path / "nowhere", tmp_path / "remote")


def test_commands_take_endpoint_and_keys_from_the_environment(
    tiles, tmp_path, bucket, moto
):
    environment = {**os.environ, **KEYS, "AWS_ENDPOINT_URL_S3": moto}

    def run(*arguments):
        line = [sys.executable, "-m", "e2e_utils.storage", *map(str, arguments)]
        return subprocess.run(
            line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )

    url = f"s3://{bucket}/t"
    done = run("upload", "--local_dir", tiles, "--url", url)
    assert done.returncode == 0 and "16 files moved" in done.stdout, done.stderr
    done = run("sync", "--url", url, "--local_dir", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "back") == content(tiles)
    done = run("sync", "--url", f"{url}/x", "--local_dir", tmp_path / "b")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: s3://")
