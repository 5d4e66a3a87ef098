"""The experiment YAMLs against Determined's own schema, and what its master adds.

The schema and its test cases are Determined's data files (0.38.1); they are no part of
this repository and the tests that need them skip where they are not at hand.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
import yaml
from commands import run
from jsonschema import Draft7Validator, ValidationError, validators
from referencing import Registry
from referencing.jsonschema import DRAFT7

from e2e_utils.config import RECIPES, TrainConfig, from_recipe
from e2e_utils.experiment import (
    HYPERPARAMETERS,
    check_hparams,
    fetch_tiles,
    hyperparameters,
    load_config,
    read_experiment,
    train_config,
)
from e2e_utils.models import MODELS, model_settings

ROOT = Path(__file__).parents[1]
FILES = ROOT / "determined_files"
YAMLS = sorted(FILES.glob("*.yaml"))
SCHEMAS = Path(__file__).parents[2] / "shared" / "schemas" / "determined-expconf"
EXPERIMENT = "http://determined.ai/schemas/expconf/v0/experiment.json"
needs_schema = pytest.mark.skipif(
    not SCHEMAS.is_dir(), reason="Determined's schema is not beside the repository"
)
each_yaml = pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)


def config(path):
    return yaml.safe_load(path.read_text())


# ---- Determined's dialect of JSON Schema: draft 7 and keywords of its own


def fits(validator, instance, schema):
    return next(validator.descend(instance, schema), None) is None


def union(validator, value, instance, schema):
    if not any(fits(validator, instance, item) for item in value["items"]):
        yield ValidationError(value.get("defaultMessage", "fits no item of the union"))


def checks(validator, value, instance, schema):
    for message, check in value.items():
        if not fits(validator, instance, check):
            yield ValidationError(message)


def compare(validator, value, instance, schema):
    values = instance if isinstance(instance, dict) else {}
    a, b = values.get(value["a"]), values.get(value["b"])
    if a is None or b is None:
        return
    if value["type"] == "a_is_subdir_of_b":
        path = PurePosixPath(posixpath.normpath(posixpath.join(b, a)))
        good = path.is_relative_to(posixpath.normpath(b))
    else:
        good = a < b or (a == b and value["type"] == "a<=b")
    if not good:
        yield ValidationError(f"{value['a']} does not suit {value['b']}")


def disallow(validator, value, instance, schema):
    for name in value.keys() & (instance if isinstance(instance, dict) else ()):
        yield ValidationError(value[name])


def optional_ref(validator, value, instance, schema):
    return validator.descend(instance, True if instance is None else {"$ref": value})


def eventually(validator, value, instance, schema):
    return validator.descend(instance, value)


def eventually_required(validator, value, instance, schema):
    for name in value if isinstance(instance, dict) else ():
        if instance.get(name) is None:
            yield ValidationError(f"{name} is a required property")


KEYWORDS = {
    "union": union,
    "checks": checks,
    "compareProperties": compare,
    "disallowProperties": disallow,
    "optionalRef": optional_ref,
}
COMPLETE = {"eventually": eventually, "eventuallyRequired": eventually_required}


def errors(url, instance, complete=False):
    """Messages of Determined's validation: of what is there, or that all is there."""
    resources = []
    for path in (SCHEMAS / "schemas" / "expconf" / "v0").glob("*.json"):
        document = json.loads(path.read_text())
        document.pop("$schema")  # or plain draft 7 would take over at each $ref
        resources.append((document["$id"], DRAFT7.create_resource(document)))
    keywords = {**KEYWORDS, **(COMPLETE if complete else {})}
    dialect = validators.extend(Draft7Validator, keywords)
    validator = dialect({"$ref": url}, registry=Registry().with_resources(resources))
    return [f"{e.json_path}: {e.message}" for e in validator.iter_errors(instance)]


