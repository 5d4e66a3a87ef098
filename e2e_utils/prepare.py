"""Any COCO data set to tiles: split by scene, cut, described.

    python -m e2e_utils.prepare --image_dir scenes --coco labels.json \
        --output_dir tiles --slice_size 512 --overlap_ratio 0.25

Copy: this file, tiling.py, grid.py, coco.py, tile_set.py, tile_files.py, scenes.py,
files.py, images.py and stretch.py.
"""

import random
import sys
from pathlib import Path

from .coco import Coco, read_coco, write_coco
from .scenes import FailedScenes
from .tile_set import start_split
from .tiling import TilingReport, checked_size, slice_coco


def split_coco(
    coco_json: str | Path,
    output_dir: str | Path,
    train_split_rate: float = 0.75,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Split a COCO file by scene: no scene has a part in both.

    Args:
        coco_json: COCO file of the scenes.
        output_dir: gets `scenes_train.json` and `scenes_val.json`.
        train_split_rate: share of the scenes for train, between 0 and 1; each split
            gets one at least.
        seed: of the draw.

    Raises:
        ValueError: not a COCO file, one of the two that it would write, one scene
            alone, or the rate is out of range.
    """
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
            "each: add scenes, or cut this one in two before"
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
        pixel_size: side of a pixel on the ground in metres, if it is known.

    Returns:
        {"train": TilingReport, "val": TilingReport}; print them.

    Raises:
        ValueError: as `slice_coco` and `split_coco`; a scene is in both COCO files, a
            category in one alone; or no tile is left of a split.
        FailedScenes: see `slice_coco`; both splits are done but for these scenes.
    """
    out = Path(output_dir)
    slice_size = checked_size(slice_size, min_area_ratio, negative_ratio)
    categories = read_coco(val_coco or coco, strict=False).categories
    for split in ("train", "val"):  # what is refused leaves everything as it was
        start_split(out, split, slice_size, overlap_ratio, categories, write=False)
    if val_coco is None:
        files = split_coco(coco, out, train_split_rate, seed)
    else:
        files = Path(coco), Path(val_coco)
        _check_pair(*files)
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
