r"""xView as it is downloaded into what detection tools read.

Copy: this file, xview_labels.py, coco.py, scenes.py, images.py, stretch.py, files.py,
classes.py and xview_classes.json.

TIFF scenes become RGB PNGs, and the geojson of labels a COCO train and val file. Of
other labels a COCO file of scenes (`coco.write_coco`) is all that later stages need.

    python -m e2e_utils.convert tif_to_rgb --input_dir xview/train_images \
        --out_dir xview/train_images_rgb
    python -m e2e_utils.convert geojson_to_coco --train_images_dir xview/train_images \
        --train_images_dir_rgb xview/train_images_rgb \
        --train_geojson_path xview/xView_train.geojson --output_dir coco \
        --train_split_rate 0.75 --category_id_remapping category_id_mapping.json \
        --xview_class_labels xview_class_labels.txt
"""

import json
import os
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from msgspec.structs import replace
from tqdm.contrib.concurrent import thread_map

from .classes import read_classes
from .coco import Category, Coco, Image, count_defects, to_annotations, write_coco
from .files import write_file
from .images import PNG_END
from .scenes import FailedScenes, open_scene, read_size
from .stretch import Stretch, as_stretch, percentile_stretch
from .xview_labels import Labels, read_labels, split_scenes


@dataclass
class PngReport:
    """What `tif_to_rgb` did; converted + skipped + failed are all scenes."""

    converted: int
    skipped: int  # a PNG of the right size, whole and not older, was there
    failed: dict[str, str]  # scene: what went wrong

    def __str__(self) -> str:
        counts = f"converted {self.converted}, already there {self.skipped}"
        return f"{counts}, failed {len(self.failed)}"


def _scene_files(folder: Path) -> list[Path]:
    """The scenes of a folder by number; `._N.tif` files are macOS metadata."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder of scenes")
    files = [f for f in folder.glob("[!.]*") if f.suffix.lower() in (".tif", ".tiff")]
    numbers = {f: int(f.stem) if f.stem.isdecimal() else sys.maxsize for f in files}
    files = sorted(files, key=lambda f: (numbers[f], f.name))
    for one, other in pairwise(files):
        if one.stem == other.stem:
            raise ValueError(f"{one} and {other.name} are scenes of one name")
    return files


def _is_copy(png: Path, tif: Path) -> bool:
    """Whether a PNG is there, whole, of its scene's size and not older than it."""
    if not png.exists() or png.stat().st_mtime < tif.stat().st_mtime:
        return False
    with open(png, "rb") as file:
        file.seek(max(0, png.stat().st_size - len(PNG_END)))
        whole = file.read() == PNG_END
    return whole and read_size(tif) == read_size(png)