@needs_schema
def test_validator_agrees_with_determineds_own_test_cases():
    count = 0
    for path in (SCHEMAS / "schemas" / "test_cases" / "v0").glob("*.yaml"):
        for case in config(path):
            for key in (
                "sane_as",
                "complete_as",
                "sanity_errors",
                "completeness_errors",
            ):
                for url in case.get(key, ()):
                    found = errors(url, case["case"], key.startswith("complete"))
                    assert (found == []) == key.endswith("_as"), (case["name"], found)
                    count += 1
    assert count > 100


@needs_schema
@each_yaml
def test_yaml_is_valid_and_complete_by_determineds_schema(path):
    experiment = config(path)
    assert errors(EXPERIMENT, experiment) == []
    image = {"cpu": "i", "cuda": "i", "rocm": "i"}  # what a master adds
    whole = {
        **experiment,
        "checkpoint_storage": {"type": "shared_fs", "host_path": "/tmp"},
        "reproducibility": {"experiment_seed": 1},
        "environment": {**experiment.get("environment", {}), "image": image},
    }
    assert errors(EXPERIMENT, whole, complete=True) == []
    whole["serchr"] = whole.pop("searcher")
    assert "serchr" in errors(EXPERIMENT, whole)[0]


# ---- what the master demands besides, and what this repository does


@each_yaml
def test_yaml_cannot_be_submitted_before_it_is_filled_in(path):
    # A master refuses a workspace or project that it does not know, and one of the two
    # without the other; no name of either can hold the angle brackets by accident.
    for key in ("workspace", "project"):
        assert re.fullmatch("<[A-Z_]+>", config(path)[key])
    where = config(path)["hyperparameters"].get("data_dir", "")
    if "://" in where:
        assert re.search("<[A-Z_]+>", where)


@each_yaml
def test_searcher_maximises_a_reported_metric_within_the_length(path):
    experiment = config(path)
    searcher, hparams = experiment["searcher"], experiment["hyperparameters"]
    assert (searcher["metric"], searcher["smaller_is_better"]) == ("mAP", False)
    if searcher["name"] == "adaptive_asha":
        assert searcher["max_time"] == hparams["max_batches"]
        rungs = searcher["max_rungs"] - 1
        first = searcher["max_time"] // searcher["divisor"] ** rungs
        assert hparams["validation_batches"] <= first
    if searcher["name"] == "grid":
        sizes = [len(values_of(value)) for value in hparams.values()]
        assert 1 < math.prod(sizes) <= 2000  # the master's limit


@each_yaml
def test_entrypoint_is_a_script_and_launched_for_many_slots(path):
    experiment = config(path)
    command = experiment["entrypoint"]
    script = {"core.yaml": "core_api.py"}.get(path.name, "train.py")
    assert command.endswith(f"python3 {script}")
    assert (FILES / script).is_file()
    many = experiment["resources"]["slots_per_trial"] > 1
    assert ("determined.launch.torch_distributed" in command) == many
    for deprecated in ("scheduling_unit", "min_validation_period", "records_per_epoch"):
        assert deprecated not in experiment


def values_of(value):
    """Some of the values that a hyperparameter may have."""
    if not isinstance(value, dict) or "type" not in value:
        return [value]
    return value["vals"] if "vals" in value else [value["minval"]]


@each_yaml
def test_hyperparameters_are_those_that_the_trial_reads(path):
    experiment = config(path)
    hparams = experiment["hyperparameters"]
    models = values_of(hparams["model"])
    assert len(set(models)) == {"const-distributed-search": 8}.get(path.stem, 1)
    for model in models:
        assert model in MODELS and model_settings(model)
    hparams = {name: values_of(value)[0] for name, value in hparams.items()}
    settings = train_config(hparams, experiment["resources"]["slots_per_trial"])
    assert settings.steps == hparams["max_batches"]


def test_the_distributed_schedule_is_that_of_the_original_recipe():
    hparams = config(FILES / "const-distributed.yaml")["hyperparameters"]
    settings = train_config(hparams, processes=8)
    assert settings.lr_milestones == [14 * 1288, 15 * 1288]
    assert round(settings.warmup * settings.steps) == 200
    assert (settings.lr, settings.momentum) == (0.01, 0.9)
    assert settings.settings == RECIPES["xview"]["settings"]


