"""Charts: a learning curve, bars, a histogram, lines, a confusion matrix.

Copy: this file, drawing.py and visualize.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from .drawing import COLORS, as_hex, axes
from .visualize import class_color


def learning_curve(records: Sequence[dict], score: str = "AP50") -> Figure:
    """Loss and a validation score against the step.

    Args:
        records: lines of metrics.jsonl: {"step", "loss", ...} or {"step", score, ...}.
        score: the key of the validation score, 0..1.

    Example:
        >>> records = [{"step": 20, "loss": 1.5}, {"step": 40, "loss": 0.9}]
        >>> learning_curve([*records, {"step": 40, "AP50": 0.3}]).get_label()
        'the loss and the AP50 against the step, 0.30 at the end'
    """
    figure, (left, right) = axes(9, 3.2, columns=2)
    for axis, key, marks, color in (
        (left, "loss", "-", "plain"),
        (right, score, "o-", "score"),
    ):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        axis.plot(*zip(*points, strict=True), marks, color=as_hex(COLORS[color]))
        axis.grid(alpha=0.3)
    left.set(xlabel="step", ylabel="loss (mean of 20 steps)", ylim=(0, None))
    right.set(xlabel="step", ylabel=f"{score}, validation tiles", ylim=(0, 1))
    last = [r[score] for r in records if r.get(score) is not None][-1:]
    ends = f", {last[0]:.2f} at the end" if last else ""
    figure.set_label(f"the loss and the {score} against the step{ends}")
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

    Example:
        >>> figure = bars({"car": 0.9, "ship": 0.7}, "AP50")
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['ship', 'car']
    """
    order = sorted(values, key=values.__getitem__)
    colors = [
        class_color(list(class_names).index(name))
        if name in class_names
        else COLORS["plain"]
        for name in order
    ]
    figure, (axis,) = axes(7.5, 0.7 + 0.28 * len(order))
    drawn = axis.barh(
        order, [values[name] for name in order], color=list(map(as_hex, colors))
    )
    axis.bar_label(drawn, [form.format(values[n]) for n in order], padding=3, size=9)
    axis.set(xlabel=xlabel, xscale="log" if log else "linear")
    axis.margins(x=0.12)
    told = ", ".join(f"{name} {form.format(values[name])}" for name in order[::-1])
    figure.set_label(f"{xlabel}: {told}")
    return figure


def histogram(
    values: Iterable[float], xlabel: str, ylabel: str, *, marks: Mapping[str, float]
) -> Figure:
    """How often values occur, with vertical lines at some of them.

    Args:
        values: numbers.
        xlabel, ylabel: of the axes.
        marks: {what the line means: where it stands}, named at the line.

    Example:
        >>> histogram([3, 130], "objects", "tiles", marks={"cap": 100}).get_label()
        'histogram of objects, 3 to 130'
    """
    figure, (axis,) = axes(7.5, 2.6)
    values = list(values)
    axis.hist(values, bins=30, color=as_hex(COLORS["plain"]))
    at = axis.get_xaxis_transform()  # x of the data, y a share of the axis
    inks = ("black", as_hex(COLORS["score"]), as_hex(COLORS["false"]))
    for row, (text, value) in enumerate(marks.items()):
        ink = inks[row % 3]
        axis.axvline(value, color=ink, ls=("-", "--", ":")[row % 3])
        side = "right" if value > np.mean(axis.get_xlim()) else "left"  # of the text
        how: dict = {"color": ink, "ha": side, "va": "top", "size": 9}
        said = f"  {text}: {value:g}  "  # with room beside the line
        axis.text(value, 0.98 - 0.13 * row, said, transform=at, **how)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    figure.set_label(f"histogram of {xlabel}, {min(values):g} to {max(values):g}")
    return figure


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    *,
    ends: Mapping[str, str] | None = None,
    **axis_options: object,
) -> Figure:
    """Curves in one pair of axes, with a legend if there are several.

    Args:
        curves: {name: (values of x, values of y)}; None breaks a curve.
        xlabel, ylabel: of the axes.
        ends: {name: a matplotlib marker for the last point of that curve}.
        axis_options: of matplotlib's `Axes.set`, such as ylim or xscale.

    Example:
        >>> lines({"trial 1": ([12, 24], [0.38, 0.42])}, "batches", "AP").get_label()
        'AP against batches: trial 1'
    """
    figure, (axis,) = axes(7.5, 2.8)
    for name, (x, y) in curves.items():
        (line,) = axis.plot(x, y, label=name)
        if ends and name in ends:
            axis.plot(x[-1:], y[-1:], ends[name], color=line.get_color())
    axis.set(xlabel=xlabel, ylabel=ylabel, **axis_options)
    if len(curves) > 1:
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.set_label(f"{ylabel} against {xlabel}: {', '.join(curves)}")
    return figure


def confusion(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """A confusion matrix, each row as shares of the objects of its class.

    Args:
        matrix: int (C + 1, C + 1) of `e2e_utils.mistakes.confusion_matrix`, the
            background first. Classes without an object or a detection are left out.
        names: of the C + 1 rows.

    Example:
        >>> matrix = np.array([[0, 1, 0], [2, 8, 0], [0, 0, 5]])
        >>> confusion(matrix, ["background", "car", "ship"]).get_label()
        'confusion matrix; on the diagonal car 80%, ship 100%'
    """
    matrix = np.asarray(matrix)
    present = np.flatnonzero((matrix + matrix.T)[1:].sum(axis=1)) + 1
    order = [*present.tolist(), 0]  # what was missed and made up closes the table
    part = matrix[np.ix_(order, order)]
    shares = part / np.maximum(part.sum(axis=1, keepdims=True), 1)
    size = min(11.0, 2.5 + 0.38 * len(order))
    figure, (axis,) = axes(size, size * 0.9)
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
    kinds = [f"{names[i]} {shares[k, k]:.0%}" for k, i in enumerate(order[:-1])]
    figure.set_label("confusion matrix; on the diagonal " + ", ".join(kinds))
    return figure
