"""The tiles of a scene as JPEG files: all of them or none, never cut twice.

Copy: this file, scenes.py and files.py.

A record, a JSON file for each scene, names the tiles before they appear and gets a key
once they are there. So a run that was killed leaves no tile that the next one does not
know of, and tiles of other settings or of a scene that has changed are replaced.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import cv2

from .files import write_file
from .scenes import read_rgb

QUALITY = 75  # of a JPEG; with 4:2:0 it gives the bytes of Pillow's save


def write_tiles(
    path: Path,
    size_hw: tuple[int, int],
    tiles: dict[str, list[int]],
    tile_dir: Path,
    record: Path,
) -> bool:
    """Cut a scene into JPEG files, all of them or none.

    Args:
        path: scene, see `read_rgb`.
        size_hw: height and width that the scene must have, pixels.
        tiles: file name to x1, y1, x2, y2 in scene pixels.
        tile_dir: folder of the tiles, there already.
        record: JSON file, on the same file system as `tile_dir`, one a scene.

    Returns:
        False if the tiles were there already, of the same scene and settings.

    Raises:
        FileNotFoundError, ValueError: the scene is missing, unreadable or of another
            size; nothing was written.
        OSError: the disk is full or not writable.
    """
    stat = path.stat()
    what = [path.name, stat.st_size, stat.st_mtime_ns, QUALITY, *tiles]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    old = json.loads(record.read_bytes()) if record.exists() else {"names": []}
    if old.get("key") == key and old["bytes"] == _size(tile_dir, tiles):
        return False
    pixels = read_rgb(path)
    if pixels.shape[:2] != size_hw:
        raise ValueError(
            f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels, but the COCO file "
            f"says {size_hw[1]} x {size_hw[0]}"
        )
    bgr = None
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


def forget_tiles(tile_dir: Path, record: Path) -> None:
    """Remove the tiles that a record names, then the record."""
    if record.exists():
        for name in json.loads(record.read_bytes())["names"]:
            (tile_dir / name).unlink(missing_ok=True)
        record.unlink()
