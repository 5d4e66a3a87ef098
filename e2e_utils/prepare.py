r"""Any COCO data set to tiles: split by scene, cut, described.

    python -m e2e_utils.prepare --image_dir scenes --coco labels.json \
        --output_dir tiles --slice_size 512 --overlap_ratio 0.25

Copy: this file, tiling.py, grid.py, coco.py, describe_tiles.py, tile_set.py,
tile_files.py, scenes.py, files.py, images.py and stretch.py.
"""

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from .coco import Coco, read_coco, write_coco
from .describe_tiles import start_split
from .scenes import STRIP_PIXELS, FailedScenes, open_scene
from .stretch import Stretch, as_stretch, is_alike, percentile_stretch
from .tiling import TilingReport, checked_size, slice_coco

_SAMPLE = 1 << 22  # pixels of all scenes that a stretch is measured on


def split_coco(
    coco_json: str | Path,
    output_dir: str | Path,
    train_split_rate: float = 0.75,
    seed: int = 0,
    val_coco: str | Path | None = None,
) -> tuple[Path, Path]:
    """Split a COCO file by scene: no scene has a part in both.

    Args:
        coco_json: COCO file of the scenes.
        output_dir: gets `scenes_train.json` and `scenes_val.json`.
        train_split_rate: share of the scenes for train, between 0 and 1; each split
            gets one at least.
        seed: of the draw.
        val_coco: COCO file of the validation scenes, if they are chosen already: then
            the two are checked and returned as they are, and nothing is written.

    Returns:
        The COCO file of the training scenes, and that of the validation scenes.

    Raises:
        ValueError: not a COCO file, one of the two that it would write, one scene
            alone, or the rate is out of range; of two files, a scene is in both, or a
            category in one alone.

    Example:
        >>> import json
        >>> from tempfile import TemporaryDirectory
        >>> scene = {"height": 600, "width": 600}
        >>> scenes = [{"id": i, "file_name": f"{i}.tif", **scene} for i in range(4)]
        >>> content = {"images": scenes, "annotations": [], "categories": []}
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "labels.json").write_text(json.dumps(content))
        ...     files = split_coco(f"{folder}/labels.json", folder)
        ...     [len(read_coco(file).images) for file in files]
        [3, 1]
    """
    if val_coco is not None:
        _check_pair(Path(coco_json), Path(val_coco))
        return Path(coco_json), Path(val_coco)
    if not 0 < train_split_rate < 1:
        raise ValueError(
            f"train_split_rate is {train_split_rate}; give a share between 0 and 1"
        )
    files = tuple(Path(output_dir, f"scenes_{name}.json") for name in ("train", "val"))
    if Path(coco_json).resolve() in [file.resolve() for file in files]:
        raise ValueError(
            f"{coco_json} would be replaced by a part of itself: choose another "
            "output_dir, or give val_coco as well"
        )
    coco = read_coco(coco_json, strict=False)
    count = len(coco.images)
    if count < 2:
        raise ValueError(
            f"{coco_json} lists {count} scene(s), and training and validation need one "
            "each: add scenes, or cut this one in two by cut_scenes"
        )
    names = sorted(image.file_name for image in coco.images)
    random.Random(seed).shuffle(names)
    training = set(names[: min(max(1, round(train_split_rate * count)), count - 1)])
    known = {image.id for image in coco.images}
    for file, trains in zip(files, (True, False), strict=True):
        images = [i for i in coco.images if (i.file_name in training) == trains]
        left_out = known - {image.id for image in images}
        if not trains:  # what names no scene stays in train, where tiling counts it
            left_out |= {row.image_id for row in coco.annotations} - known
        objects = [row for row in coco.annotations if row.image_id not in left_out]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_coco(file, Coco(images, objects, coco.categories))
    return files[0], files[1]


