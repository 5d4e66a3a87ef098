"""The trial in Determined's own Trainer, beside the plain loop of e2e_utils."""

from __future__ import annotations

import base64
import os
import pickle
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from commands import python, run

pytest.importorskip("determined")

from determined.common import context as det_context  # noqa: E402
from test_determined_core import assert_equal_weights, checkpoints  # noqa: E402

from determined_files.load import (  # noqa: E402
    convert_trial_checkpoint,
    load_trial_checkpoint,
)
from determined_files.train import run_local, steps_done  # noqa: E402
from e2e_utils.checkpoint import model_from_checkpoint  # noqa: E402
from e2e_utils.config import TrainConfig  # noqa: E402
from e2e_utils.data import CocoTiles, default_augment, train_loader  # noqa: E402
from e2e_utils.experiment import fetch_tiles, load_config  # noqa: E402
from e2e_utils.tile_set import read_tile_set  # noqa: E402
from e2e_utils.train import fit, forward_losses, seed_step  # noqa: E402

ROOT = Path(__file__).parents[1]
FILES = ROOT / "determined_files"
STEPS = 4
SMALL = {"model": "fasterrcnn_small", "weights_backbone": "null", "lr": 1.5e-3}


@pytest.fixture(autouse=True)
def _own_data_home(tmp_path, monkeypatch):
    """Keep Determined's files out of the home directory."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data_home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config_home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def experiment(tiles, **hparams):
    overrides = {
        "data_dir": str(tiles),
        "global_batch_size": 2,
        "max_batches": STEPS,
        "validation_batches": 1,
        "amp": '"off"',
        **SMALL,
        **hparams,
    }
    return load_config(FILES / "const.yaml", [f"{k}={v}" for k, v in overrides.items()])


class Recorder:
    """What a loop reports: {step: losses} and {step: metrics}; may fail at a step."""

    def __init__(self, fails_at=None):
        self.losses, self.metrics, self.fails_at = {}, {}, fails_at

    def __call__(self, values, step):
        if step == self.fails_at:
            raise OSError("the machine is gone")
        table = self.losses if "loss" in values else self.metrics
        table[step] = values


def interrupted(config, output, step):
    """Train until `step`, where the process fails: (what was reported, checkpoint)."""
    seen = Recorder(step + 1)
    with pytest.raises(OSError, match="is gone"):
        run_local(config, output, report=seen)
    assert sorted(seen.losses) == list(range(1, step + 1))
    return seen, checkpoints(output / "determined")[step]


@pytest.fixture(scope="module")
def plain(tiles, tmp_path_factory):
    """The same run by e2e_utils.train.fit; evaluated, so reported, at each step."""
    output, seen = tmp_path_factory.mktemp("plain"), Recorder()
    lengths = {"steps": STEPS, "batch_size": 2, "eval_steps": 1}
    config = TrainConfig(str(tiles), str(output), **lengths, amp="off")
    fit(config, report=seen, progress=False)
    return output, seen


@pytest.fixture(scope="module")
def whole(tiles, tmp_path_factory):
    seen = Recorder()
    output = tmp_path_factory.mktemp("whole")
    metrics, checkpoint = run_local(experiment(tiles), output, report=seen)
    return metrics, checkpoint, seen


def assert_same_reports(trial, plain):
    """Equal losses, also those that sum up to the loss, and equal COCO metrics."""
    assert sorted(trial.losses) == sorted(plain.losses)
    for step, losses in plain.losses.items():
        assert trial.losses[step] == {k: v for k, v in losses.items() if k != "lr"}
        for name, key in {"mAP": "AP", "mAP_50": "AP50", "mAP_75": "AP75"}.items():
            assert trial.metrics[step][name] == plain.metrics[step][key], (step, name)


@pytest.mark.slow
def test_trial_is_the_plain_loop_and_its_checkpoint_is_read(plain, whole, tmp_path):
    output, expected = plain
    metrics, checkpoint, seen = whole
    assert_same_reports(seen, expected)
    model, meta = model_from_checkpoint(output / "last.pt")
    # and the converted file is one that e2e_utils reads, exports and serves
    file = convert_trial_checkpoint(checkpoint, tmp_path / "best.pt")
    for ours, found in (
        load_trial_checkpoint(checkpoint),
        model_from_checkpoint(file),
    ):
        assert_equal_weights(model.state_dict(), ours.state_dict())
        assert not ours.training
        for key in ("architecture", "settings", "class_names", "tile_size"):
            assert found[key] == meta[key]
        assert (found["step"], found["metrics"]) == (STEPS, metrics)


@pytest.mark.slow
def test_resumed_trial_repeats_the_undisturbed_one(whole, tiles, tmp_path):
    config = experiment(tiles)
    seen, half = interrupted(config, tmp_path, 2)
    assert steps_done(half) == 2
    seen.fails_at = None
    _, end = run_local(config, tmp_path, resume=half, report=seen)
    assert (seen.losses, seen.metrics) == (whole[2].losses, whole[2].metrics)
    assert steps_done(end) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_trial_in_lower_precision_is_the_plain_loop_and_resumes(tiles, tmp_path, amp):
    options = {"ema": 0.5, "repeat_threshold": 1.0, "aspect_ratio_group_factor": 3}
    options |= {"amp": amp, "settings": {"min_size": 96, "max_size": 96}}
    given = {"steps": 3, "batch_size": 2, "eval_steps": 1, **options}
    seen = {"plain": Recorder(), "whole": Recorder()}
    plain = TrainConfig(str(tiles), str(tmp_path / "plain"), **given)
    fit(plain, report=seen["plain"], progress=False)
    config, folder = experiment(tiles, max_batches=3, **options), tmp_path / "halves"
    _, end = run_local(config, tmp_path / "whole", report=seen["whole"])
    seen["halves"], half = interrupted(config, folder, 2)
    seen["halves"].fails_at = None
    _, resumed = run_local(config, folder, resume=half, report=seen["halves"])
    expected, _ = model_from_checkpoint(tmp_path / "plain" / "last.pt")  # the average
    for name, checkpoint in (("whole", end), ("halves", resumed)):
        assert_same_reports(seen[name], seen["plain"])
        model, meta = load_trial_checkpoint(checkpoint)
        assert meta["precision"] == amp
        assert_equal_weights(expected.state_dict(), model.state_dict())

    config["hyperparameters"]["amp"] = "off"
    message = f'was trained in {amp}, .* go on in fp32: give it amp: "{amp}"'
    with pytest.raises(ValueError, match=message):
        run_local(config, folder, resume=half)


@pytest.mark.slow
def test_test_mode_trains_and_validates_one_batch(tiles, tmp_path):
    seen = Recorder()
    config = experiment(tiles, max_batches=100)
    metrics, checkpoint = run_local(config, tmp_path, test_mode=True, report=seen)
    assert sorted(seen.losses) == sorted(seen.metrics) == [1]
    assert 0 <= metrics["mAP"] <= 1
    assert load_trial_checkpoint(checkpoint)[1]["step"] == 1
    names = {path.name for path in (checkpoint / "code").iterdir()}
    assert "model_def.py" in names  # the trial's own folder, not the working directory
    assert "tests" not in names


@pytest.mark.slow
def test_trial_starts_from_the_weights_of_a_checkpoint(plain, tiles, tmp_path):
    file, seen = plain[0] / "last.pt", Recorder()
    config = experiment(tiles, init_checkpoint=str(file), max_batches=1)
    run_local(config, tmp_path, report=seen)
    model, _ = model_from_checkpoint(file)
    data = CocoTiles(*read_tile_set(tiles).split("train"), default_augment())
    images, targets = next(iter(train_loader(data, 2, 1)))
    seed_step(0, 1)
    model.train()
    expected = forward_losses(model, images, targets)["loss"].item()
    assert seen.losses[1]["loss"] == expected

    config["hyperparameters"]["model"] = "fasterrcnn_resnet50_fpn"
    with pytest.raises(ValueError, match="last.pt holds architecture fasterrcnn_small"):
        run_local(config, tmp_path)


# In one start of two processes: the plain loop, then the trial. They join once, because
# torchrun keeps the addresses of a first meeting, which a second one might read.
TWO = """
import sys
from determined_files.train import main
from e2e_utils.config import TrainConfig
from e2e_utils.train import fit

