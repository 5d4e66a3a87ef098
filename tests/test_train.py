import dataclasses
import json
import operator
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from commands import python
from own_data import CLASSES, write_scenes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models._api import WeightsEnum

from e2e_utils.checkpoint import model_from_checkpoint, save_checkpoint
from e2e_utils.config import RECIPES, TrainConfig, from_recipe, parse_args
from e2e_utils.data import CocoTiles
from e2e_utils.describe_tiles import describe_split
from e2e_utils.experiment import train_config
from e2e_utils.models import build_model, resolved_settings
from e2e_utils.optim import lr_factor, make_optimizer
from e2e_utils.run import Run, as_they_are, warn_if_shrunk
from e2e_utils.tile_set import read_tile_set
from e2e_utils.train import evaluate_split, fit, read_metrics, train_step

TINY = {
    "steps": 12,
    "eval_steps": 6,
    "lr": 1e-3,
    "settings": {"min_size": 96, "max_size": 96},
}

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def config(tiles, output, **changes) -> TrainConfig:
    return TrainConfig(str(tiles), str(output), **{**TINY, **changes})


def losses(folder) -> list[tuple]:
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def same_run(one, other) -> bool:
    """Whether two folders hold equal metrics, weights and states of the optimizer."""
    logs = [(folder / "metrics.jsonl").read_text() for folder in (one, other)]
    if logs[0] != logs[1]:
        return False
    for name in ("last.pt", "best.pt"):
        states = [torch.load(path / name, weights_only=True) for path in (one, other)]
        kept = [
            tree_leaves([state.get(part) for part in ("model", "trained", "optimizer")])
            for state in states
        ]
        for ours, theirs in zip(*kept, strict=True):
            equal = torch.equal if isinstance(ours, torch.Tensor) else operator.eq
            if not equal(ours, theirs):
                return False
    return True


@pytest.fixture(scope="module")
def whole_run(tiles, tmp_path_factory):
    """The folder of an undisturbed run, what it reported, saved and returned."""
    output = tmp_path_factory.mktemp("whole")
    reported, saved = [], []
    torch.set_num_threads(1)
    last = fit(
        config(tiles, output),
        report=lambda metrics, step: reported.append((step, metrics)),
        save=saved.append,
        progress=False,
    )
    return output, reported, saved, last


def test_a_run_reports_and_saves_at_each_evaluation(whole_run):
    output, reported, saved, last = whole_run
    assert saved == [6, 12] and last["step"] == 12
    assert [step for step, metrics in reported if "AP50" in metrics] == [6, 12]
    assert [step for step, metrics in reported if "loss" in metrics] == [6, 12]
    assert {"last.pt", "best.pt", "metrics.jsonl"} == {p.name for p in output.iterdir()}
    assert [r["step"] for r in read_metrics(output / "metrics.jsonl")] == [6, 6, 12, 12]
    model, meta = model_from_checkpoint(output / "best.pt")
    assert meta["class_names"] == ["background", "square", "bar", "dot"]
    assert meta["tile_size"] == 96 and meta["config"]["steps"] == 12
    assert model.transform.min_size == (96,)


def test_a_stopped_run_continues_to_the_same_weights(tiles, tmp_path, whole_run):
    calls = iter(range(100))
    fit(config(tiles, tmp_path), should_stop=lambda: next(calls) == 7, progress=False)
    stopped = torch.load(tmp_path / "last.pt", weights_only=True)
    assert stopped["step"] == 8
    del stopped["config"]["ema"]  # as a run of before this field existed has it
    torch.save(stopped, tmp_path / "last.pt")
    # where it is cached and saved may change on the way
    fit(config(tiles, tmp_path, cache=True, save_steps=12), progress=False)
    assert same_run(tmp_path, whole_run[0])


