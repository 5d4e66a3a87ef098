import json

import numpy as np
import pytest
from pycocotools import mask

from e2e_utils.classes import read_classes
from e2e_utils.evaluate import coco_metrics
from e2e_utils.xview_score import (
    XVIEW_GROUPS,
    XVIEW_TYPE_IDS,
    three_scores,
    voc_ap,
    xview_score,
)


def coco(objects: list, images: int = 3, categories: int = 3) -> dict:
    """Ground truth of (image id, category id, x, y) objects of 10 x 10 pixels."""
    size = {"height": 1000, "width": 1000}
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", **size} for i in range(1, images + 1)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(categories)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": [x, y, 10, 10]}
            for n, (i, c, x, y) in enumerate(objects, start=1)
        ],
    }


def found(*boxes: tuple) -> list[dict]:
    """Detections of (image id, category id, x, y, score), 10 x 10 pixels."""
    return [
        {"image_id": i, "category_id": c, "bbox": [x, y, 10, 10], "score": s}
        for i, c, x, y, s in boxes
    ]


def test_voc_ap_is_the_area_below_the_envelope():
    # precision 1, 1/2, 2/3 at recall 1/4, 1/4, 2/4; envelope 1 and 2/3
    assert voc_ap(np.array([True, False, True]), 4) == pytest.approx((1 + 2 / 3) / 4)
    # precision 0, 1/2, 2/3: the envelope lifts the second to 2/3
    assert voc_ap(np.array([False, True, True]), 2) == pytest.approx(2 / 3)
    assert voc_ap(np.array([], bool), 3) == 0.0


def test_the_score_of_a_case_computed_by_hand():
    truth = coco([(1, 0, 0, 0), (1, 0, 50, 0), (2, 0, 0, 0), (2, 1, 50, 50)])
    boxes = found(
        (1, 0, 1, 0, 0.9),  # right: IoU 9/11
        (1, 0, 54, 0, 0.8),  # wrong: IoU 6/14
        (2, 0, 0, 0, 0.7),  # right
        (2, 0, 1, 1, 0.6),  # wrong: the object is taken
        (2, 1, 50, 50, 0.5),  # right
        (2, 1, 0, 0, 0.4),  # wrong: nothing of this class is there
    )
    scores = xview_score(truth, boxes)
    assert scores["per_class"] == pytest.approx(
        {"class 0": (1 + 2 / 3) / 3, "class 1": 1.0}
    )
    assert scores["mAP"] == pytest.approx((5 / 9 + 1) / 2)
    precision, recall = (2 / 4 + 1 / 2) / 2, (2 / 3 + 1) / 2
    assert scores["precision"] == pytest.approx(precision)
    assert scores["recall"] == pytest.approx(recall)
    f1 = 2 * precision * recall / (precision + recall)
    assert scores["f1"] == pytest.approx(f1)


def test_a_detection_gets_no_second_choice():
    # the second box overlaps the first object more (7/13), which is taken, and the
    # second object enough (also 7/13 but later in the file)
    truth = coco([(1, 0, 0, 0), (1, 0, 6, 0)])
    boxes = found((1, 0, 0, 0, 0.9), (1, 0, 3, 0, 0.8))
    assert xview_score(truth, boxes)["per_class"]["class 0"] == pytest.approx(0.5)
    assert coco_metrics(truth, boxes)["AP50"] == pytest.approx(1.0)


def test_the_official_score_forgets_images_where_nothing_of_a_class_was_found():
    truth = coco([(1, 0, 0, 0), (2, 0, 0, 0), (2, 1, 50, 50)])
    boxes = found((1, 0, 0, 0, 0.9))
    official = xview_score(truth, boxes)
    assert official["per_class"] == {"class 0": 1.0, "class 1": 0.0}
    assert official["recall"] == 1.0
    every = xview_score(truth, boxes, every_object=True)
    assert every["per_class"] == {"class 0": 0.5, "class 1": 0.0}
    assert every["recall"] == pytest.approx((1 / 2 + 0) / 2)


def test_what_cannot_be_scored_changes_nothing_and_scores_nothing():
    truth = coco([(1, 0, 0, 0)], categories=8)
    assert xview_score(truth, found((1, 0, 0, 0, 0.0)))["mAP"] == 0.0  # a score of 0
    boxes = found((1, 0, 0, 0, 0.9), (1, 7, 0, 0, 0.95))  # a class of no object
    assert xview_score(truth, boxes)["mAP"] == 1.0
    scores = xview_score(coco([]), found((1, 0, 0, 0, 0.9)))
    assert scores["mAP"] is scores["f1"] is None and scores["per_class"] == {}


