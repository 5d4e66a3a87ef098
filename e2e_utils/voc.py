"""Pascal VOC's XML files to one COCO file.

    python -m e2e_utils.voc --labels annotations --image_dir scenes --output labels.json

Copy: this file, coco.py, files.py, scenes.py, images.py and stretch.py.
"""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .coco import Category, Coco, Image, to_annotations, write_coco
from .files import find_files
from .scenes import read_size

SIDES = ("xmin", "ymin", "xmax", "ymax")


class _WithoutDoctype(ET.TreeBuilder):
    """Entities are declared in a DOCTYPE: without one they cannot fill the memory."""

    def doctype(self, name: str, *_: str | None) -> None:
        raise ValueError(f"it has a DOCTYPE, {name!r}, which no annotation needs")


def voc_to_coco(
    labels: str | Path | Sequence[str | Path],
    image_dir: str | Path,
    output: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    first_pixel: int = 1,
) -> Coco:
    """Pascal VOC's annotations, a file a picture, as one COCO file.

    VOC counts pixels from 1, and xmax and ymax are the last pixels of an object: a box
    from 11 to 20 is ten pixels wide. In COCO, as in all of this package, coordinates
    are edges and the picture begins at 0, so that box goes from 10 to 20. Many tools
    write edges into VOC's fields; for their files `first_pixel` is 0.

    Args:
        labels: XML files, folders of them, or patterns; see `files.find_files`.
        image_dir: folder in which the pictures have the names that the files give.
        output: the COCO file; it appears whole or not at all.
        class_names: in the order of their category ids, from 1. Left out, the names
            in the files in alphabetical order. Files that belong together, such as
            training and validation, need the same.
        first_pixel: what the upper left pixel is called: 1 as in VOC, or 0.

    Returns:
        What was written. Objects marked "difficult" are crowds (iscrowd 1): VOC's
        score ignores them, and so does COCO's ignore crowds.

    Raises:
        FileNotFoundError: no XML file, or a picture that one names is missing.
        ValueError: a file is no annotation or has a DOCTYPE, its size is not that of
            the picture, a box is inverted or reaches beyond the picture, a class is
            not in `class_names`, or two files describe one picture. The message names
            the file and the value.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import cv2
        >>> box = "<xmin>1</xmin><ymin>1</ymin><xmax>10</xmax><ymax>20</ymax>"
        >>> tree = f"<object><name>Tree</name><bndbox>{box}</bndbox></object>"
        >>> size = "<size><width>80</width><height>60</height></size>"
        >>> text = f"<annotation><filename>a.png</filename>{size}{tree}</annotation>"
        >>> black = np.zeros((60, 80, 3), np.uint8)
        >>> with TemporaryDirectory() as folder:
        ...     written = cv2.imwrite(f"{folder}/a.png", black)
        ...     characters = Path(folder, "a.xml").write_text(text)
        ...     coco = voc_to_coco(folder, folder, f"{folder}/labels.json")
        >>> coco.annotations[0].bbox
        Box(x=0.0, y=0.0, width=10.0, height=20.0)
    """
    if first_pixel not in (0, 1):
        raise ValueError(f"first_pixel is {first_pixel!r}; give 1 (VOC) or 0")
    given = [labels] if isinstance(labels, (str, Path)) else labels
    images: list[Image] = []
    classes, difficult, boxes, owners = [], [], [], []
    seen: dict[str, Path] = {}
    for number, path in enumerate(find_files(given, (".xml",)).values(), 1):
        try:
            image, objects = _read(path, Path(image_dir), number, first_pixel)
        except (ET.ParseError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        name = image.file_name
        if name in seen:
            raise ValueError(f"{path}: describes {name!r}, as {seen[name]} does")
        seen[name] = path
        images.append(image)
        for kind, hard, box in objects:
            if class_names is not None and kind not in class_names:
                listed = ", ".join(class_names)
                raise ValueError(f"{path}: class {kind!r} is not among {listed}")
            classes.append(kind)
            difficult.append(hard)
            boxes.append(box)
            owners.append(number)
    names = sorted(set(classes)) if class_names is None else list(class_names)
    xywh = np.array(boxes, np.float64).reshape(-1, 4)
    xywh[:, 2:] -= xywh[:, :2]
    of_class = np.array([1 + names.index(kind) for kind in classes], np.int64)
    crowd = np.array(difficult, np.int64)
    rows = to_annotations(xywh, np.array(owners, np.int64), of_class, crowd=crowd)
    coco = Coco(images, rows, [Category(i, name) for i, name in enumerate(names, 1)])
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_coco(output, coco)
    return coco


def _read(
    path: Path, image_dir: Path, number: int, first_pixel: int
) -> tuple[Image, list[tuple[str, int, list[float]]]]:
    """The picture of a file, and of each object its class, "difficult" and corners."""
    root = ET.parse(path, ET.XMLParser(target=_WithoutDoctype())).getroot()
    if root.tag != "annotation":
        raise ValueError(f"it is <{root.tag}>, not Pascal VOC's <annotation>")
    name = _text(root, "filename")
    picture = image_dir / name
    if not picture.is_file():
        raise FileNotFoundError(f"{path}: its picture {picture} is missing")
    told = _number(root, "size/width"), _number(root, "size/height")
    height, width = read_size(picture)
    if told != (width, height):
        raise ValueError(
            f"size says {told[0]:g} x {told[1]:g} px, and {picture} has {width} x "
            f"{height}: boxes would be misplaced"
        )
    objects = []
    for element in root.findall("object"):
        corners = [_number(element, f"bndbox/{side}") for side in SIDES]
        box = [corners[0] - first_pixel, corners[1] - first_pixel, *corners[2:]]
        inside = 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
        if not inside:
            zero = first_pixel and -1 in box[:2]
            raise ValueError(
                f"the box {', '.join(f'{v:g}' for v in corners)} ({', '.join(SIDES)}) "
                f"is inverted or reaches beyond {width} x {height} px; mend or remove "
                f"it{', or take first_pixel=0: 0 is no pixel of VOC' if zero else ''}"
            )
        hard = int(_number(element, "difficult", 0.0) != 0)
        objects.append((_text(element, "name"), hard, box))
    return Image(height, width, number, name), objects


def _text(element: ET.Element, field: str) -> str:
    value = (element.findtext(field) or "").strip()
    if not value:
        raise ValueError(f"<{element.tag}> has no {field}")
    return value


def _number(element: ET.Element, field: str, default: float | None = None) -> float:
    if default is not None and element.find(field) is None:
        return default
    text = _text(element, field)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{field} is {text!r}, not a number")
    return value


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        coco = auto_cli(voc_to_coco, as_positional=False)
        print(f"{len(coco.annotations)} objects in {len(coco.images)} pictures")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
