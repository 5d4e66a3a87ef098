"""Scenes of any kind by one door: TIFF by rasterio, PNG and JPEG by images.py.

Copy: this file, images.py and stretch.py.

One rule for every reader, be it of scenes, of tiles or of the server:

- Pixels are RGB. Grey becomes R = G = B, a palette its colours, CMYK, YCbCr and Lab
  are converted; alpha and a fourth band are left out, never multiplied in.
- A file that its orientation tag turns is refused.
- Of several pages of a TIFF the largest is the scene. Parts that a sparse TIFF lacks
  are 0 or its nodata value; a truncated or corrupt file is refused.
- More than 8 bits need a `Stretch` that says what becomes 0 and 255; 8 bits stay.
- Nothing but the file itself is opened: no sidecar files, no VRT, and for a file of
  this machine nothing over the network, whatever the environment says.

rasterio and tifffile are imported for a TIFF alone: training on JPEG does without.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .images import ORIENTATION, URLS, check_upright, is_tiff, is_url, open_image
from .stretch import Stretch, as_stretch, choose

STRIP_PIXELS = 1 << 24  # that `Scene.tiles` reads at a time
_PAGES = 100  # of a TIFF that are looked at

_GDAL: dict[str, Any] = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no sidecar files
    "GDAL_PAM_ENABLED": "NO",  # no .aux.xml
    "GTIFF_IGNORE_READ_ERRORS": "NO",
    "GDAL_CACHEMAX": 256,  # MB of decoded blocks, all files together
}
# a TIFF can name a URL as the place of its overviews
_LOCAL = {**_GDAL, "CPL_VSIL_CURL_ALLOWED_FILENAME": "none"}


@dataclass(frozen=True)
class Scene:
    """An open scene, see `open_scene`."""

    name: str  # what messages call it
    height: int
    width: int
    dtype: str  # as stored
    window: Callable[..., np.ndarray]  # x1, y1, x2, y2 -> (h, w, 3) of `bands`
    held: int  # bytes of decoded pixels in memory, whatever window is read
    colours: tuple[str, ...] = ("red", "green", "blue")  # of all bands, GDAL's words
    bands: tuple[int, ...] | None = (1, 2, 3)  # that are red, green, blue; from 1
    stretch: Stretch | None = None
    nodata: float | None = None
    crs: Any = None  # a rasterio.crs.CRS
    transform: Any = None  # an affine.Affine from column, row to coordinates of the CRS

    def check(self) -> None:
        """Raises what `read` raises of the header alone."""
        found = f"{self.name}: {len(self.colours)} band(s) of {self.dtype}"
        if self.bands is None:
            raise ValueError(f"{found}: choose three by bands=(3, 2, 1)")
        if "complex" in self.dtype or self.dtype != "uint8" and not self.stretch:
            raise ValueError(
                f"{found} where uint8 is needed, and no stretch says what becomes 0 "
                "and 255: prepare_tiles and convert.tif_to_rgb record one (percentile)"
            )

    def stored(
        self, x1: int = 0, y1: int = 0, x2: int | None = None, y2: int | None = None
    ) -> np.ndarray:
        """As `read`, but (h, w, 3) of the values as they are stored."""
        right = self.width if x2 is None else min(x2, self.width)
        bottom = self.height if y2 is None else min(y2, self.height)
        with _named(self.name):
            return self.window(max(0, x1), max(0, y1), right, bottom)

    def read(self, *window: int) -> np.ndarray:
        """Pixels of a window x1, y1, x2, y2, clipped to the scene; of all without one.

        Returns:
            uint8 (h, w, 3), RGB, perhaps read-only.

        Raises:
            ValueError: truncated or corrupt, more than 8 bits without a stretch, or
                bands that no rule makes RGB; the message names the file.
        """
        self.check()
        stored = self.stored(*window)
        return self.stretch.apply(stored, self.nodata) if self.stretch else stored

    def tiles(self, boxes: Iterable[Iterable[int]]) -> Iterator[np.ndarray]:
        """The pixels of boxes x1, y1, x2, y2 in ascending y1, by few large reads."""
        top = bottom = 0
        for x1, y1, x2, y2 in boxes:
            if y2 > bottom:
                bottom = max(y2, y1 + STRIP_PIXELS // self.width)
                strip, top = self.read(0, y1, self.width, bottom), y1
            yield strip[y1 - top : y2 - top, x1:x2]


@contextmanager
def open_scene(
    source: str | Path | bytes | np.ndarray,
    *,
    bands: Sequence[int] | None = None,
    stretch: Stretch | dict | str | Path | None = None,
) -> Iterator[Scene]:
    """Open a scene; its pixels are decoded when they are read.

    Args:
        source: path of a TIFF, PNG or JPEG; the bytes of such a file; an array, uint8
            (H, W, 3); or the URL (s3://, gs://, az://, https://, http://) of a TIFF,
            which GDAL reads by ranges, with the credentials of the environment. Of a
            URL the orientation tag is not looked at, and the first page is the scene.
        bands: of red, green and blue in a TIFF, from 1. Left out, those that the file
            calls so, else the first three of three or four.
        stretch: a record of how more than 8 bits become 8, its path, or its dict.

    Yields:
        Scene, for this thread alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: none of these, or refused by a rule above; the message names the
            file and what it holds.

    Example:
        >>> with open_scene(np.zeros((600, 800, 3), np.uint8)) as scene:
        ...     scene.height, scene.width, scene.read(700, 0, 1000, 300).shape
        (600, 800, (300, 100, 3))
    """
    chosen = as_stretch(stretch) or bands
    with ExitStack() as stack:
        name = "the picture" if isinstance(source, (bytes, np.ndarray)) else str(source)
        with _named(name):
            if isinstance(source, np.ndarray):
                scene = _open_array(source)
            elif is_url(source):
                kind, rest = name.split("://", 1)
                path = URLS[f"{kind}://"] + rest
                scene = _open_raster(path, name, chosen, stack, _GDAL)
            elif is_tiff(source):
                scene = _open_tiff(source, name, chosen, stack)
            elif bands:
                raise ValueError("bands are chosen of a TIFF alone")
            else:
                scene = _open_other(source, name)
        yield scene


def read_rgb(source: str | Path | bytes, **options: Any) -> np.ndarray:
    """All pixels of a scene as uint8 (H, W, 3), perhaps read-only; see `open_scene`.

    An uncompressed TIFF with its bands last is mapped: only what is touched is read.

    Example:
        >>> import cv2
        >>> png = cv2.imencode(".png", np.full((4, 5), 128, np.uint8))[1].tobytes()
        >>> read_rgb(png)[0, 0].tolist()  # grey
        [128, 128, 128]
    """
    with open_scene(source, **options) as scene:
        return scene.read()


def read_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of a scene by its header, with the errors of `open_scene`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import tifffile
        >>> with TemporaryDirectory() as folder:
        ...     tifffile.imwrite(f"{folder}/5.tif", np.zeros((600, 800), np.uint8))
        ...     read_size(f"{folder}/5.tif")
        (600, 800)
    """
    with _named(str(path)):
        if not is_url(path) and is_tiff(path):
            import tifffile

            with tifffile.TiffFile(path) as tiff:
                page = _largest_page(tiff)[1]
                return page.imagelength, page.imagewidth
    with open_scene(path) as scene:
        return scene.height, scene.width


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Decoders raise many kinds of errors; all mean a file that cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: cannot be read as a scene: {error}") from error


def _open_array(pixels: np.ndarray) -> Scene:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"an image must be uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}"
        )
    window = lambda x1, y1, x2, y2: pixels[y1:y2, x1:x2]  # noqa: E731
    height, width, _ = pixels.shape
    return Scene("the image", height, width, "uint8", window, pixels.nbytes)


