"""The labels that detections are held against, cut to what their images show.

Copy: this file, coco.py and files.py.

Every score, every kind of mistake and every picture of them takes its labels from here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .coco import read_coco


def read_ground_truth(
    ground_truth: str | Path | dict,
    detections: list[dict],
    image_ids: Iterable[int | str] | None = None,
    clip: bool = True,
) -> tuple[dict, list[dict]]:
    """A COCO file and detections on its images, ready for arrays and for COCO's code.

    Args:
        ground_truth: a COCO file or its content, which stays as it is.
        detections: COCO results that are to be scored on it.
        image_ids: only these images; all by default.
        clip: False leaves boxes as they are; see `clip_to_images`.

    Returns:
        (content of the file without annotations that are not `listed`, its boxes cut
        to their images; detections). Where ids of images are strings, both have the
        number of the image instead, from 1 up.

    Raises:
        ValueError: a detection's image or category is not in the ground truth.

    Example:
        >>> car = {"image_id": "a", "category_id": 3, "bbox": [10, 20, 13, 13]}
        >>> lists = {"images": [{"id": "a"}], "categories": [{"id": 3}]}
        >>> truth = {**lists, "annotations": [car]}
        >>> coco, found = read_ground_truth(truth, [{**car, "score": 0.9}])
        >>> coco["images"], found[0]["image_id"]
        ([{'id': 1}], 1)
    """
    coco = _without_unlisted(content(ground_truth))
    number = {image["id"]: image["id"] for image in coco["images"]}
    foreign = sorted({d["image_id"] for d in detections} - number.keys(), key=str)
    if foreign:
        raise ValueError(
            f"detections for images not in the ground truth: {foreign[:5]}"
        )
    categories = {category["id"] for category in coco["categories"]}
    if foreign := sorted({d["category_id"] for d in detections} - categories):
        raise ValueError(
            f"detections of categories not in the ground truth: {foreign[:5]}"
        )
    strings = any(isinstance(id_, str) for id_ in number)
    if strings:
        number = {id_: index for index, id_ in enumerate(number, start=1)}
    if image_ids is not None:
        wanted = set(image_ids)
        number = {id_: n for id_, n in number.items() if id_ in wanted}

    def numbered(rows: list[dict], key: str) -> list[dict]:
        return [{**row, key: number[row[key]]} for row in rows if row[key] in number]

    if strings or image_ids is not None:
        images = numbered(coco["images"], "id")
        annotations = numbered(coco["annotations"], "image_id")
        coco = {**coco, "images": images, "annotations": annotations}
        detections = numbered(detections, "image_id")
    return (clip_to_images(coco)[0] if clip else coco), detections


def content(ground_truth: str | Path | dict) -> dict:
    """The content of a COCO file, be it given or read.

    Example:
        >>> content({"images": [], "annotations": [], "categories": []})["images"]
        []
    """
    if isinstance(ground_truth, dict):
        return ground_truth
    return read_coco(ground_truth, strict=False).to_dict()


def listed(coco: dict) -> np.ndarray:
    """Which annotations name an image and a category of the file, int64 (K,).

    Tiling leaves out the others, and so does every score.

    Example:
        >>> rows = [{"image_id": i, "category_id": 3} for i in (1, 2)]
        >>> lists = {"images": [{"id": 1}], "categories": [{"id": 3}]}
        >>> listed({**lists, "annotations": rows}).tolist()
        [0]
    """
    images, categories = ({r["id"] for r in coco[k]} for k in ("images", "categories"))
    rows = coco["annotations"]
    known = (r["image_id"] in images and r["category_id"] in categories for r in rows)
    return np.flatnonzero(np.fromiter(known, bool, len(rows)))


def _without_unlisted(coco: dict) -> dict:
    rows, kept = coco["annotations"], listed(coco)
    if len(kept) == len(rows):
        return coco
    warnings.warn(
        f"{len(rows) - len(kept)} of {len(rows)} annotations name an image or a "
        "category that the file does not list, and are not scored",
        stacklevel=3,
    )
    return {**coco, "annotations": [rows[i] for i in kept]}


def clip_to_images(coco: dict) -> tuple[dict, np.ndarray]:
    """Labels cut to what can be seen of them.

    A label may reach beyond the edge of its scene. A detector can find the visible part
    alone, and where that is less than half of the label no box in the image has an IoU
    of 0.5 with it. Labels of tiles were cut with their tiles, so nothing changes there.

    Args:
        coco: content of a COCO file; it stays as it is. An image without "width" or
            "height" has no right or lower edge here.

    Returns:
        The content with annotations cut to 0..width and 0..height of their image, their
        "area" that of the box that is left; and int64 (K,), which annotations of `coco`
        these are. Those with nothing left are dropped, and a warning counts them.

    Example:
        >>> scene = {"id": 1, "width": 100, "height": 100}
        >>> car = {"image_id": 1, "category_id": 3, "bbox": [95, 20, 13, 13]}
        >>> clipped, kept = clip_to_images({"images": [scene], "annotations": [car]})
        >>> clipped["annotations"][0]["bbox"], kept.tolist()
        ([95.0, 20.0, 5.0, 13.0], [0])
    """
    rows = coco["annotations"]
    endless = (math.inf, math.inf)
    size = {
        image["id"]: (image.get("width", math.inf), image.get("height", math.inf))
        for image in coco["images"]
    }
    ends = [size.get(row["image_id"], endless) for row in rows]
    boxes = columns(rows)[2]
    low = boxes[:, :2].clip(min=0)
    high = np.minimum(boxes[:, 2:], np.array(ends, np.float64).reshape(-1, 2))
    cut = np.abs(np.hstack([low, high]) - boxes).max(axis=1, initial=0)
    over = cut > 1e-6  # less is the rounding of x + width
    gone = over & ((high - low).min(axis=1, initial=math.inf) <= 0)
    if gone.any():
        row = rows[int(gone.argmax())]
        width, height = size[row["image_id"]]
        warnings.warn(
            f"{gone.sum()} of {len(rows)} labelled boxes lie outside their image and "
            f"are not scored; the first is bbox {row['bbox']} of image "
            f"{row['image_id']}, which has {width} x {height} pixels",
            stacklevel=3,
        )
    kept = np.flatnonzero(~gone)
    if not over.any():
        return coco, kept
    cut_rows = [rows[i] for i in kept]
    seen = np.hstack([low, high - low])[kept]
    for place in np.flatnonzero(over[kept]).tolist():
        x, y, w, h = seen[place].tolist()
        cut_rows[place] = {**cut_rows[place], "bbox": [x, y, w, h], "area": w * h}
    return {**coco, "annotations": cut_rows}, kept


def image_truth(ground_truth: str | Path | dict, image_id: int | str) -> dict:
    """The labels of one image as a detector would give them, cut to the image.

    Crowds (iscrowd 1) are left out.

    Returns:
        "boxes_xyxy" float32 (N, 4) in pixels of the image, "labels" int64 (N,) as
        `CocoTiles` numbers them, see `to_labels`.

    Raises:
        ValueError: no such image.

    Example:
        >>> car = {"image_id": 1, "category_id": 18, "bbox": [10, 20, 13, 13]}
        >>> classes = [{"id": 11}, {"id": 18}]
        >>> truth = {"images": [{"id": 1}], "annotations": [car], "categories": classes}
        >>> {key: value.tolist() for key, value in image_truth(truth, 1).items()}
        {'boxes_xyxy': [[10.0, 20.0, 23.0, 33.0]], 'labels': [2]}
    """
    coco = content(ground_truth)
    if image_id not in {image["id"] for image in coco["images"]}:
        raise ValueError(f"no image {image_id!r} in the ground truth")
    coco, _ = read_ground_truth(coco, [], [image_id])
    rows = [row for row in coco["annotations"] if not row.get("iscrowd")]
    _, category, boxes = columns(rows)
    labels = to_labels(coco, category)
    return {"boxes_xyxy": boxes.astype(np.float32), "labels": labels}


def fullest_image(ground_truth: str | Path | dict, start: str = "") -> dict:
    """The image with the most different classes, and of those the one with most labels.

    Args:
        ground_truth: a COCO file or its content.
        start: choose among the images whose file names start so, if there are any.

    Returns:
        Its row of "images".

    Raises:
        ValueError: there are no images.

    Example:
        >>> labels = (1, 3), (2, 3), (2, 7)
        >>> rows = [{"image_id": i, "category_id": c} for i, c in labels]
        >>> images = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)]
        >>> fullest_image({"images": images, "annotations": rows})["file_name"]
        '2.jpg'

    Example:
        >>> images = [{"id": 1, "file_name": "a.tif"}, {"id": 2, "file_name": "b.tif"}]
        >>> labels = [{"image_id": 2, "category_id": 5}]
        >>> fullest_image({"images": images, "annotations": labels})["file_name"]
        'b.tif'
    """
    coco = content(ground_truth)
    rows = [r for r in coco["images"] if str(r["file_name"]).startswith(start)]
    if not (rows := rows or coco["images"]):
        raise ValueError("the ground truth has no images")
    found: dict = {row["id"]: [] for row in rows}
    for one in coco["annotations"]:
        if one["image_id"] in found and not one.get("iscrowd"):
            found[one["image_id"]].append(one["category_id"])
    return max(rows, key=lambda r: (len({*found[r["id"]]}), len(found[r["id"]])))


def to_labels(coco: dict, category: np.ndarray) -> np.ndarray:
    """Labels int64 (N,) of category ids (N,): 1 for the lowest of the file, and so on.

    Raises:
        ValueError: an id is not among the file's categories.

    Example:
        >>> classes = {"categories": [{"id": 11}, {"id": 18}]}
        >>> to_labels(classes, np.array([18, 11])).tolist()
        [2, 1]
    """
    ids = np.array(sorted(row["id"] for row in coco["categories"]), np.int64)
    foreign = np.setdiff1d(category, ids)
    if len(foreign):
        raise ValueError(f"categories not in the ground truth: {foreign[:5].tolist()}")
    return np.searchsorted(ids, category) + 1


def columns(rows: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image id int64 (N,), category id int64 (N,), boxes_xyxy float64 (N, 4).

    Example:
        >>> car = {"image_id": 1, "category_id": 3, "bbox": [10, 20, 13, 13]}
        >>> columns([car])[2].tolist()
        [[10.0, 20.0, 23.0, 33.0]]
    """
    image = np.array([row["image_id"] for row in rows], np.int64)
    category = np.array([row["category_id"] for row in rows], np.int64)
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return image, category, boxes
