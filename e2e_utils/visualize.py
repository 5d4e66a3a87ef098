"""Pictures: boxes on tiles and scenes, curves, bars, a confusion matrix.

Copy: this file.

One style throughout: a class keeps its colour in every picture, and a legend names
the classes instead of captions on boxes that are smaller than a letter.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

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


def class_color(label: int) -> Color:
    """The RGB colour (0..255) of a label.

    Hue turns with the label, and three pairs of saturation and value alternate. The
    constants were searched so that common classes of xView are far apart in CIELAB.
    """
    saturation, value = ((1.0, 1.0), (0.45, 1.0), (0.8, 0.75))[label // 7 % 3]
    red, green, blue = colorsys.hsv_to_rgb(label * 0.084 % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _hex(color: Color) -> str:
    """The same colour as matplotlib takes it."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def _axes(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple:
    """A figure of so many inches, and its axes as a flat array."""
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, layout="constrained"
        )
    plt.close(figure)  # a notebook shows the returned figure, once
    return figure, axes.flat


def scaled(image: np.ndarray, scale: float) -> np.ndarray:
    """A copy of a picture, enlarged (> 1) or shrunk."""
    height, width = image.shape[:2]
    size = (round(width * scale), round(height * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=how)


def draw_boxes(
    image: np.ndarray,
    boxes_xyxy: np.ndarray,
    labels: Sequence[int],
    class_names: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    scale: float = 1.0,
    captions: bool = False,
    thickness: int = 1,
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
        thickness: of the lines, in pixels of the result.

    Returns:
        uint8 (round(H * scale), round(W * scale), 3), RGB.
    """
    canvas = scaled(image, scale)
    for index, (box, label) in enumerate(zip(boxes_xyxy, labels, strict=True)):
        x1, y1, x2, y2 = (round(float(value) * scale) for value in box)
        color = class_color(int(label))
        cv2.rectangle(canvas, (x1, y1), (x2, y2), color, thickness)
        if captions:
            text = class_names[int(label)]
            if scores is not None:
                text += f" {float(scores[index]):.2f}"
            _caption(canvas, text, x1, y1, color)
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
    figure, axes = _axes(width, height, rows, columns)
    for index, axis in enumerate(axes):
        axis.axis("off")
        if index < len(images):
            axis.imshow(images[index], interpolation="antialiased")
            axis.set_title(titles[index] if titles else "", fontsize=10)
    if legend:
        figure.legend(
            handles=[Patch(color=_hex(c), label=text) for text, c in legend.items()],
            loc="outside lower center",
            ncols=min(5, len(legend)),
            fontsize=9,
            frameon=False,
        )
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
) -> Figure:
    """Pictures with their boxes in the colours of the classes, and a legend.

    Args:
        images: one or more uint8 (H, W, 3) pictures, RGB.
        found: of each picture "boxes_xyxy" or "boxes" (N, 4) in its pixels, "labels"
            (N,), perhaps "scores" (N,): detections, or a target of `CocoTiles`.
        class_names: name of each label, the background first.
        score_threshold: boxes with a score below are left out, 0..1.
        titles, columns, width: see `show`.
        scale: see `draw_boxes`.
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
    return show(pictures, titles, columns=columns, width=width, legend=present)


def learning_curve(records: Sequence[dict], score: str = "AP50") -> Figure:
    """Loss and a validation score against the step.

    Args:
        records: lines of metrics.jsonl: {"step", "loss", ...} or {"step", score, ...}.
        score: the key of the validation score, 0..1.
    """
    figure, (left, right) = _axes(9, 3.2, columns=2)
    for axis, key, marks, color in (
        (left, "loss", "-", "plain"),
        (right, score, "o-", "score"),
    ):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        axis.plot(*zip(*points, strict=True), marks, color=_hex(COLORS[color]))
        axis.grid(alpha=0.3)
    left.set(xlabel="step", ylabel="loss (mean of 20 steps)", ylim=(0, None))
    right.set(xlabel="step", ylabel=f"{score}, validation tiles", ylim=(0, 1))
    return figure


def bars(
    values: dict[str, float],
    xlabel: str,
    *,
    class_names: Sequence[str] = (),
    log: bool = False,
    form: str = "{:.2f}",
) -> Figure:
    """Horizontal bars, largest first, each with its value.

    Args:
        values: name -> value.
        xlabel: what the bars measure, with its unit.
        class_names: colours the bars as in `draw_boxes` where names are classes.
        log: logarithmic axis.
        form: format of the values beside the bars.
    """
    order = sorted(values, key=values.__getitem__)
    colors = [
        class_color(list(class_names).index(name))
        if name in class_names
        else COLORS["plain"]
        for name in order
    ]
    figure, (axis,) = _axes(7.5, 0.7 + 0.28 * len(order))
    drawn = axis.barh(
        order, [values[name] for name in order], color=list(map(_hex, colors))
    )
    axis.bar_label(drawn, [form.format(values[n]) for n in order], padding=3, size=9)
    axis.set(xlabel=xlabel, xscale="log" if log else "linear")
    axis.margins(x=0.12)
    return figure


def confusion(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """A confusion matrix, each row as shares of the objects of its class.

    Args:
        matrix: int (C + 1, C + 1) of `e2e_utils.mistakes.confusion_matrix`, the
            background first. Classes without an object or a detection are left out.
        names: of the C + 1 rows.
    """
    matrix = np.asarray(matrix)
    present = np.flatnonzero((matrix + matrix.T)[1:].sum(axis=1)) + 1
    order = [*present.tolist(), 0]  # what was missed and made up closes the table
    part = matrix[np.ix_(order, order)]
    shares = part / np.maximum(part.sum(axis=1, keepdims=True), 1)
    size = min(11.0, 2.5 + 0.38 * len(order))
    figure, (axis,) = _axes(size, size * 0.9)
    axis.spines[:].set_visible(True)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = [names[i] for i in order]
    axis.set_xticks(range(len(order)), ticks, rotation=90, fontsize=8)
    axis.set_yticks(range(len(order)), ticks, fontsize=8)
    axis.set(xlabel="found", ylabel="labelled")
    if len(order) <= 25:
        for row, column in np.argwhere(part):
            ink = "white" if shares[row, column] > 0.5 else "black"
            where = {"ha": "center", "va": "center", "color": ink, "size": 7}
            axis.text(column, row, str(part[row, column]), **where)
    return figure


def close_up(
    image: np.ndarray,
    labelled_xyxy: Sequence[float] | None = None,
    found_xyxy: Sequence[float] | None = None,
    size: int = 240,
    least: int = 64,
) -> np.ndarray:
    """A square around a detection and its object: labelled in white, found in red.

    Args:
        image: uint8 (H, W, 3), RGB.
        labelled_xyxy, found_xyxy: in pixels of `image`; at least one of them.
        size: side of the result in pixels.
        least: least side of the square in pixels of `image`; it grows with the boxes.

    Returns:
        uint8 (size, size, 3), RGB; black beyond the borders of the image.
    """
    given = (
        (labelled_xyxy, COLORS["labelled"], 3),
        (found_xyxy, COLORS["false"], 2),
    )
    drawn = [(np.array(b, float), c, w) for b, c, w in given if b is not None]
    if not drawn:
        raise ValueError("close_up needs labelled_xyxy or found_xyxy; both are None")
    low = np.min([box[:2] for box, _, _ in drawn], axis=0)
    high = np.max([box[2:] for box, _, _ in drawn], axis=0)
    side = max(float(least), 1.5 * float((high - low).max()))
    corner, scale = (low + high - side) / 2, size / side
    matrix = np.array([[scale, 0, -corner[0] * scale], [0, scale, -corner[1] * scale]])
    canvas = cv2.warpAffine(np.ascontiguousarray(image), matrix, (size, size))
    for box, color, width in drawn:
        corners = np.round((box - np.tile(corner, 2)) * scale).astype(int).tolist()
        cv2.rectangle(canvas, corners[:2], corners[2:], color, width)
    return canvas
