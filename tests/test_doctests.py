"""Each public helper has a worked example, and the examples are right."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    f"{package}.{path.stem}"
    for package in ("e2e_utils", "kserve_utils")
    for path in (ROOT / package).glob("[!_]*.py")
)
# Functions without an example, and why: most need what a test does not have
WITHOUT = {
    "e2e_utils.train.read_metrics": "fit's example reads with it",
    "e2e_utils.visualize.notebook_style": "it changes the notebook that calls it",
    "e2e_utils.compare.show_false": "show_mistakes's example has the same arguments",
    "kserve_utils.approve.approve_or_say_why_not": "needs a trained detector",
    "kserve_utils.approve.approve_precision": "needs a trained detector",
    "kserve_utils.client.predict_grpc": "asks a server",
    "kserve_utils.client.predict_remote": "asks a server",
    "kserve_utils.client.refusal": "reads a server's answer",
    "kserve_utils.client.scene_geojson": "asks a server",
    "kserve_utils.cluster.gateway": "asks a cluster",
    "kserve_utils.cluster.host_of": "asks a cluster",
    "kserve_utils.cluster.kubectl": "asks a cluster",
    "kserve_utils.cluster.planned": "runs a script of this repository by its path",
    "kserve_utils.engines.load_eager": "load_engine calls it",
    "kserve_utils.engines.load_engine": "write_artefact's example loads with it",
    "kserve_utils.export.read_stripped": "strip_checkpoint's example reads with it",
    "kserve_utils.export.write_mar": "takes seconds; notebook 5 writes one",
    "kserve_utils.export.write_model_store": "needs the file of write_mar",
    "kserve_utils.graphs.write_onnx": "write_artefact calls it",
    "kserve_utils.graphs.write_openvino": "write_artefact calls it",
    "kserve_utils.servers.java_home": "not every machine has Java",
    "kserve_utils.servers.predictor": "starts a server",
    "kserve_utils.servers.torchserve": "starts a server",
    "kserve_utils.try_page.answer": "asks a server",
}


def public_functions(name):
    """The functions that a module defines for others, by their full names."""
    functions = inspect.getmembers(importlib.import_module(name), inspect.isfunction)
    own = {f"{name}.{n}": f for n, f in functions if f.__module__ == name}
    return {full: f for full, f in own.items() if f.__name__[0] != "_"}


@pytest.mark.parametrize("name", MODULES)
def test_each_public_helper_has_an_example_that_runs(name):
    functions = public_functions(name)
    functions.pop(f"{name}.main", None)  # of a command line
    shown = {full for full, f in functions.items() if ">>> " in (f.__doc__ or "")}
    assert shown == set(functions) - set(WITHOUT)
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_what_has_no_example_is_there():
    assert set(WITHOUT) <= {full for name in MODULES for full in public_functions(name)}
