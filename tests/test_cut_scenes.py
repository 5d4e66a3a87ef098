"""A scene in two: every pixel on one side, every box in its place."""

import json

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from e2e_utils.coco import boxes_xyxy, read_coco
from e2e_utils.cut_scenes import cut_scenes
from e2e_utils.prepare import prepare_tiles
from e2e_utils.scenes import read_rgb

PLACE = Affine(0.1, 0, 404211.9, 0, -0.1, 3285142.9)
BOXES = [[5, 10, 20, 30], [30, 70, 10, 20], [0, 88, 40, 12], [10, 74, 10, 10]]


@pytest.fixture
def scene(tmp_path):
    """A GeoTIFF of 50 x 100 px in a subfolder, and its COCO file with string ids."""
    folder = tmp_path / "scenes"
    (folder / "a").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 50, 3), dtype=np.uint8)
    profile = {"width": 50, "height": 100, "count": 3, "dtype": "uint8"}
    place = {"crs": "EPSG:32617", "transform": PLACE}
    with rasterio.open(folder / "a/s.tiff", "w", "GTiff", **profile, **place) as file:
        file.write(pixels.transpose(2, 0, 1))
    image = {"id": "s", "file_name": "a/s.tiff", "width": 50, "height": 100}
    rows = [
        {"id": n, "image_id": "s", "category_id": 7, "bbox": box, "iscrowd": n % 2}
        for n, box in enumerate(BOXES)
    ]
    coco = {"images": [image], "annotations": rows}
    coco["categories"] = [{"id": 7, "name": "tree"}]
    (tmp_path / "labels.json").write_text(json.dumps(coco))
    return folder, tmp_path / "labels.json", pixels


def test_both_parts_put_together_are_the_scene_its_boxes_and_its_place(scene, tmp_path):
    folder, labels, pixels = scene
    files = cut_scenes(folder, labels, tmp_path / "cut", val_share=0.2)
    parts, boxes = [], []
    for file in files:
        coco = read_coco(file)
        (image,) = coco.images
        path, top = tmp_path / "cut" / image.file_name, sum(map(len, parts))
        parts.append(read_rgb(path))
        assert parts[-1].shape == (image.height, image.width, 3)
        with rasterio.open(path) as raster:
            assert raster.crs.to_epsg() == 32617
            assert np.allclose(raster.xy(-top, 0), (404211.95, 3285142.85))
        moved = boxes_xyxy(coco) + [0, top, 0, top]
        crowd = [[row.iscrowd] for row in coco.annotations]
        boxes.append(np.hstack([moved, crowd]).tolist())
        assert {row.category_id for row in coco.annotations} == {7}
    assert len(parts[0]) == 80 and np.array_equal(np.concatenate(parts), pixels)
    # the second is cut in equal parts; of the last, four tenths are below the cut
    assert boxes[0] == [[5, 10, 25, 40, 0], [30, 70, 40, 80, 1], [10, 74, 20, 80, 1]]
    assert boxes[1] == [[30, 80, 40, 90, 1], [0, 88, 40, 100, 0]]
    cut = tmp_path / "cut"
    prepare_tiles(cut, files[0], tmp_path / "t", val_coco=files[1], slice_size=40)


@pytest.mark.parametrize("share", [0, 1, 1.5])
def test_a_share_that_leaves_a_side_empty_is_refused(scene, tmp_path, share):
    with pytest.raises(ValueError, match=f"val_share is {share}; .* between 0 and 1"):
        cut_scenes(*scene[:2], tmp_path / "cut", share)


def test_a_scene_of_another_size_than_its_labels_say_is_refused(scene, tmp_path):
    folder, labels, _ = scene
    labels.write_text(labels.read_text().replace('"width": 50', '"width": 51'))
    with pytest.raises(ValueError, match="s.tiff has 50 x 100 px, and .* says 51 x"):
        cut_scenes(folder, labels, tmp_path / "cut")
