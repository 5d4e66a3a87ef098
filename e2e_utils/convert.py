"""Copy: this file, scenes.py, files.py, classes.py and xview_classes.json.

xView as it is downloaded into what detection tools read: TIFF scenes to RGB PNGs, and
the geojson of labels to a COCO train and val file.

    python -m e2e_utils.convert tif_to_rgb --input_dir xview/train_images \
        --out_dir xview/train_images_rgb
    python -m e2e_utils.convert geojson_to_coco --train_images_dir xview/train_images \
        --train_images_dir_rgb xview/train_images_rgb \
        --train_geojson_path xview/xView_train.geojson --output_dir coco \
        --train_split_rate 0.75 --category_id_remapping category_id_mapping.json \
        --xview_class_labels xview_class_labels.txt
"""

import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import cv2
import msgspec
import numpy as np
from tqdm.auto import tqdm

from .classes import read_classes
from .files import write_file
from .scenes import (
    PNG_END,
    FailedScenes,
    read_bands,
    read_rgb,
)

ANNOTATION = (  # SAHI's fields in its order
    '{"iscrowd":0,"image_id":%d,"bbox":[%d.0,%d.0,%d.0,%d.0],"segmentation":[],'
    '"category_id":%d,"id":%d,"area":%d}'
)


@dataclass
class PngReport:
    """What `tif_to_rgb` did; converted + skipped + failed are all scenes."""

    converted: int = 0
    skipped: int = 0  # a PNG of the right size, whole and not older, was there
    failed: dict[str, str] = field(default_factory=dict)  # scene: what went wrong

    def __str__(self) -> str:
        counts = f"converted {self.converted}, already there {self.skipped}"
        return f"{counts}, failed {len(self.failed)}"


