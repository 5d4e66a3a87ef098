r"""Each scene in two, by area: for whoever has too few of them to split by scene.

    python -m e2e_utils.cut_scenes --image_dir scenes --coco labels.json \
        --output_dir cut

Copy: this file, coco.py, files.py, grid.py, scenes.py, images.py and stretch.py.
"""

import sys
import warnings
from pathlib import Path

import numpy as np

from .coco import Coco, Image, read_coco, to_annotations, usable_boxes, write_coco
from .files import atomic_path
from .grid import clip_to_tiles
from .scenes import Scene, open_scene


def cut_scenes(
    image_dir: str | Path,
    coco: str | Path,
    output_dir: str | Path,
    val_share: float = 0.25,
    min_area_ratio: float = 0.5,
) -> tuple[Path, Path]:
    """Cut each scene in two: its lowest rows are to validate, the others to train.

    No pixel is on both sides. But both show the same kind of ground in the same light,
    so a score on them is kinder than one on another scene.

    Args:
        image_dir: folder of the scenes, of 8 bits.
        coco: COCO file of the scenes.
        output_dir: gets NAME_train.tif and NAME_val.tif of each, lossless and in their
            places on Earth, `scenes_train.json` and `scenes_val.json`. A file appears
            whole or not at all.
        val_share: of the rows of a scene, between 0 and 1.
        min_area_ratio: a box that the cut divides stays on each side that holds at
            least this share of it, as much of it as is there. Boxes below one square
            pixel are left out, as by `tiling.slice_coco`.

    Returns:
        The COCO files, for `prepare_tiles(output_dir, train, tiles, val_coco=val)`.

    Raises:
        ValueError: no sound COCO file, see `read_coco`; `val_share` out of range; or a
            scene that cannot be read, has one row, or another size than the file says.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import cv2, json
        >>> car = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 90, 9, 9]}
        >>> scene = {"id": 1, "file_name": "a.png", "width": 80, "height": 100}
        >>> labels = {"images": [scene], "annotations": [car]}
        >>> labels["categories"] = [{"id": 1, "name": "car"}]
        >>> black = np.zeros((100, 80, 3), np.uint8)
        >>> with TemporaryDirectory() as folder:
        ...     written = cv2.imwrite(f"{folder}/a.png", black)
        ...     size = Path(folder, "a.json").write_text(json.dumps(labels))
        ...     files = cut_scenes(folder, f"{folder}/a.json", f"{folder}/cut")
        ...     [read_coco(file).images[0].height for file in files]
        [75, 25]
    """
    if not 0 < val_share < 1:
        raise ValueError(f"val_share is {val_share}; give a share between 0 and 1")
    out, content = Path(output_dir), read_coco(coco)
    (of_image, category, crowd, boxes), _ = usable_boxes(content)
    splits = {name: Coco([], [], content.categories) for name in ("train", "val")}
    stems = [Path(row.file_name).with_suffix("").as_posix() for row in content.images]
    if len(set(stems)) < len(stems):
        raise ValueError(f"{coco}: two scenes differ in their ending alone: rename one")
    for index, image in enumerate(content.images):
        rows, width = np.flatnonzero(of_image == index), image.width
        cut = max(1, min(round(image.height * (1 - val_share)), image.height - 1))
        sides = np.array([[0, 0, width, cut], [0, cut, width, image.height]])
        side, which, parts = clip_to_tiles(boxes[rows], sides, min_area_ratio)
        with open_scene(Path(image_dir, image.file_name)) as scene:
            _check_size(scene, image, coco)
            for number, (name, split) in enumerate(splits.items()):
                top, bottom = sides[number, [1, 3]].tolist()
                part = f"{stems[index]}_{name}.tif"
                _write_rows(out / part, scene, top, bottom)
                split.images.append(Image(bottom - top, width, image.id, part))
                own = rows[which[side == number]]
                xywh = parts[side == number] - [0, top, 0, top]
                xywh[:, 2:] -= xywh[:, :2]
                numbers = np.full(len(own), index)
                split.annotations.extend(
                    to_annotations(xywh, numbers, category[own], crowd=crowd[own])
                )
    files = [out / f"scenes_{name}.json" for name in splits]
    for file, split in zip(files, splits.values(), strict=True):
        for number, row in enumerate(split.annotations, 1):
            row.id, row.image_id = number, content.images[int(row.image_id)].id
        write_coco(file, split)
    return files[0], files[1]


def _check_size(scene: Scene, image: Image, coco: str | Path) -> None:
    there, told = (scene.width, scene.height), (image.width, image.height)
    if there != told:
        raise ValueError(
            f"{scene.name} has {there[0]} x {there[1]} px, and {coco} says {told[0]} x "
            f"{told[1]}: boxes would be misplaced"
        )
    if scene.height < 2:
        raise ValueError(f"{scene.name} has one row of pixels: nothing to cut")


def _write_rows(path: Path, scene: Scene, top: int, bottom: int) -> None:
    """Some rows of a scene as a TIFF of their own."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.transform import Affine

    pixels = scene.read(0, top, scene.width, bottom)
    profile: dict = {"width": scene.width, "height": bottom - top, "count": 3}
    profile |= {"dtype": "uint8", "photometric": "rgb", "compress": "deflate"}
    if scene.transform is not None:
        a, b, c, d, e, f = scene.transform[:6]
        place = Affine(a, b, c + b * top, d, e, f + e * top)
        profile |= {"crs": scene.crs, "transform": place}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part, warnings.catch_warnings():
        # a picture that lies nowhere on Earth is no mistake here
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(part, "w", "GTiff", **profile) as file:
            file.write(pixels.transpose(2, 0, 1))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        print(*auto_cli(cut_scenes, as_positional=False), sep="\n")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