def test_a_finished_run_is_not_trained_again_and_loses_a_line_that_a_kill_cut(
    tiles, tmp_path, whole_run
):
    output, _, _, last = whole_run
    shutil.copytree(output, tmp_path / "copy")
    log = tmp_path / "copy" / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 13, "loss": 0.4')
    reported = []
    again = fit(config(tiles, tmp_path / "copy"), report=lambda *a: reported.append(a))
    assert reported == [] and again == last and log.read_text() == whole


def test_a_run_starts_from_the_weights_of_another(tiles, tmp_path, whole_run):
    output, *_ = whole_run
    begin = tmp_path / "begin.pt"
    shutil.copy(output / "last.pt", begin)
    still = {"init_checkpoint": str(begin), "lr": 0.0, "weight_decay": 0.0, "steps": 1}
    fit(config(tiles, tmp_path / "still", **still), progress=False)
    learned = torch.load(begin, weights_only=True)["model"]
    begun = torch.load(tmp_path / "still" / "last.pt", weights_only=True)
    assert begun["step"] == 1  # another run, not that one continued
    trained = [key for key in learned if "running" not in key and "num_b" not in key]
    assert len(trained) > 40
    assert all(torch.equal(begun["model"][key], learned[key]) for key in trained)

    wanted = config(tiles, tmp_path / "on", init_checkpoint=str(begin), steps=4)
    fit(wanted, should_stop=lambda: True, progress=False)
    begin.unlink()  # the run goes on from its own last.pt
    assert fit(wanted, progress=False)["step"] == 4


def test_a_run_from_a_checkpoint_downloads_no_weights(tiles, tmp_path, monkeypatch):
    name = "fasterrcnn_resnet50_fpn"
    coco = {"model": name, "weights": "DEFAULT"}
    settings = resolved_settings(name, "DEFAULT", min_size=96, max_size=96)
    names = read_tile_set(tiles).class_names
    model = build_model(name, len(names), **settings)
    meta = {"architecture": name, "settings": settings, "class_names": names}
    save_checkpoint(tmp_path / "begin.pt", {"model": model.state_dict(), **meta})

    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", refuse)
    begin = str(tmp_path / "begin.pt")
    wanted = config(tiles, tmp_path / "on", init_checkpoint=begin, **coco)
    assert Run(wanted).describe()["settings"] == settings
    fit(dataclasses.replace(wanted, steps=1), progress=False)
    coco["settings"] = {"min_size": 96, "max_size": 96}
    with pytest.raises(RuntimeError, match="could not be downloaded"):
        Run(config(tiles, tmp_path / "new", **coco))


def test_a_run_from_a_checkpoint_takes_its_settings(tiles, tmp_path):
    """Norm and caps of another run, told by nobody; a setting of the run goes first."""
    name, names = "fasterrcnn_lite0_fpn", read_tile_set(tiles).class_names
    caps = {"backbone_norm": "folded", "box_detections_per_img": 50, "min_size": 128}
    settings = resolved_settings(name, **caps, max_size=128)  # tiles enter enlarged
    content = {"architecture": name, "settings": settings, "class_names": names}
    content["model"] = build_model(name, len(names), **settings).state_dict()
    begin = tmp_path / "begin.pt"
    save_checkpoint(begin, {**content, "tile_size": 64})

    own = {"model": name, "steps": 1, "init_checkpoint": str(begin)}
    own["settings"] = {"rpn_post_nms_top_n_test": 70}
    fit(config(tiles, tmp_path / "on", **own), progress=False)
    begin.unlink()  # a run that goes on has its own
    begun = Run(config(tiles, tmp_path / "on", **own))
    sides = dict.fromkeys(("min_size", "max_size"), 192)  # twofold, as before
    assert begun.describe()["settings"] == {**settings, **sides, **own["settings"]}
    assert begun.model.roi_heads.detections_per_img == 50


