"""Calls in turns and their times, and the table of differences."""

import pytest

from kserve_utils import side_by_side


def test_calls_are_made_in_turns_and_the_first_round_is_not_timed(monkeypatch):
    clock, log = [0.0], []

    def call(name, seconds):
        def made():
            log.append(name)
            clock[0] += 100 if len(log) <= 2 else seconds.pop(0)
            return len(log)

        return made

    monkeypatch.setattr(side_by_side.time, "perf_counter", lambda: clock[0])
    calls = {"a": call("a", [1, 9, 2]), "b": call("b", [0.5, 0.25, 0.125])}
    answers, milliseconds = side_by_side.in_turns(calls, times=3)
    assert log == ["a", "b"] * 4 and answers == {"a": 7, "b": 8}
    assert milliseconds == {"a": 2000, "b": 250}
    with pytest.raises(ValueError, match="times must be 1 or more, got 0"):
        side_by_side.in_turns(calls, times=0)


def test_the_table_has_a_row_for_each_and_times_where_they_are_given():
    one = {"box_difference_px": 1e-4, "score_difference": 2e-6, "boxes_of_one_side": 3}
    alone = side_by_side.differences({"x": one}).data.splitlines()
    assert alone[2] == "| x | 0.000100 px | 0.000002 | 3 |"
    timed = side_by_side.differences({"x": one}, {"x": 51.7}).data.splitlines()
    assert timed[0].endswith("| time |") and timed[2].endswith("| 3 | 52 ms |")
