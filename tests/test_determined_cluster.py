"""The trials as a cluster would run them, against a test double of its master.

The double is in determined_master.py and says what of it is real. No master can be
had for a test: Determined's own is a Go program with a database.
"""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import torch
from commands import run

pytest.importorskip("determined")

from determined.experimental import client  # noqa: E402
from determined_master import ExperimentState, MasterDouble  # noqa: E402
from test_determined_core import assert_equal_weights  # noqa: E402

from determined_files import core_api  # noqa: E402
from determined_files.load import download_best, load_trial_checkpoint  # noqa: E402
from determined_files.train import run_local  # noqa: E402
from e2e_utils.evaluate import METRICS  # noqa: E402
from e2e_utils.experiment import load_config  # noqa: E402

ROOT = Path(__file__).parents[1]
FILES = ROOT / "determined_files"
DECAYS = [0.05, 0.5]
SEARCH = {"max_batches": 12, "validation_batches": 6}


@pytest.fixture(autouse=True, scope="module")
def _own_folders(tmp_path_factory):
    """Keep Determined's token and files out of the home directory."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
            patch.setenv(name, str(home / name))
        for name in ("DET_USER", "DET_PASS", "DET_USER_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums round by the number of threads: as the trials
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def master(_own_folders, tmp_path_factory):
    with MasterDouble(tmp_path_factory.mktemp("master") / "double") as double:
        yield double
    # all that the double started has ended with it, torchrun's workers too
    for process in psutil.process_iter(["environ"]):
        environment = process.info["environ"] or {}
        assert environment.get("DET_MASTER") != double.address, process
    assert double.unanswered == []


def det(master, *arguments, code=0):
    """Run the det command of the installed package; what it printed."""
    cli = (sys.executable, "-m", "determined.cli", "-m", master.address)
    done = run(*cli, *arguments, cwd=ROOT, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def create(master, yaml, *settings, code=0):
    """`det e create` of one of the repository's experiments, filled in."""
    options = [argument for setting in settings for argument in ("--config", setting)]
    return det(
        master,
        *("e", "create", FILES / yaml, FILES),
        *("--include", ROOT / "e2e_utils"),
        *("--include", ROOT / "sample_data"),  # of fake.yaml alone
        *options,
        code=code,
    )


FILLED_IN = ("workspace=tutorial", "project=detection")


def short(tiles, **hparams):
    values = {
        "backend": "local",
        "data_dir": str(tiles),
        "global_batch_size": 2,
        "amp": '"off"',
        **hparams,
    }
    return [f"{key}={value}" for key, value in values.items()]


def on_cluster(overrides):
    return [f"hyperparameters.{override}" for override in overrides]


def submit(master, yaml, *settings):
    """(number, experiment) of an experiment that is created."""
    output = create(master, yaml, *FILLED_IN, *settings)
    number = int(output.split("Created experiment ")[1].split()[0])
    return number, master.experiments[number]


def wait(master, number):
    experiment = master.experiments[number]
    ended = (ExperimentState.COMPLETED, ExperimentState.ERROR)
    master.wait_for(lambda: experiment.state in ended)
    logs = [trial.log() for trial in experiment.trials]
    assert experiment.state == ExperimentState.COMPLETED, "\n".join(logs)[-6000:]


def pause_once(master, number, trial):
    """Pause an experiment after the first checkpoint of a trial, and activate it."""
    experiment = client.Determined(master.address).get_experiment(number)
    master.wait_for(lambda: trial.checkpoints or trial.state.name != "ACTIVE")
    experiment.pause()
    master.hold_checkpoints(False)
    master.wait_for(lambda: trial.acknowledged or trial.state.name != "ACTIVE")
    experiment.reload()
    assert experiment.state == client.ExperimentState.PAUSED, trial.log()
    experiment.activate()


def once(trial):
    """What a trial reported, each figure of each step once."""
    reports = [(group, steps) for group, steps, _ in trial.metrics]
    assert len(set(reports)) == len(reports)
    return trial.reported("training"), trial.reported("validation")


def stored(master, trial, steps):
    """Folder of the checkpoint that a trial took after so many steps."""
    by_steps = {c.metadata["steps_completed"]: c.uuid for c in trial.checkpoints}
    return master.folder / "storage" / by_steps[steps]


def assert_equal_models(folder, other):
    assert_equal_weights(
        *(load_trial_checkpoint(f)[0].state_dict() for f in (folder, other))
    )


