"""The experiment YAMLs against Determined's own schema, and what its master adds.

The schema and its test cases are Determined's data files (0.38.1); they are no part of
this repository and the tests that need them skip where they are not at hand.
"""

from __future__ import annotations

import itertools
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator, ValidationError, validators
from referencing import Registry
from referencing.jsonschema import DRAFT7

from e2e_utils.experiment import (
    HYPERPARAMETERS,
    check_hparams,
    load_config,
    train_config,
)
from e2e_utils.models import MODELS, model_settings

FILES = Path(__file__).parents[1] / "determined_files"
YAMLS = sorted(FILES.glob("*.yaml"))
SCHEMAS = Path(__file__).parents[2] / "shared" / "schemas" / "determined-expconf"
URL = "http://determined.ai/schemas/expconf/v0/"
needs_schema = pytest.mark.skipif(
    not SCHEMAS.is_dir(), reason="Determined's schema is not beside the repository"
)


def config(path):
    return yaml.safe_load(path.read_text())


# ---- Determined's dialect of JSON Schema: draft 7 and eight keywords of its own


def _valid(validator, instance, schema):
    return next(validator.descend(instance, schema), None) is None


def _union(validator, union, instance, schema):
    """At least one item fits; else the errors of the item that was meant."""
    if any(_valid(validator, instance, item) for item in union["items"]):
        return
    for item in union["items"]:
        if _meant(item["unionKey"], instance):
            yield from validator.descend(instance, item)
            return
    yield ValidationError(union.get("defaultMessage", "fits no item of the union"))


def _meant(key, instance):
    """Whether a union key such as "const:name=grid" selects its item."""
    kind, _, rest = key.partition(":")
    if kind == "not":
        return not _meant(rest, instance)
    is_object = isinstance(instance, dict)
    return {
        "always": lambda: True,
        "never": lambda: False,
        "hasattr": lambda: is_object and rest in instance,
        "singleproperty": lambda: is_object and list(instance) == [rest],
        "const": lambda: (
            is_object and instance.get(rest.partition("=")[0]) == rest.partition("=")[2]
        ),
        "type": lambda: isinstance(instance, {"object": dict, "array": list}[rest]),
    }[kind]()


def _checks(validator, checks, instance, schema):
    for message, check in checks.items():
        if not _valid(validator, instance, check):
            yield ValidationError(message)


def _compare(validator, compare, instance, schema):
    if not isinstance(instance, dict):
        return
    a, b = (instance.get(compare[key]) for key in "ab")
    if a is None or b is None:
        return
    if compare["type"] == "a_is_subdir_of_b":
        inside = posixpath.normpath(posixpath.join(b, a))
        if inside != posixpath.normpath(b) and not inside.startswith(
            posixpath.normpath(b).rstrip("/") + "/"
        ):
            yield ValidationError(
                f"{compare['a']} must either be a relative directory or a subdirectory "
                f"of {compare['b']}"
            )
    elif not (a < b or (a == b and compare["type"] == "a<=b")):
        yield ValidationError(f"{compare['a']} must be less than {compare['b']}")


def _disallow(validator, disallowed, instance, schema):
    for name, message in disallowed.items():
        if isinstance(instance, dict) and name in instance:
            yield ValidationError(message)


def _optional_ref(validator, url, instance, schema):
    if instance is not None:
        yield from validator.descend(instance, {"$ref": url})


def _eventually(validator, inner, instance, schema):
    yield from validator.descend(instance, inner)


def _eventually_required(validator, names, instance, schema):
    for name in names:
        if isinstance(instance, dict) and instance.get(name) is None:
            yield ValidationError(f"{name} is a required property")


KEYWORDS = {
    "union": _union,
    "checks": _checks,
    "compareProperties": _compare,
    "disallowProperties": _disallow,
    "optionalRef": _optional_ref,
}
COMPLETE = {"eventually": _eventually, "eventuallyRequired": _eventually_required}


