import numpy as np
from matplotlib.figure import Figure

from e2e_utils.visualize import bars, class_color, draw_boxes, learning_curve, show

NAMES = ["background", *(f"class {i}" for i in range(1, 61))]


def test_every_class_has_a_colour_of_its_own():
    colors = [class_color(label) for label in range(1, 61)]
    assert len(set(colors)) == 60
    assert all(0 <= v <= 255 for color in colors for v in color)


def test_a_box_is_drawn_at_its_place_in_the_colour_of_its_class():
    image = np.zeros((50, 80, 3), np.uint8)
    drawn = draw_boxes(image, np.array([[10, 5, 30, 25]]), [7], NAMES)
    assert image.max() == 0, "the picture given stays as it is"
    assert drawn[5, 20].tolist() == list(class_color(7))
    assert drawn[15, 20].max() == 0 and drawn[40, 70].max() == 0


def test_an_enlarged_picture_moves_its_boxes_along():
    image = np.zeros((50, 80, 3), np.uint8)
    drawn = draw_boxes(image, [[10, 5, 30, 25]], [7], NAMES, [0.5], scale=3)
    assert drawn.shape == (150, 240, 3)
    assert drawn[15, 60].tolist() == list(class_color(7))


def test_captions_stay_inside_the_picture():
    image = np.zeros((60, 60, 3), np.uint8)
    drawn = draw_boxes(image, [[50, 0, 59, 9]], [7], NAMES, [0.5], captions=True)
    assert drawn.shape == image.shape and drawn[:14, :30].max() > 0


def test_the_figures_are_made():
    tile = np.zeros((30, 40, 3), np.uint8)
    assert isinstance(
        show([tile, tile], ["a", "b"], labels=[3, 3], class_names=NAMES), Figure
    )
    records = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "AP50": 0.5},
        {"step": 3, "loss": 1.0},
    ]
    left, right = learning_curve(records).axes
    assert left.lines[0].get_xydata().tolist() == [[1, 2], [3, 1]]
    assert right.lines[0].get_xydata().tolist() == [[2, 0.5]]
    axis = bars({"class 3": 5, "class 9": 50}, "objects", class_names=NAMES).axes[0]
    assert [p.get_width() for p in axis.patches] == [5, 50]