def _scene_files(folder: Path, suffixes: tuple[str, ...] = (".tif", ".tiff")) -> list:
    """The scenes of a folder; `._N.tif` files are macOS metadata, not scenes."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder of scenes")
    files = [f for f in folder.iterdir() if f.suffix.lower() in suffixes]
    return sorted((f for f in files if f.name[0] != "."), key=_by_number)


def _by_number(path: Path) -> tuple[int, str]:
    return (int(path.stem) if path.stem.isdecimal() else sys.maxsize, path.name)


def _scaled(bands: np.ndarray, percentile: float) -> np.ndarray:
    """Stretch each band so that its percentiles p and 100 - p become 0 and 255."""
    cuts = np.percentile(bands, (percentile, 100 - percentile), axis=(0, 1))
    low, high = cuts[0], np.maximum(cuts[1], cuts[0] + 1)
    scaled = (bands - low.astype(np.float32)) * (255 / (high - low)).astype(np.float32)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def tif_to_rgb(
    input_dir: str | Path,
    out_dir: str | Path,
    *,
    percentile: float | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> PngReport:
    """Write every TIFF scene of a folder as an RGB PNG of the same name.

    Tiling reads TIFFs itself, so this step is for tools that cannot. A PNG that is
    there, whole, of its scene's size and not older than the scene is left alone.

    Args:
        input_dir: folder of .tif files, 3 or 4 bands; a fourth band is left out.
        out_dir: made if it is not there.
        percentile: scale scenes that are not 8 bit, each band from its percentiles p
            and 100 - p to 0..255; 0 <= p < 50, 2 is usual. Left out, such scenes fail,
            because cutting 16 bits to 8 without a choice gives a dark or a white scene.
        overwrite: write all PNGs again, for example after a change of percentile.
        workers: threads, each holding one scene; the number of cores if left out.
        progress: show a progress bar.

    Returns:
        PngReport; print it.

    Raises:
        FailedScenes: scenes were unreadable, not 8 bit, or had other bands; all others
            are written. Each line names the file and what it holds.
        ValueError, OSError: a bad percentile, no such folder, nothing to convert, or
            the disk is full.
    """
    if percentile is not None and not 0 <= percentile < 50:
        raise ValueError(f"percentile is {percentile}; give 0 <= percentile < 50")
    files, out = _scene_files(Path(input_dir)), Path(out_dir)
    if not files:
        raise FileNotFoundError(f"{input_dir} holds no .tif scene")
    out.mkdir(parents=True, exist_ok=True)
    report = PngReport()

    def intact(png: Path, tif: Path) -> bool:
        if overwrite or not png.exists() or png.stat().st_mtime < tif.stat().st_mtime:
            return False
        with open(png, "rb") as file:
            head = file.read(24)
            file.seek(-min(len(head), len(PNG_END)), os.SEEK_END)
            whole = file.read() == PNG_END
        height, width = read_bands(tif, header_only=True)
        return whole and head[16:] == width.to_bytes(4, "big") + height.to_bytes(
            4, "big"
        )

    def convert(tif: Path) -> str:
        png = out / f"{tif.stem}.png"
        try:
            if intact(png, tif):
                return "skipped"
            bands = read_bands(tif) if percentile is not None else read_rgb(tif)
            if bands.ndim != 3 or bands.shape[2] not in (3, 4):
                raise ValueError(f"{tif}: shape {bands.shape}; 3 or 4 bands are needed")
            if percentile is not None and bands.dtype != np.uint8:
                bands = _scaled(bands[..., :3], percentile)
        except ValueError as error:
            report.failed[tif.name] = str(error)
            return "failed"
        bgr = cv2.cvtColor(bands[..., :3], cv2.COLOR_RGB2BGR)
        write_file(png, [cv2.imencode(".png", bgr)[1].data])
        return "converted"

    bar = tqdm(total=len(files), desc="TIFF to PNG", disable=not progress)
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        for done in as_completed([pool.submit(convert, tif) for tif in files]):
            report.converted += done.result() == "converted"
            report.skipped += done.result() == "skipped"
            bar.update()
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    if report.failed:
        raise FailedScenes(report)
    return report


class _Properties(msgspec.Struct, gc=False):
    bounds_imcoords: str | list | None
    type_id: int
    image_id: str
    cat_id: str | int | None = None


class _Feature(msgspec.Struct, gc=False):
    properties: _Properties


class _Collection(msgspec.Struct):
    type: Literal["FeatureCollection"]
    features: list[_Feature]


@dataclass
class ConversionReport:
    """What `geojson_to_coco` did; features == kept + sum(dropped)."""

    features: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # features, by reason
    images: dict[str, int] = field(default_factory=dict)  # by split
    annotations: dict[str, int] = field(default_factory=dict)  # by split
    unlabelled: int = 0  # scenes in the folder that no feature names: in no split

    def __str__(self) -> str:
        rows: dict[str, object] = {"features read": self.features, "  kept": self.kept}
        rows |= {f"  dropped: {reason}": n for reason, n in self.dropped.items()}
        for split, count in self.images.items():
            rows[split] = f"{count} scenes, {self.annotations[split]} boxes"
        rows["scenes without labels"] = f"{self.unlabelled} (in no split)"
        return "\n".join(f"{name:<34}{value}" for name, value in rows.items())


def _read_labels(path: Path, step: int = 1 << 20) -> Iterator[list[_Properties]]:
    """The properties of the features, a megabyte of the file at a time.

    The file is cut between features, where `},{"type":"Feature"` stands: that cannot be
    part of a JSON string, whose quotes are escaped. So memory stays at one piece.
    """
    cut = re.compile(rb'\}(\s*,\s*)\{\s*"type"\s*:\s*"Feature"')
    head, held, done = b"", b"", 0
    try:
        with open(path, "rb") as file:
            # where no cut is found the pieces double, so that the time stays linear
            while piece := file.read(max(step, len(held))):
                held += piece
                if not head:
                    start = re.search(rb'"features"\s*:\s*\[', held)
                    if not start:
                        continue
                    head, held = held[: start.end()], held[start.end() :]
                ends = list(cut.finditer(held, max(0, len(held) - 65_536)))
                if ends:
                    last = ends[-1]
                    text = b"[" + held[: last.start(1)] + b"]"
                    features = msgspec.json.decode(text, type=list[_Feature])
                    held = held[last.end(1) :]
                    yield [feature.properties for feature in features]
                    done += len(features)
        # with the head, what is left is a whole collection: its type is checked too
        whole = msgspec.json.decode(head + held, type=_Collection)
        yield [feature.properties for feature in whole.features]
    except msgspec.DecodeError as error:
        found = re.sub(
            r"\$(?:\.features)?\[(\d+)\]",
            lambda match: f"$.features[{done + int(match[1])}]",
            str(error),
        )
        raise ValueError(f"{path}: not xView's label file: {found}") from error


def _parse_bounds(bounds: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Parse "x1,y1,x2,y2" strings to int64 (N, 4), and tell which are well formed."""
    rows = np.zeros((len(bounds), 4), np.int64)
    good = np.array([text.count(",") == 3 for text in bounds], bool)
    likely = bounds if good.all() else list(compress(bounds, good))
    try:
        numbers = np.fromstring(",".join(likely), sep=",", dtype=np.int64)
    except ValueError:
        numbers = np.empty(0, np.int64)
    if len(numbers) == 4 * len(likely):
        rows[good] = numbers.reshape(-1, 4)
        return rows, good
    # something in there is no int: find it one by one
    four_ints = re.compile(r"\s*-?\d{1,18}\s*(,\s*-?\d{1,18}\s*){3}")
    for i, text in enumerate(bounds):
        good[i] = bool(four_ints.fullmatch(text))
        if good[i]:
            rows[i] = [int(number) for number in text.split(",")]
    return rows, good


