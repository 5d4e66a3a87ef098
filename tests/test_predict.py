import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from commands import python
from torch import nn

from e2e_utils.classes import read_classes
from e2e_utils.evaluate import to_coco
from e2e_utils.models import build_model
from e2e_utils.predict import predict_image, predict_scene, save_json, to_geojson

NAMES = ["background", "ship", "truck", "square", "tank", "plane"]


def area(box) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


class BrightSquares(nn.Module):
    """A test double for a detector: finds each separate bright square exactly."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))  # tells the device
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        outputs = []
        for image in images:
            mask = (image[0].numpy() > 0.5).astype(np.uint8)
            _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
            boxes = [[x, y, x + w, y + h] for x, y, w, h, _ in stats[1:]]
            outputs.append(
                {
                    "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                    "labels": torch.full((len(boxes),), 3),
                    # larger is surer, so that a cut part loses to the whole
                    "scores": torch.tensor([area(b) / 1000 for b in boxes]),
                }
            )
        return outputs


def square_scene(corners, size=20, shape=(700, 820)):
    image = np.zeros((*shape, 3), np.uint8)
    for x, y in corners:
        image[y : y + size, x : x + size] = 255
    return image


def test_a_scene_gives_each_object_once_at_its_place():
    # 250..270 lies in the overlap of two tiles, 690 in the last, shifted one
    corners = [(10, 10), (250, 40), (500, 250), (790, 670)]
    model = BrightSquares().eval()
    found = predict_scene(model, square_scene(corners), 300, 0.2, batch_size=5)
    assert model.batches == [5, 5, 2]  # a grid of 3 x 4
    boxes = sorted(map(tuple, found["boxes_xyxy"].astype(int).tolist()))
    assert boxes == sorted((x, y, x + 20, y + 20) for x, y in corners)
    assert found["labels"].tolist() == [3] * 4
    assert found["boxes_xyxy"].dtype == np.float32
    assert found["labels"].dtype == np.int64


def test_a_part_at_a_border_gives_way_to_the_whole():
    # 270..345 is whole in the second tile, which begins at 240; the first ends at 300
    image = square_scene([(270, 30)], size=75)
    model = BrightSquares().eval()
    kept = predict_scene(model, image, 300, 0.2, border=0)
    assert sorted(kept["boxes_xyxy"][:, 2].tolist()) == [300, 345]
    found = predict_scene(model, image, 300, 0.2)
    assert found["boxes_xyxy"].tolist() == [[270, 30, 345, 105]]
    # the border of the scene is no border of a tile
    image = square_scene([(0, 0), (800, 680)])
    assert len(predict_scene(model, image, 300, 0.2)["scores"]) == 2
    found = predict_scene(model, square_scene([]), 300, 0.2)
    assert found["boxes_xyxy"].shape == (0, 4) and found["scores"].shape == (0,)


@pytest.mark.parametrize(
    "image",
    [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3))],
)
def test_what_is_no_rgb_picture_is_refused_with_its_shape(image):
    with pytest.raises(ValueError, match=rf"{image.dtype} \({image.shape[0]}"):
        predict_image(BrightSquares(), image)


def noise(height, width, seed=0):
    """Something to see at every scale, and no tile dark enough to be special."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def talkative_detector():
    """Untrained, but with class scores so far apart that it finds many boxes."""
    torch.manual_seed(0)
    model = build_model("fasterrcnn_small", len(NAMES), box_detections_per_img=40)
    model.roi_heads.box_predictor.cls_score.weight.data.mul_(30)
    return model.eval()


def test_the_boxes_are_those_of_sahi():
    from sahi import AutoDetectionModel
    from sahi.predict import get_sliced_prediction

    model, image = talkative_detector(), noise(700, 820)
    peer = get_sliced_prediction(
        image,
        AutoDetectionModel.from_pretrained(
            "torchvision",
            model=model,
            category_mapping={str(i): name for i, name in enumerate(NAMES)},
            confidence_threshold=0.05,
            device="cpu",
        ),
        slice_height=300,
        slice_width=300,
        perform_standard_pred=False,
        postprocess_type="NMS",
        postprocess_match_metric="IOU",
        verbose=0,
    ).object_prediction_list
    found = predict_scene(model, image, 300, 0.2, border=0, class_names=NAMES)
    assert len(peer) == len(found["scores"]) > 100
    theirs = np.array([[*p.bbox.to_xyxy(), p.category.id, p.score.value] for p in peer])
    ours = np.column_stack([found[k] for k in ("boxes_xyxy", "labels", "scores")])
    for row in ours:  # in any order: equal scores have none
        assert np.abs(theirs - row).max(axis=1).min() < 1e-2
    assert sorted(found["names"]) == sorted(p.category.name for p in peer)


def test_the_model_is_left_as_it_was():
    model, image = talkative_detector(), noise(300, 300)
    before = {key: value.stride() for key, value in model.state_dict().items()}
    predict_scene(model, image, 300, 0.2)
    assert not model.backbone._forward_pre_hooks
    assert {k: v.stride() for k, v in model.state_dict().items()} == before
    with pytest.raises(ValueError, match="label"):
        predict_scene(model, image, 300, 0.2, class_names=["background"])
    assert not model.backbone._forward_pre_hooks


