"""A picture or a whole scene in, boxes out; many scenes in, one file of boxes out.

Copy: this file, sliced.py, boxes.py, grid.py, scenes.py, images.py, stretch.py,
georeference.py and files.py; for the command line checkpoint.py, config.py, models.py,
backbones.py, efficientnet_lite.py, autocast.py and hardware.py as well.

A scene does not fit into a detector, so it goes through in tiles that overlap, and
the boxes come back together: an object in an overlap is found twice, and per-class
non-maximum suppression keeps the better of the two. An object that a border cuts is
found whole in one tile and in part in another; the part gives way to the whole.

    python -m e2e_utils.predict SCENE... --checkpoint best.pt --output boxes.geojson
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from .checkpoint import model_from_checkpoint
from .files import find_files
from .georeference import (
    Georeference,
    georeference_of,
    output_files,
    read_georeference,
    write_boxes,
)
from .grid import tile_grid, warn_if_small
from .hardware import find_device
from .images import is_url
from .scenes import FailedScenes, open_scene
from .sliced import KEYS, detections, merge_tables, predict_tiles, tensors
from .stretch import Stretch

SCENES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")


def _check(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"an image must be uint8 (H, W, 3), got {image.dtype} {image.shape}"
        )


@torch.inference_mode()
def predict_image(
    model: nn.Module,
    image: np.ndarray,
    score_threshold: float = 0.0,
    class_names: Sequence[str] | None = None,
) -> dict:
    """Detections on one tile.

    Args:
        model: a detector in evaluation mode; it runs where its weights are.
        image: uint8 (H, W, 3), RGB.
        score_threshold: drop boxes below, 0..1.
        class_names: index = label, the background first.

    Returns:
        "boxes_xyxy" float32 (N, 4) in pixels, "labels" int64 (N,), from 1 up, "scores"
        float32 (N,) in 0..1, descending; with `class_names` also "names", N str.

    Example:
        >>> from e2e_utils.models import build_model
        >>> model = build_model("fasterrcnn_small", 3).eval()  # has learned nothing
        >>> found = predict_image(model, np.zeros((300, 300, 3), np.uint8), 0.9)
        >>> {name: value.shape for name, value in found.items()}
        {'boxes_xyxy': (0, 4), 'labels': (0,), 'scores': (0,)}
    """
    _check(image)
    output = model(tensors([image], next(model.parameters()).device))[0]
    keep = output["scores"] >= score_threshold
    boxes, labels, scores = (output[k][keep].cpu() for k in KEYS)
    arrays = boxes.float().numpy(), labels.numpy(), scores.float().numpy()
    return detections(*arrays, class_names)


def predict_scene(
    model: nn.Module,
    image: np.ndarray | str | Path,
    size: int,
    overlap: float,
    batch_size: int = 4,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    border: float = 2.0,
    progress: bool = False,
    class_names: Sequence[str] | None = None,
    amp_dtype: torch.dtype | None = None,
    stretch: Stretch | dict | str | Path | None = None,
) -> dict:
    """Detections on a whole scene by sliced inference.

    Args:
        model: a detector in evaluation mode; it runs where its weights are.
        image: uint8 (H, W, 3), RGB, of any size; or the path of a TIFF, PNG or JPEG,
            or the URL of a TIFF, see `scenes.open_scene`. Of a TIFF some rows of tiles
            are in memory at a time; PNG and JPEG are decoded whole, height x width x 3
            bytes.
        size: side of the tiles in pixels; take that of the training.
        overlap: share of the side that neighbours have in common, 0..1, as in training.
        batch_size: tiles a forward pass.
        score_threshold: drop boxes below, 0..1, before the merge. A large box below it
            then removes no parts of its object: pass 0.05 and filter afterwards for the
            fewest boxes.
        nms_threshold: of two boxes of one class whose IoU is above, the better stays.
        border: a box that ends within so many pixels of a border inside the scene is
            taken for a part, and dropped where a larger box of its class covers most
            of it. 0 keeps parts, as SAHI's NMS on IoU does.
        progress: show a bar.
        class_names: index = label, the background first.
        amp_dtype: torch.bfloat16 or float16 for autocast, None for the model's own.
        stretch: of a TIFF of more than 8 bits, or of other bands, the "stretch" of the
            checkpoint, or a record that `convert.tif_to_rgb` wrote; the model must have
            learned from such pictures. What has 8 bits by now is as it is.

    Returns:
        As `predict_image`, in pixels of the scene, with "georeference": of
        `georeference.read_georeference`, None for an array. `georeference.write_boxes`
        makes files of it, `evaluate.to_coco(image_id, found)` COCO results.

    Raises:
        ValueError: not 8 bit RGB, no place on Earth (it names the file), or batch_size.
        FileNotFoundError: no such file.

    Example:
        >>> from e2e_utils.models import build_model
        >>> model = build_model("fasterrcnn_small", 3).eval()  # has learned nothing
        >>> scene = np.zeros((400, 500, 3), np.uint8)
        >>> names = ["background", "car", "ship"]
        >>> found = predict_scene(model, scene, 300, 0.2, class_names=names)
        >>> list(found)
        ['boxes_xyxy', 'labels', 'scores', 'names', 'georeference']
    """
    with open_scene(image, stretch=stretch) as scene:
        place = georeference_of(scene)
        warn_if_small([(scene.height, scene.width)], size)
        table = predict_tiles(
            model,
            scene,
            tile_grid(scene.height, scene.width, size, overlap),
            batch_size=batch_size,
            score_threshold=score_threshold,
            border=border,
            amp_dtype=amp_dtype,
            progress=progress,
        )
    found = merge_tables([table], nms_threshold, class_names)
    return {**found, "georeference": place}


@dataclass
class Predictions:
    """What `predict_files` found and wrote."""

    found: dict[str, dict]  # scene: as `predict_scene` gives it
    files: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # scene: what went wrong

    def __str__(self) -> str:
        names = Counter(n for found in self.found.values() for n in found["names"])
        lines = [f"{count:>9} {name}" for name, count in names.most_common()]
        lines += [f"{names.total():>9} boxes in {len(self.found)} scene(s)"]
        pixels = all(found["georeference"] is None for found in self.found.values())
        lines += ["no scene has a georeference: boxes are in pixels"] * pixels
        return "\n".join([*lines, *(f"wrote {file}" for file in self.files)])


def predict_files(
    scenes: Sequence[str | Path],
    checkpoint: str,
    output: str,
    *,
    score_threshold: float = 0.5,
    size: int | None = None,
    overlap: float | None = None,
    batch_size: int = 4,
    device: str | None = None,
    stretch: str | None = None,
) -> Predictions:
    """Run a detector over scenes and write the boxes, on the map where it can be.

    Args:
        scenes: files, folders of pictures (`SCENES`), patterns such as
            "scenes/**/*.tif", or URLs of TIFFs, see `scenes.open_scene`.
        checkpoint: written by `e2e_utils.train`; it tells the classes.
        output: .geojson, .gpkg, .parquet (longitude, latitude) or .json (COCO results,
            pixels). With {scene} in it a file each, .gpkg and .parquet in its own CRS.
        score_threshold: drop boxes below, 0..1; to score them take 0.05 or less.
        size: side of the tiles in pixels; the checkpoint's by default.
        overlap: of the tiles, 0..1; the checkpoint's by default.
        batch_size: tiles a forward pass.
        device: "cpu", "cuda" or "cuda:1"; a GPU if there is one by default.
        stretch: file of a record for TIFFs of more than 8 bits, see `predict_scene`;
            the checkpoint's by default.

    Returns:
        Predictions; print it.

    Raises:
        FailedScenes: scenes could not be read; the boxes of all others are written.
        ValueError, OSError: no scene, no checkpoint, or what `output_files` refuses.

    Example:
        >>> import cv2
        >>> from e2e_utils.checkpoint import describe, save_checkpoint
        >>> from e2e_utils.config import TrainConfig
        >>> from e2e_utils.models import build_model
        >>> tiles = {"tile_size": 96, "overlap": 0.2}
        >>> tiles["class_names"] = ["background", "car"]
        >>> content = describe(TrainConfig("tiles", "out"), tiles)
        >>> content["model"] = build_model(content["architecture"], 2).state_dict()
        >>> with tempfile.TemporaryDirectory() as name:
        ...     _ = cv2.imwrite(f"{name}/5.png", np.zeros((96, 96, 3), np.uint8))
        ...     save_checkpoint(f"{name}/best.pt", content)  # has learned nothing
        ...     paths = f"{name}/best.pt", f"{name}/a.json"
        ...     done = predict_files([f"{name}/5.png"], *paths)
        >>> [path.name for path in done.files], list(done.found)
        (['a.json'], ['5.png'])
    """
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must be in 0..1, got {score_threshold}")
    urls = {str(url).split("://")[1]: url for url in scenes if is_url(url)}
    files = [scene for scene in scenes if not is_url(scene)]
    paths = urls | (find_files(files, SCENES) if files else {})
    places, failed = _places(paths)
    done = Predictions({}, failed=failed)
    if failed and not places:
        raise FailedScenes(done)
    for file in output_files(output, places):
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()  # writable, before the work
    model, meta = model_from_checkpoint(checkpoint, find_device(device))
    size = meta.get("tile_size") if size is None else size
    overlap = meta.get("overlap") if overlap is None else overlap
    if size is None or overlap is None:
        raise ValueError(f"{checkpoint} has no tile_size, overlap: give both")
    options: dict = {"batch_size": batch_size, "score_threshold": score_threshold}
    options |= {
        "class_names": meta["class_names"],
        "progress": True,
        "stretch": meta.get("stretch") if stretch is None else stretch,
    }
    for name in tqdm(places, "scenes", unit="scene", disable=len(places) < 2):
        try:
            found = predict_scene(model, paths[name], size, overlap, **options)
            done.found[name] = found
        except (OSError, ValueError) as error:
            done.failed[name] = str(error)
    if done.found:
        ids = meta.get("category_ids")
        done.files = write_boxes(output, done.found, ids)
    if done.failed:
        raise FailedScenes(done)
    return done


def _places(scenes: dict[str, Any]) -> tuple[dict[str, Georeference | None], dict]:
    """Where scenes lie, by name; and what is wrong with those that cannot be read."""
    places, failed = {}, {}
    for name, source in scenes.items():
        try:
            places[name] = read_georeference(source)
        except (OSError, ValueError) as error:
            failed[name] = str(error)
    return places, failed


def main(arguments: list[str] | None = None) -> None:
    """The command line of `predict_files`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="python -m e2e_utils.predict")
    parser.add_argument("scenes", nargs="+", help="files, folders, patterns or URLs")
    parser.add_function_arguments(predict_files, skip={"scenes"}, as_positional=False)
    options = parser.parse_args(arguments).as_dict()
    try:
        print(predict_files(**options))
    except (FailedScenes, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