def _grouped_split(
    groups: list[str], class_counts: np.ndarray, rate: float, seed: int
) -> np.ndarray:
    """Choose whole groups for train so that each class splits near `rate`.

    Starts from nothing and flips, one at a time, the group whose flip brings the
    fractions of all classes and of the scenes nearest to the rate.

    Args:
        groups: for each scene, the place it was taken.
        class_counts: int64 (scenes, classes), boxes.

    Returns:
        bool (scenes,), True for train.
    """
    names, member = np.unique(np.array(groups, str), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"all scenes have the cat_id {groups[0]!r}: no groups")
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


def _coco_parts(
    images: list[dict[str, Any]], boxes: list[np.ndarray], categories: list[dict]
) -> Iterator[bytes]:
    """A COCO file, piece by piece; boxes are int64 rows x1, y1, x2, y2, category."""
    yield b'{"images":' + msgspec.json.encode(images) + b',"annotations":['
    first = 1
    for image, rows in zip(images, boxes, strict=True):
        if not len(rows):
            continue
        x1, y1, x2, y2, category = rows.T
        w, h, count = x2 - x1, y2 - y1, len(rows)
        number, image_id = np.arange(first, first + count), np.full(count, image["id"])
        table = np.stack([image_id, x1, y1, w, h, category, number, w * h], axis=1)
        # one format of the whole table is several times faster than a row at a time
        text = ",".join([ANNOTATION] * count) % tuple(table.ravel().tolist())
        yield ("," if first > 1 else "").encode() + text.encode()
        first += count
    yield b'],"categories":' + msgspec.json.encode(categories) + b"}"