def tif_to_rgb(
    input_dir: str | Path,
    out_dir: str | Path,
    *,
    percentile: float | None = None,
    bands: tuple[int, int, int] | None = None,
) -> PngReport:
    """Write every TIFF scene of a folder as an RGB PNG of the same name.

    Tiling reads TIFFs of 8 bits itself, so this step is for tools that cannot, for
    more than 8 bits, and for other orders of bands. A PNG that is there, whole, of its
    scene's size and not older than the scene is left alone, unless a percentile or
    bands are given: then all are written.

    Beside a PNG that was stretched, or whose bands were chosen, its `Stretch` is
    written as `NAME.stretch.json`; `predict_scene(..., stretch=)` takes it.

    Args:
        input_dir: folder of .tif or .tiff files.
        out_dir: made if it is not there.
        percentile: scale scenes that are not 8 bit, each band from its percentiles p
            and 100 - p to 0..255; 0 <= p < 50, 2 is usual. What is not finite, or the
            file's nodata, does not count and becomes 0. Left out, such scenes fail,
            because cutting 16 bits to 8 without a choice gives a dark or a white scene.
        bands: of red, green and blue, from 1; (3, 2, 1) of blue, green, red, infrared.
            Left out, see `open_scene`.

    Returns:
        PngReport; print it.

    Raises:
        FailedScenes: scenes were unreadable, not 8 bit, constant, or had other bands;
            all others are written. Each line names the file and what it holds.
        ValueError, OSError: a bad percentile, no such folder, nothing to convert, or
            the disk is full.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = cv2.imwrite(f"{folder}/5.tif", np.zeros((9, 9, 3), np.uint8))
        ...     print(tif_to_rgb(folder, f"{folder}/rgb"))
        converted 1, already there 0, failed 0
    """
    if percentile is not None and not 0 <= percentile < 50:
        raise ValueError(f"percentile is {percentile}; give 0 <= percentile < 50")
    files, out = _scene_files(Path(input_dir)), Path(out_dir)
    if not files:
        raise FileNotFoundError(f"{input_dir} holds no .tif or .tiff scene")
    out.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}

    def convert(tif: Path) -> bool:
        png, record = out / f"{tif.stem}.png", out / f"{tif.stem}.stretch.json"
        try:
            # a PNG with a record is another picture than what is asked for now
            plain = percentile is None and bands is None and not record.exists()
            if plain and _is_copy(png, tif):
                return False
            pixels, stretch = _to_rgb(tif, percentile, bands)
        except ValueError as error:
            failed[tif.name] = str(error)
            return False
        record.unlink(missing_ok=True)
        bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        write_file(png, [cv2.imencode(".png", bgr)[1].data])
        if stretch:
            write_file(record, [json.dumps(stretch.to_dict()).encode()])
        return True

    # decoding and encoding leave Python's lock; each thread holds one scene
    done = thread_map(convert, files, max_workers=os.cpu_count(), desc="TIFF to PNG")
    report = PngReport(sum(done), len(files) - sum(done) - len(failed), failed)
    if failed:
        raise FailedScenes(report)
    return report


def _to_rgb(
    tif: Path, percentile: float | None, bands: tuple[int, int, int] | None
) -> tuple[np.ndarray, Stretch | None]:
    """Pixels, and the record of how they were made if a choice was made."""
    with open_scene(tif, bands=bands) as scene:
        if scene.dtype == "uint8" or percentile is None or scene.bands is None:
            return scene.read(), as_stretch(None, bands)
        stored = scene.stored()
        try:
            stretch = percentile_stretch(stored, percentile, scene.bands, scene.nodata)
        except ValueError as error:
            raise ValueError(f"{tif}: {error}") from error
        return stretch.apply(stored, scene.nodata), stretch


