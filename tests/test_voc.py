"""Pascal VOC to COCO against pixels and torchvision's reader, and what is refused."""

import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pytest
from torchvision.datasets import VOCDetection

from e2e_utils.coco import read_coco
from e2e_utils.voc import SIDES, voc_to_coco

TREE = ("tree", 11, 21, 20, 40)


@pytest.fixture
def write(tmp_path):
    """Writes an annotation and its picture, 80 x 60 px, white where objects are."""

    def to_disk(objects=(TREE,), name="a.png", size=(80, 60), more="", **outer):
        pixels = np.zeros((60, 80, 3), np.uint8)
        rows = []
        for kind, *box in objects:
            x1, y1, x2, y2 = (int(v) if str(v).isdigit() else 0 for v in box)
            pixels[y1 - 1 : y2, x1 - 1 : x2] = 255  # VOC counts from 1, and both ends
            corners = zip(SIDES, box, strict=True)
            inner = "".join(f"<{side}>{v}</{side}>" for side, v in corners)
            rows.append(f"<object><name>{kind}</name><bndbox>{inner}</bndbox>{more}")
        cv2.imwrite(str(tmp_path / "a.png"), pixels)
        cv2.imwrite(str(tmp_path / "b.png"), pixels)
        told = f"<width>{size[0]}</width><height>{size[1]}</height>"
        body = f"<filename>{name}</filename><size>{told}</size>"
        body += "".join(f"{row}</object>" for row in rows)
        path = tmp_path / "labels" / name.replace("png", "xml")
        path.parent.mkdir(exist_ok=True)
        head, root = outer.get("head", ""), outer.get("root", "annotation")
        path.write_text(f"{head}<{root}>{body}</{root}>")
        return path

    return to_disk


@pytest.fixture
def convert(tmp_path):
    return lambda **options: voc_to_coco(
        tmp_path / "labels", tmp_path, tmp_path / "out.json", **options
    )


def test_a_box_is_the_pixels_of_its_object(write, convert, tmp_path):
    for box in [(11, 21, 20, 40), (1, 1, 80, 60), (7, 7, 7, 7), (80, 60, 80, 60)]:
        write([("tree", *box)])
        convert()
        (row,) = read_coco(tmp_path / "out.json").annotations
        white = np.argwhere(cv2.imread(str(tmp_path / "a.png"))[..., 0])
        (top, left), (bottom, right) = white.min(axis=0), white.max(axis=0) + 1
        b = row.bbox
        assert (b.x, b.y, b.width, b.height) == (left, top, right - left, bottom - top)


def test_classes_and_corners_are_those_that_torchvision_reads(write, convert):
    paths = [write([("tree", 1, 2, 30, 40), ("ash", 5, 5, 9, 9.5)])]
    paths.append(write([("birch", 3, 4, 80, 60)], "b.png"))
    coco, theirs = convert(), []
    for path in paths:
        content = VOCDetection.parse_voc_xml(ET.parse(path).getroot())
        told = content["annotation"]
        for row in told["object"]:
            corners = [float(row["bndbox"][side]) for side in SIDES]
            theirs.append((told["filename"], row["name"], *corners))
    names = {category.id: category.name for category in coco.categories}
    files = {image.id: image.file_name for image in coco.images}
    ours = [
        (files[row.image_id], names[row.category_id], b.x + 1, b.y + 1)
        + (b.x + b.width, b.y + b.height)
        for row in coco.annotations
        for b in [row.bbox]
    ]
    assert ours == theirs and list(names.values()) == ["ash", "birch", "tree"]


def test_difficult_objects_are_crowds_and_given_classes_keep_their_ids(write, convert):
    write(more="<difficult>1</difficult><part><name>leaf</name></part>")
    coco = convert(class_names=["shrub", "tree"])
    assert [(row.iscrowd, row.category_id) for row in coco.annotations] == [(1, 2)]
    assert [category.name for category in coco.categories] == ["shrub", "tree"]


def test_edges_that_count_from_0_are_taken_as_they_are(write, convert):
    write([("tree", 0, 0, 10, 10)])
    with pytest.raises(ValueError, match="first_pixel=0"):
        convert()
    (row,) = convert(first_pixel=0).annotations
    assert (row.bbox.x, row.bbox.width) == (0, 10)


ENTITY = '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx">]>'
WRONG = {
    "a size": ({"size": (81, 60)}, "size says 81 x 60 px, and .*a.png has 80 x 60"),
    "inverted": ({"objects": [("t", 20, 1, 10, 9)]}, r"box 20, 1, 10, 9 .*inverted"),
    "outside": ({"objects": [("t", 1, 1, 81, 9)]}, "81, 9 .* reaches beyond 80 x 60"),
    "no number": ({"objects": [("t", "nan", 1, 8, 9)]}, "bndbox/xmin is 'nan'"),
    "no class": ({"objects": [("", 1, 1, 8, 9)]}, "<object> has no name"),
    "no XML": ({"head": "&"}, "not well-formed"),
    "entities": ({"head": ENTITY}, "it has a DOCTYPE, 'a'"),
    "other XML": ({"root": "data"}, "it is <data>, not Pascal VOC's <annotation>"),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_with_its_file(write, convert, tmp_path, change, said):
    write(**change)
    with pytest.raises(ValueError, match=rf"labels.a\.xml: .*(?:{said})"):
        convert()
    assert not (tmp_path / "out.json").exists()


def test_a_missing_picture_a_second_file_for_one_and_a_foreign_class_are_refused(
    write, convert, tmp_path
):
    path = write()
    path.with_name("b.xml").write_text(path.read_text())
    with pytest.raises(ValueError, match="b.xml: describes 'a.png', as .*a.xml does"):
        convert()
    path.with_name("b.xml").unlink()
    with pytest.raises(ValueError, match="class 'tree' is not among shrub, herb"):
        convert(class_names=["shrub", "herb"])
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a.xml: its picture .*a.png is miss"):
        convert()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="labels"):
        convert()