tiles, *arguments = sys.argv[1:]
settings = dict(steps=4, eval_steps=4, batch_size=2, amp="off")
fit(TrainConfig(tiles, "plain", **settings), progress=False)
main(arguments)
"""


@pytest.mark.slow
def test_two_processes_end_like_the_plain_loop_and_one_goes_on(tiles, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    given = ["backend=local", f"data_dir={tiles}", 'amp="off"']
    output = python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("two.py", tiles, "--config", FILES / "fake.yaml", "--output-dir", tmp_path),
        *("validation_batches=4", *given),
        cwd=tmp_path,
    )
    assert re.search(r"step 4  mAP \d", output)
    (checkpoint,) = map(Path, re.findall("checkpoint (.*)", output))  # said once
    raw = torch.load(checkpoint / "state_dict.pth", weights_only=True)
    assert all(key.startswith("module.") for key in raw["models_state_dict"][0])
    model, meta = load_trial_checkpoint(checkpoint)
    assert meta["step"] == 4
    expected, _ = model_from_checkpoint(tmp_path / "plain" / "last.pt")
    assert_equal_weights(expected.state_dict(), model.state_dict())

    config = load_config(FILES / "fake.yaml", ["max_batches=5", *given])
    seen = Recorder()
    run_local(config, tmp_path, resume=checkpoint, report=seen)
    assert sorted(seen.losses) == [5]


@pytest.mark.slow
def test_experiment_cannot_be_created_without_a_master_and_says_so(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    create = ("-m", "determined.cli", "e", "create", FILES / "const.yaml", FILES)
    include = ("--include", ROOT / "e2e_utils")
    done = run(
        *(sys.executable, *create, *include), cwd=tmp_path, env={"DET_MASTER": address}
    )
    assert done.returncode == 1
    assert f"Master not found at {address}" in done.stderr
    assert "DET_MASTER" in done.stderr


def upload(root, *includes):
    """Files of a context as `det e create ROOT --include ...` would send them."""
    return {f.path: f for f in det_context.read_v1_context(root, includes)}


@pytest.mark.slow
def test_uploaded_folder_runs_by_itself(tmp_path, capsys):
    files = upload(FILES, ROOT / "e2e_utils")
    assert {"train.py", "model_def.py", "startup-hook.sh"} <= set(files)
    assert {"e2e_utils/train.py", "e2e_utils/xview_classes.json"} <= set(files)
    for name, file in files.items():
        if file.content:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(base64.b64decode(file.content))
    code = "import train, core_api, load, e2e_utils.train as t; print(t.__file__)"
    path = python("-c", code, cwd=tmp_path, env={"PYTHONPATH": None}).strip()
    assert Path(path).parent == tmp_path / "e2e_utils"


def test_upload_of_the_whole_repository_is_small(capsys):
    files = upload(ROOT)
    size = sum(len(file.content or "") for file in files.values())
    assert size < 20 * 2**20  # of 95 MiB
    for left_out in (".venv", "runs", "notebooks", "tests"):
        assert not any(name.split("/")[0] == left_out for name in files)
    assert "determined_files/model_def.py" in files


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"backend": "azure"}, "backend must be one of local.*got 'azure'"),
        ({"backend": "local"}, "backend local needs a folder as data_dir, got ''"),
        ({"backend": "local", "data_dir": "s3://b/t"}, "needs a folder.*'s3://b/t'"),
        ({"backend": "aws", "data_dir": "gs://b/t"}, "like s3://bucket/tiles, got 'gs"),
        ({"backend": "gcs", "data_dir": "gs://b/t"}, "backend gcs needs cache_dir"),
    ],
)
def test_backend_and_data_dir_must_fit(hparams, message):
    with pytest.raises(ValueError, match=message):
        fetch_tiles(hparams)


def test_tiles_in_a_bucket_are_fetched_once_a_machine(monkeypatch, tmp_path):
    import e2e_utils.storage

    calls = []
    monkeypatch.setattr(e2e_utils.storage, "sync", lambda *a, **k: calls.append(a))
    hparams = {"backend": "aws", "data_dir": "s3://b/t", "cache_dir": str(tmp_path)}
    for local_rank in (0, 1):
        assert fetch_tiles(hparams, local_rank=local_rank) == str(tmp_path)
    assert calls == [("s3://b/t", str(tmp_path))]


def test_fake_tiles_are_coco_tiles(tmp_path):
    hparams = load_config(FILES / "fake.yaml")["hyperparameters"]
    tiles = read_tile_set(fetch_tiles(hparams, tmp_path))
    train, val = CocoTiles(*tiles.split("train")), CocoTiles(*tiles.split("val"))
    assert (len(train), len(val), len(train.class_names)) == (8, 4, 61)
    image, target = train[0]
    assert image.shape == (3, 300, 300)
    assert len(target["boxes"]) == 4


def test_folder_that_is_no_checkpoint_is_named(tmp_path):
    for read in (load_trial_checkpoint, steps_done):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            read(tmp_path)
    torch.save({"model": {}}, tmp_path / "state_dict.pth")
    with pytest.raises(ValueError, match="not written by ObjectDetectionTrial"):
        load_trial_checkpoint(tmp_path)


def test_trial_state_with_code_in_it_is_not_run(tmp_path):
    (tmp_path / "trial_state.pkl").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(pickle.UnpicklingError, match="is no plain value"):
        steps_done(tmp_path)


def test_yaml_that_is_no_experiment_is_named(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("- 1")
    with pytest.raises(ValueError, match="x.yaml is not an experiment configuration"):
        load_config(path)