def _open_other(source: Any, name: str) -> Scene:
    source = source if isinstance(source, bytes) else Path(source)
    (height, width), dtype, decode = open_image(source)
    window = lambda x1, y1, x2, y2: decode()[y1:y2, x1:x2]  # noqa: E731
    return Scene(name, height, width, dtype, window, height * width * 3)


def _largest_page(tiff: Any) -> tuple[int, Any]:
    """(number from 1, page); the first of equals: others are its mask, or a series."""
    pages = list(enumerate(islice(tiff.pages, _PAGES), 1))
    if not pages:
        raise ValueError("truncated or corrupt: it has no page")
    return max(pages, key=lambda row: row[1].imagewidth * row[1].imagelength)


def _open_tiff(source: Any, name: str, choice: Any, stack: ExitStack) -> Scene:
    """A TIFF of this machine."""
    import rasterio
    import tifffile

    memory = isinstance(source, bytes)
    with tifffile.TiffFile(io.BytesIO(source) if memory else source) as tiff:
        number, page = _largest_page(tiff)
        check_upright(page.tags.valueof(ORIENTATION, 1))
        parts = zip(page.dataoffsets, page.databytecounts, strict=True)
        end = max((start + size for start, size in parts), default=0)
        if end > (there := tiff.filehandle.size):
            raise ValueError(f"truncated: {there} of at least {end} bytes are there")
        plain = page.is_memmappable and page.dtype == np.uint8 and page.ndim == 3
        plain = plain and page.planarconfig == 1 and page.photometric in (1, 2)
        offset, shape = page.dataoffsets[0] if plain else 0, page.shape
    if memory:
        path = stack.enter_context(rasterio.MemoryFile(source)).name
    else:
        path = str(Path(source).absolute())
    path = f"GTIFF_DIR:{number}:{path}" if number > 1 else path
    scene = _open_raster(path, name, choice, stack, _LOCAL)
    if not plain or scene.bands != (1, 2, 3):
        return scene

    def mapped(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
        # anew for each window: a mapping keeps every page that it has touched
        if memory:
            flat = np.frombuffer(source, np.uint8, int(np.prod(shape)), offset)
            return flat.reshape(shape)[y1:y2, x1:x2, :3]
        return np.memmap(source, np.uint8, "r", offset, shape)[y1:y2, x1:x2, :3]

    return replace(scene, window=mapped, held=0)


def _open_raster(
    path: str, name: str, choice: Any, stack: ExitStack, options: dict[str, Any]
) -> Scene:
    """A TIFF as GDAL reads it, by no other driver; the options hold until it closes."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    warnings.simplefilter("ignore", NotGeoreferencedWarning)  # it need lie nowhere
    stack.enter_context(rasterio.Env(**options))
    data = stack.enter_context(rasterio.open(path, driver="GTiff"))
    colours = tuple(colour.name for colour in data.colorinterp)
    dtype, palette = data.dtypes[0], None
    if bits := data.tags(1, ns="IMAGE_STRUCTURE").get("NBITS"):
        dtype = f"uint{bits}"  # of 8 or 16, and not scaled up
    indexed = colours[0] == "palette"  # its colours have 8 bits
    chosen, stretch = choose("uint8" if indexed else dtype, colours, choice)
    if chosen == (1, 1, 1) and indexed:
        table = data.colormap(1)
        palette, dtype = np.zeros((max(table) + 1, 3), np.uint8), "uint8"
        for value, colour in table.items():
            palette[value] = colour[:3]

    def window(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
        part = (y1, y2), (x1, x2)
        pixels = np.empty((y2 - y1, x2 - x1, 3), data.dtypes[0])
        try:
            data.read(chosen, out=pixels.transpose(2, 0, 1), window=part)
        except RasterioError as error:  # GDAL's own words begin with the file's name
            reason = str(error.__cause__ or error).split(": ", 1)[-1]
            raise ValueError(f"truncated or corrupt: {reason}") from error
        return pixels if palette is None else palette[pixels[..., 0]]

    block = data.block_shapes[0][0] * max(data.block_shapes[0][1], data.width)
    return Scene(
        name=name,
        height=data.height,
        width=data.width,
        dtype=dtype,
        window=window,
        held=block * data.count * np.dtype(data.dtypes[0]).itemsize,
        colours=colours,
        bands=chosen,
        stretch=stretch,
        nodata=data.nodata,
        crs=data.crs,
        transform=None if data.transform.is_identity else data.transform,
    )


class FailedScenes(RuntimeError):
    """Some scenes failed; the others are done and written. `report` has both."""

    def __init__(self, report: Any) -> None:
        self.report = report
        lines = [f"  {reason}" for reason in report.failed.values()]
        super().__init__("\n".join([f"{len(lines)} scene(s) failed:", *lines]))
