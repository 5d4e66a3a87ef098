"""Copy: this file and files.py.

The pixels of a scene: read them strictly, and cut them into JPEG tiles that appear
whole or not at all.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

from .files import write_file

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def _read_tiff(path: Path, header_only: bool = False) -> Any:
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]  # a TiffPage: the first always is
        bands_first = page.ndim == 3 and page.planarconfig == 2
        shape = page.shape[1:] if bands_first else page.shape
        if header_only:
            return shape[:2]
        parts = zip(page.dataoffsets, page.databytecounts, strict=True)
        end, there = max(start + n for start, n in parts), path.stat().st_size
        if end > there:
            raise ValueError(f"truncated: {there} of at least {end} bytes are there")
        if page.tags.valueof(274, 1) != 1:
            raise ValueError("its orientation tag rotates it; store it upright")
        if page.is_memmappable:
            start = page.dataoffsets[0]
            mapped = np.memmap(path, page.dtype, "r", offset=start, shape=page.shape)
            bands = np.asarray(mapped)
        else:
            # cv2 is faster on LZW but returns corrupt data as if it were a picture
            bands = page.asarray()
    return np.ascontiguousarray(np.moveaxis(bands, 0, -1)) if bands_first else bands


def _read_other(path: Path, magic: bytes) -> np.ndarray:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        tail = file.read()
    if magic.startswith(PNG_MAGIC):
        whole, flags = tail.endswith(PNG_END), cv2.IMREAD_UNCHANGED
    else:
        # cv2 fills what a truncated JPEG lacks with grey, so look for its end marker
        whole, flags = b"\xff\xd9" in tail, cv2.IMREAD_COLOR
    bgr = cv2.imread(str(path), flags) if whole else None
    if bgr is None:
        raise ValueError("truncated or corrupt")
    if bgr.ndim == 3:
        code = cv2.COLOR_BGR2RGB if bgr.shape[2] == 3 else cv2.COLOR_BGRA2RGBA
        cv2.cvtColor(bgr, code, dst=bgr)
    return bgr


def read_bands(path: str | Path, header_only: bool = False) -> Any:
    """Read a TIFF, PNG or JPEG scene as it is stored, bands last.

    Args:
        path: image file. Uncompressed contiguous TIFFs are mapped, not read: only the
            pixels that are touched come from the disk.
        header_only: return only (height, width), from the header.

    Returns:
        (H, W) or (H, W, bands) of the stored dtype, perhaps read-only; or (height,
        width).

    Raises:
        FileNotFoundError: no such file.
        ValueError: no image, truncated or corrupt; the message names the file.
    """
    path = Path(path)
    with open(path, "rb") as file:
        magic = file.read(24)
    try:
        if magic.startswith(TIFF_MAGIC):
            return _read_tiff(path, header_only)
        if not magic.startswith((PNG_MAGIC, b"\xff\xd8\xff")):
            raise ValueError("it is no TIFF, PNG or JPEG")
        if header_only and magic.startswith(PNG_MAGIC):
            width, height = (int.from_bytes(magic[i : i + 4], "big") for i in (16, 20))
            return height, width
        image = _read_other(path, magic)
        return image.shape[:2] if header_only else image
    except Exception as error:  # decoders raise many kinds; all mean an unreadable file
        raise ValueError(f"{path}: cannot be read as a scene: {error}") from error


def read_rgb(path: str | Path) -> np.ndarray:
    """Read a scene as RGB; see `read_bands` for the files and errors.

    Returns:
        uint8 (H, W, 3), perhaps read-only. A fourth band (alpha, near infrared) is
        left out, never multiplied in.

    Raises:
        ValueError: not 8 bit, or not 3 or 4 bands; the message names the file.
    """
    bands = read_bands(path)
    if bands.dtype != np.uint8 or bands.ndim != 3 or bands.shape[2] not in (3, 4):
        found = 1 if bands.ndim == 2 else bands.shape[-1]
        raise ValueError(
            f"{path}: {found} band(s) of {bands.dtype} where 3 or 4 bands of uint8 are "
            "needed; convert.tif_to_rgb scales 16-bit scenes with its percentile"
        )
    return bands[..., :3]


def read_window(path: str | Path, x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    """Read the pixels x1 <= x < x2, y1 <= y < y2 of a scene, clipped to the scene.

    Memory stays at the window for uncompressed TIFFs; other files are decoded whole.

    Returns:
        uint8 (h, w, 3), contiguous and writable.
    """
    return read_rgb(path)[max(0, y1) : y2, max(0, x1) : x2].copy()


class FailedScenes(RuntimeError):
    """Some scenes failed; the others are done and written. `report` has both."""

    def __init__(self, report: Any) -> None:
        self.report = report
        lines = [f"  {reason}" for reason in report.failed.values()]
        super().__init__("\n".join([f"{len(lines)} scene(s) failed:", *lines]))


def write_tiles(
    path: Path,
    size_hw: tuple[int, int],
    tiles: dict[str, list[int]],
    tile_dir: Path,
    record: Path,
    quality: int = 75,
) -> bool:
    """Cut a scene into JPEG files, all of them or none.

    `record` names the tiles before they appear and is sealed with a key afterwards, so
    a killed run leaves nothing that the next one does not know of, and tiles of other
    settings or of a scene that has changed are replaced, never mixed.

    Args:
        path: scene, see `read_rgb`.
        size_hw: height and width that the scene must have, pixels.
        tiles: file name to x1, y1, x2, y2 in scene pixels.
        tile_dir: folder of the tiles, there already.
        record: JSON file, on the same file system as `tile_dir`, one a scene.
        quality: JPEG quality, 0..100; 75 with 4:2:0 gives the bytes of Pillow's save.

    Returns:
        False if the tiles were there already, of the same scene and settings.

    Raises:
        FileNotFoundError, ValueError: the scene is missing, unreadable or of another
            size; nothing was written.
        OSError: the disk is full or not writable.
    """
    seen = path.stat()
    what = [str(path.name), seen.st_size, seen.st_mtime_ns, quality, *tiles]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    old = json.loads(record.read_bytes()) if record.exists() else {"names": []}
    if old.get("key") == key:
        there = (tile_dir / name for name in tiles)
        if sum(f.stat().st_size for f in there if f.exists()) == old["bytes"]:
            return False
    pixels = read_rgb(path)
    if pixels.shape[:2] != tuple(size_hw):
        raise ValueError(
            f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels, but the COCO file "
            f"says {size_hw[1]} x {size_hw[0]}"
        )
    total, bgr = 0, None
    with tempfile.TemporaryDirectory(prefix="cut.", dir=record.parent) as beside:
        for name, (x1, y1, x2, y2) in tiles.items():
            bgr = cv2.cvtColor(pixels[y1:y2, x1:x2], cv2.COLOR_RGB2BGR, dst=bgr)
            jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
            total += jpeg.size
            with open(f"{beside}/{name}", "wb", buffering=0) as file:
                rest = jpeg.reshape(-1).data
                while rest:  # unbuffered, a nearly full disk may take a part only
                    rest = rest[file.write(rest) :]
        unsealed = {"names": sorted({*tiles, *old["names"]})}
        write_file(record, [json.dumps(unsealed).encode()])
        for name in set(old["names"]).difference(tiles):
            (tile_dir / name).unlink(missing_ok=True)
        for name in tiles:
            os.replace(f"{beside}/{name}", f"{tile_dir}/{name}")
    sealed = {"key": key, "bytes": total, "names": list(tiles)}
    write_file(record, [json.dumps(sealed).encode()])
    return True


def forget_tiles(tile_dir: Path, record: Path) -> None:
    """Remove the tiles that a record names, then the record."""
    for name in json.loads(record.read_bytes())["names"]:
        (tile_dir / name).unlink(missing_ok=True)
    record.unlink()
