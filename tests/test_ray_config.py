"""How experiment YAMLs become searches of Ray, and what needs no running Ray."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from commands import python
from serving import ROOT
from test_k8s import strict

from e2e_utils.experiment import absolute_init, read_experiment, train_config

pytest.importorskip("ray")

from ray.tune.schedulers import ASHAScheduler  # noqa: E402
from ray.tune.search import sample  # noqa: E402

from ray_files import adapter, predict  # noqa: E402
from ray_files.archive import Report  # noqa: E402
from ray_files.translate import translate  # noqa: E402

FILES = ROOT / "determined_files"
RAYJOB, PREDICT = (ROOT / "ray_files" / f"rayjob{x}.yaml" for x in ("", "-predict"))
CRD = ROOT.parent / "shared" / "schemas" / "kuberay" / "RayJob.v1.json"


def experiment(file="adaptive", hparams=None, /, **searcher):
    found = read_experiment(FILES / f"{file}.yaml")
    found["hyperparameters"] |= hparams or {}
    found["searcher"] = {**found["searcher"], **searcher}
    return found


# ---- every YAML of determined_files


def test_the_adaptive_yaml_becomes_asha():
    plan = translate(experiment("adaptive"))
    assert (plan.samples, plan.metric, plan.slots, plan.restarts) == (16, "mAP", 1, 0)
    assert plan.concurrent == 16  # the master's default
    assert plan.searched == ["lr", "weight_decay", "clip_grad"]
    lr, decay = plan.space["lr"], plan.space["weight_decay"]
    assert isinstance(lr.sampler, sample.LogUniform)
    assert (lr.lower, lr.upper) == pytest.approx((1e-4, 1e-2))
    assert decay.categories == [0.0, 0.01, 0.05]
    clip = plan.space["clip_grad"]
    assert (clip.lower, clip.upper) == (1.0, 20.0)
    assert plan.space["max_batches"] == 1600
    (bracket,) = ASHAScheduler(metric="mAP", mode="max", **plan.asha)._brackets
    assert [milestone for milestone, _ in bracket._rungs] == [1600, 400, 100]


def test_the_search_over_architectures_becomes_a_grid():
    plan = translate(experiment("const-distributed-search"))
    assert plan.searched == ["model"] and plan.asha is None
    assert len(plan.space["model"]["grid_search"]) == 8
    assert (plan.samples, plan.slots, plan.concurrent) == (1, 8, 2)


@pytest.mark.parametrize("path", sorted(FILES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_yaml_has_a_translation(path):
    found = read_experiment(path)
    plan = translate(found)
    single = found["searcher"]["name"] == "single"
    assert single == (plan.samples == 1 and not plan.searched)
    values = {key: drawn(value) for key, value in plan.space.items()}
    config = train_config(values, plan.slots)
    assert config.steps == values["max_batches"]
    assert config.batch_size * plan.slots == values["global_batch_size"]
    assert config.eval_steps == values["validation_batches"]


def drawn(value):
    if isinstance(value, dict) and "grid_search" in value:
        return value["grid_search"][0]
    return value.sample() if isinstance(value, sample.Domain) else value


# ---- ranges


def test_each_kind_of_range_is_sampled_between_its_ends():
    hparams = {
        "lr": {"type": "log", "base": 2, "minval": -4, "maxval": -2},
        "seed": {"type": "int", "minval": 3, "maxval": 5},
        "momentum": {"type": "double", "minval": 0.5, "maxval": 0.9},
        "optimizer": {"type": "const", "val": "sgd"},
        "settings": {"min_size": {"type": "categorical", "vals": [96, 128]}},
    }
    plan = translate(experiment("adaptive", hparams))
    assert plan.space["optimizer"] == "sgd"
    assert "settings.min_size" in plan.searched
    space = {key: plan.space[key] for key in ("lr", "seed", "momentum")}
    draws = [{k: v.sample() for k, v in space.items()} for _ in range(200)]
    assert {draw["seed"] for draw in draws} == {3, 4}  # maxval is excluded
    assert all(1 / 16 <= draw["lr"] <= 1 / 4 for draw in draws)
    below = sum(draw["lr"] < 1 / 8 for draw in draws)
    assert 60 < below < 140  # the exponent is drawn evenly
    assert all(0.5 <= draw["momentum"] <= 0.9 for draw in draws)
    assert plan.space["settings"]["min_size"].categories == [96, 128]


def test_a_grid_takes_the_masters_points():
    hparams = {
        "lr": {"type": "log", "base": 10, "minval": -4, "maxval": -2, "count": 3},
        "seed": {"type": "int", "minval": 0, "maxval": 3, "count": 9},
        "momentum": {"type": "double", "minval": 0.5, "maxval": 0.9, "count": 1},
        "clip_grad": {"type": "int", "minval": 0, "maxval": 5, "count": 3},
    }
    found = experiment("const-distributed-search", hparams)
    space = translate(found).space
    assert space["lr"]["grid_search"] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert space["seed"]["grid_search"] == [0, 1, 2, 3]  # no value twice
    assert space["momentum"]["grid_search"] == [0.7]
    assert space["clip_grad"]["grid_search"] == [0, 3, 5]  # 2.5 is rounded up


# ---- the searcher


@pytest.mark.parametrize(
    ("searcher", "rungs"),
    [
        ({"max_rungs": 3}, [1600, 400, 100]),
        ({"max_rungs": 5}, [1600, 400, 100]),  # 16 trials fill three rungs of four
        ({"max_rungs": 5, "max_trials": 256}, [1600, 400, 100, 25, 6.25]),
        ({"max_rungs": 1}, [1600]),
        ({"divisor": 2, "max_rungs": 4, "max_time": 100}, [100, 50, 25, 12.5]),
    ],
)
def test_rungs_are_those_of_the_master(searcher, rungs):
    found = experiment("adaptive", {"validation_batches": 5}, **searcher)
    plan = translate(found)
    scheduler = ASHAScheduler(metric="mAP", mode="max", **plan.asha)
    milestones = [milestone for milestone, _ in scheduler._brackets[0]._rungs]
    assert milestones == pytest.approx(rungs)


@pytest.mark.parametrize(
    ("mode", "brackets"),
    [
        ("aggressive", [3]),
        ("standard", [3, 2]),
        ("conservative", [3, 2, 1]),
        (None, [3, 2]),  # standard by default
    ],
)
def test_modes_are_brackets_with_as_many_rungs_as_the_masters(mode, brackets):
    plan = translate(experiment("adaptive", mode=mode))
    scheduler = ASHAScheduler(metric="mAP", mode="max", **plan.asha)
    assert [len(bracket._rungs) for bracket in scheduler._brackets] == brackets


def test_a_random_search_has_no_scheduler_and_the_masters_defaults():
    found = experiment("adaptive")
    found["searcher"] = {
        "name": "random",
        "metric": "mAP_50",
        "smaller_is_better": False,
        "max_trials": 7,
        "max_concurrent_trials": 0,
        "source_trial_id": None,  # as good as absent
    }
    found["reproducibility"] = {"experiment_seed": 5}
    del found["max_restarts"], found["resources"]
    plan = translate(found)
    assert (plan.samples, plan.concurrent, plan.asha) == (7, 0, None)
    assert (plan.metric, plan.seed) == ("mAP_50", 5)
    assert (plan.restarts, plan.slots) == (5, 1)


@pytest.mark.parametrize(
    ("searcher", "message"),
    [
        ({"name": "custom"}, "searcher.name must be single or .*got 'custom'"),
        ({"bracket_rungs": [2]}, r"searcher.bracket_rungs = \[2\] .* no translation"),
        ({"max_length": 9}, "searcher.max_length = 9 of adaptive_asha"),
        ({"source_trial_id": 4}, "searcher.source_trial_id = 4"),
        ({"metric": "loss"}, "searcher.metric must be mAP or .*got 'loss'"),
        ({"smaller_is_better": True}, "the worst would be kept"),
        ({"smaller_is_better": None}, "the worst would be kept"),
        ({"time_metric": "epochs"}, "time_metric must be batches.*got 'epochs'"),
        ({"time_metric": None}, "time_metric must be batches.*got None"),
        ({"max_time": None}, "max_time must be 1 or more, got None"),
        ({"divisor": 1}, "divisor must be above 1, got 1"),
        ({"mode": "bold"}, "searcher.mode must be aggressive or .*got 'bold'"),
        ({"max_trials": None}, "max_trials is needed by adaptive_asha"),
    ],
)
def test_what_has_no_translation_is_refused_by_name(searcher, message):
    with pytest.raises(ValueError, match=message):
        translate(experiment("adaptive", **searcher))


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        (
            {"settings": {"nms_thresh": {"type": "log"}}},
            "settings.nms_thresh lacks bas",
        ),
        (
            {"lr": {"type": "logarithmic"}},
            "lr.type must be const or.*'logarithmic'",
        ),
        ({"lr": {"type": "double", "minval": 1, "maxval": 1}}, "below maxval"),
        ({"lerning_rate": 1}, "unknown hyperparameter 'lerning_rate'"),
        ({"validation_batches": 400}, "steps over the rung at 100.*at least every 100"),
    ],
)
def test_a_wrong_hyperparameter_is_named(hparams, message):
    with pytest.raises(ValueError, match=message):
        translate(experiment("adaptive", hparams))


def test_a_grid_needs_counts_and_values():
    lr = {"type": "double", "minval": 1, "maxval": 2}
    with pytest.raises(ValueError, match="lr needs a count in a grid"):
        translate(experiment("const-distributed-search", {"lr": lr}))
    with pytest.raises(ValueError, match="grid needs a hyperparameter with several"):
        translate(experiment("const-distributed-search", {"model": "ssd300_vgg16"}))


# ---- a trial's values as a configuration of the plain loop


def test_tiles_can_be_given_and_paths_become_absolute(tmp_path):
    found = read_experiment(FILES / "const-distributed.yaml")["hyperparameters"]
    assert adapter.local_tiles(found) == found  # in a bucket
    given = {"backend": "local", "data_dir": str(tmp_path)}
    assert adapter.local_tiles(found, tmp_path) == {**found, **given}
    relative = adapter.local_tiles({"backend": "local", "data_dir": "tiles"})
    assert relative["data_dir"] == str(Path("tiles").resolve())
    assert adapter.storage_path("s3://bucket/runs") == "s3://bucket/runs"
    assert adapter.storage_path("runs") == str(Path("runs").resolve())
    assert adapter.join_url("/runs", "a", "b") == "/runs/a/b"
    assert adapter.join_url("s3://bucket/?region=x", "a") == "s3://bucket/a?region=x"


def test_init_checkpoint_becomes_absolute_and_is_no_url():
    assert absolute_init(None) is None
    assert absolute_init("a/b.pt") == str(Path("a/b.pt").resolve())
    searched = {"type": "categorical", "vals": ["a.pt", None]}
    assert absolute_init(searched)["vals"] == [str(Path("a.pt").resolve()), None]
    with pytest.raises(ValueError, match="every machine sees, got 's3://b/last.pt'"):
        absolute_init("s3://b/last.pt")


def test_gpus_for_some_of_the_workers_are_no_silent_cpus(monkeypatch):
    for there, processes, wanted in ((0, 2, False), (2, 2, True), (8, 2, True)):
        monkeypatch.setattr("ray.cluster_resources", lambda n=there: {"GPU": n})
        assert adapter.takes_gpu(None, processes) is wanted
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 1})
    with pytest.raises(ValueError, match="1 GPU for 2 workers"):
        adapter.takes_gpu(None, 2)
    assert adapter.takes_gpu(True, 2) and not adapter.takes_gpu(False, 2)


def test_a_save_reports_only_the_metrics_of_its_own_step(tmp_path, capsys):
    sent = []

    def send(metrics, checkpoint):
        sent.append((metrics, checkpoint and checkpoint.get_metadata()))

    reporter = adapter.Reporter(send, tmp_path / "run", verbose=True)
    reporter.restore(None)
    reporter.report({"loss": 2.0, "lr": 0.1}, 20)
    reporter.save(20)
    reporter.report({"AP": 0.5, "AP50": 0.75, "AP_large": None, "AR_1": 0.1}, 40)
    reporter.save(40)
    losses = {"loss": 2.0, "lr": 0.1}
    assert sent == [
        ({**losses, "batches": 20}, {"step": 20, "resumed": []}),
        (
            {**losses, "mAP": 0.5, "mAP_50": 0.75, "batches": 40},
            {"step": 40, "resumed": []},
        ),
    ]
    assert "step 40  mAP 0.5000  mAP_50 0.7500\n" in capsys.readouterr().out
    other = adapter.Reporter(send, tmp_path / "again", main=False)
    other.restore(adapter.Checkpoint(str(reporter.folder)))
    other.save(60)
    assert other.resumed == [40]
    assert sent[-1] == ({"batches": 60}, None)


# ---- a Ray that is started here


def test_a_node_that_is_late_is_cleared_away_and_started_again(monkeypatch):
    started = []

    def init(**_):
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        started.append(subprocess.Popen(sleep))
        if len(started) < 3:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(adapter.ray, "init", init)
    adapter._start(1, False)
    assert [process.poll() is None for process in started] == [False, False, True]
    started[-1].kill()
    started[-1].wait()


def test_the_environment_and_the_handler_of_ctrl_c_are_put_back(monkeypatch):
    seen = {}

    def init(**_):
        assert not seen, "another failure than a late node is raised at once"
        seen.update(os.environ)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Ray takes it
        raise ValueError("no such option")

    monkeypatch.setattr(adapter.ray, "init", init)
    for name in ("RAY_ADDRESS", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    for address in (None, "10.0.0.1:6379"):
        if address:
            monkeypatch.setenv("RAY_ADDRESS", address)
        before, handler = dict(os.environ), signal.getsignal(signal.SIGINT)
        with pytest.raises(ValueError, match="no such option"):
            with adapter.ray_session():
                pass
        assert dict(os.environ) == before
        assert signal.getsignal(signal.SIGINT) == handler
        assert seen["RAY_USAGE_STATS_ENABLED"] == "0"
        local = address is None  # a cluster has its own settings
        assert (seen.get("RAY_AUTH_MODE") == "disabled") == local
        assert seen.get("PYTHONPATH", "").startswith(str(ROOT)) == local
        seen.clear()


# ---- the RayJob


@pytest.fixture(scope="module", params=[RAYJOB, PREDICT], ids=lambda path: path.stem)
def text(request):
    return request.param.read_text()


@pytest.fixture(scope="module")
def rayjob(text):
    return yaml.safe_load(text)


def test_rayjob_is_valid_and_holds_no_unknown_field(rayjob):
    if not CRD.is_file():
        pytest.skip("no schema of RayJob in ../shared/schemas/kuberay")
    crd = json.loads(CRD.read_text())
    assert rayjob["apiVersion"] == f"{crd['group']}/{crd['version']}"
    assert rayjob["kind"] == crd["kind"]
    schema = jsonschema.Draft202012Validator(strict(crd["openAPIV3Schema"]))
    schema.validate(rayjob)
    assert set(rayjob) == {"apiVersion", "kind", "metadata", "spec"}
    broken = json.loads(json.dumps(rayjob))
    broken["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["oops"] = 1
    with pytest.raises(jsonschema.ValidationError, match="oops"):
        schema.validate(broken)


def gpus(rayjob) -> int:
    (group,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    return group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])


def test_rayjob_runs_a_script_that_is_there_in_pinned_versions(rayjob, text):
    spec = rayjob["spec"]
    words = spec["entrypoint"].split()
    assert words[0] == "python" and (ROOT / words[1]).is_file()
    pins = (ROOT / "requirements.txt").read_text()
    for pin in yaml.safe_load(spec["runtimeEnvYAML"])["pip"]:
        assert re.search(rf"^{re.escape(pin)}( |$)", pins, re.M), pin
    (ray_pin,) = re.findall(r"^ray\[.*?\]==(\S+)", pins, re.M)
    assert spec["rayClusterSpec"]["rayVersion"] == ray_pin
    images = re.findall(r"image: (\S+)", text)
    assert {image.split("-")[0] for image in images} == {f"rayproject/ray:{ray_pin}"}


def test_rayjob_has_a_gpu_for_each_worker():
    rayjob = yaml.safe_load(RAYJOB.read_text())
    words = rayjob["spec"]["entrypoint"].split()
    found = read_experiment(ROOT / words[words.index("--config") + 1])
    assert gpus(rayjob) == found["resources"]["slots_per_trial"]
    (group,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(found["hyperparameters"]["cache_dir"].startswith(m) for m in mounts)


def test_the_rayjob_of_prediction_has_known_options_and_a_gpu_each(
    monkeypatch,
):
    rayjob = yaml.safe_load(PREDICT.read_text())
    given, report = {}, Report("", 0)

    @functools.wraps(predict.predict_archive)  # the options are those of its signature
    def note(**options):
        given.update(options)
        return report

    monkeypatch.setattr(predict, "predict_archive", note)
    predict.main(rayjob["spec"]["entrypoint"].split()[2:])
    assert given["workers"] == gpus(rayjob) and given["gpu"] is True
    assert all(given[key].startswith("s3://<") for key in ("scenes", "output"))


def test_rayjob_cannot_run_before_it_is_filled_in(text):
    urls = re.findall(r"\w+://\S+", text)
    assert len(urls) >= 3 and all("<" in url for url in urls)


# ---- the abandoned package is not needed

WITHOUT_DETERMINED = """
import importlib, pkgutil, sys
for name in ("determined", "determined.pytorch"):
    sys.modules[name] = None  # importing it raises ImportError
imported = 0
for package in ("e2e_utils", "ray_files"):
    found = importlib.import_module(package)
    for module in pkgutil.walk_packages(found.__path__, package + "."):
        importlib.import_module(module.name)
        imported += 1
assert not [m for m in sys.modules if m.startswith("determined.")][1:]
print(imported)
"""


@pytest.mark.slow
def test_nothing_of_ray_or_of_the_helpers_needs_determined():
    imported = int(python("-c", WITHOUT_DETERMINED, cwd=ROOT))
    modules = [*ROOT.glob("e2e_utils/*.py"), *ROOT.glob("ray_files/*.py")]
    assert imported >= len(modules) - 2  # but for the two __init__.py
