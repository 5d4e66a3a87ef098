"""The tiles of scenes as JPEG files: all of a scene's or none, and none cut twice.

Copy: this file, coco.py, scenes.py and files.py.

A record, a JSON file for each scene, names the tiles before they appear and gets a key
once they are there. So a run that was killed leaves no tile that the next one does not
know of, and tiles of other settings or of a scene that has changed are replaced.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import cv2
from tqdm.contrib.concurrent import thread_map

from .coco import Image
from .files import write_file
from .scenes import read_rgb

QUALITY = 75  # of a JPEG; with 4:2:0 it gives the bytes of Pillow's save


def write_tiles(
    image_dir: Path,
    tile_dir: Path,
    records: Path,
    jobs: dict[str, tuple[Image, dict[str, list[int]]]],
    *,
    workers: int | None = None,
    title: str | None = None,
) -> tuple[int, dict[str, str]]:
    """Cut scenes into JPEG files.

    Args:
        image_dir: folder of the scenes, see `read_rgb`.
        tile_dir: folder of the tiles, made if it is not there.
        records: folder of the records, on the same file system. Tiles of records that
            belong to none of the jobs are removed.
        jobs: by the name of its record, a scene as the COCO file lists it and its
            tiles: file name to x1, y1, x2, y2 in scene pixels.
        workers: threads, each holding one scene; the number of cores if left out.
        title: of the progress bar; without one there is none.

    Returns:
        How many scenes had their tiles already, and what is wrong with those that are
        missing, unreadable or of another size: {file name: error}; they have no tiles.

    Raises:
        OSError: the disk is full or not writable.
    """
    tile_dir.mkdir(parents=True, exist_ok=True)
    records.mkdir(exist_ok=True)
    for half_cut in records.glob("cut.*"):
        shutil.rmtree(half_cut)
    for record in records.glob("*.json"):
        if record.stem not in jobs:
            _forget(tile_dir, record)
    failed = {}

    def cut(name: str) -> bool:
        image, tiles = jobs[name]
        record = records / f"{name}.json"
        try:
            return _cut(image_dir / image.file_name, image, tiles, tile_dir, record)
        except (ValueError, FileNotFoundError) as error:
            failed[image.file_name] = str(error)
            _forget(tile_dir, record)
            return True

    bar = {"desc": title, "disable": title is None}
    new = thread_map(cut, jobs, max_workers=workers or os.cpu_count(), **bar)
    return new.count(False), failed


def _cut(
    path: Path, image: Image, tiles: dict[str, list[int]], tile_dir: Path, record: Path
) -> bool:
    """Cut one scene; False if its tiles are there, of the same scene and settings."""
    stat = path.stat()
    what = [path.name, stat.st_size, stat.st_mtime_ns, QUALITY, *tiles]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    old = json.loads(record.read_bytes()) if record.exists() else {"names": []}
    if old.get("key") == key and old["bytes"] == _size(tile_dir, tiles):
        return False
    pixels, bgr = read_rgb(path), None
    height, width = pixels.shape[:2]
    if (height, width) != (image.height, image.width):
        raise ValueError(
            f"{path}: {width} x {height} pixels, but the COCO file says "
            f"{image.width} x {image.height}"
        )
    with tempfile.TemporaryDirectory(prefix="cut.", dir=record.parent) as temporary:
        for name, (x1, y1, x2, y2) in tiles.items():
            bgr = cv2.cvtColor(pixels[y1:y2, x1:x2], cv2.COLOR_RGB2BGR, dst=bgr)
            jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
            with open(f"{temporary}/{name}", "wb") as file:
                file.write(jpeg.data)
        names = sorted({*tiles, *old["names"]})
        write_file(record, [json.dumps({"names": names}).encode()])
        for name in set(old["names"]).difference(tiles):
            (tile_dir / name).unlink(missing_ok=True)
        for name in tiles:
            os.replace(f"{temporary}/{name}", f"{tile_dir}/{name}")
    done = {"key": key, "bytes": _size(tile_dir, tiles), "names": list(tiles)}
    write_file(record, [json.dumps(done).encode()])
    return True


def _size(folder: Path, names: dict) -> int:
    """Bytes of the files that are there."""
    files = (folder / name for name in names)
    return sum(file.stat().st_size for file in files if file.exists())


def _forget(tile_dir: Path, record: Path) -> None:
    """Remove the tiles that a record names, then the record."""
    if record.exists():
        for name in json.loads(record.read_bytes())["names"]:
            (tile_dir / name).unlink(missing_ok=True)
        record.unlink()
