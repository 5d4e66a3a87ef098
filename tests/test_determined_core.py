"""The Core API script off a cluster, beside the plain loop that it runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from commands import python

pytest.importorskip("determined")

from determined_files import core_api  # noqa: E402
from determined_files.load import (  # noqa: E402
    convert_trial_checkpoint,
    load_trial_checkpoint,
)
from e2e_utils.checkpoint import model_from_checkpoint  # noqa: E402
from e2e_utils.config import TrainConfig  # noqa: E402
from e2e_utils.evaluate import METRICS  # noqa: E402
from e2e_utils.experiment import load_config  # noqa: E402
from e2e_utils.train import fit, read_metrics  # noqa: E402

ROOT = Path(__file__).parents[1]
FILES = ROOT / "determined_files"
STEPS = 6
SMALL = {"model": "fasterrcnn_small", "weights_backbone": "null", "lr": 1.5e-3}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def overrides(tiles, **hparams):
    values = {
        "data_dir": str(tiles),
        "global_batch_size": 2,
        "max_batches": STEPS,
        "validation_batches": 3,
        "checkpoint_batches": 2,
        "amp": '"off"',
        **SMALL,
        **hparams,
    }
    return [f"{key}={value}" for key, value in values.items()]


def experiment(tiles, **hparams):
    return load_config(FILES / "core.yaml", overrides(tiles, **hparams))


def stop_after(step):
    """A should_stop that says so once `step` steps are done."""
    calls = iter(range(1, 1000))
    return lambda: next(calls) >= step


def checkpoints(storage):
    """{step: checkpoint folder} in the folder where Determined keeps them."""
    files = storage.glob("*/metadata.json")
    return {json.loads(f.read_text())["steps_completed"]: f.parent for f in files}


def steps_completed(folder):
    """{step: checkpoint folder} of a run."""
    return checkpoints(folder / "checkpoints")


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@pytest.fixture(scope="module")
def plain(tiles, tmp_path_factory):
    """The folder of the same run by e2e_utils.train.fit alone."""
    output = tmp_path_factory.mktemp("plain")
    lengths = {"steps": STEPS, "batch_size": 2, "eval_steps": 3}
    config = TrainConfig(str(tiles), str(output), **lengths, amp="off")
    fit(config, progress=False)
    return output


@pytest.fixture(scope="module")
def whole(tiles, tmp_path_factory):
    """(metrics, last checkpoint, folder, what was reported) of an undisturbed run."""
    output, seen = tmp_path_factory.mktemp("whole"), []
    metrics, checkpoint = core_api.run_local(
        experiment(tiles), output, report=lambda v, s: seen.append((s, v))
    )
    return metrics, checkpoint, output, seen


@pytest.mark.slow
def test_losses_metrics_and_weights_are_those_of_the_plain_loop(plain, whole):
    metrics, checkpoint, output, seen = whole
    lines = read_metrics(plain / "metrics.jsonl")
    assert read_metrics(output / "metrics.jsonl") == lines
    for (step, values), line in zip(seen, lines, strict=True):
        assert step == line["step"]
        for name, value in values.items():
            assert value == line[METRICS.get(name, name)], (step, name)
    assert metrics["step"] == STEPS
    assert metrics["mAP"] == lines[-1]["AP"]
    expected, _ = model_from_checkpoint(plain / "last.pt")
    model, _ = load_trial_checkpoint(checkpoint)
    assert_equal_weights(expected.state_dict(), model.state_dict())


@pytest.mark.slow
def test_checkpoints_hold_the_run_and_their_step(whole, tmp_path):
    _, checkpoint, output, _ = whole
    folders = steps_completed(output)
    assert sorted(folders) == [2, 3, 4, 6]
    assert folders[6] == checkpoint
    for step, folder in folders.items():
        model, meta = load_trial_checkpoint(folder)
        assert meta["step"] == step
        assert not model.training
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == ["best.pt", "last.pt", "metadata.json", "metrics.jsonl"]
    file = convert_trial_checkpoint(checkpoint, tmp_path / "model.pt")
    converted = torch.load(file, weights_only=True)
    last = torch.load(output / "last.pt", weights_only=True)
    assert_equal_weights(converted["model"], last["model"])
    assert "optimizer" in last and "optimizer" not in converted


@pytest.mark.slow
def test_preempted_run_continues_as_if_undisturbed(whole, tiles, tmp_path):
    _, end, output, _ = whole
    first, second = tmp_path / "first", tmp_path / "second"
    config = experiment(tiles)
    metrics, half = core_api.run_local(config, first, should_stop=stop_after(5))
    assert metrics["step"] == 3
    assert sorted(steps_completed(first)) == [2, 3, 4, 5]
    assert steps_completed(first)[5] == half
    _, finished = core_api.run_local(config, second, resume=half)
    expected = (output / "metrics.jsonl").read_bytes()
    assert (second / "metrics.jsonl").read_bytes() == expected
    for name in ("last.pt", "best.pt"):
        assert_equal_weights(
            torch.load(finished / name, weights_only=True)["model"],
            torch.load(end / name, weights_only=True)["model"],
        )
    with pytest.raises(ValueError, match="holds a run already"):
        core_api.run_local(config, second, resume=half)
    # the finished run has no step left: the same figures, no new checkpoint
    again, none = core_api.run_local(config, second)
    assert (again["step"], none) == (STEPS, None)


# In one start of two processes: the plain loop, then the Core API's, which is stopped
# at the tenth of twelve steps and goes on in another folder.
TWO = """
import sys
from pathlib import Path
from determined_files import core_api
from determined_files.train import show
from e2e_utils.config import TrainConfig
from e2e_utils.experiment import load_config
from e2e_utils.processes import start_process_group
from e2e_utils.train import fit

