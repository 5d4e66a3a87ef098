"""Counts and shares from a score on, against those of the pictures of mistakes."""

import pytest
from test_mistakes import coco, found

from e2e_utils.mistakes import right_false_missed
from e2e_utils.operating_point import operating_point
from e2e_utils.truth import image_truth

TRUTH = coco((0, 0), (0, 50), (1, 100), (1, 150), (2, 200))
BOXES = found((0, 1, 0.6), (0, 0, 0.9), (0, 55, 0.8), (0, 100, 0.7), (2, 204, 0.4))


def test_every_box_and_every_object_counts_once():
    point = operating_point(TRUTH, BOXES, 0.5)
    assert point["right"] == 1  # (0, 0); (0, 1) is its duplicate
    assert point["false"] == 3 and point["missed"] == 4
    assert point["precision"] == 1 / 4 and point["recall"] == 1 / 5
    assert point["F1"] == pytest.approx(2 / 9)


@pytest.mark.parametrize("score", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("iou", [0.3, 0.4, 0.5])
def test_its_counts_are_those_that_the_pictures_show(score, iou):
    boxes = {
        "boxes": [[x, y, x + w, y + h] for x, y, w, h in (b["bbox"] for b in BOXES)],
        "labels": [row["category_id"] + 1 for row in BOXES],
        "scores": [row["score"] for row in BOXES],
    }
    shown = right_false_missed(image_truth(TRUTH, 1), boxes, score, iou)
    point = operating_point(TRUTH, BOXES, score, iou)
    assert {kind: len(rows) for kind, rows in shown.items()} == {
        kind: point[kind] for kind in shown
    }


def test_without_a_box_or_an_object_its_shares_are_zero():
    for truth, boxes in ((TRUTH, []), (coco(), BOXES), (coco(), [])):
        point = operating_point(truth, boxes)
        assert [point[key] for key in ("precision", "recall", "F1")] == [0, 0, 0]


def test_crowds_are_no_objects():
    truth = coco((0, 0), (0, 50))
    truth["annotations"][1]["iscrowd"] = 1
    point = operating_point(truth, BOXES[:2], 0.7)
    assert (point["right"], point["missed"]) == (1, 0)
