"""The companion notebook on real pictures, where their package can be had."""

import json
from pathlib import Path

import papermill
import pytest
from marked import differences

from sample_data.neon_crowns import fetch_crowns

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "your_own_data.ipynb"
pytestmark = pytest.mark.notebook


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Its run folder after a handful of steps."""
    folder = tmp_path_factory.mktemp("crowns")
    try:
        fetch_crowns(folder / "neon")
    except RuntimeError as error:
        pytest.skip(str(error))
    parameters = {"run_dir": str(folder), "steps": 12, "eval_steps": 12}
    papermill.execute_notebook(
        NOTEBOOK,
        folder / NOTEBOOK.name,
        {**parameters, "score_threshold": 0.05},
        kernel_name="python3",
        cwd=NOTEBOOK.parent,
        progress_bar=False,
    )
    return folder


def test_the_server_gives_the_boxes_of_the_model_on_a_real_picture(run):
    results = json.loads((run / "results.json").read_text())
    assert results["box_difference_px"] <= 0.05  # and `compare` allows few on one side
    assert set(results["ImageNet weights"]) == set(results["random weights"])


def test_the_boxes_lie_on_their_forest_in_florida(run):
    features = json.loads((run / "crowns.geojson").read_text())["features"]
    points = [p for f in features for p in f["geometry"]["coordinates"][0]]
    assert points
    for longitude, latitude in points:
        assert -81.9902 < longitude < -81.9896 and 29.6922 < latitude < 29.6928


def test_marked_outputs_equal_those_of_the_repository(run, request):
    marked, found = differences(NOTEBOOK, run / NOTEBOOK.name, request.session)
    assert marked == 2 and not found, "\n".join(found)