def errors(url, instance, complete=False):
    """Messages like "<config>.searcher: ..." of Determined's validation."""
    resources = []
    for path in (SCHEMAS / "schemas" / "expconf" / "v0").glob("*.json"):
        document = json.loads(path.read_text())
        document.pop("$schema")  # or plain draft 7 would take over at each $ref
        resources.append((document["$id"], DRAFT7.create_resource(document)))
    keywords = {**KEYWORDS, **(COMPLETE if complete else {})}
    dialect = validators.extend(Draft7Validator, keywords)
    validator = dialect({"$ref": url}, registry=Registry().with_resources(resources))
    messages = []
    for error in validator.iter_errors(instance):
        steps = (
            f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.path
        )
        messages.append(f"<config>{''.join(steps)}: {error.message}")
    return messages


def determined_cases():
    for path in sorted((SCHEMAS / "schemas" / "test_cases" / "v0").glob("*.yaml")):
        for case in config(path):
            for key in (
                "sane_as",
                "complete_as",
                "sanity_errors",
                "completeness_errors",
            ):
                if key in case:
                    yield pytest.param(key, case, id=f"{case['name']} {key}")


@needs_schema
@pytest.mark.parametrize(("key", "case"), determined_cases())
def test_validator_agrees_with_determineds_own_test_cases(key, case):
    complete = key.startswith("complete")
    if key.endswith("_as"):
        for url in case[key]:
            assert errors(url, case["case"], complete) == []
        return
    for url, patterns in case[key].items():
        found = errors(url, case["case"], complete)
        for pattern in patterns:
            assert any(re.search(pattern, message) for message in found), found


@needs_schema
def test_determineds_test_cases_were_found():
    assert len(list(determined_cases())) > 100


@needs_schema
@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_yaml_is_valid_by_determineds_schema(path):
    assert errors(URL + "experiment.json", config(path)) == []


@needs_schema
def test_yaml_is_complete_with_what_a_master_adds():
    added = {
        "checkpoint_storage": {"type": "shared_fs", "host_path": "/tmp"},
        "reproducibility": {"experiment_seed": 1},
    }
    for path in YAMLS:
        whole = {**config(path), **added}
        whole.setdefault("environment", {})
        whole["environment"]["image"] = {"cpu": "i", "cuda": "i", "rocm": "i"}
        found = errors(URL + "experiment.json", whole, complete=True)
        assert found == [], path.name


@needs_schema
def test_schema_refuses_a_misspelt_field():
    wrong = config(FILES / "const.yaml")
    wrong["serchr"] = wrong.pop("searcher")
    assert "serchr" in errors(URL + "experiment.json", wrong)[0]


# ---- what the master demands besides, and what this repository does


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_yaml_cannot_be_submitted_before_it_is_filled_in(path):
    # A master refuses a workspace or project that it does not know, and one of the two
    # without the other; no name of either can hold the angle brackets by accident.
    for key in ("workspace", "project"):
        assert re.fullmatch("<[A-Z_]+>", config(path)[key])
    where = config(path)["hyperparameters"].get("data_dir", "")
    if "://" in where:
        assert re.search("<[A-Z_]+>", where)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_searcher_maximises_a_reported_metric_within_the_length(path):
    experiment = config(path)
    searcher, hparams = experiment["searcher"], experiment["hyperparameters"]
    assert searcher["metric"] == "mAP"
    assert searcher["smaller_is_better"] is False
    assert "max_length" not in searcher  # deprecated: the length is a hyperparameter
    if searcher["name"] == "adaptive_asha":
        assert searcher["time_metric"] == "batches"
        assert searcher["max_time"] == hparams["max_batches"]
        first_rung = searcher["max_time"] // searcher["divisor"] ** (
            searcher["max_rungs"] - 1
        )
        assert hparams["validation_batches"] <= first_rung
    if searcher["name"] == "grid":
        sizes = [
            len(value["vals"]) if value["type"] == "categorical" else value["count"]
            for value in hparams.values()
            if isinstance(value, dict) and "type" in value
        ]
        product = list(itertools.accumulate(sizes, lambda a, b: a * b))[-1]
        assert 1 < product <= 2000  # the master's limit


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
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


def one_value(value):
    if not isinstance(value, dict) or "type" not in value:
        return value
    return value["vals"][0] if "vals" in value else value["minval"]


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_hyperparameters_are_those_that_the_trial_reads(path):
    experiment = config(path)
    hparams = {k: one_value(v) for k, v in experiment["hyperparameters"].items()}
    check_hparams(hparams)
    slots = experiment["resources"]["slots_per_trial"]
    assert hparams["global_batch_size"] % slots == 0
    settings = train_config(hparams, slots)
    assert settings.model in MODELS
    assert settings.steps == hparams["max_batches"]


