import contextlib
import copy
import functools
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from e2e_utils.data import CocoTiles, eval_loader
from e2e_utils.evaluate import (
    AREAS,
    METRICS,
    coco_metrics,
    detect,
    recall_ceiling,
    searcher_metrics,
    to_coco,
)
from e2e_utils.mistakes import confusion_matrix, mistakes
from e2e_utils.xview_score import xview_score


def scene(boxes: int, seed: int, images: int = 4) -> tuple[dict, list]:
    """Random ground truth and jittered, partly wrong detections of two classes."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for n in range(images * boxes):
        x, y = rng.uniform(0, 1000, 2)
        w, h = rng.uniform(8, 120, 2)
        row = {"image_id": n // boxes + 1, "category_id": int(rng.integers(0, 2))}
        extra = {"id": n + 1, "area": w * h, "iscrowd": 0}
        truth.append({**row, "bbox": [x, y, w, h], **extra})
        shift = rng.normal(0, 0.12, 4) * [w, h, w, h]
        box = [x + shift[0], y + shift[1], w + abs(shift[2]), h + abs(shift[3])]
        if rng.random() < 0.1:
            row["category_id"] = 1 - row["category_id"]
        found.append({**row, "bbox": box, "score": float(rng.random())})
    return {
        "images": [
            {"id": i, "width": 1100, "height": 1100} for i in range(1, 1 + images)
        ],
        "annotations": truth,
        "categories": [{"id": i, "name": n} for i, n in enumerate("abc")],
    }, found


def pycocotools(truth: dict, found: list) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = copy.deepcopy(truth)
        reference.createIndex()
        run = COCOeval(reference, reference.loadRes(copy.deepcopy(found)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_and_tables_equal_those_of_pycocotools(seed):
    truth, found = scene(60, seed)
    before = copy.deepcopy((truth, found))
    ours = coco_metrics(truth, found, max_dets=(1, 10, 100), tables=True)
    assert (truth, found) == before
    run = pycocotools(truth, found)
    names = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
    names += ["AR_1", "AR_10", "AR_100"]
    assert [ours[n] for n in names] == pytest.approx(run.stats[:9], abs=1e-6)
    precision = run.eval["precision"][..., 2]
    assert set(ours["per_class"]) == {"a", "b"}, "only classes that occur"
    for index, name in enumerate("ab"):
        mine = ours["per_class_AP"][name]
        assert mine == pytest.approx(precision[:, :, index, 0].mean(), abs=1e-6)
        for area, size in enumerate(AREAS[1:], start=1):
            values = precision[0, :, index, area]
            mine = ours["per_class_size"][size].get(name)
            assert mine == (None if values[0] < 0 else pytest.approx(values.mean()))


def test_searchers_get_the_figures_that_there_are_by_their_names():
    metrics = {"AP": 0.5, "AP50": 0.0, "AP_large": None, "AR_1": 0.1, "per_class": {}}
    assert searcher_metrics(metrics) == {"mAP": 0.5, "mAP_50": 0.0}
    truth, found = scene(20, seed=4)
    expected = coco_metrics(truth, found)
    assert set(METRICS.values()) <= set(expected)
    for index, row in enumerate(truth["annotations"]):
        row["id"] = index  # 0 counts like any other
        del row["area"], row["iscrowd"]  # as the boxes have them
    assert coco_metrics(truth, found) == expected


def test_a_perfect_detector_is_capped_only_by_max_dets():
    truth, _ = scene(150, seed=7, images=1)
    perfect = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in truth["annotations"]
    ]
    assert coco_metrics(truth, perfect)["AP50"] == pytest.approx(1.0)
    # 150 objects of two classes, about 75 each: a cap of 30 a class hides the rest
    assert coco_metrics(truth, perfect, (1, 10, 30))["AP50"] < 0.5


def test_a_subset_of_images_is_scored_alone():
    truth, found = scene(20, seed=3)
    kept = [d for d in found if d["image_id"] != 2]
    alone = coco_metrics(truth, found, image_ids=[1, 3, 4])
    assert coco_metrics(truth, kept, image_ids=[1, 3, 4]) == alone
    nothing = coco_metrics(truth, [])
    assert nothing["AP"] == nothing["AR_500"] == 0.0


def renamed(truth: dict, found: list[dict]) -> tuple[dict, list[dict]]:
    """The same with strings as ids of images, in another order of categories."""
    images = [{**row, "id": f"img_{row['id']}"} for row in truth["images"]]
    objects, found = (
        [{**row, "image_id": f"img_{row['image_id']}"} for row in rows]
        for rows in (truth["annotations"], found)
    )
    listed = truth["categories"][::-1]
    return {"images": images, "annotations": objects, "categories": listed}, found


def test_ids_of_images_may_be_strings(tmp_path):
    truth, found = scene(20, seed=3)
    other, others = renamed(truth, found)
    assert coco_metrics(other, others) == coco_metrics(truth, found)
    assert others[0]["image_id"] == f"img_{found[0]['image_id']}"  # as it was given
    some = coco_metrics(other, others, image_ids=["img_1", "img_3"])
    assert some == coco_metrics(truth, found, image_ids=[1, 3])
    assert xview_score(other, others) == xview_score(truth, found)
    wanted = mistakes(truth, found)
    for kind, rows in mistakes(other, others).items():
        assert rows.tolist() == wanted[kind].tolist()
    with pytest.raises(ValueError, match=r"not in the ground truth: \['no'\]"):
        coco_metrics(other, [{**others[0], "image_id": "no"}])


@pytest.mark.parametrize("rename", [lambda *both: both, renamed])
def test_what_names_no_image_or_category_of_the_file_is_in_no_score(rename):
    truth, found = rename(*scene(20, seed=3))
    rows = truth["annotations"]
    lost = [{**rows[0], "image_id": "no"}, {**rows[0], "category_id": 99}]
    more = {**truth, "annotations": lost + rows}
    every = functools.partial(xview_score, every_object=True)
    for score in (coco_metrics, every, confusion_matrix):
        with pytest.warns(UserWarning, match="2 of .* are not scored"):
            assert np.array_equal(score(more, found), score(truth, found))
    with pytest.warns(UserWarning, match="not scored"):
        kinds = mistakes(more, found)
    for kind, pairs in mistakes(truth, found).items():  # indices are those of the file
        assert np.array_equal(kinds[kind], pairs + [0, 2] * (pairs != -1))


def test_a_crowd_is_ignored_as_pycocotools_does():
    truth, found = scene(20, seed=3)
    for row in truth["annotations"][::3]:
        row["iscrowd"] = 1
    expected = pycocotools(truth, found).stats
    metrics = coco_metrics(truth, found, (1, 10, 100))
    assert metrics["AP"] == pytest.approx(expected[0], abs=1e-9)
    assert metrics["AP"] != coco_metrics(*scene(20, seed=3))["AP"]
    objects = [row for row in truth["annotations"] if not row["iscrowd"]]
    kinds = mistakes(truth, found, 0.0)
    rows = np.concatenate([kinds[k] for k in ("correct", "missed")])[:, 1]
    assert not any(truth["annotations"][row]["iscrowd"] for row in rows)
    assert confusion_matrix(truth, found, 0.0)[1:].sum() == len(objects)
    alone = {**truth, "annotations": objects}
    assert xview_score(truth, found) == xview_score(alone, found)
    assert recall_ceiling(truth, [1]) == recall_ceiling(alone, [1])


def test_labels_become_category_ids_and_boxes_xywh():
    output = {
        "boxes": torch.tensor([[10.0, 20, 30, 60]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.5]),
    }
    row = {"image_id": 4, "bbox": [10, 20, 20, 40], "score": 0.5}
    assert to_coco(4, output) == [{**row, "category_id": 1}]
    assert to_coco(4, output, [11, 18]) == [{**row, "category_id": 18}]


class Labels(torch.nn.Module):
    """A test double: answers each tile with the boxes of its labels."""

    def __init__(self, dataset):
        super().__init__()
        self.answers = (
            {**t, "scores": torch.ones(len(t["labels"]))} for _, t in dataset
        )

    def forward(self, images):
        assert all(i.dtype == torch.float32 and i.max() <= 1 for i in images)
        return [next(self.answers) for _ in images]


def test_detect_sends_tiles_through_and_restores_the_mode(tiles):
    dataset = CocoTiles(tiles / "val", tiles / "val.json")
    model = Labels(dataset).train()
    found = detect(model, eval_loader(dataset, 2), "cpu", dataset.category_ids)
    assert model.training
    truth = json.loads((tiles / "val.json").read_text())
    assert coco_metrics(truth, found)["AP"] == pytest.approx(1.0)


def test_the_recall_ceiling_is_what_the_caps_let_through():
    box = {"bbox": [0, 0, 9, 9]}
    rows = [{"image_id": 1, "category_id": 0, **box}] * 30
    rows += [{"image_id": 1, "category_id": 1, **box}] * 10
    rows += [{"image_id": 2, "category_id": 1, **box}] * 10
    truth = {"images": [{"id": 1}, {"id": 2}, {"id": 3}], "annotations": rows}
    truth["categories"] = [{"id": 0}, {"id": 1}]
    assert recall_ceiling(truth, (1, 20, 50)) == {1: 2 / 50, 20: 30 / 50, 50: 1.0}
    assert recall_ceiling(truth, [20], per_class=True) == {20: 40 / 50}
    with pytest.raises(ValueError, match=r"caps \[0\]"):
        recall_ceiling(truth, [0])
    with pytest.raises(ValueError, match="0 objects and caps"):
        recall_ceiling({**truth, "annotations": []})
