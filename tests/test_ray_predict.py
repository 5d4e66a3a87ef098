"""An archive of scenes on Ray Data, beside `predict_scene` on one scene alone."""

import json
import os
import pickle
import re
import resource
import signal
import sys
import threading
import time
from collections import Counter
from http.server import ThreadingHTTPServer
from pathlib import Path

import commands
import cv2
import geopandas
import numpy as np
import obstore
import psutil
import pytest
import torch
from rasterio.crs import CRS
from rasterio.transform import Affine
from test_predict import NAMES, checkpoint, georeferenced, noise
from test_storage import Faults, client, first

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.georeference import Georeference, write_boxes
from e2e_utils.predict import predict_scene
from e2e_utils.scenes import open_scene
from e2e_utils.storage import open_store

pytest.importorskip("ray")

from ray import cloudpickle  # noqa: E402

from ray_files import predict  # noqa: E402
from ray_files.adapter import ray_session  # noqa: E402
from ray_files.archive import Archive, Output, list_archive  # noqa: E402
from ray_files.predict import main, predict_archive  # noqa: E402
from ray_files.scene_worker import WHOLE, block_starts, finish, load_job  # noqa: E402

SCORE, PATIENCE = 0.1, 300  # seconds for what takes ten on idle cores


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A folder of scenes, two of one name, one of 12,000 px, and a checkpoint."""
    root = tmp_path_factory.mktemp("archive")
    (root / "scenes").mkdir()
    for west, name in enumerate(("a/5.tif", "b/5.tif")):
        georeferenced(root / "scenes" / name, noise(210, 220, west), west)
    cv2.imwrite(str(root / "scenes" / "a" / "5.png"), noise(210, 220, 2))
    tiled = {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "lzw"}
    georeferenced(root / "scenes" / "tall.tif", noise(12_000, 150, 3), 3, **tiled)
    (root / "scenes" / "notes.txt").write_text("no scene")
    (root / "scenes" / "a" / "._5.tif").write_bytes(b"of macOS")
    checkpoint(root / "best.pt")
    return root


@pytest.fixture(scope="module")
def s3(moto):
    """A server with faults on the way to an empty bucket, and the settings for it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faults)
    server.target = moto.removeprefix("http://")
    server.lock, server.seen, server.fault = threading.Lock(), [], lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client(moto).create_bucket(Bucket="archive")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            patch.setenv(f"AWS_{name}", "key")
        patch.setenv("AWS_REGION", "us-east-1")
        address = f"http://127.0.0.1:{server.server_port}"
        patch.setenv("AWS_ENDPOINT_URL_S3", address)
        patch.setenv("GDAL_HTTP_RETRY_DELAY", "0.1")
        yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def on_ray(s3):
    """A Ray of two CPUs; here and in its actors torch has one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ray_session(2):
        yield
    torch.set_num_threads(threads)


def run(archive, output, scenes=None, **options):
    options = {"score_threshold": SCORE, "workers": 2, "block_mb": 1.0, **options}
    scenes, best = scenes or archive / "scenes", archive / "best.pt"
    return predict_archive(str(scenes), str(best), str(output), **options)


def content(folder) -> dict[str, bytes]:
    files = (file for file in Path(folder).rglob("*") if file.is_file())
    found = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    found.pop("report.json", None)  # has seconds
    return found


@pytest.fixture(scope="module")
def undisturbed(archive, on_ray, tmp_path_factory):
    """(report, its folder)."""
    output = tmp_path_factory.mktemp("undisturbed")
    return run(archive, output), output


@pytest.mark.slow
def test_an_archive_has_the_boxes_of_each_scene_alone_bit_by_bit(
    archive, undisturbed, tmp_path
):
    report, output = undisturbed
    model, counts = model_from_checkpoint(archive / "best.pt")[0], Counter()
    names = ["a/5.png", "a/5.tif", "b/5.tif", "tall.tif"]
    for name in names:
        path, options = archive / "scenes" / name, {"score_threshold": SCORE}
        found = predict_scene(model, path, 200, 0.2, class_names=NAMES, **options)
        (alone,) = write_boxes(tmp_path / "{scene}.geojson", {name: found})
        assert (output / f"{name}.geojson").read_bytes() == alone.read_bytes()
        assert len(found["names"]) > 10
        counts.update(found["names"])
    assert set(content(output)) == {f"{n}.geojson" for n in names} | {"settings.json"}
    assert (report.done, report.failed, report.boxes) == (4, {}, counts)
    assert report.pixels == 3 * 210 * 220 + 12_000 * 150
    blocks = sum(actor["blocks"] for actor in report.actors.values())
    assert blocks == 5  # of 16 of its 75 tiles
    written = json.loads((output / "report.json").read_text())
    assert written["boxes"] == counts and written["actor_seconds"] > 0
    assert f"{counts.total()} boxes in 4 scene(s)" in str(report)
    assert re.search(r"1\.9 million pixels in \S+ s, \S+ million a second", str(report))
    again = run(archive, output)
    assert (again.done, again.skipped) == (0, 4)
    with pytest.raises(ValueError, match="score_threshold 0.1, 0.5 is asked: give ano"):
        run(archive, output, score_threshold=0.5)


def kill_two(output: Path, killed: list) -> None:
    """End an actor of each round by SIGKILL, once it is at work."""
    end = time.monotonic() + PATIENCE
    for done in (1, 3):  # files of scenes
        while time.monotonic() < end and len(list(output.rglob("*.geojson"))) < done:
            time.sleep(0.05)
        while time.monotonic() < end and len(killed) < done / 2:
            for process in psutil.Process().children(recursive=True):
                if "MapWorker" in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)
                    break
            time.sleep(0.05)


@pytest.mark.slow
def test_a_run_with_kills_has_the_bytes_of_the_undisturbed(
    archive, undisturbed, tmp_path
):
    killed: list[int] = []
    killer = threading.Thread(target=kill_two, args=(tmp_path, killed))
    killer.start()
    report = run(archive, tmp_path)
    killer.join()
    assert len(killed) == 2 and (report.done, report.failed) == (4, {})
    assert content(tmp_path) == content(undisturbed[1])
    assert report.boxes == undisturbed[0].boxes


class Dies(predict.Worker):
    """An actor that one scene ends, as a decoder that crashes would."""

    def __call__(self, row):
        if row["name"] == "dies.tif":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(row)


@pytest.fixture
def faults(archive, s3, tmp_path):
    """A bucket with two scenes that are well and five that are not, their COCO file."""
    store = open_store("s3://archive")
    georeferenced(tmp_path / "5.tif", noise(210, 220), compress="deflate")
    whole = (tmp_path / "5.tif").read_bytes()
    contents = dict.fromkeys(("dies.tif", "get503.tif", "put503.tif"), whole)
    contents |= {
        "cut.tif": whole[:20_000],
        "best.pt": (archive / "best.pt").read_bytes(),
    }
    for name in ("a/5.tif", "a/5.png"):
        contents[name] = (archive / "scenes" / name).read_bytes()
    for name, some in contents.items():
        obstore.put(store, name, some)
    names = [name for name in (*contents, "gone.tif") if name != "best.pt"]
    size, coco = {"height": 210, "width": 220}, {"annotations": []}
    rows = enumerate(names, 7)
    coco["images"] = [{"id": i, "file_name": name, **size} for i, name in rows]
    coco["categories"] = [{"id": i, "name": n} for i, n in enumerate(NAMES[1:])]
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    once = first(1, "GET", "a/5.tif", 503)

    def fault(command, path):
        lost = command == "GET" and "get503.tif" in path
        full = command == "PUT" and "put503.tif" in path
        return 503 if lost or full else once(command, path)

    s3.fault = fault
    yield store, whole, tmp_path / "coco.json", names
    s3.fault = lambda *_: None


@pytest.mark.slow
def test_what_fails_is_told_and_the_same_command_does_what_is_missing(
    archive, on_ray, s3, faults, tmp_path, monkeypatch, capsys
):
    store, whole, listed, names = faults
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    command = [f"--scenes={listed}", "--images=s3://archive", "--format=json"]
    command += ["--checkpoint=s3://archive/best.pt", "--output=s3://archive/out"]
    command += ["--workers=1", f"--score_threshold={SCORE}"]
    with monkeypatch.context() as patch:
        patch.setattr(predict, "Worker", Dies)
        patch.setattr(predict, "DEATHS", 0)
        with pytest.raises(SystemExit) as error:
            main(command)
    assert error.value.code == 1
    written = bytes(obstore.get(store, "out/report.json").bytes())
    failed = json.loads(written)["failed"]
    assert failed.pop("dies.tif") == "each worker that took it died"
    reasons = {"cut.tif": "truncated or corrupt", "gone.tif": "does not exist"}
    reasons |= {"get503.tif": "503", "put503.tif": "json: not written: .*503"}
    for name, reason in reasons.items():
        assert re.search(reason, failed[name]) and name in failed[name]
    assert failed.keys() == reasons.keys()
    told = capsys.readouterr().out
    assert all(f"failed: {name}: {why}" in told for name, why in failed.items())

    s3.fault = lambda *_: None
    for name in ("cut.tif", "gone.tif"):
        obstore.put(store, name, whole)
    s3.seen.clear()
    main(command)
    assert "5 done, 0 failed, 2 were there already" in capsys.readouterr().out
    assert not any("a/5" in path and seen != "GET" for seen, path, _ in s3.seen)
    alone = predict_scene(
        *(model_from_checkpoint(archive / "best.pt")[0], tmp_path / "5.tif", 200, 0.2),
        score_threshold=SCORE,
        class_names=NAMES,
    )
    for image_id, name in enumerate(names, 7):
        rows = json.loads(bytes(obstore.get(store, f"out/{name}.json").bytes()))
        assert {row["image_id"] for row in rows} == {image_id}
        assert "a/5" in name or len(rows) == len(alone["names"]) > 10


# ---- before any work is done


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scenes": "nowhere"}, "nowhere: no such folder or file"),
        ({"scenes": "empty"}, r"empty: no scene there \(.tif, "),
        ({"scenes": "ftp://host/a"}, "ftp://host/a: give a path, file://, s3://"),
        ({"scenes": "https://host/a"}, "lists nothing; give a list of URLs"),
        ({"scenes": "empty/list.txt"}, "list.txt names no scene"),
        ({"scenes": "/bin/sh"}, "sh is no list of scenes"),
        ({"scenes": "other.json"}, "other classes.*category 0 is 'ship'.*'car' there"),
        ({"checkpoint": "no.pt"}, "No such file.*no.pt"),
        ({"checkpoint": "other.json"}, "other.json is not a readable checkpoint"),
        ({"output": "other.json/out"}, "other.json/out: cannot be read"),
        ({"output": "/proc/out"}, "/proc/out"),
        ({"format": "kml"}, "format must be one of .geojson.*got 'kml'"),
        ({"score_threshold": "7"}, "score_threshold must be in 0..1, got 7"),
        ({"precision": "int8"}, "precision must be one of fp32.*got 'int8'"),
        ({"workers": "0"}, "workers is 0"),
        ({"block_mb": "0"}, "block_mb is 0"),
        ({"overlap": "1"}, "overlap is 1"),
        ({"images": "empty"}, "images is empty, but .* is no list or COCO file"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_any_work(
    archive, tmp_path, monkeypatch, changes, reason
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict.adapter, "ray_session", None)  # is not called
    Path("empty").mkdir()
    if "list.txt" in changes.get("scenes", ""):
        Path("empty/list.txt").write_text("\n")
    image = {"id": 1, "file_name": "a.tif", "height": 9, "width": 9}
    coco = {"images": [image], "annotations": []}
    Path("other.json").write_text(
        json.dumps({**coco, "categories": [{"id": 0, "name": "car"}]})
    )
    given = {"scenes": archive / "scenes", "checkpoint": archive / "best.pt"}
    given |= {"output": "out", **changes}
    with pytest.raises(SystemExit, match=reason) as error:
        main([f"--{key}={value}" for key, value in given.items()])
    assert len(str(error.value).splitlines()) == 1 and not list(Path().glob("out/*"))


def test_names_of_a_list_stay_when_it_grows_and_are_one_a_scene(tmp_path):
    rows = [
        "a/5.tif",
        "./b/5.tif",
        f"{tmp_path}/c/5.tif",
        "s3://bucket/5.tif",
        "/x/5.tif",
    ]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    found = list_archive(str(tmp_path / "list.txt"))
    names = ["a/5.tif", "b/5.tif", "c/5.tif", "bucket/5.tif", "x/5.tif"]
    assert list(found.scenes) == names and found.root == str(tmp_path)
    assert found.scenes["b/5.tif"] == f"{tmp_path}/b/5.tif"
    assert found.scenes["bucket/5.tif"] == "s3://bucket/5.tif"
    remote = list_archive(str(tmp_path / "list.txt"), "s3://bucket/in/")
    assert remote.scenes["b/5.tif"] == "s3://bucket/in/b/5.tif"
    one = list_archive("s3://bucket/in/5.tif")
    assert one.scenes == {"5.tif": "s3://bucket/in/5.tif"}
    (tmp_path / "list.txt").write_text("a/../../5.tif")
    with pytest.raises(ValueError, match="5.tif: no URL or path below s3://bucket"):
        list_archive(str(tmp_path / "list.txt"), "s3://bucket")
    (tmp_path / "list.txt").write_text("s3://bucket/5.tif\ngs://bucket/5.tif")
    with pytest.raises(ValueError, match="s3://bucket/5.tif and gs://.* have one name"):
        list_archive(str(tmp_path / "list.txt"))


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_blocks_begin_at_a_batch_and_are_no_smaller_than_what_is_decoded(
    archive, batch_size
):
    with open_scene(archive / "scenes" / "tall.tif") as scene:
        starts = block_starts(scene, 75, batch_size, 1.0)
        assert starts[0] == 0 and not any(start % batch_size for start in starts)
        assert 5 <= len(starts) <= 7 and starts[-1] < 75
        every = list(range(0, 75, batch_size))
        assert block_starts(scene, 75, batch_size, 0.001) == every
    with open_scene(noise(12_000, 150)) as scene:  # in memory as a whole, like a PNG
        assert block_starts(scene, 75, batch_size, 1.0) == [0]


def whole_job(archive, output, ending):
    machine = {"batch_size": 4, "block_mb": 9.0, "threads": 1, "gpu": False}
    options = {
        "score_threshold": SCORE,
        "precision": "fp32",
        "stretch": None,
        "border": 2.0,
    }
    options |= {"size": None, "overlap": None}
    place = Output(str(output), ending)
    best = str(archive / "best.pt")
    return load_job(best, Archive("", {}), place, machine, options)[0]


def one_row(name="a/5.tif"):
    return {"name": name, "id": '"one"', "start": 0, "stop": WHOLE}


def block(pixels=46_200):
    """What an actor hands over of a block in which it found one box."""
    table = np.array([[1, 2, 11, 12, 3, 0.5, 0]], np.float32)
    place = Georeference(CRS.from_epsg(32633), Affine(0.5, 0, 5e5, 0, -0.5, 5e6))
    return pickle.dumps((table, place, pixels))


@pytest.mark.parametrize("ending", ["geojson", "gpkg", "parquet"])
def test_each_format_has_the_boxes_of_all_blocks(archive, tmp_path, ending):
    job = whole_job(archive, tmp_path, ending)
    record = finish(job, one_row(), [block(), block()])
    assert record == {
        "boxes": {"square": 1},
        "pixels": 46_200,
    }  # the second is the same
    frame = (
        geopandas.read_file(tmp_path / f"a/5.tif.{ending}")
        if ending != "parquet"
        else geopandas.read_parquet(tmp_path / "a/5.tif.parquet")
    )
    assert frame["scene"].tolist() == ["a/5.tif"]
    assert frame.crs == ("EPSG:4326" if ending == "geojson" else "EPSG:32633")


@pytest.mark.slow
def test_a_disk_that_fills_up_fails_what_does_not_fit(archive, undisturbed, tmp_path):
    """A real one, of so many bytes, that this test alone sees."""
    script = """disk=$2; mount -t tmpfs -o size=$1 full "$disk" || exit; shift 2
        "$@"; echo "status $?"
        mount -o remount,size=64m "$disk" && "$@" && cp -r "$disk" "$disk.copy"
    """
    (tmp_path / "disk").mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if commands.run(*alone, "mount -t tmpfs none /mnt").returncode:
        pytest.skip("no file system can be mounted here")
    whole = content(undisturbed[1])
    room = max(map(len, whole.values())) // 2  # for all but the largest
    program = [sys.executable, "ray_files/predict.py", "--scenes", archive / "scenes"]
    program += ["--checkpoint", archive / "best.pt", "--output", tmp_path / "disk"]
    program += ["--workers=1", "--block_mb=1", f"--score_threshold={SCORE}"]
    done = commands.run(*alone, script, "sh", room, tmp_path / "disk", *program)
    assert done.returncode == 0, done.stderr
    first, _, second = done.stdout.partition("status 1\n")
    assert re.search(r"failed: tall.tif: .*No space left on device", first)
    assert "3 done, 1 failed" in first
    assert "1 done, 0 failed, 3 were there already" in second
    assert content(tmp_path / "disk.copy") == whole


def test_a_full_disk_is_an_error_and_leaves_nothing(archive, tmp_path):
    job = whole_job(archive, tmp_path / "out", "geojson")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError):
            finish(job, one_row(), [block()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path) == {}
    finish(job, one_row(), [block()])
    assert set(content(tmp_path)) == {"out/a/5.tif.geojson"}
