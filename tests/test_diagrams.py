"""The diagrams of README and the notebooks: readable everywhere, and true."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from e2e_utils.boxes import iou_pairs

FOLDER = Path(__file__).parents[1] / "notebooks" / "images"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("*.svg")), ids=lambda path: path.stem
)
def test_a_diagram_is_small_described_and_follows_dark_mode_without_anything_outside(
    path,
):
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    _, _, width, height = map(int, root.attrib["viewBox"].split())
    assert (root.get("width"), root.get("height")) == (str(width), str(height))
    assert width <= 760 and len(text) < 12_000
    described = [root.find(f"{SVG}{name}") for name in ("title", "desc")]
    assert all(len(part.text) > 10 for part in described)
    assert root.attrib["aria-labelledby"].split() == [
        part.get("id") for part in described
    ]
    kinds = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert "text" in kinds and not kinds & {"script", "image", "use", "foreignObject"}
    style = root.find(f"{SVG}style").text
    assert "prefers-color-scheme: dark" in style and "@import" not in style
    assert "href" not in text and text.count("http") == 1  # the name of SVG itself
    ids = {element.get("id") for element in root.iter()}
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in ids}
    used = " ".join(element.get("class", "") for element in root.iter()).split()
    assert set(used) <= set(re.findall(r"\.([a-z]\w*)", style))
    for element in root.iter(f"{SVG}text"):
        assert 0 < float(element.get("x")) < width, element.text
        assert 0 < float(element.get("y")) < height, element.text


def test_the_diagrams_figures_of_iou_are_those_of_its_boxes():
    root = ElementTree.parse(FOLDER / "iou.svg").getroot()
    found = {"label": [], "found": []}
    for rect in root.iter(f"{SVG}rect"):
        x, y, *size = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
        if rect.get("class") in found and size == [120, 64]:  # 15 x 8 px, 8 units each
            found[rect.get("class")].append([x, y, x + 120, y + 64])
    boxes = [np.array(rows) for rows in found.values()]
    panel = np.arange(3)
    a, _, iou = iou_pairs(boxes[0], panel, boxes[1], panel, 0.01)
    text = " ".join(element.text for element in root.iter(f"{SVG}text"))
    assert re.findall(r"IoU (0\.\d\d)\b", text) == [
        f"{v:.2f}" for v in iou[np.argsort(a)]
    ]
    shares = [int(n) / int(of) for n, of in re.findall(r"(\d+) / (\d+)", text)]
    assert shares == pytest.approx(iou[np.argsort(a)])
    limit = min(np.roots([1, -(15 + 8), 15 * 8 / 3]))  # (15 - s) (8 - s) = 2/3 * 15 * 8
    assert f"a shift of {limit:.1f} px" in text
    assert f"an IoU of {97**2 / (2 * 100**2 - 97**2):.2f}" in text
