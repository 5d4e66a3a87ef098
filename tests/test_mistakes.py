import copy
import json

import numpy as np
import pytest
from test_evaluate import pycocotools, scene

from e2e_utils.data import CocoTiles
from e2e_utils.evaluate import coco_metrics
from e2e_utils.mistakes import KINDS, confusion_matrix, mistakes, right_false_missed
from e2e_utils.truth import clip_to_images, columns, fullest_image, image_truth
from e2e_utils.xview_score import xview_score

NAMES = ["plane", "ship", "tank"]


def coco(*objects: tuple) -> dict:
    """Ground truth of (category id, x) objects of 10 x 10 pixels in one image."""
    return {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": i, "name": n} for i, n in enumerate(NAMES)],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": c, "bbox": [x, 0, 10, 10]}
            for n, (c, x) in enumerate(objects, start=1)
        ],
    }


def found(*boxes: tuple) -> list[dict]:
    """Detections of (category id, x, score), 10 x 10 pixels."""
    return [
        {"image_id": 1, "category_id": c, "bbox": [x, 0, 10, 10], "score": s}
        for c, x, s in boxes
    ]


def test_one_mistake_of_each_kind():
    truth = coco((0, 0), (0, 50), (1, 100), (1, 150), (2, 200))
    boxes = found(
        (0, 1, 0.6),  # 0: after 1, so a duplicate
        (0, 0, 0.9),  # 1: right
        (0, 55, 0.8),  # 2: IoU 5/15 with its class
        (0, 100, 0.7),  # 3: on a ship
        (0, 155, 0.7),  # 4: near a ship
        (2, 300, 0.7),  # 5: near nothing
        (2, 200, 0.4),  # 6: below the threshold
    )
    kinds = mistakes(truth, boxes)
    assert tuple(kinds) == KINDS
    assert {kind: rows.tolist() for kind, rows in kinds.items()} == {
        "correct": [[1, 0]],
        "localisation": [[2, 1]],
        "confusion": [[3, 2]],
        "duplicate": [[0, 0]],
        "both": [[4, 3]],
        "background": [[5, -1]],
        "missed": [[-1, 3], [-1, 4]],
    }


def test_labels_of_the_matrix_are_those_of_the_tiles_whatever_the_order_of_the_file():
    truth = coco((0, 0), (2, 50))
    matrix = confusion_matrix(truth, found((0, 0, 0.9)))
    truth["categories"].reverse()
    assert confusion_matrix(truth, found((0, 0, 0.9))).tolist() == matrix.tolist()
    assert matrix[1, 1] == matrix[3, 0] == 1  # label 1 is the lowest id


def test_a_confused_object_is_not_missed_and_an_image_without_objects_is_background():
    kinds = mistakes(coco((1, 0)), found((0, 0, 0.9)))
    assert len(kinds["missed"]) == 0 and kinds["confusion"].tolist() == [[0, 0]]
    kinds = mistakes(coco((0, 0)), [{**found((0, 0, 0.9))[0], "image_id": 2}])
    assert kinds["background"].tolist() == [[0, -1]]
    assert kinds["missed"].tolist() == [[-1, 0]]


def test_the_confusion_matrix_of_a_case_counted_by_hand():
    truth = coco((0, 0), (0, 50), (1, 100), (2, 150))
    boxes = found(
        (0, 0, 0.9),  # a plane found
        (1, 51, 0.8),  # a plane taken for a ship
        (0, 55, 0.7),  # IoU 5/15 with the plane: a plane where nothing is
        (1, 100, 0.6),  # a ship found
        (2, 150, 0.4),  # below the threshold: the tank is missed
        (2, 300, 0.9),  # a tank where nothing is
    )
    assert confusion_matrix(truth, boxes).tolist() == [
        [0, 1, 0, 1],
        [0, 1, 1, 0],
        [0, 0, 1, 0],
        [1, 0, 0, 0],
    ]
    assert confusion_matrix(truth, [])[:, 0].tolist() == [0, 2, 1, 1]
    assert confusion_matrix(coco(), boxes)[0].tolist() == [0, 2, 2, 1]
    # the class comes before the score: the plane is found, the ship has no object
    boxes = found((1, 51, 0.8), (0, 50, 0.7))
    assert confusion_matrix(coco((0, 50)), boxes)[:2, :3].tolist() == [
        [0, 0, 1],
        [0, 1, 0],
    ]


def test_classes_stand_in_the_order_of_their_ids_whatever_the_file_says(tmp_path):
    truth, boxes = coco((1, 0), (5, 50), (9, 100)), found((5, 0, 0.9), (9, 100, 0.9))
    names = {9: "tank", 1: "plane", 5: "ship"}
    truth["categories"] = [{"id": i, "name": name} for i, name in names.items()]
    for image in truth["images"]:
        image |= {"file_name": f"{image['id']}.jpg", "width": 200, "height": 10}
    (tmp_path / "coco.json").write_text(json.dumps(truth))
    tiles = CocoTiles(tmp_path, tmp_path / "coco.json")
    matrix = confusion_matrix(tmp_path / "coco.json", boxes)
    named = {
        (tiles.class_names[a], tiles.class_names[b]): int(matrix[a, b])
        for a, b in np.argwhere(matrix).tolist()
    }
    lost = ("ship", "background")
    assert named == {("plane", "ship"): 1, ("tank", "tank"): 1, lost: 1}
    assert image_truth(truth, 1)["labels"].tolist() == [1, 2, 3]


