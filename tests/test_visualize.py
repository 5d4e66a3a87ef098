import re

import cv2
import nbclient
import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure

from e2e_utils.charts import bars, confusion, histogram, learning_curve, lines
from e2e_utils.close_ups import close_up
from e2e_utils.compare import (
    draw_matches,
    precision_recall,
    show_false,
    show_found,
    show_matches,
    show_mistakes,
)
from e2e_utils.drawing import COLORS
from e2e_utils.grid import tile_grid
from e2e_utils.mistakes import mistakes
from e2e_utils.tile_figure import (
    fullest_tile,
    show_grid,
    show_shared,
    show_shrunk,
    size_table,
)
from e2e_utils.visualize import (
    class_color,
    draw_boxes,
    listing,
    show,
    show_boxes,
    table,
)

NAMES = ["background", *(f"class {i}" for i in range(1, 61))]


def test_a_box_is_drawn_at_its_position_in_the_colour_of_its_class():
    scale = 3
    assert len({class_color(label) for label in range(1, 61)}) == 60
    image = np.zeros((50, 80, 3), np.uint8)
    drawn = draw_boxes(image, np.array([[10, 5, 30, 25]]), [7], NAMES, scale=scale)
    assert image.max() == 0, "the picture given stays as it is"
    assert drawn.shape == (50 * scale, 80 * scale, 3)
    assert drawn[5 * scale, 20 * scale].tolist() == list(class_color(7))
    assert drawn[15 * scale, 20 * scale].max() == 0
    assert drawn[40 * scale, 70 * scale].max() == 0
    caption = draw_boxes(image, [[70, 0, 79, 9]], [7], NAMES, [0.5], captions=True)
    assert caption.shape == image.shape and caption[:14, :50].max() > 0


def test_the_figures_are_made():
    tile = np.zeros((30, 40, 3), np.uint8)
    shown = show([tile, tile], ["a", "b"], labels=[3, 3], class_names=NAMES)
    assert isinstance(shown, Figure)
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "AP50": 0.5}]
    records.append({"step": 3, "loss": 1.0})
    left, right = learning_curve(records).axes
    assert left.lines[0].get_xydata().tolist() == [[1, 2], [3, 1]]
    assert right.lines[0].get_xydata().tolist() == [[2, 0.5]]
    axis = bars({"class 3": 5, "class 9": 50}, "objects", class_names=NAMES).axes[0]
    assert [p.get_width() for p in axis.patches] == [5, 50]
    assert "class 9 50" in bars({"class 9": 50}, "x", form="{:.0f}").get_label()
    axis = histogram([1, 2, 3], "objects", "tiles", marks={"cap": 2, "most": 3}).axes[0]
    assert [line.get_xdata() for line in axis.lines] == [[2, 2], [3, 3]]
    assert [text.get_text().strip() for text in axis.texts] == ["cap: 2", "most: 3"]
    assert len({(m.get_color(), m.get_linestyle()) for m in axis.lines}) == 2
    assert [text.get_ha() for text in axis.texts] == ["left", "right"], "of the line"
    figure = lines({"a": ([1, 2], [3, 4]), "b": ([1], [2])}, "x", "y", ends={"a": "x"})
    assert len(figure.axes[0].lines) == 3 and figure.get_label() == "y against x: a, b"


def test_a_confusion_matrix_shows_the_classes_that_occur_and_background_last():
    matrix = np.zeros((61, 61), int)
    matrix[3, 3], matrix[3, 9], matrix[0, 9], matrix[9, 0] = 6, 2, 1, 4
    axis = confusion(matrix, NAMES).axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["class 3", "class 9", "background"]
    shares = axis.images[0].get_array()
    assert shares.tolist() == [[0.75, 0.25, 0], [0, 0, 1], [0, 1, 0]]
    assert sorted(t.get_text() for t in axis.texts) == ["1", "2", "4", "6"]


def test_a_close_up_is_centred_on_its_boxes_even_at_a_corner():
    image = np.full((100, 100, 3), 90, np.uint8)
    view = close_up(image, [0, 0, 20, 20], None, size=128, least=64)
    assert view.shape == (128, 128, 3) and image.max() == 90
    # the square reaches from -22 to 42, two pixels each: the box from 44 to 84
    assert view[44, 64].tolist() == [255, 255, 255]
    assert view[10, 64].tolist() == [0, 0, 0] and view[64, 64].tolist() == [90] * 3
    view = close_up(image, None, [40, 40, 60, 60], size=128)
    assert view[44, 64].tolist() == list(COLORS["false"])
    view = close_up(image, None, None, [40, 40, 60, 60], size=128)
    assert view[44, 64].tolist() == list(COLORS["right"])
    assert close_up(image, None, [0, 0, 99, 99], size=50).shape == (50, 50, 3)
    with pytest.raises(ValueError, match="all are None"):
        close_up(image)


