"""Ray Train and Ray Tune on this machine, beside the plain loop and torchrun."""

import itertools
import json
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from commands import python
from serving import ROOT
from test_storage import client

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.config import TrainConfig
from e2e_utils.experiment import read_experiment
from e2e_utils.train import fit, read_metrics

pytest.importorskip("ray")

import ray  # noqa: E402
from ray.train import Checkpoint  # noqa: E402

from ray_files.adapter import ray_session  # noqa: E402
from ray_files.train import train  # noqa: E402
from ray_files.tune import search  # noqa: E402

pytestmark = pytest.mark.slow
FILES = ROOT / "determined_files"
SETTINGS = {"min_size": 96, "max_size": 96}
PATIENCE = 300  # seconds for what takes ten on idle cores


def config(tiles, output="", **changes) -> TrainConfig:
    values = {"steps": 30, "eval_steps": 10, "save_steps": 2, "batch_size": 1}
    values |= {"lr": 1e-3, "amp": "off", "settings": SETTINGS, **changes}
    return TrainConfig(str(tiles), str(output), **values)


def ray_processes(parent: psutil.Process) -> list[psutil.Process]:
    """Processes of Ray below one, however deep."""
    found = []
    for process in parent.children(recursive=True):
        try:
            command = process.name() + " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if "ray" in command:
            found.append(process)
    return found


@pytest.fixture(scope="module", autouse=True)
def one_ray():
    """A Ray of two CPUs for these tests, of which nothing may be left."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ray_session(3):
        started = ray_processes(psutil.Process())
        assert any("raylet" in process.name() for process in started)
        yield
    torch.set_num_threads(threads)
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive and not ray_processes(psutil.Process())


def tables(folder) -> list[dict]:
    return read_metrics(Path(folder) / "metrics.jsonl")


def assert_same_run(ours, theirs):
    """Equal losses, figures and weights, bit for bit."""
    assert tables(ours) == tables(theirs)
    states = [
        torch.load(Path(folder) / "last.pt", weights_only=True)
        for folder in (ours, theirs)
    ]
    assert states[0]["step"] == states[1]["step"]
    for key, value in states[1]["model"].items():
        assert torch.equal(states[0]["model"][key], value), key


@pytest.fixture(scope="module")
def undisturbed(tiles, tmp_path_factory):
    return train(config(tiles), 2, tmp_path_factory.mktemp("undisturbed"))


def test_two_workers_compute_what_torchrun_computes(undisturbed, tiles, tmp_path):
    python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "e2e_utils.train", "--data-path", tiles, "--output-dir", tmp_path),
        *("--steps", 30, "--eval-steps", 10, "--save-steps", 2, "--batch-size", 1),
        *("--lr", 1e-3, "--amp", "off", "--settings", json.dumps(SETTINGS)),
        env={"OMP_NUM_THREADS": "1"},
    )
    assert_same_run(undisturbed["checkpoint"], tmp_path)
    assert list(undisturbed["losses"]) == [10, 20, 30]
    assert undisturbed["metrics"]["batches"] == 30
    assert 0 <= undisturbed["metrics"]["mAP"] <= undisturbed["metrics"]["mAP_50"] <= 1
    assert undisturbed["resumed"] == []
    kept = Path(undisturbed["checkpoint"])
    assert [path.name for path in kept.parent.glob("checkpoint_2*")] == [kept.name]
    model, meta = model_from_checkpoint(kept / "best.pt")
    assert meta["class_names"] == ["background", "square", "bar", "dot"]
    assert not model.training


def test_a_run_of_other_settings_names_the_run_in_its_way(undisturbed, tiles, tmp_path):
    run = Path(undisturbed["checkpoint"]).parent
    shutil.copytree(run, tmp_path / "taken")
    (kept,) = (tmp_path / "taken").glob("checkpoint_2*")
    before = tables(kept)
    with pytest.raises(ray.train.TrainingFailedError) as raised:
        other = config(tiles, momentum=0.5)
        train(other, 1, tmp_path, name="taken", max_failures=0)
    message = str(raised.value)
    assert f"{tmp_path}/taken" in message and "(--name)" in message
    assert "momentum" in message and "ray_worker_" not in message.splitlines()[-1]
    assert tables(kept) == before


def kill_a_worker(registry: Path, killed: list) -> None:
    """Once Ray knows of a checkpoint, end one training process by SIGKILL."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if registry.exists():
            for process in ray_processes(psutil.Process()):
                if "RayTrainWorker" in process.name() + "".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)
                    return
        time.sleep(0.02)


def test_a_killed_worker_is_replaced_and_the_run_ends_like_the_undisturbed(
    undisturbed, tiles, tmp_path
):
    killed: list[int] = []
    registry = tmp_path / "train" / "checkpoint_manager_snapshot.json"
    killer = threading.Thread(target=kill_a_worker, args=(registry, killed))
    killer.start()
    done = train(config(tiles), 2, tmp_path)
    killer.join()
    assert len(killed) == 1
    (resumed,) = done["resumed"]
    assert 0 < resumed < 30
    assert done["losses"] == undisturbed["losses"]
    assert_same_run(done["checkpoint"], undisturbed["checkpoint"])