def test_the_fullest_image_has_most_classes_and_then_most_labels():
    images = [{"id": i, "file_name": name} for i, name in enumerate(("a1", "a2", "b"))]
    seen = ((0, [1, 1, 1]), (1, [1, 2, 2]), (2, [1, 2, 3]))
    rows = [{"image_id": i, "category_id": c} for i, of in seen for c in of]
    truth = {"images": images, "annotations": rows}
    assert fullest_image(truth) == images[2] == fullest_image(truth, "nothing")
    assert fullest_image(truth, "a") == images[1]
    rows += [{"image_id": 0, "category_id": c, "iscrowd": 1} for c in (2, 3, 4)]
    assert fullest_image(truth, "a") == images[1], "a crowd is no object"
    rows += [{"image_id": 0, "category_id": 2}]
    assert fullest_image(truth, "a") == images[0]
    with pytest.raises(ValueError, match="has no images"):
        fullest_image({"images": [], "annotations": []})


def test_an_object_at_the_edge_is_found_by_its_visible_part():
    truth = coco((0, -60), (0, -6), (1, 94), (2, 50))  # the first is not there at all
    truth["images"][0] |= {"width": 100, "height": 100}
    truth["annotations"][2] |= {"area": 100}
    before = copy.deepcopy(truth)
    boxes = found((0, 0, 0.9), (1, 94, 0.9), (2, 50, 0.9))
    boxes[0]["bbox"], boxes[1]["bbox"] = [0, 0, 4, 10], [94, 0, 6, 10]
    with pytest.warns(UserWarning, match=r"1 of 4 labelled .* bbox \[-60, 0, 10, 10\]"):
        kinds = mistakes(truth, boxes)
    assert {kind: pairs.tolist() for kind, pairs in kinds.items() if len(pairs)} == {
        "correct": [[0, 1], [1, 2], [2, 3]]  # as the file counts its objects
    }
    with pytest.warns(UserWarning, match="100 x 100 pixels"):
        seen, kept = clip_to_images(truth)
    assert truth == before and kept.tolist() == [1, 2, 3]
    assert seen["annotations"][1]["bbox"] == [94, 0, 6, 10]
    assert seen["annotations"][1]["area"] == 60
    assert seen["annotations"][2] is truth["annotations"][3]
    assert clip_to_images(seen)[0] is seen, "what was cut, as tiles are, stays"
    del truth["annotations"][0]
    assert coco_metrics(truth, boxes)["AP"] == pytest.approx(1)
    assert xview_score(truth, boxes, every_object=True)["mAP"] == 1
    assert xview_score(truth, boxes)["mAP"] == pytest.approx(2 / 3), "as published"
    assert image_truth(truth, 1)["boxes_xyxy"].tolist()[0] == [0, 0, 4, 10]
    with pytest.raises(ValueError, match="no image 7"):
        image_truth(truth, 7)


@pytest.mark.parametrize("seed", range(4))
def test_each_detection_and_object_is_counted_once(seed):
    truth, boxes = scene(50, seed, images=2)
    kept = [i for i, row in enumerate(boxes) if row["score"] >= 0.3]
    kinds = mistakes(truth, boxes, 0.3)
    assert sorted(i for k in KINDS[:-1] for i in kinds[k][:, 0]) == kept
    matrix = confusion_matrix(truth, boxes, 0.3)
    objects = [row["category_id"] for row in truth["annotations"]]
    assert matrix[1:].sum(1).tolist() == np.bincount(objects, minlength=3).tolist()
    mine = [boxes[i]["category_id"] for i in kept]
    assert matrix[:, 1:].sum(0).tolist() == np.bincount(mine, minlength=3).tolist()
    assert matrix[0, 0] == 0
    right = [boxes[i]["category_id"] for i in kinds["correct"][:, 0]]
    assert matrix.diagonal()[1:].tolist() == np.bincount(right, minlength=3).tolist()
    for number in (1, 2):  # one image alone, as pictures show it
        mine = [row for row in boxes if row["image_id"] == number]
        alone = {"boxes_xyxy": columns(mine)[2], "scores": [r["score"] for r in mine]}
        alone["labels"] = [row["category_id"] + 1 for row in mine]
        pairs = right_false_missed(image_truth(truth, number), alone, 0.3)
        image = {i for i, row in enumerate(boxes) if row["image_id"] == number}
        here = [i for i in kinds["correct"][:, 0] if i in image]
        assert [boxes.index(mine[i]) for i in pairs["right"][:, 0]] == here
        assert len(pairs["missed"]) + len(here) == 50
        assert len(pairs["false"]) + len(here) == sum(r["score"] >= 0.3 for r in mine)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_correct_equals_the_matches_of_pycocotools(seed):
    truth, boxes = scene(50, seed, images=2)
    images = pycocotools(truth, boxes).evalImgs
    matches = {
        (int(detection) - 1, int(annotation) - 1)
        for image in images
        if image and image["aRng"] == [0, 1e10]  # of all sizes
        for detection, annotation in zip(
            image["dtIds"], image["dtMatches"][0], strict=True
        )
        if annotation
    }
    correct = mistakes(truth, boxes, score_threshold=0)["correct"]
    assert set(map(tuple, correct.tolist())) == matches


def test_unknown_images_and_categories_and_mixed_up_thresholds_are_errors():
    elsewhere = [{**found((0, 0, 0.9))[0], "image_id": 99}]
    for function in (mistakes, confusion_matrix, xview_score, coco_metrics):
        with pytest.raises(ValueError, match=r"not in the ground truth: \[99\]"):
            function(coco((0, 0)), elsewhere)
        with pytest.raises(ValueError, match=r"categories not in .*: \[7\]"):
            function(coco((0, 0)), found((7, 0, 0.9)))
    with pytest.raises(ValueError, match="background_iou is 0.6"):
        mistakes(coco(), [], background_iou=0.6)