def test_hyperparameters_become_the_configuration_of_each_process():
    hparams = config(FILES / "core.yaml")["hyperparameters"]
    hparams |= {"global_batch_size": 8, "lr": 0.01, "lr_step_batches": [7, 41]}
    settings = train_config(hparams, 4, "tiles", "out")
    assert (settings.batch_size, settings.lr, settings.steps) == (2, 0.01, 1500)
    assert (settings.eval_steps, settings.save_steps) == (500, 250)
    assert settings.lr_milestones == [7, 41]
    assert (settings.data_path, settings.output_dir) == ("tiles", "out")
    with pytest.raises(ValueError, match="8 does not divide equally among 3 processes"):
        train_config(hparams, 3)


@pytest.mark.parametrize("changes", [{}, {"lr_milestones": [7, 41], "amp": "off"}])
def test_a_configuration_comes_back_from_its_hyperparameters(changes):
    config = from_recipe("xview", "/tiles", "out", steps=90, save_steps=30, **changes)
    hparams = hyperparameters(config, processes=4)
    assert hparams["global_batch_size"] == 32
    again = train_config(hparams, 4, fetch_tiles(hparams), "out")
    # with a length in steps nothing reads how many epochs there are
    assert again == replace(config, epochs=TrainConfig("", "").epochs)
    with pytest.raises(ValueError, match="steps is None"):
        hyperparameters(replace(config, steps=None))


# ---- train.py's reading of a YAML


