"""README's commands for other data, read from it and executed as they are printed.

What is changed is where things are, and how long a training is. The notebooks have no
label of our own data, no size and no class in them: three classes with the ids 1, 5 and
9 on PNG scenes of strange names, cut into tiles of 512 px; and a folder shaped like
xView, with the recipe for it; and 16-bit TIFFs of four bands, blue first.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import rasterio
from commands import python
from own_data import write_16_bit_scenes, write_scenes
from rasterio.windows import Window
from test_run import SAME_MERGE

from sample_data.dataset import draw_dataset

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.notebook

SHORT = {
    "03": {"changes": {"steps": 6, "eval_steps": 6}},
    "04": {
        "batches": 2,
        "more_batches": 2,
        "processes": 0,
        "search_trials": 2,
        "search_batches": 4,
    },
}
# No network: no COCO weights. And what has learned nothing gives no class more than
# 1/61, which is a box to the servers all the same.
SETTINGS = {"box_score_thresh": 0.005}
SHORT_XVIEW = {
    **SHORT,
    "03": {
        "changes": {"steps": 2, "eval_steps": 2, "workers": 0}
        | {"weights": None, "settings": SETTINGS}
    },
}


def commands(run_name: str) -> list[list[str]]:
    """README's papermill commands that write to ../runs/<run_name>."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^papermill .*$", text, re.M)
    return [shlex.split(line) for line in lines if f"../runs/{run_name}" in line]


def execute(command: list[str], paths: dict[str, Path], changes: dict) -> None:
    """A command of README, with its example paths replaced and parameters added."""
    for example, path in paths.items():
        command = [word.replace(example, str(path)) for word in command]
    for name, value in changes.get(command[1][:2], {}).items():
        command += ["-y", f"{name}: {json.dumps(value)}"]
    command += ["--no-progress-bar", "--kernel", "python3"]
    python("-m", *command, cwd=ROOT / "notebooks", timeout=900)


def test_all_notebooks_run_on_pngs_of_other_classes_by_parameters(tmp_path):
    labels = write_scenes(tmp_path / "own" / "scenes")
    paths = {
        "/path/to/scenes": labels.parent / "scenes",
        "/path/to/labels.json": labels,
    }
    printed = commands("own")
    assert [command[1][:2] for command in printed] == ["02", "03", "04", "05"]
    for command in printed:
        changes = {"02": {"overlap_ratio": 0.25}, **SHORT}
        execute(command, paths | {"../runs": tmp_path}, changes)
    tiles = json.loads((tmp_path / "own" / "tiles" / "tiles.json").read_text())
    assert (tiles["tile_size"], tiles["overlap"]) == (512, 0.25)
    served = json.loads((tmp_path / "own" / "serving" / "results.json").read_text())
    assert len(served["tile"]) == 9
    assert all(s["box_difference_px"] <= 0.05 for s in served["tile"].values())


def small_xview(folder: Path) -> Path:
    """Corners of two drawn scenes: a ResNet-50 takes its time."""
    draw_dataset(folder, scenes=2)
    for path in (folder / "train_images").glob("[!.]*.tif"):
        with rasterio.open(path) as file:
            corner = file.read(window=Window(0, 0, 540, 540))
            profile = {**file.profile, "width": 540, "height": 540}
        with rasterio.open(path, "w", **profile) as file:
            file.write(corner)
    return folder


def test_the_recipe_for_xview_runs_on_a_folder_of_its_shape(tmp_path):
    xview = small_xview(tmp_path / "of xView")
    printed = commands("xview")
    assert [command[1][:2] for command in printed] == ["02", "03", "04", "05"]
    for command in printed:
        paths = {"/path/to/xview": xview, "../runs": tmp_path}
        execute(command, paths, SHORT_XVIEW)
    served = json.loads((tmp_path / "xview" / "serving" / "results.json").read_text())
    assert len(served["tile"]) == 9
    assert all(s["box_difference_px"] <= 0.05 for s in served["tile"].values())
    results = json.loads((tmp_path / "xview" / "training" / "results.json").read_text())
    sahi, ours = (results["of_merges"][way] for way in SAME_MERGE)
    assert results["step"] == 2 and sahi == ours


def test_scenes_of_16_bits_and_other_bands_run_by_parameters(tmp_path):
    labels = write_16_bit_scenes(tmp_path / "deep")
    paths = {"/path/to/scenes": labels.parent / "scenes"}
    paths |= {"/path/to/labels.json": labels, "../runs": tmp_path}
    printed = commands("deep")
    assert [command[1][:2] for command in printed] == ["02", "03"]
    for command in printed:
        execute(command, paths, SHORT)
    stretch = json.loads((tmp_path / "deep" / "tiles" / "tiles.json").read_text())
    assert stretch["stretch"]["bands"] == [3, 2, 1]
    assert (tmp_path / "deep" / "training" / "results.json").exists()
