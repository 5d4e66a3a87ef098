"""Each public helper has a worked example, and the examples are right."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

MODULES = sorted(
    path.stem for path in (Path(__file__).parents[1] / "e2e_utils").glob("[!_]*.py")
)
# Modules, or functions of one, without an example: where else to see them at work
WITHOUT = {
    "autocast": "models.build_model calls it",
    "backbones": "models.build_model calls it",
    "efficientnet_lite": "models.build_model calls it",
    "models": "notebook 3 builds detectors; the file is at its limit of lines",
    "convert": "notebook 2 converts; it needs xView's files",
    "xview_labels": "convert calls it",
    "sliced": "predict.predict_scene calls it",
    "scenes": "notebook 2 reads scenes; the file is at its limit of lines",
    "tiling": "notebook 2 cuts tiles; the file is at its limit of lines",
    "tile_files": "tiling calls it",
    "tile_set": "notebook 3 reads tiles; the file is at its limit of lines",
    "run": "train calls it",
    "train": "notebook 3 trains",
    "smoke_test": "notebook 1 runs it",
    "visualize": "the notebooks draw",
    "compare": "the notebooks draw",
    "map_figure": "the notebooks draw",
    "checkpoint.load_file": "save_checkpoint's example reads with it",
    "checkpoint.load_detector": "model_from_checkpoint calls it",
    "checkpoint.read_checkpoint": "model_from_checkpoint calls it",
    "checkpoint.start_from": "TrainConfig.init_checkpoint calls it",
    "coco.read_coco": "write_coco's example reads with it",
    "evaluate.detect": "notebook 3 evaluates, by train.evaluate_split",
    "experiment.load_config": "read_experiment's example has the same arguments",
    "files.digest": "write_file's example calls it",
    "georeference.georeference_of": "notebook 3 puts boxes on the map",
    "georeference.read_georeference": "notebook 3 puts boxes on the map",
    "georeference.read_georeferences": "notebook 3 puts boxes on the map",
    "predict.predict_files": "README has its command line",
    "prepare.measure_stretch": "notebook 2 prepares tiles",
    "xview_score.three_scores": "notebook 3 scores",
}


def public_functions(module):
    """Names of the functions that a module defines for others."""
    functions = inspect.getmembers(module, inspect.isfunction)
    own = [f for name, f in functions if f.__module__ == module.__name__]
    return {f.__name__: f for f in own if f.__name__[0] != "_" and f.__name__ != "main"}


@pytest.mark.parametrize("name", MODULES)
def test_each_public_helper_has_an_example_that_runs(name):
    module = importlib.import_module(f"e2e_utils.{name}")
    shown = {n for n, f in public_functions(module).items() if ">>> " in f.__doc__}
    expected = {n for n in public_functions(module) if f"{name}.{n}" not in WITHOUT}
    assert shown == (set() if name in WITHOUT else expected)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_what_has_no_example_is_there():
    modules = {name: importlib.import_module(f"e2e_utils.{name}") for name in MODULES}
    names = {f"{m}.{f}" for m in MODULES for f in public_functions(modules[m])}
    assert set(WITHOUT) <= {*MODULES, *names}
