r"""A COCO data set of scenes cut into a COCO data set of tiles.

Copy: this file, grid.py, coco.py, describe_tiles.py, tile_set.py, tile_files.py,
scenes.py, images.py, stretch.py and files.py.

`slice_coco` has the grid, names, annotations and JPEG bytes of
`sahi.slicing.slice_coco` (0.12.8).

    python -m e2e_utils.tiling --image_dir xview/train_images \
        --train_dataset_json_path coco/train.json \
        --val_dataset_json_path coco/val.json --slice_size 300 --overlap_ratio 0.2 \
        --ignore_negative_samples True --min_area_ratio 0.1 \
        --output_train_dir tiles --output_val_dir tiles
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .coco import (
    MIN_SIDE,
    Coco,
    Image,
    read_coco,
    to_annotations,
    usable_boxes,
    write_coco,
)
from .describe_tiles import describe_split, start_split
from .grid import clip_to_tiles, tile_grid, warn_if_small
from .scenes import FailedScenes
from .stretch import Stretch, as_stretch
from .tile_files import Tiles, start_manifest, write_tiles
from .tile_set import MANIFEST


@dataclass
class _Scene:
    """One scene's plan: its tiles, and its boxes clipped to them."""

    image: Image
    prefix: str  # of its tile names
    grid: np.ndarray  # int64 (T, 4) xyxy
    counts: np.ndarray  # int64 (T,): boxes in each tile
    boxes_xywh: np.ndarray  # float64 (P, 4), tile-relative, tile by tile
    categories: np.ndarray  # int64 (P,)
    crowd: np.ndarray  # int64 (P,): COCO's iscrowd
    keep: np.ndarray  # bool (T,): tiles of the JSON

    def tiles(self) -> Tiles:
        """Names of the kept tiles: x1, y1, x2, y2 in scene pixels."""
        rows = self.grid[self.keep].tolist()
        return {f"{self.prefix}_{'_'.join(map(str, row))}.jpg": row for row in rows}


@dataclass
class TilingReport:
    """What `slice_coco` did. boxes == sum(dropped) + in_no_tile + boxes in tiles."""

    coco_json: Path
    image_dir: Path
    manifest: Path
    scenes: int = 0
    resumed: int = 0  # scenes whose tiles were there already
    boxes: int = 0  # annotations read
    dropped: dict[str, int] = field(default_factory=dict)  # annotations, by reason
    in_no_tile: int = 0  # outside, or every clipped part under min_area_ratio
    small_parts: int = 0  # clipped parts of boxes under min_area_ratio, or too thin
    tiles: int = 0  # images in the JSON
    negatives: int = 0  # of them without boxes
    empty_tiles: int = 0  # others without boxes, left out
    annotations: int = 0  # in the JSON; a box may be in several tiles
    failed: dict[str, str] = field(default_factory=dict)  # scene: what went wrong

    def __str__(self) -> str:
        rows = {
            "scenes": f"{self.scenes} ({self.resumed} already tiled)",
            "boxes read": self.boxes,
            **{f"  dropped: {reason}": n for reason, n in self.dropped.items() if n},
            "  dropped: in no tile": self.in_no_tile,
            "tiles": f"{self.tiles} ({self.negatives} without boxes)",
            "  left out: without boxes": self.empty_tiles,
            "boxes in tiles": self.annotations,
            "  left out: small parts of boxes": self.small_parts,
            "scenes failed": len(self.failed),
        }
        return "\n".join(f"{name:<34}{value}" for name, value in rows.items())


def _plan(
    coco: Coco, report: TilingReport, size: int, overlap: float, min_area_ratio: float
) -> list[_Scene]:
    """Lay the grid over every scene and clip its boxes; count what is dropped."""
    report.scenes, report.boxes = len(coco.images), len(coco.annotations)
    (scene, category, crowd, xyxy), report.dropped = usable_boxes(coco)
    cuts = np.searchsorted(scene, np.arange(len(coco.images) + 1))
    scenes = []
    for i, image in enumerate(coco.images):
        own = slice(cuts[i], cuts[i + 1])
        grid = tile_grid(image.height, image.width, size, overlap)
        every_part = clip_to_tiles(xyxy[own], grid, 0.0)[0]
        parts = clip_to_tiles(xyxy[own], grid, min_area_ratio)
        wide = np.ptp(parts[2].reshape(-1, 2, 2), axis=1).min(axis=1) >= MIN_SIDE
        tile, box, clipped = (part[wide] for part in parts)
        corner = clipped[:, :2] - grid[tile, :2]
        counts = np.bincount(tile, minlength=len(grid))
        report.in_no_tile += len(xyxy[own]) - len(np.unique(box))
        report.small_parts += len(every_part) - len(box)
        scenes.append(
            _Scene(
                image=image,
                prefix=f"{Path(image.file_name).stem}_{i}",
                grid=grid,
                counts=counts,
                boxes_xywh=np.hstack([corner, clipped[:, 2:] - clipped[:, :2]]),
                categories=category[own][box],
                crowd=crowd[own][box],
                keep=counts > 0,
            )
        )
    return scenes


