"""How stored bands become RGB: which of them, and how more than 8 bits become 8.

Copy: this file.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Stretch:
    """The bands that become RGB, and of each the values that become 0 and 255.

    What lies beyond these is cut off. `convert.tif_to_rgb` writes one as JSON beside
    each scene that it stretched.
    """

    bands: tuple[int, ...]  # of red, green and blue; the first band is 1
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = np.array([self.bands, self.low, self.high], float)
        if numbers.shape != (3, 3) or not np.isfinite(numbers).all():
            raise ValueError(f"bands, low and high are three numbers each, not {self}")
        if (numbers[2] < numbers[1]).any():
            raise ValueError(f"low is above high in {self}")

    def apply(self, stored: np.ndarray, nodata: float | None = None) -> np.ndarray:
        """(H, W, 3) of any real dtype to uint8; not finite or nodata becomes 0."""
        values = stored.astype(np.result_type(stored.dtype, np.float32))
        low, high = (np.array(ends, values.dtype) for ends in (self.low, self.high))
        slope = np.divide(255, high - low, where=high > low, out=np.zeros_like(low))
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = np.rint((values - low) * slope).clip(0, 255)
        return np.where(_is_valid(stored, nodata), scaled, 0).astype(np.uint8)


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
    return Stretch(bands, tuple(low), tuple(high))


def read_stretch(path: str | Path) -> Stretch:
    """A `Stretch` from its JSON: {"bands": [1, 2, 3], "low": [...], "high": [...]}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other keys or values; the message names the file.
    """
    try:
        given = json.loads(Path(path).read_bytes())
        return Stretch(**{key: tuple(value) for key, value in given.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no record of a stretch: {error}") from error


def rgb_bands(
    colours: tuple[str, ...], bands: Iterable[int] | None
) -> tuple[int, ...] | None:
    """Which bands are red, green and blue, from 1; None where no rule tells.

    Args:
        colours: of the bands of a file, in GDAL's words: "red", "gray", "alpha", ...
        bands: the choice of the caller.

    Raises:
        ValueError: bands that are not there, or not three.
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