@pytest.fixture
def bucket(moto):
    """URL of an empty bucket of moto's S3 server on this machine."""
    client(moto).create_bucket(Bucket="runs")
    address = moto.removeprefix("http://")
    return f"s3://key:secret@runs/ray?endpoint_override={address}&scheme=http"


def test_one_worker_computes_what_the_plain_loop_computes_into_a_bucket(
    tiles, tmp_path, bucket
):
    # in bf16, emulated where the CPU has none: the other runs here are in float32
    few = {"steps": 3, "eval_steps": 1, "batch_size": 2, "amp": "bf16"}
    fit(config(tiles, tmp_path / "plain", **few), progress=False)
    done = train(config(tiles, **few), 1, bucket, name="one")
    assert list(done["losses"]) == [1, 2, 3]
    assert done["records"] == tables(tmp_path / "plain")
    kept = Checkpoint(done["checkpoint"]).to_directory(tmp_path / "kept")
    assert_same_run(kept, tmp_path / "plain")
    assert done["checkpoint"].startswith("s3://key:secret@runs/ray/one/checkpoint_")


def experiment(file, **hparams):
    found = read_experiment(FILES / f"{file}.yaml")
    found["hyperparameters"] |= {"amp": "off", "settings": SETTINGS, **hparams}
    return found


def test_asha_stops_what_does_not_learn(tiles, tmp_path, capfd):
    rates = {"type": "categorical", "vals": [2e-3, 1e-7]}
    found = experiment("adaptive", max_batches=12, validation_batches=3, lr=rates)
    found["searcher"] |= {"max_time": 12, "divisor": 2, "max_rungs": 2}
    # one after the other, so that the outcome does not hang on timing
    found["searcher"] |= {"max_trials": 3, "max_concurrent_trials": 1}
    # draws the rate that learns first, then the other twice
    found["reproducibility"] = {"experiment_seed": 1}
    found["hyperparameters"] |= {"weight_decay": 0.05, "clip_grad": 10.0}
    seen = []
    lock = threading.Lock()  # cannot be pickled, as much in a notebook cannot

    def keep(record: dict) -> None:
        with lock:
            seen.append((record["trial"], record["state"]))

    records = search(found, tiles, tmp_path, on_result=keep)
    assert [record["trial"] for record in records] == [0, 1, 2]
    assert [record["hparams"]["lr"] for record in records] == [2e-3, 1e-7, 1e-7]
    assert [record["stopped_at"] for record in records] == [None, 6, 6]
    for record in records:
        batches = [step for step, _ in record["curve"]]
        assert batches == list(range(3, batches[-1] + 1, 3))
        assert all(0 <= value <= 1 for _, value in record["curve"])
        assert record["best"] == max(value for _, value in record["curve"])
        assert list(record["hparams"]) == ["lr"]
        assert batches[-1] == record["stopped_at"] or record["state"] == "finished"
        validations = [state for trial, state in seen if trial == record["trial"]]
        assert validations == ["running"] * len(batches) + [record["state"]]
        model, meta = model_from_checkpoint(record["checkpoint"])
        assert meta["config"]["lr"] == record["hparams"]["lr"]
        assert meta["metrics"]["AP"] == record["best"]  # what was searched: mAP
    assert max(records, key=lambda record: record["best"]) is records[0]
    out = capfd.readouterr()
    assert out.out == out.err == ""  # fit for a notebook
    with pytest.raises(FileExistsError, match="holds a search; remove it"):
        search(found, tiles, tmp_path)


def test_a_grid_is_gone_through_and_a_trial_that_fails_has_its_error(tiles, tmp_path):
    found = experiment(
        "const-distributed-search",
        model="fasterrcnn_small",
        weights_backbone=None,
        workers=0,
        global_batch_size=2,
        max_batches=2,
        validation_batches=2,
        warmup_batches=1,
        lr_step_batches=[1],
        lr={"type": "categorical", "vals": [0.01, 0.001]},
        amp={"type": "categorical", "vals": ["off", "oops"]},
    )
    found["resources"]["slots_per_trial"] = 1
    records = search(found, tiles, tmp_path)
    values = [tuple(record["hparams"].values()) for record in records]
    assert sorted(values) == sorted(itertools.product((0.001, 0.01), ("off", "oops")))
    for record in records:
        good = record["hparams"]["amp"] == "off"
        assert record["state"] == ("finished" if good else "failed")
        assert record["stopped_at"] is None
        if good:
            assert [step for step, _ in record["curve"]] == [2]
            state = torch.load(record["checkpoint"], weights_only=True)
            assert state["scheduler"]["base_lrs"] == [record["hparams"]["lr"]] * 2
            assert record["error"] is None
        else:
            assert "got 'oops'" in record["error"]
            assert record["checkpoint"] is None and record["best"] is None


def test_a_trial_of_two_slots_has_two_workers(tiles, tmp_path):
    found = experiment("adaptive", max_batches=2, validation_batches=2)
    found["searcher"] |= {"max_time": 2, "max_rungs": 1, "max_trials": 1}
    found["resources"]["slots_per_trial"] = 2
    (record,) = search(found, tiles, tmp_path)
    assert record["state"] == "finished"
    assert [step for step, _ in record["curve"]] == [2]
    state = torch.load(record["checkpoint"], weights_only=True)
    assert state["config"]["batch_size"] == 1  # of global_batch_size 2
    assert state["config"]["lr"] == record["hparams"]["lr"]