@pytest.fixture(scope="module")
def search(master, tiles):
    """(number, experiment) of a finished grid of two, paused once on its way."""
    master.hold_checkpoints(True)
    number, experiment = submit(
        master,
        "const.yaml",
        *on_cluster(short(tiles, **SEARCH)),
        "hyperparameters.checkpoint_batches=3",
        f"hyperparameters.weight_decay={{type: categorical, vals: {DECAYS}}}",
        "searcher.name=grid",
        "max_restarts=0",
    )
    pause_once(master, number, experiment.trials[0])
    wait(master, number)
    return number, experiment


@pytest.mark.slow
def test_placeholders_cannot_be_submitted(master):
    output = create(master, "const.yaml", code=1)
    assert "workspace '<WORKSPACE_NAME>' not found" in output
    assert "Created experiment" not in output


@pytest.mark.slow
def test_a_search_runs_a_trial_for_each_value_to_its_end(master, search):
    number, experiment = search
    found = client.Determined(master.address).get_experiment(number).list_trials()
    assert [trial.hparams["weight_decay"] for trial in found] == DECAYS
    assert [trial.state.name for trial in found] == ["COMPLETED"] * 2
    assert [trial.runs for trial in experiment.trials] == [2, 1]  # one was paused
    for trial in experiment.trials:
        losses, figures = once(trial)
        assert max(losses) == 12
        assert sorted(figures) == [6, 12]
        assert trial.progress == 1.0
        assert {"training", "validating", "checkpointing"} <= set(trial.statuses)


@pytest.mark.slow
def test_a_paused_trial_ends_as_an_undisturbed_one(master, search, tiles, tmp_path):
    trial = search[1].trials[0]
    overrides = short(tiles, **SEARCH, weight_decay=trial.hparams["weight_decay"])
    seen = {}
    _, checkpoint = run_local(
        load_config(FILES / "const.yaml", overrides),
        tmp_path,
        report=lambda values, step: seen.setdefault(step, {}).update(values),
    )
    for step, figures in trial.reported("validation").items():
        names = [name for name in METRICS if name in figures]
        assert "mAP" in names
        assert all(figures[name] == seen[step][name] for name in names)
    assert_equal_models(stored(master, trial, 12), checkpoint)


@pytest.mark.slow
def test_the_best_checkpoint_of_a_search_is_downloaded(master, search, tmp_path):
    number, experiment = search
    reported = [
        trial.reported("validation")[checkpoint.metadata["steps_completed"]]["mAP"]
        for trial in experiment.trials
        for checkpoint in trial.checkpoints
        if checkpoint.metadata["steps_completed"] in trial.reported("validation")
    ]
    assert len(reported) >= 2
    folder = download_best(number, tmp_path, master=master.address)
    model, meta = load_trial_checkpoint(folder)
    assert meta["metrics"]["mAP"] == max(reported)
    assert not model.training
    assert (folder / "code" / "model_def.py").is_file()
    with pytest.raises(ValueError, match=f"{number} has no checkpoint with accuracy"):
        download_best(number, tmp_path, "accuracy", master.address)


@pytest.mark.slow
def test_two_slots_speak_once_and_their_checkpoint_loads(master):
    settings = on_cluster(["validation_batches=2", 'amp="off"'])
    number, experiment = submit(master, "fake.yaml", *settings, "max_restarts=0")
    wait(master, number)
    (trial,) = experiment.trials
    losses, figures = once(trial)
    assert max(losses) == 4
    assert sorted(figures) == [2, 4]
    assert "[rank=0] step 4  mAP" in trial.log()
    assert "[rank=1]" in trial.log()
    folder = stored(master, trial, 4)
    raw = torch.load(folder / "state_dict.pth", weights_only=True)
    assert all(key.startswith("module.") for key in raw["models_state_dict"][0])
    assert load_trial_checkpoint(folder)[1]["step"] == 4


@pytest.mark.slow
def test_preempted_core_api_trial_ends_as_an_undisturbed_one(master, tiles, tmp_path):
    overrides = short(tiles, **SEARCH, checkpoint_batches=3)
    master.hold_checkpoints(True)
    number, experiment = submit(master, "core.yaml", *on_cluster(overrides))
    (trial,) = experiment.trials
    pause_once(master, number, trial)
    wait(master, number)
    assert trial.state.name == "COMPLETED", trial.log()
    assert (trial.runs, trial.progress) == (2, 1.0)
    seen = {"training": {}, "validation": {}}

    def keep(values, step):
        seen["training" if "loss" in values else "validation"][step] = values

    config = load_config(FILES / "core.yaml", overrides)
    _, checkpoint = core_api.run_local(config, tmp_path, report=keep)
    assert once(trial) == (seen["training"], seen["validation"])
    assert_equal_models(stored(master, trial, 12), checkpoint)
    best = download_best(number, tmp_path / "best", master=master.address)
    assert load_trial_checkpoint(best)[1]["step"] in (6, 12)
