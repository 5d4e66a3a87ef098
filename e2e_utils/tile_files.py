"""The tiles of scenes as JPEG files: each whole or not there, and none cut twice.

The manifest is written before the tiles that it names. So whatever a killed run leaves
is known to the next one, which keeps what it needs and removes the rest.

Copy: this file, coco.py, scenes.py, images.py, stretch.py and files.py.
"""

import os
from pathlib import Path

import cv2
import msgspec
from tqdm.contrib.concurrent import thread_map

from .coco import Image
from .files import write_file
from .scenes import open_scene
from .stretch import Stretch

QUALITY = 75  # of a JPEG; with 4:2:0 it gives the bytes of Pillow's save
Tiles = dict[str, list[int]]  # file name: x1, y1, x2, y2 in scene pixels


def _sources(manifest: dict) -> dict[str, dict]:
    """The scene, as a manifest describes it, that each tile is cut from."""
    scenes = {row["file_name"]: row for row in manifest["scenes"]}
    return {tile["file_name"]: scenes[tile["scene"]] for tile in manifest["tiles"]}


def _manifest(image_dir: Path, jobs: list, stretch: Stretch | None) -> dict:
    """What is cut from what; a missing scene has no `bytes` and `mtime_ns`."""
    rows, tiles = [], []
    for image, own in jobs:
        row, name = msgspec.to_builtins(image), image.file_name
        if (image_dir / name).exists():
            stat = (image_dir / name).stat()
            row |= {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        rows.append(row | ({"stretch": stretch.to_dict()} if stretch else {}))
        for tile, xyxy in own.items():
            tiles.append({"file_name": tile, "scene": name, "xyxy": xyxy})
    return {"scenes": rows, "tiles": tiles}


def start_manifest(
    path: Path,
    image_dir: Path,
    tile_dir: Path,
    jobs: list[tuple[Image, Tiles]],
    stretch: Stretch | None = None,
) -> None:
    """Write a manifest, and remove the tiles that do not belong to it.

    A tile stays if the manifest that was there names it too, so that it shows the same
    part of a scene, and describes that scene alike.

    Args:
        path: of the manifest, see `tiling.slice_coco`.
        tile_dir: folder of the tiles, made if it is not there.
        image_dir, jobs, stretch: see `write_tiles`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> scene = Image(300, 540, 1, "1.png")
        >>> with TemporaryDirectory() as name:
        ...     folder, manifest = Path(name), Path(name, "manifest.json")
        ...     for x1 in (0, 240):  # of another overlap, the second time
        ...         tiles = {f"{x1}.jpg": [x1, 0, x1 + 300, 300]}
        ...         start_manifest(manifest, folder, folder, [(scene, tiles)])
        ...         (folder / f"{x1}.jpg").touch()
        ...     [path.name for path in folder.glob("*.jpg")]
        ['240.jpg']
    """
    manifest = _manifest(image_dir, jobs, stretch)
    tile_dir.mkdir(parents=True, exist_ok=True)
    for half_written in tile_dir.glob(".*.part"):
        half_written.unlink()
    old, new = {}, _sources(manifest)
    if path.exists():
        old = _sources(msgspec.json.decode(path.read_bytes()))
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            (tile_dir / name).unlink(missing_ok=True)
    write_file(path, [msgspec.json.encode(manifest)])


def write_tiles(
    image_dir: Path,
    tile_dir: Path,
    jobs: list[tuple[Image, Tiles]],
    title: str,
    stretch: Stretch | None = None,
) -> tuple[int, dict[str, str]]:
    """Cut scenes into JPEG files; a scene whose tiles are all there is not read.

    Args:
        image_dir: folder of the scenes, see `scenes.open_scene`.
        tile_dir: folder of the tiles, after `start_manifest`.
        jobs: scenes as the COCO file lists them, and the tiles of each.
        title: of the progress bar.
        stretch: see `scenes.open_scene`.

    Returns:
        How many scenes had their tiles already, and what is wrong with those that are
        missing, unreadable or of another size: {file name: error}; they have no tiles.

    Raises:
        OSError: the disk is full or not writable.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import numpy as np
        >>> jobs = [(Image(300, 540, 1, "1.png"), {"left.jpg": [0, 0, 300, 300]})]
        >>> with TemporaryDirectory() as name:
        ...     _ = cv2.imwrite(f"{name}/1.png", np.zeros((300, 540, 3), np.uint8))
        ...     write_tiles(Path(name), Path(name), jobs, "scenes")
        ...     write_tiles(Path(name), Path(name), jobs, "scenes")  # not again
        (0, {})
        (1, {})
    """
    failed = {}

    def cut(job: tuple[Image, Tiles]) -> bool:
        image, tiles = job
        if tiles and all(_is_whole(tile_dir / name) for name in tiles):
            return False
        try:
            _cut(image_dir / image.file_name, image, tiles, tile_dir, stretch)
        except (ValueError, FileNotFoundError) as error:
            failed[image.file_name] = str(error)
            for name in tiles:
                (tile_dir / name).unlink(missing_ok=True)
        return True

    # decoding and encoding leave Python's lock; each thread holds one scene
    new = thread_map(cut, jobs, max_workers=os.cpu_count(), desc=title)
    return new.count(False), failed


def _is_whole(path: Path) -> bool:
    """Whether a JPEG is there and has its end marker."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2))
        return file.read() == b"\xff\xd9"


def _cut(
    path: Path, image: Image, tiles: Tiles, tile_dir: Path, stretch: Stretch | None
) -> None:
    bgr = None
    with open_scene(path, stretch=stretch) as scene:
        if (scene.height, scene.width) != (image.height, image.width):
            raise ValueError(
                f"{path}: {scene.width} x {scene.height} pixels, but the COCO file "
                f"says {image.width} x {image.height}"
            )
        for name, rgb in zip(tiles, scene.tiles(tiles.values()), strict=True):
            bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR, dst=bgr)
            jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
            temporary = f"{tile_dir}/.{name}.part"  # lighter than write_file
            with open(temporary, "wb") as file:
                file.write(jpeg.data)
            os.replace(temporary, f"{tile_dir}/{name}")