def test_every_model_of_the_grid_can_be_built_by_name():
    searched = config(FILES / "const-distributed-search.yaml")
    names = searched["hyperparameters"]["model"]["vals"]
    assert len(set(names)) == 8
    for name in names:
        assert model_settings(name)


def test_the_distributed_schedule_is_that_of_the_original_recipe():
    hparams = config(FILES / "const-distributed.yaml")["hyperparameters"]
    settings = train_config(hparams, processes=8)
    assert settings.lr_milestones == [14 * 1288, 15 * 1288]
    assert round(settings.warmup * settings.steps) == 200
    assert (settings.lr, settings.momentum) == (0.01, 0.9)


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


# ---- train.py's reading of a YAML


def test_override_replaces_a_range_by_a_value():
    path = FILES / "const-distributed-search.yaml"
    with pytest.raises(ValueError, match="model is a range to search"):
        load_config(path)
    loaded = load_config(path, ["model=fcos_resnet50_fpn", "lr=1.0e-3"])
    assert loaded["hyperparameters"]["model"] == "fcos_resnet50_fpn"
    assert loaded["hyperparameters"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lerning_rate=1", "unknown hyperparameter 'lerning_rate'.*valid:.*lr"),
        ("lr", "an override is name=value, got 'lr'"),
        ("warmup=0.1", None),
    ],
)
def test_override_that_nothing_reads_is_an_error(override, message):
    if message is None:
        load_config(FILES / "const.yaml", [override])
        return
    with pytest.raises(ValueError, match=message):
        load_config(FILES / "const.yaml", [override])


def test_hyperparameters_that_contradict_each_other_are_an_error():
    with pytest.raises(ValueError, match="warmup_batches or warmup, not both"):
        load_config(FILES / "const-distributed.yaml", ["warmup=0.1"])
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


# ---- the startup hook


def test_startup_hook_is_clean_by_shellcheck():
    tool = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    tool = tool or shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not on PATH")
    done = subprocess.run(
        [tool, str(FILES / "startup-hook.sh")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def run_hook(tmp_path, *, sourced=False, **variables):
    hook = FILES / "startup-hook.sh"
    command = [f"source {hook}; echo entrypoint goes on"] if sourced else []
    return subprocess.run(
        ["bash", "-ec", *command, "entrypoint"] if sourced else ["bash", str(hook)],
        cwd=tmp_path,
        env={**os.environ, "DET_PYTHON_EXECUTABLE": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_startup_hook_fetches_labels_once_and_lets_the_entrypoint_go_on(tmp_path):
    bucket, labels = tmp_path / "bucket", tmp_path / "labels"
    bucket.mkdir()
    for name in ("train_300_02.json", "val_300_02.json"):
        (bucket / name).write_text("{}")
    variables = {"E2E_LABELS_URL": bucket.as_uri(), "E2E_LABELS_DIR": str(labels)}
    first = run_hook(tmp_path, sourced=True, **variables)
    assert first.returncode == 0, first.stderr
    assert "fetched val_300_02.json" in first.stdout
    assert "entrypoint goes on" in first.stdout
    second = run_hook(tmp_path, **variables)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("is there") == 2
    assert sorted(p.name for p in labels.iterdir()) == [
        "train_300_02.json",
        "val_300_02.json",
    ]


@pytest.mark.slow
def test_startup_hook_stops_the_container_where_labels_are_missing(tmp_path):
    bucket, labels = tmp_path / "bucket", tmp_path / "labels"
    bucket.mkdir()
    (bucket / "train_300_02.json").write_text("{}")
    done = run_hook(
        tmp_path,
        sourced=True,
        E2E_LABELS_URL=bucket.as_uri(),
        E2E_LABELS_DIR=str(labels),
    )
    assert done.returncode == 1
    assert "could not fetch val_300_02.json" in done.stderr
    assert "entrypoint goes on" not in done.stdout
    assert [p.name for p in labels.iterdir()] == ["train_300_02.json"]


@pytest.mark.slow
def test_startup_hook_without_a_bucket_fetches_nothing(tmp_path):
    done = run_hook(tmp_path, E2E_LABELS_URL="")
    assert done.returncode == 0, done.stderr
    assert "no labels to fetch" in done.stdout
