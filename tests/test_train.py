import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.config import TrainConfig, parse_args
from e2e_utils.data import CocoTiles
from e2e_utils.optim import lr_factor, make_optimizer
from e2e_utils.train import evaluate_split, fit, read_metrics, train_step

TINY = {
    "steps": 12,
    "eval_steps": 6,
    "lr": 1e-3,
    "settings": {"min_size": 96, "max_size": 96},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def config(tiles, output, **changes) -> TrainConfig:
    return TrainConfig(str(tiles), str(output), **{**TINY, **changes})


def losses(folder) -> list[tuple]:
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def same_weights(one, other) -> bool:
    """Whether two checkpoints hold equal weights, those of the optimizer among them."""
    ours, theirs = (torch.load(path, weights_only=True) for path in (one, other))
    for part in ("model", "trained"):
        if set(ours.get(part, {})) != set(theirs.get(part, {})):
            return False
        for key, value in theirs.get(part, {}).items():
            if not torch.equal(ours[part][key], value):
                return False
    moments = [state["optimizer"]["state"] for state in (ours, theirs)]
    return moments[0].keys() == moments[1].keys() and all(
        torch.equal(moments[0][i][key], value)
        for i, row in moments[1].items()
        for key, value in row.items()
    )


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
    assert same_weights(tmp_path / "last.pt", output / "last.pt")
    assert losses(tmp_path) == losses(output)


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


def test_a_run_starts_from_the_weights_of_another(tiles, tmp_path, whole_run):
    output, *_ = whole_run
    begin = tmp_path / "begin.pt"
    shutil.copy(output / "last.pt", begin)
    still = {"init_checkpoint": str(begin), "lr": 0.0, "weight_decay": 0.0, "steps": 1}
    fit(config(tiles, tmp_path / "still", **still), progress=False)
    learned = torch.load(begin, weights_only=True)["model"]
    told = torch.load(tmp_path / "still" / "last.pt", weights_only=True)
    assert told["step"] == 1  # another run, not that one continued
    trained = [key for key in learned if "running" not in key and "num_b" not in key]
    assert len(trained) > 40
    assert all(torch.equal(told["model"][key], learned[key]) for key in trained)

    wanted = config(tiles, tmp_path / "on", init_checkpoint=str(begin), steps=4)
    fit(wanted, should_stop=lambda: True, progress=False)
    begin.unlink()  # the run goes on from its own last.pt
    assert fit(wanted, progress=False)["step"] == 4


def test_the_best_checkpoint_is_that_of_the_metric(tiles, tmp_path):
    changes = {"steps": 4, "eval_steps": 1, "best_metric": "AP75", "lr": 0.01}
    fit(config(tiles, tmp_path / "run", **changes), progress=False)
    told = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "AP75" in r]
    highest = max(record["AP75"] or 0.0 for record in told)
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert (best["metrics"]["AP75"] or 0.0) == highest == best["best"]