def test_the_groups_are_those_of_the_challenge():
    assert list(read_classes()) == list(XVIEW_TYPE_IDS)
    sizes = {name: len(ids) for name, ids in XVIEW_GROUPS.items()}
    assert sizes == {"small": 19, "medium": 27, "large": 14, "common": 29, "rare": 31}
    position = {name: i for i, name in read_classes().values()}
    for name, groups in {
        "Small Car": {"small", "common"},
        "Helipad": {"medium", "rare"},
        "Container Ship": {"large", "rare"},
    }.items():
        mine = {g for g, ids in XVIEW_GROUPS.items() if position[name] in ids}
        assert mine == groups, name


def test_xviews_own_categories_are_scored_by_size_and_frequency():
    car, crane = 5, 34  # Small Car, Tower crane
    truth = coco([(1, car, 0, 0), (1, crane, 50, 0)], categories=60)
    scores = xview_score(truth, found((1, car, 0, 0, 0.9)))
    assert scores["mAP_small"] == scores["mAP_common"] == 1.0
    assert scores["mAP_large"] == scores["mAP_rare"] == 0.0
    assert scores["mAP_medium"] is None and scores["mAP"] == 0.5
    other = xview_score(coco([(1, 0, 0, 0)]), [], groups={"mine": [0, 1]})
    assert other["mAP_mine"] == 0.0 and "mAP_small" not in other


def scored_box_by_box(truth: dict, detections: list, every_object: bool) -> dict:
    """The rules once more: an oracle whose matching shares no code with the rest."""
    result = {}
    for category in {row["category_id"] for row in truth["annotations"]}:
        objects, boxes = (
            [row for row in rows if row["category_id"] == category]
            for rows in (truth["annotations"], detections)
        )
        shown = {row["image_id"] for row in boxes}
        count = sum(every_object or row["image_id"] in shown for row in objects)
        taken, hits = {None}, []
        for box in sorted(boxes, key=lambda row: -row["score"]):
            here = [row for row in objects if row["image_id"] == box["image_id"]]
            iou = mask.iou([box["bbox"]], [r["bbox"] for r in here], [0] * len(here))
            best = here[np.argmax(iou)]["id"] if np.max(iou, initial=0) >= 0.5 else None
            hits.append(best not in taken)
            taken.add(best)
        result[f"class {category}"] = voc_ap(np.array(hits, bool), count or 1)
    return result


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("every_object", [False, True])
def test_random_cases_equal_the_rules_followed_box_by_box(seed, every_object):
    rng = np.random.default_rng(seed)
    objects = [
        (*rng.integers([1, 0], [7, 4]), *rng.uniform(0, 60, 2)) for _ in "x" * 80
    ]
    truth = coco(objects, images=6, categories=5)
    boxes = found(
        *((i, c, *rng.normal([x, y], 2), rng.random()) for i, c, x, y in objects[:60]),
        *((i, 4 - c, x, y, rng.random()) for i, c, x, y in objects[:20]),
    )
    expected = scored_box_by_box(truth, boxes, every_object)
    scores = xview_score(truth, boxes, every_object=every_object)
    assert scores["per_class"] == pytest.approx(expected)
    assert scores["mAP"] == pytest.approx(np.mean(list(expected.values())))


def test_three_scores_show_what_empty_tiles_and_merging_cost(tmp_path):
    tiles = coco([(1, 0, 0, 0), (2, 0, 0, 0)])  # tile 3 is empty
    in_tiles = found((1, 0, 0, 0, 0.8), (2, 0, 0, 0, 0.7), (3, 0, 0, 0, 0.9))
    scenes = coco([(1, 0, 0, 0), (1, 0, 240, 0)], images=1)
    in_scenes = found((1, 0, 0, 0, 0.8), (1, 0, 243, 0, 0.7), (1, 0, 99, 9, 0.9))
    path = tmp_path / "val.json"
    path.write_text(json.dumps(scenes))
    table = three_scores(tiles, in_tiles, path, in_scenes)
    assert list(table) == ["tiles with objects", "all tiles", "whole scenes"]
    assert [row["xview"] for row in table.values()] == pytest.approx([1, 2 / 3, 2 / 3])
    assert xview_score(tiles, in_tiles, image_ids=[1, 2])["mAP"] == 1.0
    assert table["tiles with objects"]["AP50"] == pytest.approx(1.0)
    assert table["all tiles"]["AP50"] == pytest.approx(2 / 3, abs=0.01)
    alone = coco_metrics(scenes, in_scenes, (1, 500, 5000))
    assert {k: table["whole scenes"][k] for k in alone} == alone
    assert table["whole scenes"]["xview_every_object"] == pytest.approx(2 / 3)
