"""A COCO data set of scenes cut into a COCO data set of tiles.

Copy: this file, grid.py, scenes.py and files.py.

`slice_coco` has the grid, names, annotations and JPEG bytes of
`sahi.slicing.slice_coco` (0.12.8).

    python -m e2e_utils.tiling --image_dir xview/train_images \
        --train_dataset_json_path coco/train.json \
        --val_dataset_json_path coco/val.json --slice_size 300 --overlap_ratio 0.2 \
        --ignore_negative_samples True --min_area_ratio 0.1 \
        --output_train_dir tiles --output_val_dir tiles
"""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tqdm.auto import tqdm

from .files import write_file
from .grid import check_grid, clip_to_tiles, tile_grid
from .scenes import (
    FailedScenes,
    forget_tiles,
    write_tiles,
)

ANNOTATION = (  # SAHI's fields in its order
    '{"iscrowd":0,"image_id":%d,"bbox":[NUMBER,NUMBER,NUMBER,NUMBER],'
    '"segmentation":[[%d,%d,%d,%d,%d,%d,%d,%d]],"category_id":%d,"id":%d,"area":%d}'
)


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    height: int
    width: int


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    bbox: tuple[float, float, float, float]
    category_id: int


class _Coco(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[dict[str, Any]]


@dataclass
class _Scene:
    """One scene's plan: its tiles, and its boxes clipped to them."""

    image: _Image
    prefix: str  # of its tile names
    grid: np.ndarray  # int64 (T, 4) xyxy
    counts: np.ndarray  # int64 (T,): boxes in each tile
    boxes_xywh: np.ndarray  # float64 (P, 4), tile-relative, tile by tile
    categories: np.ndarray  # int64 (P,)
    areas: np.ndarray  # int64 (P,), pixels
    keep: np.ndarray  # bool (T,): tiles of the JSON

    def names(self, tiles: np.ndarray) -> list[str]:
        rows = self.grid[tiles].tolist()
        return [f"{self.prefix}_{a}_{b}_{c}_{d}.jpg" for a, b, c, d in rows]


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
    tiles: int = 0  # images in the JSON
    negatives: int = 0  # of them without boxes
    annotations: int = 0  # in the JSON; a box may be in several tiles
    failed: dict[str, str] = field(default_factory=dict)  # scene: what went wrong

    def __str__(self) -> str:
        rows = {
            "scenes": f"{self.scenes} ({self.resumed} already tiled)",
            "boxes read": self.boxes,
            **{f"  dropped: {reason}": n for reason, n in self.dropped.items()},
            "  in no tile": self.in_no_tile,
            "tiles": f"{self.tiles} ({self.negatives} without boxes)",
            "boxes in tiles": self.annotations,
            "scenes failed": len(self.failed),
        }
        return "\n".join(f"{name:<34}{value}" for name, value in rows.items())


def _read_coco(path: Path) -> _Coco:
    try:
        coco = msgspec.json.decode(path.read_bytes(), type=_Coco)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: not a COCO data set: {error}") from error
    for what, ids in (
        ("images", [image.id for image in coco.images]),
        ("categories", [category.get("id") for category in coco.categories]),
    ):
        twice = [i for i, n in Counter(ids).items() if n > 1 or type(i) is not int]
        if twice:
            raise ValueError(f"{path}: id {twice[0]!r} in {what} is not a unique int")
    for image in coco.images:
        if image.height < 1 or image.width < 1:
            size = f"{image.width} x {image.height} pixels"
            raise ValueError(f"{path}: image {image.file_name!r} is {size}")
    return coco


def _plan(
    coco: _Coco, report: TilingReport, size: int, overlap: float, min_area_ratio: float
) -> list[_Scene]:
    """Lay the grid over every scene and clip its boxes; count what is dropped."""
    position = {image.id: i for i, image in enumerate(coco.images)}
    known = {category["id"] for category in coco.categories}
    rows, scenes = coco.annotations, []
    scene = np.array([position.get(row.image_id, -1) for row in rows], np.int64)
    category = np.array([row.category_id for row in rows], np.int64)
    numbers = chain.from_iterable(row.bbox for row in rows)
    xywh = np.fromiter(numbers, np.float64, 4 * len(rows)).reshape(-1, 4)
    report.scenes, report.boxes = len(coco.images), len(rows)
    ends = np.stack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])
    # a negative width or height counts as absolute, as in SAHI
    xyxy = np.concatenate([ends.min(axis=0), ends.max(axis=0)], axis=1)
    area = np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1)
    left = np.ones(len(rows), bool)
    for reason, bad in (
        ("image not listed", scene < 0),
        ("category not listed", ~np.isin(category, list(known))),
        ("zero area", area == 0),
        ("area below 1 pixel", ~(area >= 1)),
    ):
        report.dropped[reason] = int((left & bad).sum())
        left &= ~bad
    order = np.flatnonzero(left)
    order = order[np.argsort(scene[order], kind="stable")]
    cuts = np.searchsorted(scene[order], np.arange(len(coco.images) + 1))
    for i, image in enumerate(coco.images):
        own = order[cuts[i] : cuts[i + 1]]
        grid = tile_grid(image.height, image.width, size, overlap)
        tile, box, clipped = clip_to_tiles(xyxy[own], grid, min_area_ratio)
        side = clipped[:, 2:] - clipped[:, :2]
        counts = np.bincount(tile, minlength=len(grid))
        report.in_no_tile += int((np.bincount(box, minlength=len(own)) == 0).sum())
        scenes.append(
            _Scene(
                image=image,
                prefix=f"{Path(image.file_name).stem}_{i}",
                grid=grid,
                counts=counts,
                boxes_xywh=np.concatenate([clipped[:, :2] - grid[tile, :2], side], 1),
                categories=category[own][box],
                areas=np.prod(side, axis=1).astype(np.int64),
                keep=counts > 0,
            )
        )
    return scenes


