"""The pixels of a scene: TIFF, PNG and JPEG, read strictly.

Copy: this file.
"""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

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
            bands = np.asarray(tifffile.memmap(path, page=0, mode="r"))
        else:
            # cv2 is faster on LZW but returns corrupt data as if it were a picture
            bands = page.asarray()
    return np.ascontiguousarray(np.moveaxis(bands, 0, -1)) if bands_first else bands


def _read_other(path: Path, head: bytes, header_only: bool = False) -> Any:
    png = head.startswith(PNG_MAGIC)
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        tail = file.read()
    # cv2 fills what a truncated JPEG lacks with grey, so look for its end marker
    if not (tail.endswith(PNG_END) if png else b"\xff\xd9" in tail):
        raise ValueError("truncated or corrupt")
    if png and header_only:
        return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")
    flags = cv2.IMREAD_UNCHANGED if png else cv2.IMREAD_COLOR
    bgr = cv2.imread(str(path), flags)
    if bgr is None:
        raise ValueError("truncated or corrupt")
    if header_only:
        return bgr.shape[:2]
    if bgr.ndim == 3:
        code = cv2.COLOR_BGR2RGB if bgr.shape[2] == 3 else cv2.COLOR_BGRA2RGBA
        cv2.cvtColor(bgr, code, dst=bgr)
    return bgr


def read_bands(path: str | Path, header_only: bool = False) -> Any:
    """Read a TIFF, PNG or JPEG scene as it is stored, bands last.

    Args:
        path: image file. Uncompressed contiguous TIFFs are mapped, not read: only the
            pixels that are touched come from the disk.
        header_only: return only (height, width); a JPEG is decoded for it, the others
            are not.

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
        return _read_other(path, magic, header_only)
    except Exception as error:  # decoders raise many kinds; all mean an unreadable file
        raise ValueError(f"{path}: cannot be read as a scene: {error}") from error


def read_rgb(path: str | Path, percentile: float | None = None) -> np.ndarray:
    """Read a scene as RGB; see `read_bands` for the files and errors.

    Args:
        path: image file.
        percentile: scale a scene that is not 8 bit, each band from its percentiles p
            and 100 - p to 0..255; left out, it is refused.

    Returns:
        uint8 (H, W, 3), perhaps read-only. A fourth band (alpha, near infrared) is
        left out, never multiplied in.

    Raises:
        ValueError: not 8 bit, or not 3 or 4 bands; the message names the file.
    """
    bands = read_bands(path)
    found = bands.shape[2] if bands.ndim == 3 else 1
    if found in (3, 4) and bands.dtype == np.uint8:
        return bands[..., :3]
    if found not in (3, 4) or percentile is None:
        raise ValueError(
            f"{path}: {found} band(s) of {bands.dtype} where 3 or 4 bands of uint8 are "
            "needed; convert.tif_to_rgb scales 16-bit scenes with its percentile"
        )
    rgb = bands[..., :3]
    low, high = np.percentile(rgb, (percentile, 100 - percentile), axis=(0, 1))
    low, high = low.astype(np.float32), np.maximum(high, low + 1).astype(np.float32)
    return np.clip(np.rint((rgb - low) * (255 / (high - low))), 0, 255).astype(np.uint8)


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