TRUTH = {"boxes": [[5, 5, 25, 25], [40, 5, 60, 25], [90, 30, 120, 50]]}
TRUTH["labels"] = [1, 1, 2]
FOUND = {
    "boxes_xyxy": [[90, 30, 100, 50], [6, 5, 26, 25], [40, 30, 60, 45], [0, 0, 9, 9]],
    "labels": [2, 1, 3, 1],
    "scores": [0.6, 0.7, 0.8, 0.4],
}


def test_right_false_and_missed_are_told_apart_and_counted():
    image = np.full((60, 100, 3), 90, np.uint8)  # cuts the third label to a third
    canvas, labels = draw_matches(image, TRUTH, FOUND, scale=4)
    assert image.min() == 90 and canvas.shape == (240, 400, 3)
    assert labels == {"right": [1, 2], "false": [3], "missed": [1]}
    for x, y, kind in ((64, 20, "right"), (200, 120, "false"), (200, 20, "missed")):
        assert canvas[y, x].tolist() == list(COLORS[kind]), kind
    thin, _ = draw_matches(image, TRUTH, FOUND, scale=4, thickness=1)
    hidden = [(picture != 90).any(axis=2).sum() for picture in (thin, canvas)]
    assert thin[20, 64].tolist() == list(COLORS["right"]) and hidden[0] < hidden[1]
    _, labels = draw_matches(image, TRUTH, FOUND, window=(30, 0, 70, 28), scale=4)
    assert labels == {"right": [], "false": [], "missed": [1]}, "of the window alone"
    thin, _ = draw_matches(image, TRUTH, FOUND, scale=4, thickness=1)
    inks = [(np.ptp(drawn, axis=2) > 0).sum() for drawn in (canvas, thin)]
    assert inks[0] > 1.5 * inks[1] > 0, "a thinner line"
    with pytest.raises(
        ValueError, match=r"window \(30, 0, 101, 28\) .* 100 x 60 pixels"
    ):
        draw_matches(image, TRUTH, FOUND, window=(30, 0, 101, 28))
    nothing = {"boxes": [], "labels": [], "scores": []}
    for pair, kind in (((TRUTH, nothing), "missed"), ((nothing, FOUND), "false")):
        assert [k for k, v in draw_matches(image, *pair)[1].items() if v] == [kind]
    options = {"score_threshold": 0.75, "titles": ["a", "b"]}
    figure, counts = show_matches([image] * 2, [TRUTH] * 2, [FOUND] * 2, **options)
    assert counts == {"right": 0, "false": 2, "missed": 6}
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [f"{name}: 0 right, 1 false, 3 missed" for name in "ab"]
    figure, _ = show_matches(image, TRUTH, FOUND, NAMES)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[1:] == ["false (1 class 3)", "missed (1 class 1)"]
    rows = {"boxes": [[0, 0, 9, 9]] * 5, "labels": [1, 1, 2, 3, 4], "scores": [0.9] * 5}
    legend = show_matches(image, nothing, rows, list("_abcd"))[0].legends[0]
    many = legend.get_texts()[1].get_text()
    assert many == "false (mostly 2 a, 1 b, 1 c)", "three of the four classes"
    figures = [show_found(image, truth, FOUND, NAMES) for truth in (TRUTH, None)]
    words = [[t.get_text() for t in f.legends[0].get_texts()] for f in figures]
    assert words == [texts, ["class 1", "class 2", "class 3"]], "labels there or not"


def test_boxes_from_a_threshold_up_are_shown_with_their_classes_in_the_legend():
    image = np.zeros((60, 100, 3), np.uint8)
    figure = show_boxes([image] * 2, [TRUTH, FOUND], NAMES, score_threshold=0.75)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["class 1", "class 2", "class 3"]
    of_truth, of_found = (axis.images[0].get_array() for axis in figure.axes)
    assert of_truth[5, 50].tolist() == list(class_color(1)), "all that has no score"
    assert of_found[30, 50].tolist() == list(class_color(3))
    assert of_found[5, 15].max() == 0, "below the threshold"


SCENE = np.full((300, 500, 3), 120, np.uint8)
GRID = tile_grid(300, 500, 200, 0.25)


def test_the_grid_shows_one_tile_and_what_all_of_them_share():
    figure = show_grid(SCENE, GRID, 0, width=500)
    picture = figure.axes[0].images[0].get_array()
    own, shared, outside = picture[50, 50], picture[75, 175], picture[250, 450]
    assert own.tolist() == [120] * 3 and shared[0] > 150 and outside[2] > 150
    red, _, blue = picture[50, 325]  # of the second tile and the third
    assert red < outside[0] and blue > red
    assert "6 tiles" in figure.get_label()


def test_the_fullest_tile_is_shown_shrunk_and_at_its_own_size():
    boxes = np.array([[10, 10, 30, 30], [180, 20, 260, 60], [300, 20, 310, 30]])
    fullest = fullest_tile(GRID, boxes)
    assert GRID[fullest].tolist() == [150, 0, 350, 200], "two of three boxes"
    scene = np.tile(np.uint8([[[0] * 3, [200] * 3]]), (300, 250, 1))  # stripes of 1 px
    small, own = show_shrunk(scene, GRID[fullest], 1280).axes
    assert small.get_title() == "1,280 px shrunk to 640"
    assert np.ptp(small.images[0].get_array()) == 0, "they are gone"
    assert np.ptp(own.images[0].get_array()) > 150