@dataclass
class ConversionReport:
    """What `geojson_to_coco` did; features == kept + sum(dropped)."""

    features: int
    unlabelled: int  # scenes in the folder that no feature names: in no split
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # features, by reason
    images: dict[str, int] = field(default_factory=dict)  # by split
    annotations: dict[str, int] = field(default_factory=dict)  # by split

    def __str__(self) -> str:
        rows: dict[str, object] = {"features read": self.features, "  kept": self.kept}
        rows |= {f"  dropped: {reason}": n for reason, n in self.dropped.items()}
        for split, images in self.images.items():
            rows[split] = f"{images} scenes, {self.annotations[split]} boxes"
        rows["scenes without labels"] = f"{self.unlabelled} (in no split)"
        return "\n".join(f"{name:<34}{value}" for name, value in rows.items())


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
        train_images_dir: folder of the scenes; the ending may be .tif or .tiff in any
            case, whatever ending the labels give.
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
            message names file, feature and field. Or no label is kept, a bad argument,
            or a scene that is no image.
        OSError: a file or folder is missing or not writable.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> car = {"bounds_imcoords": "1,2,14,15", "type_id": 18, "image_id": "5.tif"}
        >>> labels = {"type": "FeatureCollection", "features": [{"properties": car}]}
        >>> with TemporaryDirectory() as folder:
        ...     _ = cv2.imwrite(f"{folder}/5.tif", np.zeros((20, 20, 3), np.uint8))
        ...     path = Path(folder, "labels.geojson")
        ...     _ = path.write_text(json.dumps(labels))
        ...     geojson_to_coco(folder, path, folder, train_split_rate=1).annotations
        {'train': 1, 'val': 0}
    """
    if not 0 <= train_split_rate <= 1:
        raise ValueError(f"train_split_rate is {train_split_rate}; give 0 to 1")
    if split not in ("original", "grouped"):
        raise ValueError(f"split is {split!r}; give 'original' or 'grouped'")
    files = _scene_files(Path(train_images_dir))
    classes = read_classes(category_id_remapping, xview_class_labels)
    labels = read_labels(Path(train_geojson_path), files, classes, split == "grouped")
    labelled = np.unique(labels.scene[~labels.empty & (labels.scene >= 0)]).tolist()
    images = {i: _listed_image(files[i], train_images_dir_rgb) for i in labelled}
    report = ConversionReport(len(labels.scene), len(files) - len(labelled))
    kept = _choose_labels(labels, images, report)
    if not len(kept):
        raise ValueError(
            f"{train_geojson_path}: none of {report.features} labels is kept for the "
            f"{len(files)} scenes of {train_images_dir}: {report.dropped}"
        )
    names: dict[int, str] = {}
    for category_id, name in classes.values():
        names.setdefault(category_id, name)
    categories = [Category(i, name, name) for i, name in names.items()]
    out = Path(output_dir)
    out.mkdir(parents=True, exist_ok=True)
    splits = split_scenes(labels, labelled, kept, split, train_split_rate, seed)
    for name, members in splits.items():
        image_id = np.zeros(len(files), np.int64)  # 0: not in this split
        image_id[members] = np.arange(1, len(members) + 1)
        rows = kept[image_id[labels.scene[kept]] > 0]
        rows = rows[np.argsort(image_id[labels.scene[rows]], kind="stable")]
        boxes, of_image = labels.xyxy[rows].astype(float), image_id[labels.scene[rows]]
        boxes[:, 2:] -= boxes[:, :2]
        listed = [replace(images[i], id=n) for n, i in enumerate(members, 1)]
        objects = to_annotations(boxes, of_image, labels.category[rows])
        write_coco(out / f"{name}.json", Coco(listed, objects, categories))
        report.images[name], report.annotations[name] = len(members), len(rows)
    return report


def _listed_image(tif: Path, rgb_dir: str | Path | None) -> Image:
    """A scene, or its RGB copy, as the COCO file lists it; its id comes later."""
    path = tif if rgb_dir is None else Path(rgb_dir, f"{tif.stem}.png")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; make it with tif_to_rgb")
    height, width = read_size(path)
    return Image(height, width, id=0, file_name=path.name)


def _choose_labels(
    labels: Labels, images: dict[int, Image], report: ConversionReport
) -> np.ndarray:
    """Indices of the labels to keep; the others are counted by their first defect."""
    size = np.zeros((labels.scene.max(initial=0) + 2, 2), np.int64)  # last: no scene
    for i, image in images.items():
        size[i] = image.width, image.height
    width, height = size[labels.scene].T
    x1, y1, x2, y2 = labels.xyxy.T
    kept, report.dropped = count_defects(
        {
            "empty bounds": labels.empty,
            "scene missing": labels.scene < 0,
            "malformed bounds": labels.malformed,
            "unknown class": labels.category < 0,
            "zero area": (x1 == x2) | (y1 == y2),
            "outside the scene": (x1 >= width) | (y1 >= height) | (x2 <= 0) | (y2 <= 0),
        }
    )
    report.kept = len(kept)
    return kept


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        print(auto_cli([tif_to_rgb, geojson_to_coco], as_positional=False))
    except (FailedScenes, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
