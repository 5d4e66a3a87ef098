"""The reader of COCO files against files that it must refuse, and what is written."""

import json

import numpy as np
import pytest

from e2e_utils.coco import Category, Coco, Image, read_coco, to_annotations, write_coco


def content():
    return {
        "images": [{"id": 5, "file_name": "a.jpg", "height": 30, "width": 40}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 0, "bbox": [1, 2, 3.5, 4]},
            {"id": 2, "image_id": 5, "category_id": 0, "bbox": [1, 2, 3, 4], "area": 9},
        ],
        "categories": [{"id": 0, "name": "car"}],
    }


def changed(what, **fields):
    coco = content()
    coco[what][0].update(fields)
    return json.dumps(coco)


def without(what, field):
    coco = content()
    del coco[what][0][field]
    return json.dumps(coco)


ANOTHER_ID = {**content()["images"][0], "id": 6}
SAME_FILE = {**content(), "images": [*content()["images"], ANOTHER_ID]}
TWICE = {**content(), "images": content()["images"] * 2}


@pytest.mark.parametrize(
    "text, said",
    [
        ("not json", "not a COCO file"),
        ("[1, 2]", "Expected `object`"),
        ('{"images": [], "annotations": []}', "missing required field `categories`"),
        (changed("annotations", bbox=[1, 2]), r"annotations\[0\].bbox"),
        (changed("annotations", bbox=[1, 2, 3, 4, 5]), "`array` of at most length 4"),
        (changed("images", id=1.5), r"Expected `int . str`.*images\[0\].id"),
        (changed("images", height=0), "image 'a.jpg' is 40 x 0 pixels"),
        (changed("annotations", id=2), "id 2 stands twice in annotations"),
        (without("images", "file_name"), r"required field `file_name`.*images\[0\]"),
        (without("annotations", "id"), r"required field `id` .*annotations\[0\]"),
        (without("annotations", "bbox"), r"required field `bbox` .*annotations\[0\]"),
        (without("categories", "name"), r"required field `name` .*categories\[0\]"),
        (json.dumps(TWICE), "id 5 stands twice in images"),
        (json.dumps(SAME_FILE), "'a.jpg' stands twice in images: join the two"),
    ],
)
def test_broken_file_is_named_with_the_field_and_the_value(tmp_path, text, said):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as failure:
        read_coco(path, strict=False)
    assert str(path) in str(failure.value)


@pytest.mark.parametrize(
    "text, said",
    [
        (changed("annotations", category_id=99), "annotation 1 of .*category_id 99 is"),
        (changed("annotations", image_id=99), "annotation 1 of .*image_id 99 is not"),
        (changed("annotations", bbox=[1, 1, 0, 5]), "annotation 1 of .*has no area"),
        (changed("annotations", bbox=[1e5, 1, 2e-3, 5]), "annotation 1 .*in float32"),
        (changed("annotations", image_id="5"), "annotation 1 .*image_id '5' is not"),
        (json.dumps({**content(), "images": [], "annotations": []}), "no images"),
    ],
)
def test_what_annotations_name_is_checked_unless_the_caller_does(tmp_path, text, said):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as failure:
        read_coco(path)
    assert str(path) in str(failure.value)
    assert len(read_coco(path, strict=False).categories) == 1


def test_a_read_file_is_its_content_in_plain_dicts(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content()))
    coco = read_coco(path).to_dict()
    for row, given in zip(coco["annotations"], content()["annotations"], strict=True):
        assert {**row, **given} == row and row["iscrowd"] == 0
        assert type(row["bbox"]) is list and ("area" in row) == ("area" in given)
    assert (coco["images"], coco["categories"]) == (
        content()["images"],
        content()["categories"],
    )


def test_what_is_written_is_read_again(tmp_path):
    boxes = np.array([[1, 2, 3, 4], [5.5, 6, 7, 8]])
    rows = to_annotations(boxes, np.array([5, 5]), np.array([0, 1]), outlines=True)
    categories = [Category(0, "car", "vehicle"), Category(1, "bus")]
    coco = Coco([Image(30, 40, 5, "a.jpg")], rows, categories)
    write_coco(tmp_path / "a.json", coco)
    assert read_coco(tmp_path / "a.json") == coco
    first = json.loads((tmp_path / "a.json").read_text())["annotations"][0]
    assert first["segmentation"] == [[4, 2, 4, 6, 1, 6, 1, 2]] and first["area"] == 12