@pytest.mark.parametrize("kind", ["contig", "lzw", "separate", "png"])
def test_a_file_gives_the_boxes_of_its_pixels(tmp_path, kind):
    image = square_scene([(10, 10), (250, 40), (500, 250), (790, 670)])
    path = tmp_path / f"scene.{'png' if kind == 'png' else 'tif'}"
    if kind == "png":
        cv2.imwrite(str(path), image)
    else:
        bands = np.moveaxis(image, -1, 0) if kind == "separate" else image
        config = {"planarconfig": kind} if kind != "lzw" else {"compression": "lzw"}
        tifffile.imwrite(path, bands, photometric="rgb", **config)
    wanted = predict_scene(BrightSquares(), image, 200, 0.2)
    found = predict_scene(BrightSquares(), str(path), 200, 0.2)
    assert len(wanted["scores"]) == 4
    for key in wanted:
        np.testing.assert_array_equal(found[key], wanted[key])


def test_a_file_that_is_no_scene_is_named(tmp_path):
    (tmp_path / "notes.tif").write_text("no picture")
    with pytest.raises(ValueError, match="notes.tif"):
        predict_scene(BrightSquares(), tmp_path / "notes.tif", 300, 0.2)


PEAK = """
import sys
from pathlib import Path
import torch
from e2e_utils.predict import predict_scene

class Blind(torch.nn.Module):  # a test double: finds nothing, so the pixels are all
    def __init__(self):
        super().__init__()
        self.device = torch.nn.Parameter(torch.zeros(1))
    def forward(self, images):
        nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
        return [{**nothing, "labels": torch.zeros(0, dtype=torch.int64)}] * len(images)

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3

before = peak()
found = predict_scene(Blind(), sys.argv[1], 600, 0.2)
print(len(found["scores"]), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells it")
def test_a_large_scene_on_disk_needs_the_memory_of_a_row_of_tiles(tmp_path):
    shape = (12_000, 12_000, 3)  # 432 MB, sparse: takes no room on the disk
    path = tmp_path / "large.tif"
    tifffile.memmap(path, shape=shape, dtype=np.uint8, photometric="rgb")
    boxes, megabytes = python("-c", PEAK, path).split()
    assert boxes == "0" and float(megabytes) < 200


def test_autocast_reaches_the_model():
    class Asks(BrightSquares):
        def forward(self, images):
            self.dtype = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
            return super().forward(images)

    for dtype in (None, torch.bfloat16):
        model = Asks()
        found = predict_scene(
            model, square_scene([(10, 10)]), 300, 0.2, amp_dtype=dtype
        )
        assert model.dtype == (dtype or torch.float32)
        assert found["scores"].dtype == np.float32


def test_names_come_with_the_boxes_above_the_threshold():
    tile = square_scene([(9, 9)], shape=(300, 300))
    assert predict_image(BrightSquares(), tile, 0.3, NAMES)["names"] == ["square"]
    assert predict_image(BrightSquares(), tile, 0.5, NAMES)["names"] == []
    with pytest.raises(ValueError, match="label 3 has no name.* 2 entries"):
        predict_image(BrightSquares(), tile, 0, NAMES[:2])


FOUND = {
    "boxes_xyxy": np.array([[10.2, 20.4, 30, 60], [100, 200, 130, 210]], np.float32),
    "labels": np.array([3, 1]),
    "scores": np.array([0.9, 0.5], np.float32),
}


def ring_of(feature) -> tuple[np.ndarray, bool]:
    """The corners (x, y), the first once more at the end, and whether they go left."""
    ring = np.array(feature["geometry"]["coordinates"][0])
    (x, y), (x2, y2) = (ring[:-1] - ring.mean(0)).T, (ring[1:] - ring.mean(0)).T
    return ring, float((x * y2 - x2 * y).sum()) > 0


def test_geojson_has_the_fields_of_xview(tmp_path):
    path, types = tmp_path / "found.geojson", list(read_classes())
    content = to_geojson(FOUND, NAMES, path, image_id="5.tif", type_ids=types)
    assert json.loads(path.read_text()) == content
    first = content["features"][0]
    assert first["properties"] == {
        "bounds_imcoords": "10,20,30,60",
        "label": 3,
        "class_name": "square",
        "score": pytest.approx(0.9),
        "image_id": "5.tif",
        "type_id": types[2],
    }
    ring, left = ring_of(first)
    assert (ring[0] == ring[-1]).all() and left
    assert [*ring.min(axis=0), *ring.max(axis=0)] == pytest.approx([10.2, 20.4, 30, 60])
    nothing = {key: value[:0] for key, value in FOUND.items()}
    empty = {"type": "FeatureCollection", "features": []}
    assert to_geojson(nothing, NAMES) == empty


def test_geojson_follows_the_transform_of_the_scene():
    north_up = (0.3, 0, 500_000, 0, -0.3, 4_000_000)  # 30 cm a pixel, UTM
    crs = "urn:ogc:def:crs:EPSG::32616"
    for transform in (north_up, (*north_up, 0, 0, 1)):
        content = to_geojson(FOUND, NAMES, transform=transform, crs=crs)
        ring, left = ring_of(content["features"][1])
        assert ring.min(axis=0) == pytest.approx([500_030, 4_000_000 - 63])
        assert ring.max(axis=0) == pytest.approx([500_039, 4_000_000 - 60])
        assert left and content["crs"]["properties"]["name"] == crs


def test_coco_results_are_saved_whole_or_not_at_all(tmp_path):
    path = save_json(to_coco(7, FOUND), tmp_path / "found.json")
    rows = json.loads(path.read_text())
    assert [row["category_id"] for row in rows] == [2, 0]
    assert rows[1]["bbox"] == [100, 200, 30, 10] and rows[1]["image_id"] == 7
    with pytest.raises(TypeError):
        save_json([object()], path)
    assert json.loads(path.read_text()) == rows
    assert list(tmp_path.iterdir()) == [path]
