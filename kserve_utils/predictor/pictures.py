"""Bytes of a picture file to pixels, with the checks and words of the TorchServe
handler, so that both servers refuse the same pictures for the same reasons.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from e2e_utils.georeference import Georeference, read_georeference
from e2e_utils.scenes import TIFF_MAGIC, read_bands

from .refusal import bad

FORMATS = ("JPEG", "PNG", "TIFF")  # whose header is read without decoding pixels
MAX_SIDE = 100_000  # a scene of 1 x 2,000,000,000 px would be millions of tiles

_UNREADABLE: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError)
_UNREADABLE += (struct.error, zlib.error, Image.DecompressionBombError)


def check_picture(content: bytes, max_pixels: int, where: str) -> Image.Image:
    """Read the header of a picture file, none of its pixels.

    Args:
        content: a JPEG, PNG or TIFF file.
        max_pixels: width x height that is still taken.
        where: what the reason begins with, such as "instance 0".

    Raises:
        Refusal: 400, not a picture, too large, or not 8 bits a channel.
    """
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except _UNREADABLE as error:
        reason = f"{len(content)} bytes that are not a picture (JPEG, PNG or TIFF)"
        raise bad(f"{where}: {reason}") from error
    width, height = picture.size
    if width * height > max_pixels:
        raise bad(
            f"{where}: the picture has {width} x {height} pixels, at most {max_pixels} "
            "are taken: send tiles of it, or the parameter scene"
        )
    if picture.mode.startswith(("I", "F")):
        raise bad(f"{where}: mode {picture.mode}: send 8 bits a channel")
    return picture


def decode(content: bytes, max_pixels: int, where: str) -> np.ndarray:
    """Pixels of a picture file, uint8 (H, W, 3), RGB; raises as `check_picture`."""
    picture = check_picture(content, max_pixels, where)
    try:
        return np.array(picture.convert("RGB"))
    except _UNREADABLE as error:
        raise bad(f"{where}: the picture is damaged or cut short: {error}") from error


def place_of(content: bytes, where: str) -> Georeference | None:
    """Where a picture file lies on Earth, if it says; raises a Refusal, 400."""
    try:
        return read_georeference(content)
    except ValueError as error:
        raise bad(f"{where}: {error}") from error


def check_scene(path: Path, max_pixels: int) -> None:
    """Read the header of a scene's file, none of its pixels.

    Args:
        path: a TIFF, PNG or JPEG.
        max_pixels: of a file that is decoded whole. An uncompressed TIFF, bands last,
            is read by windows: its memory does not grow with its size.

    Raises:
        Refusal: 400, not a scene, or too large; never with the path.
    """
    try:
        height, width, windows = _scene_header(path)
    except _UNREADABLE as error:
        raise scene_error(path, error) from error
    check_sides(height, width)
    if not windows and height * width > max_pixels:
        raise bad(
            f"scene: {width} x {height} pixels, at most {max_pixels} are decoded "
            "whole: send it as an uncompressed TIFF, which is read by windows"
        )


def check_sides(height: int, width: int) -> None:
    """Raises a Refusal, 400, if a scene has a side above `MAX_SIDE`."""
    if max(height, width) > MAX_SIDE:
        raise bad(f"scene: {width} x {height} pixels, a side is at most {MAX_SIDE}")


def _scene_header(path: Path) -> tuple[int, int, bool]:
    """Height, width, and whether it is read by windows."""
    with open(path, "rb") as file:
        tiff = file.read(4).startswith(TIFF_MAGIC)
    if not tiff:
        with Image.open(path, formats=FORMATS) as picture:
            return picture.height, picture.width, False
    height, width = read_bands(path, header_only=True)
    with tifffile.TiffFile(path) as pages:
        page: Any = pages.pages[0]  # a TiffPage: the first always is
        bands_first = page.ndim == 3 and page.planarconfig == 2
        return height, width, page.is_memmappable and not bands_first


def scene_error(path: Path, error: Exception) -> Exception:
    """What a scene that cannot be read is refused with: 400, without its path."""
    if isinstance(error, Image.UnidentifiedImageError):
        return bad(f"scene: {path.stat().st_size} bytes that are no TIFF, PNG or JPEG")
    reason = str(error).replace(f"{path}: ", "").replace(f"'{path}'", "the file")
    return bad(f"scene: {reason}")
