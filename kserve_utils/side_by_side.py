"""Servers and engines beside one another: how fast each is, and how far apart they are.

Copy: this file. (And e2e_utils.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, TypeVar

from e2e_utils.visualize import table

Answer = TypeVar("Answer")


def in_turns(
    calls: Mapping[str, Callable[[], Answer]], times: int = 10
) -> tuple[dict[str, Answer], dict[str, float]]:
    """Call several functions in turns and time each call.

    In turns, so that whatever else the machine does slows all of them. A first round is
    not counted: it fills caches.

    Args:
        calls: {name: function without arguments}.
        times: rounds that count.

    Returns:
        ({name: what its last call returned}, {name: median of its calls in ms}).

    Raises:
        ValueError: `times` is not positive.

    Example:
        >>> answers, milliseconds = in_turns({"a": lambda: 1, "b": lambda: 2}, times=3)
        >>> answers, list(milliseconds)
        ({'a': 1, 'b': 2}, ['a', 'b'])
    """
    if times < 1:
        raise ValueError(f"times must be 1 or more, got {times}")
    answers: dict[str, Answer] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(times + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            answers[name] = call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return answers, {name: 1000 * median(of_name) for name, of_name in seconds.items()}


def differences(
    measured: Mapping[str, Mapping[str, float]],
    milliseconds: Mapping[str, float] | None = None,
) -> Any:
    """A table of what `artefact.compare` returned: an IPython.display.Markdown.

    Args:
        measured: {name: result of `compare`}, a row for each.
        milliseconds: {name: time}, a column of times beside them.

    Example:
        >>> row = {"box_difference_px": 0.0005, "score_difference": 0.0}
        >>> text = differences({"openvino": {**row, "boxes_of_one_side": 0}}).data
        >>> text.splitlines()[-1]
        '| openvino | 0.000500 px | 0.000000 | 0 |'
    """
    header = ["", "a box moves by", "a score changes by", "boxes on one side alone"]
    rows: list[list[Any]] = []
    for name, of_name in measured.items():
        moved, changed = of_name["box_difference_px"], of_name["score_difference"]
        alone = of_name["boxes_of_one_side"]
        rows.append([name, f"{moved:.6f} px", f"{changed:.6f}", alone])
        if milliseconds is not None:
            rows[-1].append(f"{milliseconds[name]:.0f} ms")
    return table(header if milliseconds is None else [*header, "time"], rows)
