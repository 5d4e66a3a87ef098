"""The five notebooks, each executed once and in order, and what they recorded."""

import json
from pathlib import Path

import papermill
import pytest
import torch
from marked import differences

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.data import CocoTiles
from e2e_utils.tile_set import read_tile_set
from e2e_utils.train import evaluate_split

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
pytestmark = pytest.mark.notebook

# A shorter training and search than a reader's; nothing else differs. What 01 and 02
# mark depends on the size of the sample, so they run at their own.
RUN = {
    "01_install": {},
    "02_data_prep": {},
    "03_local_training": {"changes": {"steps": 300, "eval_steps": 100}},
    "04_cluster_training": {
        "more_batches": 40,
        "search_trials": 3,
        "search_batches": 24,
    },
    "05_kserve_deploy": {},
}

SAME_MERGE = ("SAHI, NMS on IoU", "predict_scene, border=0")


def execute(name: str, output: Path, parameters: dict) -> None:
    papermill.execute_notebook(
        NOTEBOOKS / f"{name}.ipynb",
        output / f"{name}.ipynb",
        parameters,
        kernel_name="python3",
        cwd=NOTEBOOKS,
        progress_bar=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder after all five; a failing notebook fails every test here."""
    folder = tmp_path_factory.mktemp("run")
    for name, parameters in RUN.items():
        execute(name, folder, {"run_dir": str(folder), **parameters})
    return folder


def results_of(run: Path, stage: str) -> dict:
    """What a notebook recorded of itself."""
    return json.loads((run / stage / "results.json").read_text())


def test_the_detector_learned(run):
    results = results_of(run, "training")
    assert results["step"] == 300
    # 300 of the default's 750 steps; guessing stays below 0.01, and the detector from
    # random weights reaches 0.15 by then
    assert results["AP50"] > 0.5


def test_its_average_precision_in_bf16_is_that_in_fp32(run):
    """Emulated where the CPU has no bf16: slow there, and the same arithmetic."""
    detector, meta = model_from_checkpoint(run / "training" / "best.pt")
    tiles = CocoTiles(*read_tile_set(run / "tiles").split("val"))
    cpu = torch.device("cpu")
    full, lower = (
        evaluate_split(detector, tiles, cpu, dtype)[0]["AP"]
        for dtype in (None, torch.bfloat16)
    )
    assert full > 0.2
    assert abs(full - lower) <= 0.005


def test_its_scene_agrees_with_sahi_and_has_about_as_many_boxes_as_labels(run):
    results = results_of(run, "training")
    sahi, ours = (results["of_merges"][way] for way in SAME_MERGE)
    assert sahi == ours and sahi[0] > 0
    assert results["scene_right"] > 0.4 * results["scene_labelled"]
    assert results["scene_boxes"] < 2 * results["scene_labelled"]


def test_determined_and_ray_trained_with_the_losses_of_the_plain_loop(run):
    results = results_of(run, "cluster/determined")
    assert results["largest_loss_difference"] == 0
    assert results["largest_loss_difference_ray"] == 0
    assert results["converted_weights_equal"]
    assert 0 < results["batches_of_search"] <= 3 * 24


def test_fine_tuning_helped_in_the_other_city(run):
    results = results_of(run, "cluster/determined")
    assert results["mAP_50"] > results["mAP_50_before"] + 0.01


def test_every_server_gave_the_boxes_of_the_model(run):
    results = results_of(run, "serving")
    assert len(results["tile"]) == 9 and results["boxes"] > 0
    for found in [*results["tile"].values(), results["scene"]]:
        assert found["box_difference_px"] <= 0.05
        assert found["score_difference"] <= 1e-4
    # of a thousand boxes one may lie on the threshold, on either side of it
    assert results["scene"]["boxes_of_one_side"] <= 2
    assert results["scene_boxes"] > 10


def test_a_wrong_parameter_stops_with_its_name_and_the_valid_ones(run, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="fasterrcnn_tiny") as e:
        parameters = {"run_dir": str(run), "changes": {"model": "fasterrcnn_tiny"}}
        execute("03_local_training", tmp_path, parameters)
    assert "fasterrcnn_small" in e.value.evalue


def test_a_notebook_without_its_predecessor_names_the_missing_folder(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="tiles"):
        execute("03_local_training", tmp_path, {"run_dir": str(tmp_path)})


@pytest.mark.parametrize("name", RUN)
def test_marked_outputs_equal_those_of_the_repository(name, run, request):
    executed = run / f"{name}.ipynb"
    marked, found = differences(NOTEBOOKS / f"{name}.ipynb", executed, request.session)
    assert marked > 0
    assert not found, "\n".join(found)
