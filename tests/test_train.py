import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

from e2e_utils.models import model_from_checkpoint
from e2e_utils.train import (
    TrainConfig,
    amp_dtype,
    fit,
    lr_factor,
    make_optimizer,
    parse_args,
    read_metrics,
)

TINY = {
    "steps": 12,
    "eval_steps": 6,
    "lr": 1e-3,
    "settings": {"min_size": 96, "max_size": 96},
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(tiles, output, **changes) -> TrainConfig:
    return TrainConfig(str(tiles), str(output), **{**TINY, **changes})


def losses(folder) -> list[tuple]:
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


@pytest.fixture(scope="module")
def whole_run(tiles, tmp_path_factory):
    """An undisturbed run of 12 steps, what it reported, and what it returned."""
    output = tmp_path_factory.mktemp("whole")
    told, saved = [], []
    torch.set_num_threads(1)
    last = fit(
        config(tiles, output),
        report=lambda m, s: told.append((s, m)),
        save=saved.append,
        progress=False,
    )
    return output, told, saved, last


def test_a_run_reports_and_saves_at_each_evaluation(whole_run):
    output, told, saved, last = whole_run
    assert saved == [6, 12] and last["step"] == 12
    assert [s for s, m in told if "AP50" in m] == [6, 12]
    assert [s for s, m in told if "loss" in m] == [6, 12]
    assert {"last.pt", "best.pt", "metrics.jsonl"} == {p.name for p in output.iterdir()}
    assert [r["step"] for r in read_metrics(output / "metrics.jsonl")] == [6, 6, 12, 12]


def test_the_checkpoint_describes_the_model_and_loads_it(whole_run):
    output, *_ = whole_run
    model, meta = model_from_checkpoint(output / "best.pt")
    assert meta["class_names"] == ["background", "square", "bar", "dot"]
    assert meta["tile_size"] == 300 and meta["config"]["steps"] == 12
    assert model.transform.min_size == (96,)


def test_a_stopped_run_continues_to_the_same_weights(tiles, tmp_path, whole_run):
    output, *_ = whole_run
    calls = iter(range(100))
    fit(config(tiles, tmp_path), should_stop=lambda: next(calls) == 7, progress=False)
    stopped = torch.load(tmp_path / "last.pt", weights_only=True)
    assert stopped["step"] == 8
    fit(config(tiles, tmp_path), progress=False)
    ours = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    theirs = torch.load(output / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_finished_run_is_not_trained_again(tiles, tmp_path, whole_run):
    output, _, _, last = whole_run
    shutil.copytree(output, tmp_path / "copy")
    told = []
    again = fit(config(tiles, tmp_path / "copy"), report=lambda *a: told.append(a))
    assert told == [] and again == last


def test_another_configuration_does_not_continue_a_run(tiles, whole_run):
    output, *_ = whole_run
    with pytest.raises(ValueError, match="lr: 0.001 there, 0.5 asked"):
        fit(config(tiles, output, lr=0.5), progress=False)


def test_a_loss_that_is_not_finite_names_its_tiles(tiles, tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+.*train_\d"):
        fit(config(tiles, tmp_path, lr=1e30, clip_grad=0.0, warmup=0.0), progress=False)
    assert not (tmp_path / "last.pt").exists()


def test_missing_tiles_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_images_300_02"):
        fit(config(tmp_path / "nowhere", tmp_path / "out"))


def test_weight_decay_spares_norms_and_biases(tiles):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    groups = make_optimizer(model, config(tiles, "x")).param_groups
    assert [len(g["params"]) for g in groups] == [1, 3]
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0]


def test_the_rate_warms_up_then_falls(tiles):
    cosine = lr_factor(config(tiles, "x", warmup=0.1), 100, 10)
    assert cosine(0) < cosine(5) < cosine(10) == pytest.approx(1.0)
    assert cosine(55) == pytest.approx(0.505) and cosine(100) == pytest.approx(0.01)
    steps = config(tiles, "x", warmup=0.0, lr_scheduler="multistep", lr_steps=[4, 8])
    factor = lr_factor(steps, 100, 10)
    assert [factor(s) for s in (0, 39, 40, 80)] == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "'adamw' or 'sgd', got 'adam'"),
        ({"lr_scheduler": "step"}, "'cosine' or 'multistep', got 'step'"),
        ({"amp": "yes"}, "'auto', 'on' or 'off', got 'yes'"),
        ({"model": "yolo"}, "unknown model 'yolo'"),
    ],
)
def test_a_wrong_value_is_quoted_with_the_valid_ones(tiles, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(config(tiles, tmp_path, **changes))


def test_bfloat16_follows_the_hardware_unless_asked():
    cpu = torch.device("cpu")
    assert amp_dtype("off", cpu) is None and amp_dtype("on", cpu) is torch.bfloat16
    assert amp_dtype("auto", torch.device("cuda")) is torch.bfloat16


def test_every_field_is_a_flag():
    flags = "--data-path d --output-dir o --epochs 26 --lr-steps 16 22 --cache"
    parsed = parse_args([*flags.split(), "--settings", '{"min_size": 400}'])
    assert parsed.lr_steps == [16, 22] and parsed.epochs == 26 and parsed.cache
    assert parsed.settings == {"min_size": 400} and parsed.steps is None
    assert dataclasses.asdict(parsed) == dataclasses.asdict(
        TrainConfig("d", "o", cache=True, settings={"min_size": 400})
    )


@pytest.mark.slow
def test_two_processes_under_torchrun_evaluate_like_one(tiles, tmp_path):
    settings = json.dumps(TINY["settings"])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "e2e_utils.train",
        "--data-path",
        tiles,
        "--output-dir",
        tmp_path / "two",
        "--steps",
        "6",
        "--batch-size",
        "1",
        "--lr",
        "1e-3",
        "--eval-steps",
        "6",
        "--settings",
        settings,
    ]
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    from e2e_utils.train import CocoTiles, evaluate_split

    model, meta = model_from_checkpoint(tmp_path / "two" / "last.pt")
    dataset = CocoTiles(*config(tiles, tmp_path).split("val"))
    alone, _ = evaluate_split(model, dataset, torch.device("cpu"))
    gathered = meta["metrics"]
    for key in ("AP", "AP50", "AR_500"):
        assert math.isclose(alone[key], gathered[key], abs_tol=1e-6)
