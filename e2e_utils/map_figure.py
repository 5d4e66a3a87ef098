"""A picture of a scene with coordinates on its axes.

Copy: this file, drawing.py, georeference.py, scenes.py, images.py, stretch.py and
files.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.transforms import Affine2D

from .drawing import Color, add_legend
from .georeference import Georeference


def map_figure(
    image: np.ndarray,
    place: Georeference,
    scale: float = 1.0,
    width: float = 8.0,
    legend: Mapping[str, Color] | None = None,
) -> Figure:
    """A scene with the coordinates of its CRS on the axes.

    Args:
        image: uint8 (H, W, 3), RGB, such as `visualize.draw_boxes` gives.
        place: of `georeference.read_georeference`.
        scale: of `draw_boxes`, pixels of `image` for one of the scene.
        width: of the figure in inches.
        legend: {text: its colour}, below the scene.

    Example:
        >>> from rasterio.crs import CRS
        >>> from rasterio.transform import Affine
        >>> corner = Affine(0.3, 0, 404211, 0, -0.3, 3285142)  # pixels of 0.3 m
        >>> place = Georeference(CRS.from_epsg(32616), corner)
        >>> figure = map_figure(np.zeros((300, 300, 3), np.uint8), place)
        >>> [round(x) for x in figure.axes[0].get_xlim()], figure.axes[0].get_xlabel()
        ([404211, 404301], 'easting (metre, EPSG:32616)')
    """
    a, b, c, d, e, f = place.transform[:6]
    matrix = np.array([[a / scale, b / scale, c], [d / scale, e / scale, f], [0, 0, 1]])
    rows, columns = image.shape[:2]
    x, y, _ = matrix @ [[0, columns, columns, 0], [0, 0, rows, rows], [1] * 4]
    names, unit, aspect = ("longitude", "latitude"), "degrees", 1.0
    if place.crs.is_geographic:  # a degree of longitude is shorter than one of latitude
        aspect = 1 / np.cos(np.radians(y.mean()))
    else:
        names, unit = ("easting", "northing"), f"{place.crs.linear_units}, {place.crs}"
    size = width, width * aspect * np.ptp(y) / np.ptp(x)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    plt.close(figure)  # a notebook shows the returned figure, once
    box = (0, columns, rows, 0)  # of the picture in its own pixels
    drawn = axis.imshow(image, extent=box, interpolation="antialiased")
    drawn.set_transform(Affine2D(matrix) + axis.transData)
    axis.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()), aspect=aspect)
    axis.set(xlabel=f"{names[0]} ({unit})", ylabel=f"{names[1]} ({unit})")
    axis.ticklabel_format(useOffset=False, style="plain")
    axis.tick_params(axis="x", rotation=20)
    add_legend(figure, legend or {})
    figure.set_label(f"a scene with {names[0]} and {names[1]} on its axes")
    return figure
