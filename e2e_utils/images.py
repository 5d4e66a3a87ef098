"""PNG and JPEG files, strictly, with the pixels that Pillow gives; which is a TIFF.

Copy: this file.
"""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

PNG_MAGIC, JPEG_MAGIC = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 274  # tag of EXIF and of TIFF
PNG_END, JPEG_END = b"\0\0\0\0IEND\xaeB`\x82", b"\xff\xd9"
# scheme of a TIFF's URL -> how GDAL reads it
URLS = {"s3://": "/vsis3/", "gs://": "/vsigs/", "az://": "/vsiaz/"}
URLS |= {f"{scheme}://": f"/vsicurl/{scheme}://" for scheme in ("http", "https")}


def is_url(source: object) -> bool:
    """Whether a string names a file that GDAL reads over the network.

    Example:
        >>> is_url("s3://bucket/5.tif"), is_url("scenes/5.tif")
        (True, False)
    """
    return isinstance(source, str) and source.startswith(tuple(URLS))


def is_tiff(source: str | Path | bytes) -> bool:
    """Whether a file, or the bytes of one, begin as a TIFF does.

    Example:
        >>> is_tiff(b"II*\\0 and so on"), is_tiff(JPEG_MAGIC)
        (True, False)
    """
    if isinstance(source, bytes):
        return source.startswith(TIFF_MAGIC)
    with open(source, "rb") as file:
        return file.read(4).startswith(TIFF_MAGIC)


def check_upright(orientation: int) -> None:
    """Refuse what a viewer turns: were its boxes drawn before or after the turn?

    Example:
        >>> check_upright(6)
        Traceback (most recent call last):
            ...
        ValueError: its orientation tag, 6, rotates it; store it upright
    """
    if orientation != 1:
        raise ValueError(
            f"its orientation tag, {orientation}, rotates it; store it upright"
        )


def open_image(
    source: Path | bytes,
) -> tuple[tuple[int, int], str, Callable[[], np.ndarray]]:
    """Read the header of a PNG or JPEG.

    Args:
        source: its path, or its bytes.

    Returns:
        (height, width); "uint8" or "uint16" as its values are stored; a function that
        decodes it, once, to uint8 (H, W, 3), RGB.

    Raises:
        ValueError, OSError, SyntaxError: no PNG or JPEG, or turned by its orientation
            tag; the function raises them if it is truncated or corrupt.

    Example:
        >>> pixels = np.full((300, 200, 3), 128, np.uint8)
        >>> size, dtype, decode = open_image(cv2.imencode(".png", pixels)[1].tobytes())
        >>> size, dtype, decode()[0, 0].tolist()
        ((300, 200), 'uint8', [128, 128, 128])
    """
    with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        head = file.read(32)
        png = head.startswith(PNG_MAGIC)
        if not png and not head.startswith(JPEG_MAGIC):
            raise ValueError("it is no TIFF, PNG or JPEG")
        file.seek(0)
        picture = _pillow(file, png)
        (width, height), mode = picture.size, picture.mode
        if not png or "exif" in picture.info:  # else Pillow decodes a PNG for it
            check_upright(picture.getexif().get(ORIENTATION, 1))

    @cache
    def decode() -> np.ndarray:
        content = source if isinstance(source, bytes) else source.read_bytes()
        return _decode(content, png, mode)

    # Pillow calls 16 bits of RGB "RGB"; the 25th byte of a PNG is its depth
    return (height, width), "uint16" if png and head[24] > 8 else "uint8", decode


def _pillow(file: Any, png: bool) -> PngImageFile | JpegImageFile:
    """Without the limit that `Image.open` puts on a scene's pixels."""
    return PngImageFile(file) if png else JpegImageFile(file)


def _decode(content: bytes, png: bool, mode: str) -> np.ndarray:
    if png and b"eXIf" in content:  # perhaps behind the pixels
        picture = _pillow(io.BytesIO(content), png)
        picture.load()
        check_upright(picture.getexif().get(ORIENTATION, 1))
    if png and content.rfind(PNG_END) < 0:
        raise ValueError("truncated")
    # OpenCV is twice as fast, but fills what a truncated JPEG lacks with grey, and is
    # one level off in CMYK
    if not png and (mode == "CMYK" or JPEG_END not in content[-4096:]):
        return np.asarray(_pillow(io.BytesIO(content), png).convert("RGB"))
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    bgr = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    if bgr is None:
        raise ValueError("truncated or corrupt")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, dst=bgr)