def _choose_negatives(scenes: list[_Scene], ratio: float, seed: int) -> None:
    """Keep `ratio` tiles without boxes for each tile with boxes, over all scenes."""
    positives = sum(int(scene.keep.sum()) for scene in scenes)
    empty = [(scene, t) for scene in scenes for t in np.flatnonzero(~scene.keep)]
    wanted = min(len(empty), round(ratio * positives))
    for i in np.random.default_rng(seed).choice(len(empty), wanted, replace=False):
        scene, tile = empty[i]
        scene.keep[tile] = True


def _json_lists(scenes: list[_Scene]) -> tuple[Iterator[bytes], Iterator[bytes]]:
    """The images and the annotations of the tiles in SAHI's fields, scene by scene."""

    def images() -> Iterator[bytes]:
        number = 1
        for scene in scenes:
            rows = []
            tiles = scene.grid[scene.keep].tolist()
            names = scene.names(scene.keep)
            for name, (x1, y1, x2, y2) in zip(names, tiles, strict=True):
                size = {"height": y2 - y1, "width": x2 - x1}
                rows.append({**size, "id": number, "file_name": name})
                number += 1
            yield msgspec.json.encode(rows)[1:-1]

    def annotations() -> Iterator[bytes]:
        image, number = 1, 1
        for scene in scenes:
            in_tile, count = scene.counts[scene.keep], len(scene.areas)
            image_id = np.repeat(np.arange(image, image + len(in_tile)), in_tile)
            ids = np.arange(number, number + count)
            x, y, w, h = scene.boxes_xywh.T
            corners = [x + w, y, x + w, y + h, x, y + h, x, y]
            whole = np.array_equal(scene.boxes_xywh, np.floor(scene.boxes_xywh))
            columns = [image_id, x, y, w, h, *corners, scene.categories, ids]
            table = np.stack([*columns, scene.areas], axis=1)
            values = (table.astype(np.int64) if whole else table).ravel().tolist()
            row = ANNOTATION.replace("NUMBER", "%d.0" if whole else "%r")
            # one format of the whole table is several times faster than a row at a time
            yield (",".join([row] * count) % tuple(values)).encode()
            image, number = image + len(in_tile), number + count

    return images(), annotations()