tiles, path, *overrides = sys.argv[1:]
start_process_group()
settings = dict(steps=12, batch_size=2, eval_steps=8, amp="off")
fit(TrainConfig(tiles, "plain", **settings), progress=False)
config = load_config(path, overrides)
core_api.run_local(config, "first", report=show, should_stop=lambda: True)
half = max(Path("first/checkpoints").iterdir(), key=lambda p: p.stat().st_mtime)
core_api.run_local(config, "second", half, report=show)
"""


@pytest.mark.slow
def test_two_processes_stop_and_continue_as_the_plain_loop(tiles, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    output = python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("two.py", tiles, FILES / "core.yaml"),
        *overrides(tiles, global_batch_size=4, max_batches=12),
        *("validation_batches=8", "checkpoint_batches=100"),
        cwd=tmp_path,
    )
    assert [output.count(f"step {step}  mAP") for step in (8, 12)] == [1, 1]
    assert sorted(steps_completed(tmp_path / "first")) == [8, 10]
    assert sorted(steps_completed(tmp_path / "second")) == [12]
    lines = read_metrics(tmp_path / "plain" / "metrics.jsonl")
    assert read_metrics(tmp_path / "second" / "metrics.jsonl") == lines
    expected, _ = model_from_checkpoint(tmp_path / "plain" / "last.pt")
    model, meta = load_trial_checkpoint(steps_completed(tmp_path / "second")[12])
    assert meta["step"] == 12
    assert_equal_weights(expected.state_dict(), model.state_dict())


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tiles, tmp_path):
    long = {"max_batches": 400, "validation_batches": 400}
    command = [sys.executable, FILES / "core_api.py", "--config", FILES / "core.yaml"]
    command += ["--output-dir", "run", *overrides(tiles, **long)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not steps_completed(tmp_path / "run") and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, errors
    stopped_at = max(steps_completed(tmp_path / "run"))
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert 2 <= state["step"] == stopped_at < 400
    # what comes back is the run: from the step where it stopped, to the next
    steps = []
    core_api.run_local(
        experiment(tiles, **long),
        tmp_path / "run",
        should_stop=lambda: steps.append(1) or True,
    )
    assert len(steps) == 1
    assert max(steps_completed(tmp_path / "run")) == stopped_at + 1
    assert not psutil.pid_exists(process.pid)


def test_folder_without_a_run_cannot_be_resumed(tmp_path):
    config = load_config(FILES / "core.yaml")
    with pytest.raises(FileNotFoundError, match="it is no checkpoint of core_api.py"):
        core_api.run_local(config, tmp_path / "new", resume=tmp_path)


def test_trial_continues_itself_and_forks_no_other(tmp_path):
    (tmp_path / "last.pt").touch()
    (tmp_path / "metadata.json").write_text('{"steps_completed": 4, "trial_id": 3}')
    context = SimpleNamespace(
        info=SimpleNamespace(task_type="TRIAL", trial=SimpleNamespace(trial_id=5)),
        distributed=SimpleNamespace(local_rank=0, broadcast_local=print),
    )
    with pytest.raises(ValueError, match="trial 5 was given .* of trial 3"):
        core_api._restore(context, tmp_path, tmp_path / "new")
    context.info.trial.trial_id = 3
    core_api._restore(context, tmp_path, tmp_path / "new")
    assert (tmp_path / "new" / "last.pt").exists()


def test_script_off_a_cluster_says_what_it_needs(capsys):
    with pytest.raises(SystemExit) as stopped:
        core_api.main(["--config", "core.yaml"])
    assert stopped.value.code == 2
    assert (
        "--output-dir are required off a Determined cluster" in capsys.readouterr().err
    )