def _keep_negatives(scenes: list[_Scene], ratio: float, seed: int) -> None:
    """Keep `ratio` tiles without boxes for each with boxes, over all scenes; or all."""
    if ratio == np.inf:
        for scene in scenes:
            scene.keep[:] = True
        return
    keep = np.concatenate([np.zeros(0, bool), *(scene.keep for scene in scenes)])
    empty = np.flatnonzero(~keep)
    wanted = min(len(empty), round(ratio * keep.sum()))
    chosen = np.random.default_rng(seed).choice(len(empty), wanted, replace=False)
    keep[empty[chosen]] = True
    ends = np.cumsum([len(scene.keep) for scene in scenes])
    for scene, part in zip(scenes, np.split(keep, ends), strict=False):
        scene.keep = part


def _save(scenes: list[_Scene], coco: Coco, report: TilingReport) -> None:
    """Write the COCO file of the tiles; count what is in it."""
    images: list[Image] = []
    for scene in scenes:
        for name, (x1, y1, x2, y2) in scene.tiles().items():
            images.append(Image(y2 - y1, x2 - x1, len(images) + 1, name))
    in_tile = [n for scene in scenes for n in scene.counts[scene.keep].tolist()]
    annotations = to_annotations(
        np.vstack([np.zeros((0, 4)), *(scene.boxes_xywh for scene in scenes)]),
        np.repeat(np.arange(1, len(images) + 1), in_tile),
        np.concatenate([np.zeros(0, int), *(scene.categories for scene in scenes)]),
        outlines=True,
        crowd=np.concatenate([np.zeros(0, int), *(scene.crowd for scene in scenes)]),
    )
    write_coco(report.coco_json, Coco(images, annotations, coco.categories))
    report.tiles, report.annotations = len(images), len(annotations)
    report.negatives = in_tile.count(0)
    report.empty_tiles = int(sum((~scene.keep).sum() for scene in scenes))


def checked_size(
    slice_size: float, min_area_ratio: float, negative_ratio: float
) -> int:
    """ValueError for a value out of range that nothing else would refuse.

    Example:
        >>> checked_size(3e2, 0.1, 0.0)
        300
    """
    if not 0 <= min_area_ratio <= 1:
        raise ValueError(f"min_area_ratio is {min_area_ratio}; give 0 to 1")
    if not 0 <= negative_ratio < np.inf:
        raise ValueError(f"negative_ratio is {negative_ratio}; give 0 or more")
    if slice_size % 1 != 0:  # of infinity and NaN too
        raise ValueError(f"slice_size is {slice_size}; give a whole number of pixels")
    return int(slice_size)  # papermill passes 3e2 as a float