def test_weights_that_do_not_fit_the_run_are_refused(tiles, tmp_path, whole_run):
    begin = str(whole_run[0] / "last.pt")
    for changes, message in (
        ({"model": "ssd300_vgg16", "settings": {}}, "holds architecture fasterrcnn_sm"),
        (
            {"settings": {"anchor_sizes": [[4, 8, 16, 32]] * 3}},
            "trained with other settings",
        ),
        ({"init_checkpoint": str(tmp_path / "gone.pt")}, "gone.pt"),
    ):
        changes = {"init_checkpoint": begin, **changes}
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            fit(config(tiles, tmp_path / "on", **changes), progress=False)
        assert not (tmp_path / "on" / "last.pt").exists()
    state = torch.load(begin, weights_only=True)
    state["class_names"] = ["background", "boat", "bar", "dot"]
    torch.save(state, tmp_path / "boats.pt")
    changes = {"init_checkpoint": str(tmp_path / "boats.pt")}
    with pytest.raises(
        ValueError, match="boats.pt has 'boat' as label 1, the run 'square'"
    ):
        fit(config(tiles, tmp_path / "on", **changes), progress=False)


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
    given = {"warmup": 0.0, "lr_scheduler": "multistep"}
    for when in ({"lr_steps": [4, 8]}, {"lr_milestones": [40, 80]}):  # epochs, steps
        factor = lr_factor(config(tiles, "x", **given, **when), 100, 10)
        rates = [factor(step) for step in (0, 39, 40, 80)]
        assert rates == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "'adamw' or 'sgd', got 'adam'"),
        ({"lr_scheduler": "step"}, "'cosine' or 'multistep', got 'step'"),
        ({"amp": "yes"}, "one of auto, off, bf16, fp16, got 'yes'"),
        ({"device": "cuda:99"}, "device 'cuda:99', but torch .* finds"),
        ({"model": "yolo"}, "unknown model 'yolo'"),
        ({"ema": 1.0}, "ema must be in 0..1, below 1, got 1.0"),
        ({"cache": "ram"}, "cache must be True or False, got 'ram'"),
        ({"repeat_threshold": -1}, "repeat_threshold must be in 0..1, got -1"),
    ],
)
def test_a_wrong_value_is_quoted_with_the_valid_ones(tiles, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(config(tiles, tmp_path, **changes))


def test_every_field_is_a_flag():
    flags = (
        "--data-path d --output-dir o --epochs 26 --lr-steps 16 22 --cache --scale-lr"
    )
    parsed = parse_args([*flags.split(), "--settings", '{"min_size": 400}'])
    assert parsed.lr_steps == [16, 22] and parsed.epochs == 26 and parsed.cache
    assert parsed.settings == {"min_size": 400} and parsed.steps is None
    assert dataclasses.asdict(parsed) == dataclasses.asdict(
        TrainConfig("d", "o", cache=True, scale_lr=True, settings={"min_size": 400})
    )


class Toy(torch.nn.Module):
    """A model of two losses in torchvision's convention, which reads no value."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 4, 3)

    def forward(self, images, targets):
        out = self.layer(torch.stack(images))
        return {"a": out.square().mean(), "b": (out - 1).abs().mean()}


class ReadsOnTheHost(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: .item(), bool(), float(), int()."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_reads_no_value_on_the_host(tiles, optimizer):
    model = Toy()
    made = make_optimizer(model, config(tiles, "x", optimizer=optimizer))
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    with ReadsOnTheHost() as seen:
        values = train_step(model, made, images, [target] * 2)
    assert seen.count == 0
    with ReadsOnTheHost() as seen:
        values["loss"].item()
    assert seen.count == 1  # the probe sees one where there is one


@pytest.mark.slow
def test_the_average_of_weights_is_followed_and_evaluated(tiles, tmp_path):
    """Against the average computed here, from runs that save each step's weights.

    That it goes on after an interruption is shown with a run that is killed.
    """
    given = {"ema": 0.5, "save_steps": 1, "steps": 4, "eval_steps": 4}
    seen = []

    def keep(step):
        state = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
        seen.append((state["trained"], state["model"]))

    fit(config(tiles, tmp_path / "a", **given), save=keep, progress=False)
    key = "roi_heads.box_predictor.cls_score.weight"
    for (_, before), (step, (trained, after)) in zip(
        seen[:-1], list(enumerate(seen, start=1))[1:], strict=True
    ):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * before[key] + (1 - decay) * trained[key]
        assert torch.allclose(after[key], expected, atol=1e-7)
        assert not torch.equal(after[key], trained[key])
    best = torch.load(tmp_path / "a" / "best.pt", weights_only=True)
    assert torch.equal(best["model"][key], seen[-1][1][key]) and "trained" not in best

    # the average does not change what is trained
    fit(config(tiles, tmp_path / "c", **{**given, "ema": 0.0}), progress=False)
    plain = torch.load(tmp_path / "c" / "last.pt", weights_only=True)["model"]
    assert torch.equal(plain[key], seen[-1][0][key])


def test_a_rare_class_lengthens_an_epoch(tiles, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiles, data)
    coco = json.loads((data / "train_300_02.json").read_text())
    coco["annotations"][0]["category_id"] = 2  # a class that one tile of 12 has
    (data / "train_300_02.json").write_text(json.dumps(coco))
    given = {"steps": None, "epochs": 1, "eval_steps": 100, "repeat_threshold": 1.0}
    fit(config(data, tmp_path / "a", **given), progress=False)
    whole = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    assert whole["step"] > 6 and whole["epoch"] == 1  # six without repeats


def test_a_run_can_be_saved_more_often_than_evaluated(tiles, tmp_path):
    saved = []
    given = {"steps": 7, "eval_steps": 6, "save_steps": 3}
    fit(config(tiles, tmp_path, **given), save=saved.append, progress=False)
    assert saved == [3, 6, 7]


def test_where_the_run_is_saved_and_cached_may_change_on_the_way(tiles, tmp_path):
    calls = iter(range(9))
    fit(
        config(tiles, tmp_path, steps=2),
        should_stop=lambda: next(calls) == 0,
        progress=False,
    )
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    for new in ("ema", "repeat_threshold"):
        del state["config"][new]  # as a run of before these fields existed has it
    torch.save(state, tmp_path / "last.pt")
    told = []
    fit(
        config(tiles, tmp_path, steps=2, save_steps=1, cache=True),
        report=lambda _, step: told.append(step),
        progress=False,
    )
    assert told == [2, 2]


def test_a_line_that_a_kill_cut_is_dropped(tiles, tmp_path, whole_run):
    output, *_ = whole_run
    shutil.copytree(output, tmp_path / "copy")
    log = tmp_path / "copy" / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 13, "loss": 0.4')
    fit(config(tiles, tmp_path / "copy"), progress=False)
    assert log.read_text() == whole


@pytest.mark.slow
def test_a_compiled_backbone_trains_alike_and_keeps_its_names(
    tiles, tmp_path, monkeypatch
):
    compiled, real = [], torch.nn.Module.compile

    def traced_only(module):  # inductor would take a minute of C++ for these steps
        compiled.append(type(module).__name__)
        real(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced_only)
    given = {"steps": 2, "eval_steps": 2, "amp": "off"}
    fit(config(tiles, tmp_path / "a", **given), progress=False)
    fit(config(tiles, tmp_path / "b", **given, compile=True), progress=False)
    assert compiled == ["BackboneWithFPN"]
    ours, theirs = losses(tmp_path / "b"), losses(tmp_path / "a")
    assert ours[0][1] == pytest.approx(theirs[0][1], rel=1e-3)
    model_from_checkpoint(tmp_path / "b" / "last.pt")


def command_line(tiles, output, **flags) -> list[str]:
    flags = {
        "lr": 1e-3,
        "amp": "off",
        "settings": json.dumps(TINY["settings"]),
        **flags,
    }
    told = ["--data-path", tiles, "--output-dir", output]
    for name, value in flags.items():
        told += ["--" + name.replace("_", "-"), value]
    return ["-m", "e2e_utils.train", *map(str, told)]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

KILLED = """
import json, sys, torch
from e2e_utils.train import TrainConfig, fit
torch.set_num_threads(1)
config = TrainConfig(**json.loads(sys.argv[1]))
fit(config, should_stop=lambda: print("step", flush=True), progress=False)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_ends_like_the_undisturbed_one(tiles, tmp_path):
    given = {"steps": 30, "eval_steps": 12, "save_steps": 5, "amp": "off", "ema": 0.9}
    fit(config(tiles, tmp_path / "whole", **given), progress=False)
    killed = config(tiles, tmp_path / "killed", **given)
    rng = random.Random(0)
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, json.dumps(dataclasses.asdict(killed))],
            env=ONE_THREAD,
            stdout=subprocess.PIPE,
            text=True,
        )
        wait = rng.randint(1, 9)  # steps, then into a step, a save or an evaluation
        try:
            heard = [child.stdout.readline() for _ in range(wait)]
            time.sleep(rng.uniform(0, 0.1))
            assert heard == ["step\n"] * wait  # it did not end before
        finally:
            child.kill()
            child.communicate(timeout=120)
        assert child.returncode == -signal.SIGKILL
    fit(killed, progress=False)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    ours, theirs = (
        (tmp_path / name / "metrics.jsonl").read_text() for name in ("killed", "whole")
    )
    assert ours == theirs
    for name in ("last.pt", "best.pt"):
        assert same_weights(tmp_path / "killed" / name, tmp_path / "whole" / name)