def geojson_to_coco(
    train_images_dir: str | Path,
    train_geojson_path: str | Path,
    output_dir: str | Path,
    train_split_rate: float = 0.75,
    *,
    train_images_dir_rgb: str | Path | None = None,
    category_id_remapping: str | Path | None = None,
    xview_class_labels: str | Path | None = None,
    split: Literal["original", "grouped"] = "original",
    seed: int = 0,
) -> ConversionReport:
    """Turn xView's labels into `train.json` and `val.json` in COCO format.

    Every scene that is in the folder and that a label names enters one of the two, even
    if none of its labels is kept. Boxes are kept as they stand in the label file, parts
    that overhang the border included (only corners in the wrong order are swapped), so
    that tiling sees the true area. Category ids are 0..59 in ascending type_id, and all
    classes are listed in both files. Not kept, and counted by the first reason that
    holds: labels with empty or malformed bounds, of a missing scene, of an unknown
    class (75 and 82 in xView), with zero area, or wholly outside their scene.

    Args:
        train_images_dir: folder of the .tif scenes.
        train_geojson_path: xView_train.geojson.
        output_dir: made if it is not there.
        train_split_rate: fraction of the scenes for train, 0..1, rounded down.
        train_images_dir_rgb: folder of PNG copies; if given, the COCO files name those.
        category_id_remapping: see `read_classes`.
        xview_class_labels: see `read_classes`.
        split: "original" sorts scenes by number and shuffles them with Python's
            generator, which is the split of SAHI's xView script for seed 0. "grouped"
            keeps scenes of one `cat_id` (one pass of the satellite) together, so that
            train and val share no ground, and balances the classes.
        seed: of either split.

    Returns:
        ConversionReport, whose counts add up to the features read; print it.

    Raises:
        ValueError: the label file is no FeatureCollection or lacks a property; the
            message names file, feature and field. Or a bad argument, or a scene that
            is no image.
        OSError: a file or folder is missing or not writable.
    """
    if not 0 <= train_split_rate <= 1:
        raise ValueError(f"train_split_rate is {train_split_rate}; give 0 to 1")
    if split not in ("original", "grouped"):
        raise ValueError(f"split is {split!r}; give 'original' or 'grouped'")
    folder = Path(train_images_dir)
    files = _scene_files(folder)
    classes = read_classes(category_id_remapping, xview_class_labels)
    number = {file.name: i for i, file in enumerate(files)}
    lookup = {type_id: new for type_id, (new, _) in classes.items()}
    # how often each scene has which cat_id, for the grouped split
    places: list[Counter[str]] = [Counter() for _ in files]
    pieces = []
    for rows in _read_labels(Path(train_geojson_path)):
        bounds = [row.bounds_imcoords for row in rows]
        of_scene = [number.get(row.image_id, -1) for row in rows]
        if split == "grouped":
            for row, i, text in zip(rows, of_scene, bounds, strict=True):
                if i >= 0 and text:
                    places[i][str(row.cat_id)] += 1
        empty = np.array([not text for text in bounds], bool)
        classed = [lookup.get(row.type_id, -1) for row in rows]
        texts = [text if isinstance(text, str) else "" for text in bounds]
        pieces.append((of_scene, classed, empty, *_parse_bounds(texts)))
    scene, category, empty, xyxy, good = (
        np.concatenate([np.asarray(piece[i], kind) for piece in pieces])
        for i, kind in enumerate((np.int64, np.int64, bool, np.int64, bool))
    )
    report = ConversionReport(features=len(scene))
    named = np.flatnonzero(~empty & (scene >= 0))
    ends = xyxy.reshape(-1, 2, 2)
    xyxy = np.concatenate([ends.min(axis=1), ends.max(axis=1)], axis=1)

    labelled = np.flatnonzero(np.bincount(scene[named])).tolist()
    report.unlabelled = len(files) - len(labelled)
    paths = {i: _listed_scene(files[i], train_images_dir_rgb) for i in labelled}
    size_hw = np.zeros((len(files) + 1, 2), np.int64)  # the last row is "no scene"
    for i, path in paths.items():
        size_hw[i] = read_bands(path, header_only=True)
    height, width = size_hw[scene].T
    x1, y1, x2, y2 = xyxy.T
    left = np.ones(len(scene), bool)
    for reason, bad in (
        ("empty bounds", empty),
        ("scene missing", scene < 0),
        ("malformed bounds", ~good),
        ("unknown class", category < 0),
        ("zero area", (x1 == x2) | (y1 == y2)),
        ("outside the scene", (x1 >= width) | (y1 >= height) | (x2 <= 0) | (y2 <= 0)),
    ):
        report.dropped[reason] = int((left & bad).sum())
        left &= ~bad
    kept = np.flatnonzero(left)
    report.kept = len(kept)

    if split == "original":
        order = labelled.copy()
        random.Random(seed).shuffle(order)
        train = int(len(order) * train_split_rate)
        splits = {"train": order[:train], "val": order[train:]}
    else:
        groups = [places[i].most_common(1)[0][0] for i in labelled]
        counts = np.zeros((len(files), max(lookup.values()) + 1), np.int64)
        np.add.at(counts, (scene[kept], category[kept]), 1)
        chosen = _grouped_split(groups, counts[labelled], train_split_rate, seed)
        splits = {
            name: [i for i, c in zip(labelled, chosen, strict=True) if c == is_train]
            for name, is_train in (("train", True), ("val", False))
        }

    kept = kept[np.argsort(scene[kept], kind="stable")]
    boxes = np.column_stack([xyxy[kept], category[kept]])
    cuts = np.searchsorted(scene[kept], np.arange(len(files) + 1))
    named_once = {new: name for new, name in reversed(classes.values())}
    categories = [
        {"id": new, "name": named_once[new], "supercategory": named_once[new]}
        for new in dict.fromkeys(new for new, _ in classes.values())
    ]
    out = Path(output_dir)
    out.mkdir(parents=True, exist_ok=True)
    for name, members in splits.items():
        images = [
            {
                "height": int(size_hw[i, 0]),
                "width": int(size_hw[i, 1]),
                "id": image_id,
                "file_name": paths[i].name,
            }
            for image_id, i in enumerate(members, 1)
        ]
        in_scene = [boxes[cuts[i] : cuts[i + 1]] for i in members]
        report.images[name] = len(images)
        report.annotations[name] = sum(map(len, in_scene))
        parts = _coco_parts(images, in_scene, categories)
        write_file(out / f"{name}.json", parts)
    return report


def _listed_scene(tif: Path, rgb_dir: str | Path | None) -> Path:
    if rgb_dir is None:
        return tif
    png = Path(rgb_dir) / f"{tif.stem}.png"
    if not png.is_file():
        raise FileNotFoundError(f"{png} is missing; make it with tif_to_rgb")
    return png


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        print(auto_cli([tif_to_rgb, geojson_to_coco], as_positional=False))
    except (FailedScenes, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