def slice_coco(
    image_dir: str | Path,
    coco_json: str | Path,
    output_dir: str | Path,
    *,
    split: str | None = None,
    slice_size: int = 300,
    overlap_ratio: float = 0.2,
    min_area_ratio: float = 0.1,
    ignore_negative_samples: bool = True,
    negative_ratio: float = 0.0,
    seed: int = 0,
    bands: tuple[int, int, int] | None = None,
    stretch: Stretch | str | Path | None = None,
    pixel_size: float | None = None,
) -> TilingReport:
    """Cut a COCO data set of scenes into a COCO data set of tiles.

    Writes into `output_dir`, for split "train", size 300 and overlap 0.2:
    `train_300_02.json` (fields and order of SAHI's; segmentation is the clipped box),
    `train_images_300_02/{scene}_{index in images}_{x1}_{y1}_{x2}_{y2}.jpg`, and
    `train_300_02_manifest.json` (`scenes` with id, file_name, height, width, bytes,
    mtime_ns, stretch; `tiles` with file_name, scene, xyxy in scene pixels). At last it
    adds the split to `tiles.json`, which tells all of it to whoever reads the folder,
    see `tile_set.read_tile_set`. Boxes are cut, polygons of the input are not read; a
    crowd (iscrowd 1) stays one. Run again, the work continues by the manifest: tiles of
    other settings, or of a scene that has changed, are removed.

    Args:
        image_dir: folder of the scenes, TIFF, PNG or JPEG, see `scenes.open_scene`.
        coco_json: COCO file of the scenes; bbox is x, y, w, h in scene pixels.
        output_dir: made if it is not there.
        split: name in the outputs; the stem of `coco_json` if left out.
        slice_size: side of a tile in pixels.
        overlap_ratio: fraction of the side that neighbours share, 0 <= ratio < 1.
        min_area_ratio: least part of a box, by area, that a tile must hold, 0..1.
        ignore_negative_samples: leave out tiles without boxes. False keeps them all,
            as validation needs: false positives on empty ground show only there.
        negative_ratio: of the tiles that would be left out, keep so many for each tile
            with boxes, chosen at random by `seed`; 0.5 keeps one for every two.
        seed: for `negative_ratio`.
        bands: of red, green and blue in TIFFs, from 1; (3, 2, 1) of blue, green, red,
            infrared. Left out, see `scenes.open_scene`. Noted in `tiles.json`.
        stretch: of scenes of more than 8 bits, one for all, or its path, in place of
            `bands`, see `prepare.measure_stretch`. Noted in `tiles.json`, too.
        pixel_size: side of a pixel on the ground in metres, if it is known; noted in
            `tiles.json`.

    Returns:
        TilingReport with the paths and the counts; print it for a table.

    Raises:
        FailedScenes: scenes were missing, truncated, of another kind or size. All
            others are written and listed; `error.report` is the report.
        ValueError: an argument is out of range, `coco_json` is not COCO, or
            `output_dir` has tiles of another size, overlap, stretch or categories.
        OSError: the disk is full or not writable.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import cv2
        >>> from e2e_utils.coco import Annotation, Box, Category
        >>> car = Annotation(id=1, image_id=1, category_id=1, bbox=Box(10, 20, 13, 13))
        >>> coco = Coco([Image(300, 540, 1, "1.png")], [car], [Category(1, "car")])
        >>> with TemporaryDirectory() as folder:
        ...     _ = cv2.imwrite(f"{folder}/1.png", np.zeros((300, 540, 3), np.uint8))
        ...     write_coco(f"{folder}/train.json", coco)
        ...     report = slice_coco(folder, f"{folder}/train.json", f"{folder}/tiles")
        >>> report.tiles, report.empty_tiles, report.annotations
        (1, 1, 1)
    """
    slice_size = checked_size(slice_size, min_area_ratio, negative_ratio)
    coco_json, images, out = Path(coco_json), Path(image_dir), Path(output_dir)
    record, split = as_stretch(stretch, bands), split or coco_json.stem
    tag = f"{slice_size}_{str(float(overlap_ratio)).replace('.', '')}"
    report = TilingReport(
        coco_json=out / f"{split}_{tag}.json",
        image_dir=out / f"{split}_images_{tag}",
        manifest=out / f"{split}_{tag}{MANIFEST}",
    )
    coco = read_coco(coco_json, strict=False)
    warn_if_small([(image.height, image.width) for image in coco.images], slice_size)
    scenes = _plan(coco, report, slice_size, overlap_ratio, min_area_ratio)
    start_split(out, split, slice_size, overlap_ratio, coco.categories, record)
    coco.annotations.clear()
    _keep_negatives(scenes, negative_ratio if ignore_negative_samples else np.inf, seed)
    settings = {
        "min_area_ratio": min_area_ratio,
        "ignore_negative_samples": ignore_negative_samples,
        "negative_ratio": negative_ratio,
        "seed": seed,
    }
    jobs = [(scene.image, scene.tiles()) for scene in scenes]
    folders = images, report.image_dir
    start_manifest(report.manifest, *folders, jobs, record)
    done = write_tiles(*folders, jobs, f"{split} scenes", record)
    report.resumed, report.failed = done
    if report.failed:
        scenes = [s for s in scenes if s.image.file_name not in report.failed]
        jobs = [(scene.image, scene.tiles()) for scene in scenes]
        start_manifest(report.manifest, *folders, jobs, record)
    _save(scenes, coco, report)
    told: dict = {"tile_size": slice_size, "overlap": overlap_ratio}
    told |= {"pixel_size": pixel_size, "stretch": record, "settings": settings}
    told |= {"manifest": report.manifest, "scenes": (images, coco_json)}
    describe_split(out, split, report.image_dir, report.coco_json, **told)
    if report.failed:
        raise FailedScenes(report)
    return report


def main() -> int:
    """Cut the train and the val data set, with the flags of the original command."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=main.__doc__)
    own: set[str | int] = {"coco_json", "output_dir", "split"}
    shared = parser.add_function_arguments(slice_coco, skip=own)
    for split in ("train", "val"):
        parser.add_argument(f"--{split}_dataset_json_path", required=True)
        parser.add_argument(f"--output_{split}_dir", required=True)
    given = parser.parse_args().as_dict()
    status = 0
    for split in ("train", "val"):
        try:
            report = slice_coco(
                coco_json=given[f"{split}_dataset_json_path"],
                output_dir=given[f"output_{split}_dir"],
                **{name: given[name] for name in shared},
            )
        except FailedScenes as error:
            report, status = error.report, 1
            print(f"error: {error}", file=sys.stderr)
        print(f"{report.coco_json}\n{report}\n")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
