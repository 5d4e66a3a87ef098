"""Hardware that this machine is not: the same road on other instruction sets.

Each run differs from this machine in one thing. An instruction set that the CPU has
can be hidden, one that it lacks cannot be lent: such a run is skipped with its name.
"""

import json
import platform
import re

import pytest
import torch
from commands import python

pytestmark = pytest.mark.slow
ROUNDING = 1e-3  # of the first losses: other kernels round otherwise

ROAD = """
import json, sys
from pathlib import Path
import torch
from kserve_utils.artefact import write_artefact
from e2e_utils.data import CocoTiles, train_loader
from kserve_utils.engines import read_artefact
from kserve_utils.export import strip_checkpoint
from e2e_utils.models import build_model
from e2e_utils.tile_set import read_tile_set
from e2e_utils.train import TrainConfig, fit, forward_losses, read_metrics, seed_step

tiles, folder = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(int(sys.argv[3]))  # OMP_NUM_THREADS gives at most the cores
settings = {"min_size": 96, "max_size": 96, "box_score_thresh": 0.02}  # of few steps

def trained(name, stop=None):
    config = TrainConfig(
        str(tiles), str(folder / name), steps=6, eval_steps=6, device="cpu",
        settings=settings,
    )
    calls = iter(range(1, 99))
    fit(config, should_stop=lambda: next(calls) == stop, progress=False)
    return torch.load(folder / name / "last.pt", weights_only=True)

torch.manual_seed(0)
model = build_model("fasterrcnn_small", 4, **settings)
batch = next(iter(train_loader(CocoTiles(*read_tile_set(tiles).split("train")), 2, 1)))
seed_step(0, 1)
first = {k: v.item() for k, v in forward_losses(model, *batch).items()}
whole = trained("whole")
assert trained("halves", stop=3)["step"] == 3
halves = trained("halves")
same = all(torch.equal(v, halves["model"][k]) for k, v in whole["model"].items())
logs = [read_metrics(folder / n / "metrics.jsonl") for n in ("whole", "halves")]
stripped = strip_checkpoint(folder / "whole" / "last.pt", folder / "stripped.pth")
data = CocoTiles(*read_tile_set(tiles).split("val"))
pictures = [data.read(i).permute(1, 2, 0).numpy() for i in range(3)]
parity = read_artefact(write_artefact(stripped, folder / "artefact", tiles=pictures))
print("road", json.dumps({
    "aten": torch.backends.cpu.get_cpu_capability(),
    "threads": torch.get_num_threads(),
    "resumed": same and logs[0] == logs[1],
    "precision": whole["precision"],
    "first": first,
    "parity": parity["parity"],
}))
"""


ISA = """
import torch
with torch.no_grad():  # of oneDNN, whose first product prints its instruction set
    torch.nn.functional.conv2d(torch.ones(4, 64, 64, 64), torch.ones(64, 64, 3, 3))
"""


def lacks(name: str) -> bool:
    """Whether this CPU has no such instruction set, by what torch tells of it."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    here = torch.backends.cpu.get_cpu_capability()
    if platform.machine() not in ("x86_64", "AMD64") or here not in order:
        return True
    return order.index(here) < order.index(name.upper())


def road(tiles, folder, threads=1, **changes) -> dict:
    """What a run of ROAD found, which holds whatever it ran on."""
    alike = {"ATEN_CPU_CAPABILITY": None, "ONEDNN_MAX_CPU_ISA": None}
    env = {**alike, "OMP_NUM_THREADS": "1", **changes}
    printed = python("-c", ROAD, tiles, folder, threads, env=env)
    found = json.loads(re.search("^road (.*)$", printed, re.M)[1])
    assert found["threads"] == threads and found["resumed"]
    assert found["precision"] == "fp32"  # the small detector's, whatever the CPU has
    assert {"openvino", "onnxruntime"} <= found["parity"].keys()
    assert found["parity"]["torch"]["boxes"] > 0
    return found


@pytest.fixture(scope="module")
def first_losses(tiles, tmp_path_factory):
    """Those of this machine as it is."""
    found = road(tiles, tmp_path_factory.mktemp("as_it_is"))["first"]
    return pytest.approx(found, rel=ROUNDING)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ATEN_CPU_CAPABILITY", "default"),
        ("ATEN_CPU_CAPABILITY", "avx2"),
        ("ATEN_CPU_CAPABILITY", "avx512"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2"),
    ],
)
def test_the_road_with_another_instruction_set(
    tiles, tmp_path, first_losses, variable, value
):
    if lacks(value):
        here = torch.backends.cpu.get_cpu_capability()
        pytest.skip(f"this CPU has no {value}: {here}")
    found = road(tiles, tmp_path, **{variable: value})
    assert found["first"] == first_losses
    if variable == "ATEN_CPU_CAPABILITY":
        assert found["aten"].lower() == value
    else:  # not in the run itself: OpenVINO's oneDNN fails where it is to report itself
        env = {"ONEDNN_VERBOSE": "1", variable: value}
        (isa,) = re.findall(r",cpu,isa:(.*)$", python("-c", ISA, env=env), re.M)
        assert isa.endswith(value)


def test_the_road_with_four_threads(tiles, tmp_path, first_losses):
    assert road(tiles, tmp_path, threads=4)["first"] == first_losses