def _check_pair(train: Path, val: Path) -> None:
    """ValueError where a scene is in both COCO files, or a category in one alone."""
    first, second = (read_coco(path, strict=False) for path in (train, val))
    scenes = [{row.file_name for row in coco.images} for coco in (first, second)]
    if both := scenes[0] & scenes[1]:
        raise ValueError(
            f"scene {min(both)!r} is in {train} and in {val}: what is trained on "
            "cannot validate"
        )
    classes = [{(c.id, c.name) for c in coco.categories} for coco in (first, second)]
    if alone := classes[0] ^ classes[1]:
        number, name = min(alone)
        raise ValueError(
            f"category {number}, {name!r}, is in {train} or in {val} alone: both need "
            "the same categories"
        )


def measure_stretch(
    scenes: Sequence[str | Path],
    percentile: float,
    bands: tuple[int, int, int] | None = None,
) -> Stretch:
    """One stretch for a data set of scenes of more than 8 bits, read by windows.

    Args:
        scenes: TIFFs; about four million pixels of them count, evenly over their grids.
        percentile: p; of each band the percentile p becomes 0, and 100 - p becomes 255;
            0 <= p < 50, 2 is usual. Nodata and what is not finite does not count.
        bands: of red, green and blue, from 1; left out, see `scenes.open_scene`.

    Raises:
        FileNotFoundError: a scene is missing.
        ValueError: a scene is of 8 bits, cannot be read, or differs from the first in
            its bands or kind of numbers; no scene; or see `percentile_stretch`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import tifffile
        >>> grey = np.linspace(0, 4000, 10_000).reshape(100, 100).astype(np.uint16)
        >>> with TemporaryDirectory() as folder:
        ...     tifffile.imwrite(f"{folder}/5.tif", np.dstack([grey] * 3))
        ...     stretch = measure_stretch([f"{folder}/5.tif"], percentile=2)
        >>> [round(x) for x in (stretch.low[0], stretch.high[0])]
        [80, 3919]
    """
    if not 0 <= percentile < 50:
        raise ValueError(f"percentile is {percentile}; give 0 <= percentile < 50")
    if not scenes:
        raise ValueError("no scene to measure a stretch on")
    values, first = [], None
    for path in scenes:
        with open_scene(path, bands=bands) as scene:
            if scene.bands is None or "complex" in scene.dtype:
                scene.check()  # says what to do
            if scene.dtype == "uint8":
                raise ValueError(f"{path}: has 8 bits, which need no percentile")
            first = first or scene
            if scene.bands != first.bands or not is_alike(scene.dtype, first.dtype):
                raise ValueError(
                    f"{path}: bands {scene.bands} of {scene.dtype}, but {first.name} "
                    f"has {first.bands} of {first.dtype}: one stretch cannot do both"
                )
            pixels = scene.height * scene.width
            step = math.ceil(math.sqrt(pixels * len(scenes) / _SAMPLE))
            rows = step * max(1, STRIP_PIXELS // scene.width // step)
            for top in range(0, scene.height, rows):
                strip = scene.stored(0, top, scene.width, top + rows)[::step, ::step]
                part = strip.astype(np.result_type(strip, np.float32)).reshape(-1, 1, 3)
                if scene.nodata is not None:
                    part[strip.reshape(-1, 1, 3) == scene.nodata] = np.nan
                values.append(part)
    assert first is not None and first.bands is not None
    found = percentile_stretch(np.concatenate(values), percentile, first.bands)
    return replace(found, dtype=first.dtype)


def prepare_tiles(
    image_dir: str | Path,
    coco: str | Path,
    output_dir: str | Path,
    *,
    val_coco: str | Path | None = None,
    slice_size: int = 300,
    overlap_ratio: float = 0.2,
    min_area_ratio: float = 0.1,
    negative_ratio: float = 0.0,
    train_split_rate: float = 0.75,
    seed: int = 0,
    bands: tuple[int, int, int] | None = None,
    stretch: Stretch | str | Path | None = None,
    percentile: float | None = None,
    pixel_size: float | None = None,
) -> dict[str, TilingReport]:
    """Tiles to train on and to validate, and the description of both.

    All tiles of the validation scenes are kept, of the training scenes those with
    boxes and what `negative_ratio` adds.

    Args:
        image_dir: folder of the scenes, TIFF, PNG or JPEG.
        coco: COCO file of the scenes, which is split by scene if `val_coco` is None,
            see `split_coco`; else that of the training scenes.
        output_dir: gets the tiles, their COCO files, and `tiles.json`.
        val_coco: COCO file of the validation scenes, with the same categories.
        slice_size, overlap_ratio, min_area_ratio, negative_ratio: see `slice_coco`.
        train_split_rate, seed: of the split; the seed also of `negative_ratio`.
        bands: of red, green and blue in TIFFs, from 1, see `slice_coco`.
        stretch: of scenes of more than 8 bits, or its file, see `slice_coco`.
        percentile: in place of `stretch`, which is measured on the training scenes by
            `measure_stretch`; 2 is usual.
        pixel_size: side of a pixel on the ground in metres, if it is known.

    Returns:
        {"train": TilingReport, "val": TilingReport}; print them.

    Raises:
        ValueError: as `slice_coco`, `split_coco` and `measure_stretch`; a scene is in
            both COCO files, a category in one alone; or no tile is left of a split.
        FailedScenes: see `slice_coco`; both splits are done but for these scenes.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import cv2, json
        >>> car = {"category_id": 1, "bbox": [5, 90, 9, 9]}
        >>> cars = [{**car, "id": i, "image_id": i} for i in (1, 2)]
        >>> scene = {"width": 540, "height": 300}
        >>> scenes = [{**scene, "id": i, "file_name": f"{i}.png"} for i in (1, 2)]
        >>> labels = {"images": scenes, "annotations": cars}
        >>> labels["categories"] = [{"id": 1, "name": "car"}]
        >>> black = np.zeros((300, 540, 3), np.uint8)
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("1.png", "2.png"):
        ...         _ = cv2.imwrite(f"{folder}/{name}", black)
        ...     coco = Path(folder, "labels.json")
        ...     _ = coco.write_text(json.dumps(labels))
        ...     reports = prepare_tiles(folder, coco, Path(folder, "tiles"))
        >>> {split: report.tiles for split, report in reports.items()}
        {'train': 1, 'val': 2}
    """
    out = Path(output_dir)
    slice_size = checked_size(slice_size, min_area_ratio, negative_ratio)
    if pixel_size is not None and not pixel_size > 0:
        raise ValueError(f"pixel_size is {pixel_size}; give metres, more than 0")
    categories = read_coco(val_coco or coco, strict=False).categories
    for split in ("train", "val"):  # what is refused leaves everything as it was
        start_split(out, split, slice_size, overlap_ratio, categories, write=False)
    files = split_coco(coco, out, train_split_rate, seed, val_coco)
    record = as_stretch(stretch, bands if percentile is None else None)
    if percentile is not None:
        if record:
            raise ValueError(f"percentile {percentile} beside a stretch: give one")
        images = read_coco(files[0], strict=False).images
        paths = [Path(image_dir, image.file_name) for image in images]
        record = measure_stretch(paths, percentile, bands)
    reports, failure = {}, None
    for split, file in zip(("train", "val"), files, strict=True):
        try:
            reports[split] = slice_coco(
                image_dir,
                file,
                out,
                split=split,
                slice_size=slice_size,
                overlap_ratio=overlap_ratio,
                min_area_ratio=min_area_ratio,
                ignore_negative_samples=split == "train",
                negative_ratio=negative_ratio,
                seed=seed,
                stretch=record,
                pixel_size=pixel_size,
            )
        except FailedScenes as error:
            reports[split], failure = error.report, failure or error
        if not reports[split].tiles and not failure:
            raise ValueError(
                f"no tile of {split} is left: none of the {reports[split].boxes} boxes "
                f"of {file} lies in its {reports[split].scenes} scenes"
            )
    if failure:
        raise failure
    return reports


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        for split, report in auto_cli(prepare_tiles, as_positional=False).items():
            print(f"{split}\n{report}\n")
    except (FailedScenes, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
