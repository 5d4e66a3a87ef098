"""What every figure is drawn with: colours, axes, a legend, rectangles.

Copy: this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

Color = tuple[int, int, int]  # RGB, 0..255
# Of what is not a class. Right, false and missed differ in lightness too, for eyes that
# do not tell their hues apart.
COLORS: dict[str, Color] = {
    "right": (60, 220, 255),
    "false": (255, 40, 40),
    "missed": (255, 225, 0),
    "labelled": (255, 255, 255),
    "plain": (31, 119, 180),
    "score": (255, 127, 14),
}


def as_hex(color: Color) -> str:
    """The same colour as matplotlib takes it.

    Example:
        >>> as_hex((255, 225, 0))
        '#ffe100'
    """
    return "#{:02x}{:02x}{:02x}".format(*color)


def axes(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple:
    """A figure of so many inches, and its axes as a flat array.

    Example:
        >>> figure, (left, right) = axes(9, 3, columns=2)
        >>> figure.get_size_inches().tolist()
        [9.0, 3.0]
    """
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure, grid = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, layout="constrained"
        )
    plt.close(figure)  # a notebook shows the returned figure, once
    return figure, grid.flat


def add_legend(figure: Figure, legend: Mapping[str, Color]) -> None:
    """Below a figure, what its colours mean: {text: colour}; nothing if empty.

    Example:
        >>> figure, _ = axes(4, 3)
        >>> add_legend(figure, {"missed": COLORS["missed"]})
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['missed']
    """
    handles = [Patch(fc=as_hex(c), ec="0.4", label=t) for t, c in legend.items()]
    if handles:
        where: dict = {"loc": "outside lower center", "ncols": min(5, len(handles))}
        figure.legend(handles=handles, fontsize=9, frameon=False, **where)


def scaled(image: np.ndarray, scale: float) -> np.ndarray:
    """A copy of a picture, enlarged (> 1) or shrunk.

    Example:
        >>> scaled(np.zeros((300, 200, 3), np.uint8), 0.5).shape
        (150, 100, 3)
    """
    height, width = image.shape[:2]
    size = (round(width * scale), round(height * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=how)


def rectangles(
    canvas: np.ndarray, boxes: np.ndarray, colors: Sequence[Color], thickness: int = 2
) -> None:
    """Draw boxes, int (N, 4) xyxy, into a picture: all dark edges, then all lines.

    Lines run outside of the boxes: a small object is not hidden by its own.

    Example:
        >>> canvas = np.zeros((60, 60, 3), np.uint8)
        >>> rectangles(canvas, np.array([[10, 10, 30, 30]]), [COLORS["missed"]])
        >>> canvas[10, 20].tolist(), canvas[20, 20].tolist()  # its line, its inside
        ([255, 225, 0], [0, 0, 0])
    """
    out = thickness // 2
    around = (boxes + [-out, -out, out, out]).tolist()
    rows = list(zip(around, colors, strict=True))
    for box, _ in rows:
        cv2.rectangle(canvas, box[:2], box[2:], (0, 0, 0), thickness + 2)
    for box, color in rows:
        cv2.rectangle(canvas, box[:2], box[2:], color, thickness)