def _save(
    scenes: list[_Scene], coco: _Coco, report: TilingReport, settings: dict
) -> None:
    """Write the COCO file of the tiles and the manifest."""

    def joined(pieces: Iterator[bytes]) -> Iterator[bytes]:
        comma = b""
        for piece in filter(None, pieces):
            yield comma + piece
            comma = b","

    images, annotations = _json_lists(scenes)
    categories = msgspec.json.encode(coco.categories)
    parts = (
        [b'{"images":['],
        joined(images),
        [b'],"annotations":['],
        joined(annotations),
        [b'],"categories":', categories, b"}"],
    )
    write_file(report.coco_json, chain.from_iterable(parts))
    tiles = (
        msgspec.json.encode(
            [
                {"file_name": name, "scene": scene.image.file_name, "xyxy": xyxy}
                for name, xyxy in zip(
                    scene.names(scene.keep),
                    scene.grid[scene.keep].tolist(),
                    strict=True,
                )
            ]
        )[1:-1]
        for scene in scenes
    )
    sizes = [
        {
            "file_name": s.image.file_name,
            "height": s.image.height,
            "width": s.image.width,
        }
        for s in scenes
    ]
    head = msgspec.json.encode({"settings": settings, "scenes": sizes})[:-1]
    manifest = ([head, b',"tiles":['], joined(tiles), [b"]}"])
    write_file(report.manifest, chain.from_iterable(manifest))


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
    write_all_tiles: bool = False,
    quality: int = 75,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> TilingReport:
    """Cut a COCO data set of scenes into a COCO data set of tiles.

    Writes into `output_dir`, for split "train", size 300 and overlap 0.2:
    `train_300_02.json` (fields and order of SAHI's; segmentation is the clipped box),
    `train_images_300_02/{scene}_{place in images}_{x1}_{y1}_{x2}_{y2}.jpg`, and
    `train_300_02_manifest.json` (`settings`; `scenes` with file_name, height, width;
    `tiles` with file_name, scene and xyxy in scene pixels). Boxes are cut, polygons of
    the input are not read. The hidden folder `.train_300_02` remembers which scenes are
    done: run again, the work continues; with other settings, its own old tiles go.

    Args:
        image_dir: folder of the scenes, TIFF, PNG or JPEG, see `scenes.read_rgb`.
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
        write_all_tiles: write the JPEGs of left-out tiles too, as SAHI does.
        quality: JPEG quality, 0..100.
        seed: for `negative_ratio`.
        workers: threads (decoding and encoding leave Python's lock), each holding one
            scene; as many as there are cores if left out.
        progress: show a progress bar.

    Returns:
        TilingReport with the paths and the counts; print it for a table.

    Raises:
        FailedScenes: scenes were missing, truncated, of another kind or size. All
            others are written and listed; `error.report` is the report.
        ValueError: an argument is out of range, or `coco_json` is not COCO.
        OSError: the disk is full or not writable.
    """
    check_grid(slice_size, overlap_ratio)
    for name, value, top in (
        ("min_area_ratio", min_area_ratio, 1),
        ("negative_ratio", negative_ratio, np.inf),
        ("quality", quality, 100),
    ):
        if not 0 <= value <= top:
            raise ValueError(f"{name} is {value}; give a number from 0 to {top}")
    image_dir, coco_json, out = Path(image_dir), Path(coco_json), Path(output_dir)
    split = split or coco_json.stem
    tag = f"{slice_size}_{str(float(overlap_ratio)).replace('.', '')}"
    report = TilingReport(
        coco_json=out / f"{split}_{tag}.json",
        image_dir=out / f"{split}_images_{tag}",
        manifest=out / f"{split}_{tag}_manifest.json",
    )
    coco = _read_coco(coco_json)
    scenes = _plan(coco, report, slice_size, overlap_ratio, min_area_ratio)
    coco.annotations.clear()
    if ignore_negative_samples and negative_ratio:
        _choose_negatives(scenes, negative_ratio, seed)
    elif not ignore_negative_samples:
        for scene in scenes:
            scene.keep[:] = True
    state = out / f".{split}_{tag}"
    report.image_dir.mkdir(parents=True, exist_ok=True)
    state.mkdir(exist_ok=True)
    for half_cut in state.glob("cut.*"):
        shutil.rmtree(half_cut)
    records = {f"{scene.prefix}.json" for scene in scenes}
    for record in state.glob("*.json"):
        if record.name not in records:
            forget_tiles(report.image_dir, record)

    def cut(scene: _Scene) -> bool:
        write = np.ones_like(scene.keep) if write_all_tiles else scene.keep
        tiles = zip(scene.names(write), scene.grid[write].tolist(), strict=True)
        path = image_dir / scene.image.file_name
        size_hw = scene.image.height, scene.image.width
        record = state / f"{scene.prefix}.json"
        try:
            return write_tiles(
                path, size_hw, dict(tiles), report.image_dir, record, quality
            )
        except (ValueError, FileNotFoundError) as error:
            report.failed[scene.image.file_name] = str(error)
            if record.exists():
                forget_tiles(report.image_dir, record)
            return True

    bar = tqdm(total=len(scenes), desc=f"{split} scenes", disable=not progress)
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        for done in as_completed([pool.submit(cut, scene) for scene in scenes]):
            report.resumed += not done.result()
            bar.update()
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    scenes = [s for s in scenes if s.image.file_name not in report.failed]
    report.tiles = sum(int(scene.keep.sum()) for scene in scenes)
    report.negatives = sum(
        int((scene.counts[scene.keep] == 0).sum()) for scene in scenes
    )
    report.annotations = sum(len(scene.areas) for scene in scenes)
    settings = {
        "slice_size": slice_size,
        "overlap_ratio": overlap_ratio,
        "min_area_ratio": min_area_ratio,
        "ignore_negative_samples": ignore_negative_samples,
        "negative_ratio": negative_ratio,
        "quality": quality,
        "seed": seed,
    }
    _save(scenes, coco, report, settings)
    if report.failed:
        raise FailedScenes(report)
    return report