def test_sizes_and_what_borders_cut_are_told_by_class():
    categories = [{"id": i, "name": n} for i, n in ((7, "car"), (8, "bus"), (9, "van"))]
    boxes = [(7, [10, 10, 4, 9]), (7, [145, 10, 6, 6]), (8, [100, 20, 120, 30])]
    rows = [{"image_id": 1, "category_id": c, "bbox": box} for c, box in boxes]
    scene = {"id": 1, "width": 350, "height": 200}  # tiles of x 0 to 200 and 150 to 350
    scenes = {"images": [scene], "categories": categories, "annotations": rows}
    made = size_table(scenes, 200, 0.25).data.split("\n")
    # the second car is whole in one tile, its sixth in the other; the bus in none
    assert made[2:] == [
        "| car | 2 | 6 | 6 | 33% | 0% |",
        "| bus | 1 | 60 | 60 | 100% | 100% |",
    ]


def test_an_object_that_borders_cut_is_shown_in_each_of_its_tiles():
    boxes = [[10, 10, 30, 30], [180, 20, 260, 60]]
    figure = show_shared(SCENE, GRID, boxes, [1, 2], NAMES)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["class 2, 25% of it", "class 2, 100% of it"]
    (axis,) = show_shared(SCENE, GRID, boxes[:1], [1], NAMES).axes
    assert axis.get_title() == "class 1, 100% of it"
    with pytest.raises(ValueError, match="none of 0 objects"):
        show_shared(SCENE, GRID, [], [], NAMES)


def coco_of_two_cars():
    """Ground truth of one scene, and detections: right, beside nothing, on a car again.

    By hand: precision 1, 1/2, 1/3 and recall 1/2 throughout.
    """
    rows = [[0, 0, 10, 10], [50, 50, 10, 10]]
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "height": 100, "width": 100}],
        "categories": [{"id": 7, "name": "car"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 7, "bbox": box}
            for i, box in enumerate(rows)
        ],
    }
    found = [
        {"image_id": 1, "category_id": 7, "bbox": box, "score": score}
        for box, score in ((rows[0], 0.9), ([80, 0, 9, 9], 0.8), ([0, 2, 10, 10], 0.3))
    ]
    return coco, found


def test_precision_over_recall_is_that_of_the_matching_and_marks_the_threshold():
    coco, found = coco_of_two_cars()
    figure = precision_recall(coco, found[::-1], 0.5)
    curve, *others, mark = figure.axes[0].lines
    assert [line.get_xydata().tolist() for line in others] == [
        [[0.5, 1 / 3]],
        [[0.5, 0.5]],
    ]
    assert curve.get_ydata() == pytest.approx([1, 1 / 2, 1 / 3])
    assert curve.get_xdata() == pytest.approx([1 / 2] * 3)
    assert mark.get_xydata().tolist() == [[0.5, 0.5]]
    assert "no box reaches it" in precision_recall(coco, found, 0.95).get_label()


def test_a_mistake_of_each_kind_is_shown(tmp_path):
    coco, found = coco_of_two_cars()
    cv2.imwrite(str(tmp_path / "a.png"), np.full((100, 100, 3), 90, np.uint8))
    figure = show_mistakes(mistakes(coco, found, 0.2), coco, found, tmp_path, most=2)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["duplicate: car", "background: car", "missed: car"]
    blue = [(a.images[0].get_array() == COLORS["right"]).all(2) for a in figure.axes]
    assert [bool(pixels.any()) for pixels in blue] == [True, False, False]
    kinds = mistakes(coco, found, 0.2)
    figure = show_false(kinds, coco, found, tmp_path, "car", most=1)
    assert [axis.get_title() for axis in figure.axes] == ["background, score 0.80"]
    assert show_false(kinds, coco, found, tmp_path, "bus") is None


def test_a_table_aligns_numbers_to_the_right():
    made = table(["", "AP50"], [["car", 0.5], ["bus", None]], "{:.2f}").data.split("\n")
    assert made == ["|  | AP50 |", "| --- | ---: |", "| car | 0.50 |", "| bus |  |"]


def test_a_listing_is_highlighted_in_whatever_page_it_stands():
    html = listing("a: 1  # b", "yaml")._repr_html_()
    assert '<span class="c1"># b</span>' in html
    assert re.search(r"\.output_html \.c1 ?{[^}]*color", html)
    assert '<div class="output_html' in html, "the class of those styles"


def test_pictures_of_a_notebook_have_alternative_texts(tmp_path):
    code = (
        "from e2e_utils import visualize as v\nimport numpy as np\nv.notebook_style()"
    )
    code += "\nv.show(np.zeros((9, 9, 3), np.uint8), alt='a black square')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert output.metadata["image/jpeg"] == {"alt": "a black square"}
