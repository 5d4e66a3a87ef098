"""xView's label file as arrays, and its scenes split into train and val.

Copy: this file.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
import numpy as np


class _Properties(msgspec.Struct, gc=False):
    bounds_imcoords: str | list | None
    type_id: int
    image_id: str


class _WithCatId(_Properties, gc=False):  # read for a grouped split only: 40 MB more
    cat_id: str | int | None = None


P = TypeVar("P", bound=_Properties)


class _Feature(msgspec.Struct, Generic[P], gc=False):
    properties: P


class _Collection(msgspec.Struct, Generic[P]):
    type: Literal["FeatureCollection"]
    features: list[_Feature[P]]


@dataclass
class Labels:
    """The features of a label file, column by column."""

    scene: np.ndarray  # int64 (N,): index of the scene in its folder, -1: not there
    category: np.ndarray  # int64 (N,), -1: unknown class
    empty: np.ndarray  # bool (N,): without bounds
    malformed: np.ndarray  # bool (N,): not four whole numbers
    xyxy: np.ndarray  # int64 (N, 4) in pixels of the scene, corners in order
    cat_ids: list  # N: str, int or None, the pass of the satellite; None if not read


def read_labels(
    path: Path,
    files: list[Path],
    classes: dict[int, tuple[int, str]],
    cat_ids: bool = False,
) -> Labels:
    """Read xView's label file, which is held in memory as a whole.

    Args:
        path: xView_train.geojson.
        files: the scenes; a label's `image_id` is the name of one, or this name with
            another ending of a TIFF.
        classes: {type_id: (category_id, name)}, see `classes.read_classes`.
        cat_ids: read `cat_id` too, which a grouped split asks for.

    Raises:
        ValueError: it is no FeatureCollection, or a feature lacks a property or has one
            of another type; the message names file, feature and field.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> car = {"bounds_imcoords": "1,2,14,15", "type_id": 18, "image_id": "5.tif"}
        >>> content = {"type": "FeatureCollection", "features": [{"properties": car}]}
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "labels.geojson")
        ...     _ = path.write_text(json.dumps(content))
        ...     labels = read_labels(path, [Path("5.tif")], {18: (0, "Small Car")})
        >>> labels.xyxy.tolist(), labels.category.tolist()
        ([[1, 2, 14, 15]], [0])
    """
    rows = _read_properties(path, _WithCatId if cat_ids else _Properties)
    endings = (".tif", ".tiff", ".TIF", ".TIFF")  # of one scene, whoever renamed it
    number = {f"{f.stem}{end}": i for i, f in enumerate(files) for end in endings}
    category = {type_id: new for type_id, (new, _) in classes.items()}
    bounds = [_parse_bounds(row.bounds_imcoords) for row in rows]
    numbers = chain.from_iterable(four or (0,) * 4 for four in bounds)
    ends = np.fromiter(numbers, np.int64, 4 * len(rows)).reshape(-1, 2, 2)
    first, second = ends[:, 0], ends[:, 1]
    return Labels(
        scene=np.array([number.get(row.image_id, -1) for row in rows], np.int64),
        category=np.array([category.get(row.type_id, -1) for row in rows], np.int64),
        empty=np.array([not row.bounds_imcoords for row in rows], bool),
        malformed=np.array([four is None for four in bounds], bool),
        xyxy=np.hstack([np.minimum(first, second), np.maximum(first, second)]),
        cat_ids=[getattr(row, "cat_id", None) for row in rows],
    )


def _read_properties(path: str | Path, kind: type[P]) -> list[P]:
    collection: Any = _Collection[kind]  # type: ignore[valid-type]
    try:
        with open(path, "rb") as file:
            text = mmap(file.fileno(), 0, access=ACCESS_READ)
        with text:
            whole = msgspec.json.decode(text, type=collection)
    except (ValueError, msgspec.DecodeError) as error:
        raise ValueError(f"{path}: not xView's label file: {error}") from error
    return [feature.properties for feature in whole.features]


def satellite_passes(path: str | Path) -> dict[str, str]:
    """The pass of the satellite that each scene was cut from: {image_id: cat_id}.

    Scenes of one pass show the same ground in the same light. A scene's pass is that
    of most of its labels, as in a grouped split.

    Args:
        path: xView_train.geojson.

    Raises:
        ValueError: see `read_labels`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> car = {"bounds_imcoords": "1,2,14,15", "type_id": 18, "image_id": "5.tif"}
        >>> rows = [{"properties": {**car, "cat_id": "1040010006"}}]
        >>> content = {"type": "FeatureCollection", "features": rows}
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "labels.geojson")
        ...     _ = path.write_text(json.dumps(content))
        ...     satellite_passes(path)
        {'5.tif': '1040010006'}
    """
    counts: dict[str, Counter[str]] = {}
    for row in _read_properties(path, _WithCatId):
        if row.bounds_imcoords:
            counts.setdefault(row.image_id, Counter())[str(row.cat_id)] += 1
    return {scene: of.most_common(1)[0][0] for scene, of in counts.items()}


def shared_passes(
    path: str | Path, train_json: str | Path, val_json: str | Path
) -> list[str]:
    """The validation scenes that were cut from a pass which training scenes are of too.

    Args:
        path: xView_train.geojson.
        train_json, val_json: COCO files of its scenes, be they TIFFs or PNGs.

    Raises:
        ValueError: see `read_labels`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> car = {"bounds_imcoords": "1,2,14,15", "type_id": 18, "cat_id": "A"}
        >>> rows = [{"properties": {**car, "image_id": f"{i}.tif"}} for i in (1, 2)]
        >>> with TemporaryDirectory() as folder:
        ...     labels, train, val = (Path(folder, f"{i}.json") for i in range(3))
        ...     text = json.dumps({"type": "FeatureCollection", "features": rows})
        ...     _ = labels.write_text(text)
        ...     _ = train.write_text('{"images": [{"file_name": "1.tif"}]}')
        ...     _ = val.write_text('{"images": [{"file_name": "2.tif"}]}')
        ...     shared_passes(labels, train, val)
        ['2.tif']
    """
    passes = {Path(name).stem: of for name, of in satellite_passes(path).items()}
    train, val = (
        [image["file_name"] for image in json.loads(Path(file).read_text())["images"]]
        for file in (train_json, val_json)
    )
    trained = {passes.get(Path(name).stem) for name in train} - {None}
    return [name for name in val if passes.get(Path(name).stem) in trained]


# far outside of any scene, and small enough for the area to fit 64 bits
_Pixel = Annotated[int, msgspec.Meta(ge=-(2**30), le=2**30)]
_BOUNDS = msgspec.json.Decoder(tuple[_Pixel, _Pixel, _Pixel, _Pixel])


def _parse_bounds(text: str | list | None) -> tuple[int, int, int, int] | None:
    """The numbers of "x1,y1,x2,y2"; None if it is anything else."""
    try:
        return _BOUNDS.decode(f"[{text}]")
    except msgspec.DecodeError:
        return None


def split_scenes(
    labels: Labels,
    labelled: list[int],
    kept: np.ndarray,
    how: Literal["original", "grouped"],
    rate: float,
    seed: int,
) -> dict[str, list[int]]:
    """Choose the scenes of train and of val.

    Args:
        labels: of `read_labels`.
        labelled: indices of the scenes to split, ascending.
        kept: int64 (K,), indices of the labels that count for the balance of classes.
        how: "original" or "grouped", see `convert.geojson_to_coco`.
        rate: fraction for train, 0..1.
        seed: of the shuffle, or of what decides ties.

    Returns:
        Indices of the scenes of "train" and of "val", in the order of the COCO files.

    Raises:
        ValueError: "grouped" where all scenes have one `cat_id`.

    Example:
        >>> none = np.zeros(0, np.int64)
        >>> labels = Labels(none, none, none, none, none, [])
        >>> split_scenes(labels, [0, 1, 2, 3], none, "original", rate=0.75, seed=0)
        {'train': [2, 0, 1], 'val': [3]}
    """
    if how == "original":
        order = labelled.copy()
        random.Random(seed).shuffle(order)
        cut = int(len(order) * rate)
        return {"train": order[:cut], "val": order[cut:]}
    cat_ids: dict[int, Counter[str]] = {i: Counter() for i in labelled}
    columns = labels.scene.tolist(), labels.cat_ids, labels.empty.tolist()
    for i, cat_id, empty in zip(*columns, strict=True):
        if i >= 0 and not empty:
            cat_ids[i][str(cat_id)] += 1
    groups = [counter.most_common(1)[0][0] for counter in cat_ids.values()]
    counts = np.zeros((len(labelled), labels.category.max(initial=0) + 1), np.int64)
    position = np.searchsorted(labelled, labels.scene[kept])
    np.add.at(counts, (position, labels.category[kept]), 1)
    train = _choose_groups(groups, counts, rate, seed)
    scenes = np.array(labelled)
    return {"train": scenes[train].tolist(), "val": scenes[~train].tolist()}


def _choose_groups(
    groups: list[str], class_counts: np.ndarray, rate: float, seed: int
) -> np.ndarray:
    """Choose whole groups for train so that each class splits near `rate`.

    Starts from nothing and flips, one at a time, the group whose flip brings the
    fractions of all classes and of the scenes nearest to the rate.

    Args:
        groups: for each scene, the group it belongs to.
        class_counts: int64 (scenes, classes), boxes.

    Returns:
        bool (scenes,), True for train.
    """
    names, member = np.unique(np.array(groups, str), return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"the scenes have the cat_ids {names.tolist()}; a grouped split needs two"
        )
    totals = np.zeros((len(names), class_counts.shape[1] + 1))
    np.add.at(totals, member, np.column_stack([class_counts, np.ones(len(member))]))
    totals = totals[:, totals.sum(axis=0) > 0]
    share = totals / totals.sum(axis=0)
    order = np.random.default_rng(seed).permutation(len(names))  # decides ties
    share, chosen = share[order], np.zeros(len(names), bool)
    have = np.zeros(share.shape[1])
    while True:
        flipped = have + np.where(chosen, -1, 1)[:, None] * share
        cost = ((flipped - rate) ** 2).sum(axis=1)
        best = int(cost.argmin())
        if cost[best] >= ((have - rate) ** 2).sum() - 1e-12:
            break
        chosen[best], have = not chosen[best], flipped[best]
    train = np.zeros(len(names), bool)
    train[order] = chosen
    return train[member]


def first_feature(path: str | Path) -> dict:
    """The first feature of a label file, without reading the rest of its 370 MB.

    Raises:
        ValueError: it does not begin as a FeatureCollection; names the file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "labels.geojson")
        ...     _ = path.write_text('{"features": [{"properties": {"type_id": 18}},')
        ...     first_feature(path)
        {'properties': {'type_id': 18}}
    """
    with open(path, encoding="utf-8") as file:
        head = file.read(1 << 16)
    try:
        start = head.index("{", head.index('"features"'))
        return json.JSONDecoder().raw_decode(head, start)[0]
    except ValueError as error:
        raise ValueError(f"{path}: not xView's label file: {error}") from error