def slice_train_val(
    image_dir: str | Path,
    train_dataset_json_path: str | Path,
    val_dataset_json_path: str | Path,
    output_train_dir: str | Path,
    output_val_dir: str | Path,
    slice_size: int = 300,
    overlap_ratio: float = 0.2,
    ignore_negative_samples: bool = True,
    min_area_ratio: float = 0.1,
    negative_ratio: float = 0.0,
    write_all_tiles: bool = False,
    workers: int | None = None,
) -> None:
    """Cut the train and the val COCO data sets into tiles; see `slice_coco`.

    Args:
        image_dir: folder of the scenes.
        train_dataset_json_path: COCO file; its stem names the outputs.
        val_dataset_json_path: COCO file; its stem names the outputs.
        output_train_dir: folder of the train tiles and their COCO file.
        output_val_dir: folder of the val tiles and their COCO file.
        slice_size: side of a tile in pixels.
        overlap_ratio: fraction of the side that neighbours share.
        ignore_negative_samples: leave out tiles without boxes.
        min_area_ratio: least part of a box, by area, that a tile must hold.
        negative_ratio: tiles without boxes to keep for each tile with boxes.
        write_all_tiles: write the JPEGs of left-out tiles too.
        workers: threads; as many as there are cores if left out.
    """
    failures = []
    for coco_json, output_dir in (
        (train_dataset_json_path, output_train_dir),
        (val_dataset_json_path, output_val_dir),
    ):
        try:
            report = slice_coco(
                image_dir,
                coco_json,
                output_dir,
                slice_size=slice_size,
                overlap_ratio=overlap_ratio,
                min_area_ratio=min_area_ratio,
                ignore_negative_samples=ignore_negative_samples,
                negative_ratio=negative_ratio,
                write_all_tiles=write_all_tiles,
                workers=workers,
            )
        except FailedScenes as error:
            report = error.report
            failures.append(str(error))
        print(f"{report.coco_json}\n{report}\n")
    if failures:
        raise RuntimeError("\n".join(failures))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        auto_cli(slice_train_val, as_positional=False)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
