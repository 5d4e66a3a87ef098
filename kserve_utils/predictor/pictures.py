"""Bytes of a picture file to pixels, checked as TorchServe's handler checks them.

Both servers refuse the same pictures for the same reasons, in the same words.

TIFF, PNG and JPEG are opened by `e2e_utils.scenes`, which opens nothing but the bytes
that the caller sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from e2e_utils.georeference import Georeference, read_georeference
from e2e_utils.scenes import Scene, open_scene

from .refusal import Refusal, bad

MAX_SIDE = 100_000  # a scene of 1 x 2,000,000,000 px would be millions of tiles
# a detector scales a thinner picture to less than a pixel
MAX_RATIO = 100


def check_picture(
    content: bytes, max_pixels: int, where: str, stretch: dict | None = None
) -> None:
    """Read the header of a picture file, none of its pixels.

    Args:
        content: a JPEG, PNG or TIFF file.
        max_pixels: width x height that is still taken.
        where: what the reason begins with, such as "instance 0".
        stretch: of detector.json, for TIFFs, see `predict.predict_scene`.

    Raises:
        Refusal: 400, not a picture, too large, too thin, turned by its orientation
            tag, or more than 8 bits a channel without a stretch for them.
    """
    with _opened(content, max_pixels, where, stretch):
        pass


def decode(
    content: bytes, max_pixels: int, where: str, stretch: dict | None = None
) -> np.ndarray:
    """Pixels of a picture file, uint8 (H, W, 3), RGB; raises as `check_picture`."""
    with _opened(content, max_pixels, where, stretch) as scene:
        try:
            return np.array(scene.read())
        except ValueError as error:
            reason = f"the picture is damaged or cut short: {_reason(error)}"
            raise bad(f"{where}: {reason}") from error


def check_size(height: int, width: int, max_pixels: int, where: str) -> None:
    """Raises a Refusal, 400, if a picture is too large or too thin."""
    size = f"{where}: the picture has {width} x {height} pixels"
    if width * height > max_pixels:
        raise bad(
            f"{size}, at most {max_pixels} are taken: send tiles of it, or the "
            "parameter scene"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise bad(f"{size}: a side is at most {MAX_RATIO} times the other")


@contextmanager
def _opened(
    content: bytes, max_pixels: int, where: str, stretch: dict | None
) -> Iterator[Scene]:
    try:
        with open_scene(content, stretch=stretch) as scene:
            check_size(scene.height, scene.width, max_pixels, where)
            if scene.dtype != "uint8" and not scene.stretch:
                bits = re.sub(r"\D", "", scene.dtype)
                raise bad(f"{where}: {bits} bits a channel: send 8 bits a channel")
            scene.check()
            yield scene
    except ValueError as error:
        reason = _reason(error)
        if "no TIFF, PNG or JPEG" in reason:
            reason = f"{len(content)} bytes that are not a picture (JPEG, PNG or TIFF)"
        raise bad(f"{where}: {reason}") from error


def place_of(content: bytes, where: str) -> Georeference | None:
    """Where a picture file lies on Earth, if it says; raises a Refusal, 400."""
    try:
        return read_georeference(content)
    except ValueError as error:
        raise bad(f"{where}: {_reason(error)}") from error


def check_scene(
    path: Path, max_pixels: int, total: int, stretch: dict | None = None
) -> None:
    """Read the header of a scene's file, none of its pixels.

    Args:
        path: a TIFF, PNG or JPEG.
        max_pixels: that may be decoded at a time. A TIFF is read by windows, so that
            a row of its tiles or a strip counts, and PNG and JPEG in full.
        total: pixels of any scene. Compressed or sparse, a small file can be millions
            of tiles.
        stretch: as `check_picture`.

    Raises:
        Refusal: 400, not a scene, or too large; never with the path.
    """
    try:
        with open_scene(path, stretch=stretch) as scene:
            check_sides(scene.height, scene.width)
            size = f"scene: {scene.width} x {scene.height} pixels, at most"
            if scene.height * scene.width > total:
                raise bad(f"{size} {total} are taken: send parts of it")
            if scene.held > 3 * max_pixels:
                raise bad(
                    f"{size} {max_pixels} are decoded whole: send it as a tiled TIFF, "
                    "which is read by windows"
                )
            scene.check()
    except ValueError as error:
        raise scene_error(path, error) from error


def check_sides(height: int, width: int) -> None:
    """Raises a Refusal, 400, if a scene has a side above `MAX_SIDE`."""
    if max(height, width) > MAX_SIDE:
        raise bad(f"scene: {width} x {height} pixels, a side is at most {MAX_SIDE}")


def scene_error(path: Path, error: ValueError) -> Refusal:
    """What a scene that cannot be read is refused with: 400, without its path."""
    reason = _reason(error).replace(f"{path}: ", "").replace(str(path), "the file")
    if "no TIFF, PNG or JPEG" in reason:
        reason = f"{path.stat().st_size} bytes that are no TIFF, PNG or JPEG"
    return bad(f"scene: {reason}")


def _reason(error: ValueError) -> str:
    """Without the name that `open_scene` calls the file by."""
    return str(error).removeprefix("the picture: ").split(" as a scene: ", 1)[-1]