def test_override_replaces_a_range_by_a_value():
    path = FILES / "const-distributed-search.yaml"
    with pytest.raises(ValueError, match="model is a range to search"):
        load_config(path)
    loaded = load_config(path, ["model=fcos_resnet50_fpn", "lr=1.0e-3"])
    assert loaded["hyperparameters"]["model"] == "fcos_resnet50_fpn"
    assert loaded["hyperparameters"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("file", "override", "message"),
    [
        (
            "const",
            "lerning_rate=1",
            "unknown hyper.* 'lerning_rate'.*valid:.*lr",
        ),
        ("const", "lr", "an override is name=value, got 'lr'"),
        ("const-distributed", "warmup=0.1", "warmup_batches or warmup, not both"),
    ],
)
def test_override_that_nothing_reads_is_an_error(file, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(FILES / f"{file}.yaml", [override])


def test_hyperparameters_that_are_missing_are_named():
    with pytest.raises(ValueError, match="lack backend, global_batch_size"):
        check_hparams({"max_batches": 1})


def test_off_of_yaml_is_the_word_that_was_written():
    loaded = load_config(FILES / "const.yaml", ["amp=off"])
    assert loaded["hyperparameters"]["amp"] is False
    assert train_config(loaded["hyperparameters"]).amp == "off"
    loaded = load_config(FILES / "const.yaml", ["amp=on"])
    with pytest.raises(ValueError, match="one of auto, off, bf16, fp16, got 'on'"):
        train_config(loaded["hyperparameters"])


def test_every_hyperparameter_is_told_in_the_module():
    text = (FILES.parent / "e2e_utils" / "experiment.py").read_text()
    own = [k for k in HYPERPARAMETERS if "batch" in k or k in ("backend", "data_dir")]
    for name in own:
        assert f"    {name} " in text


# ---- the command of notebook 4


@pytest.mark.parametrize("tiles", ["s3://b/tiles", "gs://b/tiles", "/data/tiles"])
def test_command_of_notebook_4_submits_what_a_trial_accepts(tiles, monkeypatch, capsys):
    """Run as its cell is, and read by Determined's own command line."""
    det, ntsc = map(pytest.importorskip, ("determined.cli.cli", "determined.cli.ntsc"))
    notebook = json.loads((ROOT / "notebooks/04_cluster_training.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    (given,) = (text for text in cells if text.startswith("run_dir ="))
    (lengths,) = (text for text in cells if '"lr_step_batches"' in text)
    (submit,) = (text for text in cells if '"determined.cli"' in text)
    names = {"files": FILES, "read_experiment": read_experiment, "sys": sys}
    exec(given, names)
    exec(f"{lengths}\n{submit}", names | {"agents_tiles": tiles})
    program, *words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    monkeypatch.chdir(ROOT)
    parser = det.make_parser()
    det.cli.add_args(parser, det.all_args_description)
    told = parser.parse_args(words)
    with told.config_file as file:
        experiment = yaml.safe_load(file)
    experiment = ntsc.parse_config_overrides(experiment, told.config)

    assert program == "det" and Path(told.model_def).is_dir()
    assert all(path.is_dir() for path in map(Path, told.include))
    assert (experiment["workspace"], experiment["project"]) == (
        names["workspace"],
        names["project"],
    )
    hparams, slots = experiment["hyperparameters"], experiment["resources"]
    settings = train_config(hparams, slots["slots_per_trial"])
    epoch = 90_000 // (settings.batch_size * slots["slots_per_trial"])
    assert (settings.steps, settings.eval_steps) == (26 * epoch, epoch) == (18278, 703)
    assert settings.lr_milestones == [16 * epoch, 22 * epoch]
    fetched = []
    monkeypatch.setattr("e2e_utils.storage.sync", lambda *where: fetched.append(where))
    folder = fetch_tiles(hparams)
    assert fetched == ([(tiles, folder)] if "://" in tiles else [])
    mounts = [mount["container_path"] for mount in experiment["bind_mounts"]]
    assert any(Path(folder).is_relative_to(mount) for mount in mounts)


# ---- the startup hook


def test_startup_hook_is_clean_by_shellcheck():
    tool = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    tool = tool or shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not on PATH")
    done = run(tool, FILES / "startup-hook.sh")
    assert done.returncode == 0, done.stdout


@pytest.fixture
def hook(tmp_path):
    """Runs the hook as a container does; labels come from a folder to another."""
    bucket, labels = tmp_path / "bucket", tmp_path / "labels"
    bucket.mkdir()
    env = {
        "DET_PYTHON_EXECUTABLE": sys.executable,
        "E2E_LABELS_URL": bucket.as_uri(),
        "E2E_LABELS_DIR": labels,
    }

    def start(**variables):
        script = f"source {FILES / 'startup-hook.sh'}; echo entrypoint goes on"
        return run("bash", "-ec", script, "entrypoint", env={**env, **variables})

    return bucket, labels, start


LABELS = ["tiles.json", "train_512_025.json", "val_512_025.json"]
SPLITS = {"splits": {name[:-13]: {"coco": name} for name in LABELS[1:]}}


@pytest.mark.slow
def test_startup_hook_fetches_labels_once_and_lets_the_entrypoint_go_on(hook):
    bucket, labels, start = hook
    for name in LABELS:
        (bucket / name).write_text(json.dumps(SPLITS))
    for expected in (f"fetched {LABELS[2]}", f"{LABELS[2]} is there"):
        done = start()
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout and "entrypoint goes on" in done.stdout
    assert sorted(p.name for p in labels.iterdir()) == LABELS


@pytest.mark.slow
def test_startup_hook_stops_the_container_where_labels_are_missing(hook):
    bucket, labels, start = hook
    for name in LABELS[:2]:
        (bucket / name).write_text(json.dumps(SPLITS))
    done = start()
    assert done.returncode == 1
    assert "could not fetch val_512_025.json" in done.stderr
    assert "entrypoint goes on" not in done.stdout
    assert {p.name for p in labels.iterdir()} == {*LABELS[:2]}


@pytest.mark.slow
def test_startup_hook_without_a_bucket_fetches_nothing(hook):
    done = hook[2](E2E_LABELS_URL="")
    assert done.returncode == 0, done.stderr
    assert "no labels to fetch" in done.stdout