def test_the_commands_of_the_faq_go_on_from_a_detector_of_notebook_3(tmp_path):
    faq = (ROOT / "FAQ.md").read_text().replace("\\\n", " ")
    section = faq.split("### Can I go on from a trained checkpoint?")[1].split("###")[0]
    commands = re.findall(r"^python (-m .*)", section, re.M)
    labels = write_scenes(tmp_path / "scenes")
    name = RECIPES["sample"]["model"]
    names = ["background", *(CLASSES[key] for key in sorted(CLASSES))]
    settings = resolved_settings(name, None, RECIPES["sample"]["weights_backbone"])
    content = {"architecture": name, "settings": settings, "class_names": names}
    content |= {"tile_size": 300}
    content["model"] = build_model(name, len(names), **settings).state_dict()
    old = tmp_path / "runs" / "own" / "training"
    old.mkdir(parents=True)
    save_checkpoint(old / "best.pt", content)

    places = {"/path/to/scenes": tmp_path / "scenes", "/path/to/labels.json": labels}
    for command, short in zip(commands, ([], ["--steps", "1"]), strict=True):
        words = [places.get(word, word) for word in shlex.split(command)]
        python(*words, *short, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    written = tmp_path / "runs" / "new_place" / "training" / "last.pt"
    begun = torch.load(written, weights_only=True)["settings"]
    assert begun["backbone_norm"] == "folded" and begun["min_size"] == 512


def test_the_best_checkpoint_is_that_of_the_metric(tiles, tmp_path):
    changes = {"steps": 4, "eval_steps": 1, "best_metric": "AP75", "lr": 0.01}
    fit(config(tiles, tmp_path / "run", **changes), progress=False)
    evaluated = [
        r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "AP75" in r
    ]
    highest = max(record["AP75"] or 0.0 for record in evaluated)
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert (best["metrics"]["AP75"] or 0.0) == highest == best["best"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "'adamw' or 'sgd', got 'adam'"),
        ({"lr_scheduler": "step"}, "'cosine' or 'multistep', got 'step'"),
        ({"amp": "yes"}, "one of auto, off, bf16, fp16, got 'yes'"),
        ({"device": "cuda:99"}, "device 'cuda:99', but torch .* finds"),
        ({"model": "yolo"}, "unknown model 'yolo'"),
        ({"ema": 1.0}, "ema must be in 0..1, below 1, got 1.0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, got 2.5"),
        ({"lr_milestones": [1, "2"]}, "lr_milestones must be a whole number, got '2'"),
        ({"cache": "ram"}, "cache must be True or False, got 'ram'"),
        ({"repeat_threshold": -1}, "repeat_threshold must be in 0..1, got -1"),
        ({"data_path": "nowhere"}, "nowhere has no tiles.json"),
        ({"output_dir": "WHOLE", "lr": 0.5}, "lr: 0.001 there, 0.5 asked"),
        ({"output_dir": "WHOLE", "data_path": "WIDER"}, "tile_size 96, .* have 128"),
        ({"model": "ssd300_vgg16", "settings": {}}, "architecture fasterrcnn_sm"),
        ({"settings": {"anchor_sizes": [[4, 8, 16, 32]] * 3}}, "other settings"),
        ({"init_checkpoint": "gone.pt"}, "gone.pt"),
        ({"init_checkpoint": "BOATS"}, "boats.pt has 'boat' as label 1.*'square'"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_writes(
    tiles, tmp_path, whole_run, changes, message
):
    state = torch.load(whole_run[0] / "last.pt", weights_only=True)
    state["class_names"][1] = "boat"
    torch.save(state, tmp_path / "boats.pt")
    places = {"WHOLE": str(whole_run[0]), "BOATS": str(tmp_path / "boats.pt")}
    places["WIDER"] = str(shutil.copytree(tiles, tmp_path / "wider"))
    said = (tmp_path / "wider" / "tiles.json").read_text()
    wider = said.replace('"tile_size": 96', '"tile_size": 128')
    (tmp_path / "wider" / "tiles.json").write_text(wider)
    if changes.keys() & {"model", "settings"}:
        changes = {"init_checkpoint": str(whole_run[0] / "last.pt"), **changes}
    changes = {key: places.get(str(value), value) for key, value in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fit(dataclasses.replace(config(tiles, tmp_path / "on"), **changes))
    assert not (tmp_path / "on" / "last.pt").exists()


def test_a_loss_that_is_not_finite_names_its_tiles(tiles, tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+.*train_\d"):
        fit(config(tiles, tmp_path, lr=1e30, clip_grad=0.0, warmup=0.0), progress=False)
    assert not (tmp_path / "last.pt").exists()


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


def test_whole_floats_are_taken_as_ints():
    given = {"steps": 1e5, "eval_steps": None, "lr_milestones": [1e2, 200], "lr": 1}
    run = TrainConfig("d", "o", **given)
    assert (run.steps, run.eval_steps, run.lr_milestones) == (100_000, None, [100, 200])
    assert type(run.steps) is type(run.lr_milestones[0]) is int
    with pytest.raises(ValueError, match="lr must be a number, got '1e-3'.*1.0e-3"):
        TrainConfig("d", "o", lr="1e-3")
    for name in ("steps", "epochs", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
            TrainConfig("d", "o", **{name: 0}).check()
    for steps in (float("inf"), float("nan"), True, "1e5"):
        with pytest.raises(ValueError, match="steps must be a whole number, got"):
            TrainConfig("d", "o", steps=steps)
    hparams = {"global_batch_size": 4.0, "max_batches": 1e2, "backend": "fake"}
    assert train_config({**hparams, "warmup_batches": 10.0}, 2).batch_size == 2
    with pytest.raises(ValueError, match="global_batch_size must be .*'4'"):
        train_config({**hparams, "global_batch_size": "4"})


def test_a_model_that_does_not_resize_follows_the_size_of_its_tiles(tiles):
    small = config(tiles, "x", settings={})
    assert as_they_are(small, 512).settings == {"min_size": 512, "max_size": 512}
    for kept, size in (
        (small, 300),
        (config(tiles, "x", settings={"min_size": 600}), 512),
        (config(tiles, "x", settings={}, model="fasterrcnn_resnet50_fpn"), 512),
        (config(tiles, "x", settings={}, model="ssd300_vgg16"), 512),
    ):
        assert as_they_are(kept, size) is kept
    settings = from_recipe("xview", "tiles", "out").settings
    with pytest.warns(UserWarning, match="tiles of 512 px are shrunk to 300 px"):
        warn_if_shrunk(settings, 512)
    warn_if_shrunk(settings, 300)
    warn_if_shrunk({"min_size": [640, 800]}, 512)  # torchvision draws one of them


def test_augment_reaches_the_tiles_and_an_unknown_name_or_value_is_quoted(
    tiles, tmp_path
):
    def red_less_blue(augment: dict) -> float:
        run = Run(config(tiles, tmp_path / "run", augment=augment))
        pixels = run.train_set[0, 5][0].float().mean((1, 2))
        return float(pixels[0] - pixels[2])

    still = red_less_blue({"brightness": 0, "contrast": 0})
    assert abs(red_less_blue({"brightness": 0, "contrast": 0, "hue": 0.5}) - still) > 1
    for augment, said in (({"hues": 0.1}, "'hues'"), ({"hue": 2}, "hue values")):
        with pytest.raises(ValueError, match=rf"augment is .*{said}"):
            red_less_blue(augment)


def test_every_field_is_a_flag():
    flags = "--data-path d --output-dir o --epochs 26 --lr-steps 16 22 --scale-lr"
    parsed = parse_args([*flags.split(), "--cache", "--settings", '{"min_size": 400}'])
    expected = {"cache": True, "scale_lr": True, "settings": {"min_size": 400}}
    assert parsed == TrainConfig("d", "o", epochs=26, lr_steps=[16, 22], **expected)
    assert parse_args(flags.split()).cache is False


class Toy(torch.nn.Module):
    """A model of one loss in torchvision's convention, which reads no value."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 4, 3)

    def forward(self, images, targets):
        return {"a": self.layer(torch.stack(images)).square().mean()}


class ReadsOnTheHost(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: .item(), bool(), float(), int()."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_reads_no_value_on_the_host(tiles, optimizer):
    model = Toy()
    made = make_optimizer(model, config(tiles, "x", optimizer=optimizer))
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    with ReadsOnTheHost() as seen:
        losses = train_step(
            model, made, [torch.zeros(3, 8, 8, dtype=torch.uint8)], [target]
        )
        assert seen.count == 0
        losses["loss"].item()
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
    for index in range(1, len(seen)):
        before, (trained, after) = seen[index - 1][1], seen[index]
        decay = min(0.5, (2 + index) / (11 + index))
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
    data = shutil.copytree(tiles, tmp_path / "data")
    coco = json.loads((data / "train.json").read_text())
    coco["annotations"][0]["category_id"] = 2  # a class that one tile of 12 has
    (data / "train.json").write_text(json.dumps(coco))
    described = {"tile_size": 96, "overlap": 0.0}
    describe_split(data, "train", data / "train", data / "train.json", **described)
    given = {"steps": None, "epochs": 1, "eval_steps": 100, "repeat_threshold": 1.0}
    fit(config(data, tmp_path / "run", **given), progress=False)
    whole = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert whole["step"] > 6 and whole["epoch"] == 1  # six without repeats


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


def command_line(config: TrainConfig) -> list[str]:
    """What starts a run in a shell: a flag for each value that is not the default."""
    flags, defaults = [], dataclasses.asdict(TrainConfig("", ""))
    for name, value in dataclasses.asdict(config).items():
        if value != defaults[name]:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            flags += ["--" + name.replace("_", "-"), text]
    return ["-m", "e2e_utils.train", *flags]


@contextmanager
def started(*arguments, **streams):
    """A Python program that runs meanwhile, and is killed at the end if it still does.

    In a session of its own, so that a signal to its group leaves the tests alone.
    """
    child = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        text=True,
        start_new_session=True,
        **streams,
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait(timeout=120)


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
        wait = rng.randint(1, 9)  # steps, then into a step, a save or an evaluation
        settings = json.dumps(dataclasses.asdict(killed))
        with started("-c", KILLED, settings, stdout=subprocess.PIPE) as child:
            lines = [child.stdout.readline() for _ in range(wait)]
            time.sleep(rng.uniform(0, 0.1))
            assert lines == ["step\n"] * wait  # it did not end before
        assert child.returncode == -signal.SIGKILL
    fit(killed, progress=False)
    assert same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("launch", [[], TORCHRUN], ids=["alone", "torchrun"])
def test_sigterm_saves_and_the_same_run_goes_on(tiles, tmp_path, launch):
    """Two processes agree on the step every ten steps."""
    given = {"steps": 400, "eval_steps": 400, "save_steps": 2, "batch_size": 1}
    run = config(tiles, tmp_path, amp="off", workers=1, **given)
    last = tmp_path / "last.pt"
    with started(*launch, *command_line(run), stderr=subprocess.PIPE) as child:
        end = time.monotonic() + 120
        while not last.exists():
            assert time.monotonic() < end, "nothing was saved"
            time.sleep(0.05)
        if launch:
            child.terminate()  # torchrun passes it on to its processes
        else:
            os.killpg(child.pid, signal.SIGTERM)  # as Slurm does: its loader too
        _, printed = child.communicate(timeout=120)
    step = torch.load(last, weights_only=True)["step"]
    assert 2 <= step < 400
    message = f"last.pt holds step {step}, and the same command goes on"
    assert printed.count(message) == 1
    if launch:
        assert step % 10 == 0
        return
    assert child.returncode == 143 and "Traceback" not in printed
    # that it ends like an undisturbed run is shown above, after a harder end
    fit(run, should_stop=lambda: True, progress=False)
    assert torch.load(last, weights_only=True)["step"] == step + 1


TWO_SAVES = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from e2e_utils.train import TrainConfig, fit

config = TrainConfig(**json.loads(sys.argv[1]))
saved = []

def save(step):
    on_disk = torch.load(Path(config.output_dir) / "last.pt", weights_only=True)
    steps = torch.tensor([step, on_disk["step"]])
    dist.all_reduce(steps)  # a collective call: each process makes it
    saved.append(steps.tolist())

fit(config, save=save, progress=False)
# one write, so that lines of two processes do not mix
os.write(1, (json.dumps([dist.get_rank(), saved]) + "\\n").encode())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_are_one_run(tiles, tmp_path):
    """Everything that only several processes can show, in one start of torchrun."""
    data = shutil.copytree(tiles, tmp_path / "tiles")
    (tmp_path / "two_saves.py").write_text(TWO_SAVES)
    given = {"steps": 4, "eval_steps": 4, "save_steps": 1, "batch_size": 1, "warmup": 0}
    given |= {"amp": "off", "scale_lr": True, "cache": True}
    wanted = config(data, tmp_path / "run", **given)
    settings = json.dumps(dataclasses.asdict(wanted))
    env = {"OMP_NUM_THREADS": "1"}
    printed = python(*TORCHRUN, tmp_path / "two_saves.py", settings, env=env)
    saves = dict(json.loads(line) for line in printed.splitlines())
    # each process hears of a save once the file is there; the all_reduce sums two
    expected = [[2 * step, 2 * step] for step in (1, 2, 3, 4)]
    assert saves == {0: expected, 1: expected}

    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["scheduler"]["base_lrs"] == [2e-3, 2e-3]  # scaled on request
    assert state["config"]["lr"] == 1e-3

    model, meta = model_from_checkpoint(tmp_path / "run" / "last.pt")
    alone, _ = evaluate_split(
        model, CocoTiles(*read_tile_set(tiles).split("val")), torch.device("cpu")
    )
    assert alone["AR_500"] > 0
    figures = {key: alone[key] for key in ("AP", "AP50", "AR_500")}
    shared = {key: meta["metrics"][key] for key in figures}
    assert shared == pytest.approx(figures, abs=1e-6)


# ---- recipes


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_configuration_whose_model_can_be_built(recipe):
    made = from_recipe(recipe, "tiles", "out", batch_size=3)
    assert (
        dataclasses.asdict(made).items() >= {**RECIPES[recipe], "batch_size": 3}.items()
    )
    with torch.device("meta"):
        build_model(made.model, 5, **made.settings)


def test_a_recipe_with_another_model_leaves_weights_and_settings_to_it():
    made = from_recipe("sample", "tiles", "out", model="fasterrcnn_small", steps=None)
    assert (made.weights_backbone, made.steps) == (None, None)
    assert made.lr == RECIPES["sample"]["lr"]
    made = from_recipe("sample", "tiles", "out", epochs=5)
    assert (made.epochs, made.steps) == (5, None)
    made = from_recipe("xview", "tiles", "out", 512)
    assert (made.settings["min_size"], made.settings["max_size"]) == (512, 512)
    more = {"box_detections_per_img": 500, "anchor_sizes": None}
    joined = from_recipe("xview", "tiles", "out", 512, settings=more).settings
    assert joined == {**made.settings, **more}
    made.settings.clear()
    assert RECIPES["xview"]["settings"]
    with pytest.raises(
        ValueError, match="recipe must be one of sample, xview, got 'x'"
    ):
        from_recipe("x", "tiles", "out")
