import cv2
import numpy as np
import pytest
import torch
from torch import nn

from e2e_utils.predict import predict_image, predict_scene


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
    found = predict_scene(BrightSquares().eval(), square_scene(corners), 300, 0.2)
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


def test_an_object_at_the_border_of_the_scene_is_no_part():
    image = square_scene([(0, 0), (800, 680)])
    assert len(predict_scene(BrightSquares().eval(), image, 300, 0.2)["scores"]) == 2


def test_tiles_go_through_in_batches():
    model = BrightSquares().eval()
    predict_scene(model, square_scene([]), 300, 0.2, batch_size=5)
    assert model.batches == [5, 5, 2]  # a grid of 3 x 4


def test_an_empty_scene_gives_empty_arrays():
    found = predict_scene(BrightSquares().eval(), square_scene([]), 300, 0.2)
    assert found["boxes_xyxy"].shape == (0, 4) and found["scores"].shape == (0,)


def test_the_threshold_drops_weak_boxes():
    image = square_scene([(10, 10)], shape=(300, 300))
    model = BrightSquares().eval()
    assert len(predict_image(model, image, 0.3)["scores"]) == 1
    assert len(predict_image(model, image, 0.5)["scores"]) == 0


@pytest.mark.parametrize(
    "image",
    [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3))],
)
def test_what_is_no_rgb_picture_is_refused_with_its_shape(image):
    with pytest.raises(ValueError, match=rf"{image.dtype} \({image.shape[0]}"):
        predict_image(BrightSquares(), image)
