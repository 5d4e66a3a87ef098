"""Pictures of tiles and scenes with their boxes, tables and code, for a notebook.

Copy: this file and drawing.py.

One style throughout: a class keeps its colour in every picture, and a legend names
the classes instead of captions on boxes that are smaller than a letter. A box has a
dark edge, so that no roof, road or water hides it. Every figure has an alternative
text, its label, which `notebook_style` hands to the notebook.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from .drawing import Color, add_legend, axes, rectangles, scaled


def class_color(label: int) -> Color:
    """The RGB colour (0..255) of a label.

    Hue turns with the label, and three pairs of saturation and value alternate. The
    constants were searched so that common classes of xView are far apart in CIELAB,
    also for eyes without red or green cones (Machado et al., 2009).

    Example:
        >>> class_color(1) != class_color(2)  # and the same in every picture
        True
    """
    saturation, value = ((1.0, 1.0), (0.45, 1.0), (0.8, 0.75))[label // 7 % 3]
    red, green, blue = colorsys.hsv_to_rgb(label * 0.084 % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: np.ndarray,
    boxes_xyxy: np.ndarray,
    labels: Sequence[int],
    class_names: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    scale: float = 1.0,
    captions: bool = False,
    thickness: int = 2,
) -> np.ndarray:
    """A copy of a picture with its boxes.

    Args:
        image: uint8 (H, W, 3), RGB.
        boxes_xyxy: (N, 4) in pixels of `image`.
        labels: (N,) of 1..C.
        class_names: name of each label, the background first.
        scores: (N,) in 0..1, shown in the captions.
        scale: enlarge (> 1) or shrink the picture first; lines stay sharp.
        captions: write name and score above each box.
        thickness: of the lines, in pixels of the result; an edge of one comes on top.

    Returns:
        uint8 (round(H * scale), round(W * scale), 3), RGB.

    Example:
        >>> tile, names = np.zeros((60, 60, 3), np.uint8), ["background", "car"]
        >>> drawn = draw_boxes(tile, [[10, 10, 30, 30]], [1], names, scale=2.0)
        >>> drawn.shape, tuple(drawn[20, 40].tolist()) == class_color(1)
        ((120, 120, 3), True)
    """
    canvas = scaled(image, scale)
    corners = np.round(np.asarray(boxes_xyxy, float).reshape(-1, 4) * scale).astype(int)
    colors = [class_color(int(label)) for label in labels]
    rectangles(canvas, corners, colors, thickness)
    for index, (x, y, *_) in enumerate(corners.tolist() if captions else []):
        text = class_names[int(labels[index])]
        if scores is not None:
            text += f" {float(scores[index]):.2f}"
        _caption(canvas, text, x, y, colors[index])
    return canvas


def _caption(canvas: np.ndarray, text: str, x: int, y: int, color: tuple) -> None:
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.38
    (width, height), _ = cv2.getTextSize(text, font, size, 1)
    top, left = max(y, height + 4), max(0, min(x, canvas.shape[1] - width - 2))
    corner = (left + width + 2, top)
    cv2.rectangle(canvas, (left, top - height - 4), corner, color, -1)
    ink = (0, 0, 0) if sum(color) > 380 else (255, 255, 255)
    cv2.putText(canvas, text, (left + 1, top - 3), font, size, ink, 1, cv2.LINE_AA)


def show(
    images: np.ndarray | Sequence[np.ndarray],
    titles: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    width: float = 9.0,
    labels: Sequence[int] = (),
    class_names: Sequence[str] = (),
    legend: Mapping[str, Color] | None = None,
    alt: str = "",
) -> Figure:
    """Pictures side by side, with a legend of the classes.

    Args:
        images: one or more uint8 (H, W, 3) pictures, RGB.
        titles: one for each.
        columns: pictures in a row; all in one row by default.
        width: of the figure in inches.
        labels: the labels that the legend explains; repeated ones count once.
        class_names: name of each label.
        legend: {text: its colour} instead of the classes.
        alt: what is to be seen, for those who do not see it; titles and legend if none.

    Example:
        >>> tile = np.zeros((60, 60, 3), np.uint8)
        >>> show([tile, tile], ["before", "after"]).get_label()
        'before; after'
    """
    images = [images] if isinstance(images, np.ndarray) else list(images)
    columns = columns or len(images)
    rows = -(-len(images) // columns)
    aspect = max(image.shape[0] / image.shape[1] for image in images)
    if legend is None:
        present = sorted({int(label) for label in labels})
        legend = {class_names[i]: class_color(i) for i in present}
    extra = 0.3 * bool(titles) * rows + 0.3 * -(-len(legend) // 5)
    height = width / columns * aspect * rows + extra
    figure, flat = axes(width, height, rows, columns)
    for index, axis in enumerate(flat):
        axis.axis("off")
        if index < len(images):
            axis.imshow(images[index], interpolation="antialiased")
            axis.set_title(titles[index] if titles else "", fontsize=10)
    add_legend(figure, legend)
    figure.set_label(alt or "; ".join([*(titles or ["a picture"]), *legend]))
    return figure


def show_boxes(
    images: np.ndarray | Sequence[np.ndarray],
    found: Any,
    class_names: Sequence[str],
    titles: Sequence[str] | None = None,
    *,
    score_threshold: float = 0.0,
    scale: float = 1.0,
    columns: int | None = None,
    width: float = 9.0,
    alt: str = "",
) -> Figure:
    """Pictures with their boxes in the colours of the classes, and a legend.

    Args:
        images: one or more uint8 (H, W, 3) pictures, RGB.
        found: of each picture "boxes_xyxy" or "boxes" (N, 4) in its pixels, "labels"
            (N,), perhaps "scores" (N,): detections, or a target of `CocoTiles`.
        class_names: name of each label, the background first.
        score_threshold: boxes with a score below are left out, 0..1.
        titles, columns, width, alt: see `show`.
        scale: see `draw_boxes`.

    Example:
        >>> tile, names = np.zeros((60, 60, 3), np.uint8), ["background", "car", "ship"]
        >>> target = {"boxes": [[10, 10, 30, 30]], "labels": [2]}
        >>> show_boxes(tile, target, names, ["scene 5"]).get_label()
        'scene 5; ship'
    """
    if isinstance(images, np.ndarray):
        images, found = [images], [found]
    pictures, shown = [], []
    for image, row in zip(images, found, strict=True):
        labels = np.asarray(row["labels"])
        keep = np.asarray(row.get("scores", np.ones(len(labels)))) >= score_threshold
        boxes = np.asarray(row["boxes_xyxy"] if "boxes_xyxy" in row else row["boxes"])
        kept = labels[keep].tolist()
        pictures.append(draw_boxes(image, boxes[keep], kept, class_names, scale=scale))
        shown += kept
    present = {class_names[label]: class_color(label) for label in sorted(set(shown))}
    how: dict = {"columns": columns, "width": width, "legend": present, "alt": alt}
    return show(pictures, titles, **how)


def table(
    header: Sequence[Any], rows: Iterable[Iterable[Any]], form: str = "{}"
) -> Any:
    """A table for the end of a cell: an IPython.display.Markdown.

    Args:
        header: of the columns; one that is "" has no words.
        rows: their cells; numbers stand to the right, None is left empty.
        form: format of the floats among them, such as "{:.3f}".

    Example:
        >>> print(table(["class", "AP"], [["car", 0.5], ["ship", None]], "{:.2f}").data)
        | class | AP |
        | --- | ---: |
        | car | 0.50 |
        | ship |  |
    """
    from IPython.display import Markdown

    def text(value: Any) -> str:
        if value is None:
            return ""
        return form.format(value) if isinstance(value, float) else str(value)

    cells = [list(row) for row in rows]
    sides = [
        "---:" if any(isinstance(v, Number) for v in column) else "---"
        for column in zip(*cells, strict=True)
    ]
    lines = [header, sides or ["---"] * len(header)]
    lines += [[text(value) for value in row] for row in cells]
    return Markdown("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))


def listing(text: str, language: str = "yaml") -> Any:
    """Code for the end of a cell, highlighted: an IPython.display.Code.

    It looks alike in JupyterLab, in HTML made of a notebook, and in dark mode.

    Args:
        text: the code.
        language: as Pygments names it, such as "yaml", "python" or "bash".

    Example:
        >>> listing("lr: 0.001").data
        'lr: 0.001'
    """
    from IPython.display import Code

    class Listing(Code):
        def _repr_html_(self) -> str:  # in the class that Code's own style speaks of
            style = "padding: 0.5em; overflow-x: auto; color: #1f2328"
            pre = "font-family: monospace; white-space: pre; color: inherit; margin: 0"
            html = f'<div class="output_html" style="{style}">{super()._repr_html_()}'
            return f"{html}<style>.output_html pre {{ {pre} }}</style></div>"

    return Listing(text, language=language)


def notebook_style(quality: int = 80) -> None:
    """Figures of this notebook become JPEG, each with its label as alternative text."""
    from IPython.core.getipython import get_ipython
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("jpeg", pil_kwargs={"quality": quality})
    formatter = get_ipython().display_formatter.formatters["image/jpeg"]
    draw = formatter.lookup_by_type(Figure)
    formatter.for_type(Figure, lambda f: (draw(f), {"alt": f.get_label()}))
