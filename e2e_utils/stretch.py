"""How stored bands become RGB: which of them, and how more than 8 bits become 8.

Copy: this file.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

_PIXELS = 1 << 20  # that are floats at a time


@dataclass(frozen=True)
class Stretch:
    """The bands that become RGB, and of each the values that become 0 and 255.

    What lies beyond these is cut off. One is in the description of tiles that were cut
    from such scenes, in their checkpoints and artefacts, and `convert.tif_to_rgb`
    writes one as JSON beside each scene that it stretched.
    """

    bands: tuple[int, ...]  # of red, green and blue; the first band is 1
    low: tuple[float, ...]
    high: tuple[float, ...]
    dtype: str = ""  # of the scenes; "uint8" chooses bands alone, "" is any other

    def __post_init__(self) -> None:
        numbers = np.array([self.bands, self.low, self.high], float)
        if numbers.shape != (3, 3) or not np.isfinite(numbers).all():
            raise ValueError(f"bands, low and high are three numbers each, not {self}")
        if not isinstance(self.dtype, str):
            raise ValueError(f"dtype is the name of one, not {self.dtype!r}")
        if (numbers[2] < numbers[1]).any():
            raise ValueError(f"low is above high in {self}")

    def to_dict(self) -> dict:
        """Lists, numbers and text, as JSON and checkpoints hold them."""
        return json.loads(json.dumps(asdict(self)))

    def apply(self, stored: np.ndarray, nodata: float | None = None) -> np.ndarray:
        """(H, W, 3) of any real dtype to uint8; not finite or nodata becomes 0."""
        kind = np.result_type(stored.dtype, np.float32)
        low, high = (np.array(ends, kind) for ends in (self.low, self.high))
        slope = np.divide(255, high - low, where=high > low, out=np.zeros_like(low))
        pixels = np.empty(stored.shape, np.uint8)
        rows = max(1, _PIXELS // max(1, stored.shape[1]))
        for top in range(0, len(stored), rows):  # floats take the memory of few rows
            part = stored[top : top + rows]
            with np.errstate(invalid="ignore", over="ignore"):
                scaled = np.rint((part.astype(kind) - low) * slope).clip(0, 255)
            pixels[top : top + rows] = np.where(_is_valid(part, nodata), scaled, 0)
        return pixels


def _is_valid(stored: np.ndarray, nodata: float | None) -> np.ndarray:
    return np.isfinite(stored) & (True if nodata is None else stored != nodata)


def percentile_stretch(
    stored: np.ndarray,
    percentile: float,
    bands: tuple[int, ...],
    nodata: float | None = None,
) -> Stretch:
    """What of a scene becomes 0 and 255: percentiles of each band.

    Args:
        stored: (H, W, 3) of any real dtype. Values that are not finite, or nodata, do
            not count.
        percentile: p; low is the percentile p, high 100 - p; 0 <= p < 50.
        bands: that the three are, for the record.
        nodata: of the file.

    Raises:
        ValueError: a band has no value that counts, or low is high in all bands.

    Example:
        >>> scene = np.tile(np.arange(1001, dtype=np.uint16)[:, None, None], 3)
        >>> stretch = percentile_stretch(scene, 2, bands=(3, 2, 1))
        >>> stretch.low[0], stretch.high[0]
        (20.0, 980.0)
        >>> stretch.apply(scene[::250])[..., 0].ravel().tolist()
        [0, 61, 128, 194, 255]
    """
    low, high = [], []
    for band, values in zip(bands, np.moveaxis(stored, -1, 0), strict=True):
        values = values[_is_valid(values, nodata)]
        if not len(values):
            raise ValueError(f"band {band} has nothing but nodata ({nodata}) and NaN")
        ends = np.percentile(values, (percentile, 100 - percentile)).tolist()
        low.append(ends[0])
        high.append(ends[1])
    if low == high:
        raise ValueError(
            f"its percentiles {percentile} and {100 - percentile} are both {low} in "
            f"the bands {bands}: a constant scene cannot be stretched"
        )
    return Stretch(bands, tuple(low), tuple(high), stored.dtype.name)


def read_stretch(path: str | Path) -> Stretch:
    """A `Stretch` from its JSON: {"bands": [1, 2, 3], "low": [...], "high": [...]}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other keys or values; the message names the file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "5.stretch.json")
        ...     _ = path.write_text(json.dumps(as_stretch(None, [3, 2, 1]).to_dict()))
        ...     read_stretch(path).bands
        (3, 2, 1)
    """
    content = Path(path).read_bytes()
    return _stretch_of(lambda: json.loads(content), str(path))


def as_stretch(
    given: Stretch | dict | str | Path | None, bands: Iterable[int] | None = None
) -> Stretch | None:
    """The record that a caller means.

    Args:
        given: itself, its `to_dict`, or its file, see `read_stretch`.
        bands: in its place, of scenes of 8 bits; such a record only chooses them.

    Example:
        >>> as_stretch(None, bands=[3, 2, 1]).bands
        (3, 2, 1)
    """
    if bands is not None:
        if given is not None:
            raise ValueError(f"bands {bands} beside a stretch: it has bands of its own")
        return Stretch(tuple(bands), (0.0,) * 3, (255.0,) * 3, "uint8")
    if given is None or isinstance(given, Stretch):
        return given
    if isinstance(given, dict):
        return _stretch_of(lambda: given, str(given))
    return read_stretch(given)


def _stretch_of(read: Callable[[], dict], name: str) -> Stretch:
    try:
        rows: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in read().items()
        }
        return Stretch(**rows)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: no record of a stretch: {error}") from error


def is_alike(dtype: str, other: str) -> bool:
    """Whether one stretch can be for both: 8 bits, other integers, or fractions.

    Example:
        >>> is_alike("uint16", "int32"), is_alike("uint16", "uint8")
        (True, False)
    """
    one, two = (d if d == "uint8" else "float" in d for d in (dtype, other))
    return one == two


def choose(
    dtype: str, colours: tuple[str, ...], choice: Stretch | Iterable[int] | None
) -> tuple[tuple[int, ...] | None, Stretch | None]:
    """(bands, stretch) that a file is read with; see `rgb_bands`.

    A file of 8 bits is never stretched: it was, or needs not be.

    Args:
        dtype, colours: of the file.
        choice: a record, or bands, of the caller or of a checkpoint.

    Raises:
        ValueError: bands that are not there, or a record of another kind of numbers.

    Example:
        >>> choose("uint8", ("blue", "green", "red", "undefined"), None)
        ((3, 2, 1), None)
    """
    if not isinstance(choice, Stretch):
        return rgb_bands(colours, choice), None
    if "uint8" in (dtype, choice.dtype):
        own = choice.bands if choice.dtype == "uint8" else None
        return rgb_bands(colours, own), None
    if choice.dtype and not is_alike(dtype, choice.dtype):
        raise ValueError(f"it is {dtype}, and the stretch is of {choice.dtype}")
    return rgb_bands(colours, choice.bands), choice


def rgb_bands(
    colours: tuple[str, ...], bands: Iterable[int] | None
) -> tuple[int, ...] | None:
    """Which bands are red, green and blue, from 1; None where no rule tells.

    Args:
        colours: of the bands of a file, in GDAL's words: "red", "gray", "alpha", ...
        bands: the choice of the caller.

    Raises:
        ValueError: bands that are not there, or not three.

    Example:
        >>> rgb_bands(("gray", "alpha"), None), rgb_bands(("undefined",) * 6, (4, 3, 2))
        ((1, 1, 1), (4, 3, 2))
    """
    if bands is not None:
        bands = tuple(bands)
        if len(bands) != 3 or not set(bands) <= set(range(1, len(colours) + 1)):
            raise ValueError(f"bands are {bands}; give three of 1 to {len(colours)}")
        return bands
    if {"red", "green", "blue"} <= set(colours):
        return tuple(colours.index(name) + 1 for name in ("red", "green", "blue"))
    visible = [n for n, name in enumerate(colours, 1) if name != "alpha"]
    if len(visible) == 1:
        return (visible[0],) * 3
    return (1, 2, 3) if len(visible) in (3, 4) and visible[:3] == [1, 2, 3] else None