def wait_for(path, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_run_goes_on(tiles, tmp_path):
    flags = {"steps": 400, "eval_steps": 400, "save_steps": 2, "workers": 1}
    child = subprocess.Popen(
        [sys.executable, *command_line(tiles, tmp_path, **flags)],
        env=ONE_THREAD,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(tmp_path / "last.pt")
        os.killpg(child.pid, signal.SIGTERM)  # as Slurm does: its loader too
        _, told = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 143, told
    step = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert f"last.pt holds step {step}, and the same command goes on" in told
    assert "Traceback" not in told
    assert 2 <= step < 400
    # one step more, from where it stopped; that it ends like an undisturbed run is
    # shown above, after a harder end
    again = config(tiles, tmp_path, **flags, amp="off")
    fit(again, should_stop=lambda: True, progress=False)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == step + 1


@pytest.mark.slow
def test_processes_of_torchrun_stop_at_one_step(tiles, tmp_path):
    flags = {"steps": 400, "eval_steps": 400, "save_steps": 5, "batch_size": 1}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    child = subprocess.Popen(
        [sys.executable, *launch, *command_line(tiles, tmp_path, **flags)],
        env=ONE_THREAD,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(tmp_path / "last.pt")
        child.terminate()  # torchrun passes it on to its processes
        _, told = child.communicate(timeout=120)
    finally:
        child.kill()
    step = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert step % 10 == 0 and step < 400
    assert told.count(f"last.pt holds step {step}") == 1


TWO_SAVES = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from e2e_utils.train import TrainConfig, fit

config = TrainConfig(**json.loads(sys.argv[1]))
saved = []

def save(step):
    on_disk = torch.load(Path(config.output_dir) / "last.pt", weights_only=True)
    told = torch.tensor([step, on_disk["step"]])
    dist.all_reduce(told)  # a collective call: each process makes it
    saved.append(told.tolist())

fit(config, save=save, progress=False)
# one write, so that lines of two processes do not mix
os.write(1, (json.dumps([dist.get_rank(), saved]) + "\\n").encode())
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tiles, tmp_path_factory):
    """(folder of tiles, folder of the run, rank -> saves) of one start of torchrun.

    Everything that only several processes can show, in one configuration.
    """
    folder = tmp_path_factory.mktemp("two_processes")
    data = shutil.copytree(tiles, folder / "tiles")
    (folder / "two_saves.py").write_text(TWO_SAVES)
    given = {"steps": 4, "eval_steps": 4, "save_steps": 1, "batch_size": 1, "warmup": 0}
    given |= {"amp": "off", "scale_lr": True, "cache": True}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [
            *(sys.executable, *launch, folder / "two_saves.py"),
            json.dumps(dataclasses.asdict(config(data, folder / "run", **given))),
        ],
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = dict(json.loads(line) for line in done.stdout.splitlines())
    return data, folder / "run", told


@pytest.mark.slow
def test_every_process_is_told_of_a_save_once_the_file_is_there(two_processes):
    expected = [[2 * step, 2 * step] for step in (1, 2, 3, 4)]
    assert two_processes[2] == {0: expected, 1: expected}


@pytest.mark.slow
def test_the_rate_grows_with_the_number_of_processes_on_request(two_processes):
    _, run, _ = two_processes
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["scheduler"]["base_lrs"] == [2e-3, 2e-3]
    assert state["config"]["lr"] == 1e-3


@pytest.mark.slow
def test_two_processes_under_torchrun_evaluate_like_one(two_processes):
    data, run, _ = two_processes
    model, meta = model_from_checkpoint(run / "last.pt")
    dataset = CocoTiles(*config(data, run).split("val"))
    alone, _ = evaluate_split(model, dataset, torch.device("cpu"))
    assert alone["AR_500"] > 0
    for key in ("AP", "AP50", "AR_500"):
        assert math.isclose(alone[key], meta["metrics"][key], abs_tol=1e-6)
