"""Checkpoints to artefacts, and the handler that serves them, called in process."""

import argparse
import ast
import base64
import importlib
import io
import json
import random
import runpy
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import ts.torch_handler.base_handler as base_handler
from PIL import Image
from serving import NAMES, ROOT, SETTINGS, TABLE, checkpoint, decode, jpeg
from ts.utils.util import PredictionException, list_classes_from_module

from e2e_utils.models import model_from_checkpoint
from e2e_utils.predict import predict_image
from kserve_utils import export
from kserve_utils.engines import DESCRIBES

SERVER = ROOT / "kserve_utils" / "torchserve_utils"
DESCRIPTION = {"architecture": "fasterrcnn_small", "class_names": NAMES}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "best.pt"
    torch.save(checkpoint(), path)
    return path


@pytest.fixture(scope="module")
def stripped(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stripped")
    return export.strip_checkpoint(ours, folder / "trained_model_stripped.pth")


@pytest.fixture(scope="module")
def mar(stripped, tmp_path_factory):
    return export.write_mar(stripped, tmp_path_factory.mktemp("mar"))


def ddp(weights):
    return {f"module.{name}": value for name, value in weights.items()}


def determined(weights, **more):
    """What determined.pytorch's _save writes beside the weights."""
    return {
        "models_state_dict": [weights],
        "optimizers_state_dict": [{"state": {}, "param_groups": []}],
        "lr_schedulers_state_dict": [],
        "callbacks": {},
        "rng_state": {
            "cpu_rng_state": torch.random.get_rng_state(),
            "np_rng_state": np.random.get_state(),
            "random_rng_state": random.getstate(),
        },
        **more,
    }


def test_stripping_keeps_the_weights_and_what_describes_them_only(ours, stripped):
    content = torch.load(stripped, weights_only=True)
    assert set(content) == {"model", *DESCRIBES}
    assert content["settings"] == SETTINGS and content["class_names"] == NAMES
    before = torch.load(ours, weights_only=True)["model"]
    assert all(torch.equal(content["model"][k], v) for k, v in before.items())
    assert stripped.stat().st_size < ours.stat().st_size
    assert not list(stripped.parent.glob("*.part"))


@pytest.mark.parametrize("form", ["seeds", "arguments", "bare", "determined", "ddp"])
def test_other_forms_are_stripped_when_told_what_they_are(form, tmp_path):
    weights = checkpoint()["model"]
    content = {
        "seeds": {"model": weights, "optimizer": {}, "epoch": 3},
        "arguments": {"model": weights, "args": argparse.Namespace(lr=0.02)},
        "bare": weights,
        "determined": determined(weights),
        "ddp": determined(ddp(weights)),
    }[form]
    torch.save(content, tmp_path / "state_dict.pth")
    source = tmp_path if form == "determined" else tmp_path / "state_dict.pth"
    new = export.strip_checkpoint(source, tmp_path / "new.pth", **DESCRIPTION)
    model, meta = model_from_checkpoint(new)
    assert (meta["tile_size"], meta["overlap"], meta["settings"]) == (300, 0.2, {})
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


def test_a_trial_that_describes_itself_needs_no_arguments(tmp_path):
    whole = checkpoint()
    said = {key: whole[key] for key in DESCRIBES}
    torch.save(determined(whole["model"], e2e=said), tmp_path / "state_dict.pth")
    new = export.strip_checkpoint(tmp_path, tmp_path / "new.pth")
    assert model_from_checkpoint(new)[1] == said


def test_the_weights_of_a_view_do_not_drag_its_storage_along(tmp_path):
    content = checkpoint()
    name = "roi_heads.box_head.fc7.bias"
    content["model"][name] = torch.zeros(5_000_000)[: len(content["model"][name])]
    torch.save(content, tmp_path / "ckpt.pt")
    new = export.strip_checkpoint(tmp_path / "ckpt.pt", tmp_path / "new.pth")
    assert new.stat().st_size < 9e6 < (tmp_path / "ckpt.pt").stat().st_size


class Foreign:
    """Not data: reading it would run code."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


def unfit():
    content = checkpoint()
    return {**content, "class_names": content["class_names"][:10]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"w": torch.zeros(2)}}, "pass architecture=.* and class_names="),
        (
            {"model": Foreign(), "architecture": "x", "class_names": []},
            "not a readable checkpoint",
        ),
        ([1, 2, 3], "holds a list"),
        ({**DESCRIPTION, "model": {}}, "holds no weights"),
        ({**DESCRIPTION, "epoch": 3}, "holds no weights.*architecture"),
        ({**DESCRIPTION, "model": {"w": torch.zeros(2)}}, "do not fit"),
        ({**DESCRIPTION, "models_state_dict": [{}, {}]}, "holds 2 models"),
        (unfit(), "do not fit fasterrcnn_small with 10 classes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_foreign_checkpoint_is_an_error_that_names_it(
    content, message, tmp_path, capsys
):
    path, new = tmp_path / "foreign.pt", tmp_path / "new.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as raised:
        export.strip_checkpoint(path, new)
    assert "foreign.pt" in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["foreign.pt"]
    assert "never" not in capsys.readouterr().out


def test_what_is_no_checkpoint_at_all_is_an_error_that_names_it(ours, tmp_path):
    path, new = tmp_path / "broken.pt", tmp_path / "new.pth"
    texts = [b"", b"just text", b"<html>404</html>", b'{"model": 1}', jpeg()]
    for content in [ours.read_bytes()[:100_000], *texts]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.pt is not a readable"):
            export.strip_checkpoint(path, new)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.pt"):
        export.strip_checkpoint(tmp_path / "absent.pt", new)
    assert not new.exists()


@pytest.mark.slow
def test_the_command_of_the_tutorial_strips_a_checkpoint(ours, tmp_path):
    command = [sys.executable, "kserve_utils/torchserve_utils/strip_checkpoint.py"]
    command += ["--ckpt-path", str(ours), "--new-ckpt-name", str(tmp_path / "new.pth")]
    command += ["--class-names", str(ROOT / "e2e_utils" / "xview_classes.json")]
    for returncode in (0, 1):
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == returncode, done.stderr
        command[3] = str(tmp_path / "absent.pt")
    assert done.stderr == f"strip_checkpoint: no checkpoint at {command[3]}\n"
    content = torch.load(tmp_path / "new.pth", weights_only=True)
    assert set(content) == {"model", *DESCRIBES}


def test_class_names_are_read_from_a_list_or_a_class_table(tmp_path):
    read = runpy.run_path(str(SERVER / "strip_checkpoint.py"))["read_class_names"]
    assert read(ROOT / "e2e_utils" / "xview_classes.json") == NAMES
    (tmp_path / "names.json").write_text('["background", "car"]')
    assert read(tmp_path / "names.json") == ["background", "car"]
    (tmp_path / "names.json").write_text('{"car": 1}')
    with pytest.raises(ValueError, match="names.json is neither"):
        read(tmp_path / "names.json")


def test_the_archive_holds_all_that_a_server_needs(mar, stripped):
    with zipfile.ZipFile(mar) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert set(files) == {
        "MAR-INF/MANIFEST.json",
        "detector.json",
        "fasterrcnn_handler.py",
        "index_to_name.json",
        "model-xview.py",
        "trained_model_stripped.pth",
        *export.CODE,
    }
    assert files["trained_model_stripped.pth"] == stripped.read_bytes()
    for name in export.CODE:
        assert files[name] == (ROOT / "e2e_utils" / name).read_bytes()
    committed = (SERVER / "index_to_name.json").read_bytes()
    assert files["index_to_name.json"] == committed
    assert json.loads(committed)["1"] == TABLE["classes"][0]["name"]
    description = json.loads(files["detector.json"])
    meta = model_from_checkpoint(stripped)[1]
    limits = {"score_threshold": 0.0, "max_pixels": 4096 * 4096}
    assert description == {**meta, **limits}
    manifest = json.loads(files["MAR-INF/MANIFEST.json"])["model"]
    assert manifest["modelName"] == "xview-fasterrcnn"
    assert manifest["modelVersion"] == "1.0"


@pytest.mark.slow
def test_two_archives_at_the_same_time_do_not_disturb_each_other(
    stripped, mar, tmp_path
):
    command = [sys.executable, "-m", "kserve_utils.export"]
    command += ["--stripped-ckpt", str(stripped), "--out-dir"]
    runs = [subprocess.Popen([*command, str(tmp_path / name)]) for name in ("a", "b")]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    with zipfile.ZipFile(mar) as wanted:
        for name in ("a", "b"):
            with zipfile.ZipFile(
                tmp_path / name / "model-store" / "xview-fasterrcnn.mar"
            ) as made:
                assert sorted(made.namelist()) == sorted(wanted.namelist())
                assert made.testzip() is None


def test_what_is_not_stripped_or_out_of_range_is_refused(tmp_path, ours, stripped):
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth is not a readable"):
        export.write_mar(tmp_path / "text.pth", tmp_path)
    with pytest.raises(ValueError, match=r"best\.pt is not stripped .*strip_checkp"):
        export.write_mar(ours, tmp_path)
    with pytest.raises(ValueError, match="in 0..1, got 40"):
        export.write_mar(stripped, tmp_path, score_threshold=40)
    with pytest.raises(RuntimeError, match="special characters"):
        export.write_mar(stripped, tmp_path, "../evil")
    with pytest.raises(ValueError, match=r"text\.pth is not a model archive"):
        export.write_model_store(tmp_path / "text.pth", tmp_path / "store")
    with pytest.raises(FileNotFoundError, match=r"no model archive at .*absent\.mar"):
        export.write_model_store(tmp_path / "absent.mar", tmp_path / "store")


def read_properties(path):
    lines = path.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def test_the_committed_configuration_is_that_of_a_written_tree(mar, tmp_path):
    tree = export.write_model_store(mar, tmp_path)
    for name in ("config/config.properties", "model-store/properties.json"):
        assert (tree / name).read_bytes() == (SERVER / name).read_bytes(), name
    assert (tree / "model-store" / mar.name).read_bytes() == mar.read_bytes()
    files = sorted(str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file())
    assert files == [
        "config/config.properties",
        "model-store/properties.json",
        "model-store/xview-fasterrcnn.mar",
    ]


KINDS = ("inference", "management", "metrics")


def test_the_defaults_are_safe():
    config = read_properties(SERVER / "config" / "config.properties")
    assert config["management_address"].startswith("http://127.0.0.1:")
    addresses = (config[f"{kind}_address"] for kind in KINDS)
    ports = [address.rsplit(":")[-1] for address in addresses]
    ports += [config["grpc_inference_port"], config["grpc_management_port"]]
    assert len(set(ports)) == 5
    assert not {"8080", "8081"} & set(ports)  # KServe's wrapper has these
    assert config["install_py_dep_per_model"] == "false"
    assert int(config["max_request_size"]) == 64 * 2**20
    (versions,) = json.loads(config["model_snapshot"])["models"].values()
    assert versions["1.0"]["batchSize"] == versions["1.0"]["maxWorkers"] == 1


@pytest.fixture(scope="module")
def handler(mar, tmp_path_factory):
    return start_handler(mar, tmp_path_factory.mktemp("unpacked"))


def start_handler(mar, folder, gpu_id=None):
    """The handler in an unpacked archive, as a worker of TorchServe starts it."""
    with zipfile.ZipFile(mar) as archive:
        archive.extractall(folder)
    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())
    context = SimpleNamespace(
        system_properties={"model_dir": str(folder), "gpu_id": gpu_id},
        manifest=manifest,
        model_yaml_config={},
        metrics=SimpleNamespace(add_time=lambda *a, **k: None),
        get_request_header=lambda *a: None,
    )
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("fasterrcnn_handler")
        (only,) = list_classes_from_module(module)
        handler = only()
        handler.initialize(context)
        model = importlib.import_module("model-xview")
        assert len(list_classes_from_module(model)) == 1
    finally:
        sys.path.remove(str(folder))
    return lambda instances: handler.handle(instances, context)


def instance(content: bytes) -> dict:
    return {"data": base64.b64encode(content).decode()}


def test_the_handler_answers_what_local_prediction_answers(handler, stripped):
    model, meta = model_from_checkpoint(stripped)
    contents = [jpeg(), jpeg(211, 157, seed=1)]
    answers = handler([instance(content) for content in contents])
    assert len(answers) == 2
    for content, answer in zip(contents, answers, strict=True):
        wanted = predict_image(model, decode(content))
        assert len(answer) == len(wanted["scores"]) > 10
        for row, box, label, score in zip(
            answer,
            wanted["boxes_xyxy"].tolist(),
            wanted["labels"],
            wanted["scores"].tolist(),
            strict=True,
        ):
            assert row == {meta["class_names"][label]: box, "score": score}


class OneGpu:
    """A test double of torch for TorchServe's base class: a GPU that is the CPU."""

    def __init__(self) -> None:
        self.asked, self.cuda = [], SimpleNamespace(is_available=lambda: True)

    def device(self, name: str) -> torch.device:
        self.asked.append(name)
        return torch.device("cpu")

    def __getattr__(self, name: str):
        return getattr(torch, name)


def test_the_handler_takes_the_gpu_that_torchserve_gives_it(
    mar, handler, tmp_path, monkeypatch
):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    torch.set_float32_matmul_precision("high")  # what the base class does on a GPU
    monkeypatch.setattr(base_handler, "torch", gpu := OneGpu())
    try:
        on_gpu = start_handler(mar, tmp_path, gpu_id=3)
        assert gpu.asked == ["cuda:3"]
        assert on_gpu([instance(jpeg())]) == handler([instance(jpeg())])
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_thin_first_picture_spoils_no_later_one(mar, handler, tmp_path):
    fresh = start_handler(mar, tmp_path)
    thin, tile = [instance(jpeg(40, 900))], [instance(jpeg())]
    assert [fresh(thin), fresh(tile)] == [handler(thin), handler(tile)]


def test_the_handler_takes_raw_bytes_broken_lines_and_other_formats(handler):
    plain = handler([instance(jpeg())])
    assert handler([{"body": jpeg()}]) == plain
    assert handler([{"data": base64.encodebytes(jpeg()).decode()}]) == plain
    for kind in ("PNG", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(decode(jpeg())).save(file, kind)
        assert handler([instance(file.getvalue())]) == plain
    for mode in ("L", "RGBA", "P"):
        file = io.BytesIO()
        Image.fromarray(decode(jpeg())).convert(mode).save(file, "PNG")
        assert len(handler([instance(file.getvalue())])) == 1


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("L", (12_000, 12_000)).save(file, "PNG")
    return file.getvalue()


def deep() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("instances", "message"),
    [
        (None, 'no "instances"'),
        ([], 'no "instances"'),
        (["text"], 'instance 0: needs the key "data"'),
        ([{"image": "x"}], 'needs the key "data"'),
        ([{"data": ""}], 'needs the key "data"'),
        ([{"data": 7}], "must be text"),
        ([{"data": "%%%"}], "not base64"),
        ([{"data": "schön"}], "not base64"),
        ([instance(b"hello world")], "11 bytes that are not a picture"),
        ([instance(jpeg()[:2000])], "cut short"),
        ([instance(jpeg()), instance(jpeg()[:2000])], "instance 1"),
        ([instance(bomb())], "12000 x 12000 pixels, at most 16777216"),
        ([instance(deep())], "send 8 bits"),
    ],
)
def test_bad_input_is_a_400_with_a_reason(handler, instances, message):
    with pytest.raises(PredictionException) as raised:
        handler(instances)
    assert raised.value.error_code == 400
    assert message in raised.value.message


def test_damaged_pictures_are_a_400_or_boxes_and_nothing_else(handler):
    rng = np.random.default_rng(0)
    whole = np.frombuffer(jpeg(64, 64), dtype=np.uint8)
    for _ in range(20):
        damaged = whole.copy()
        places = rng.integers(0, len(whole), 4)
        damaged[places] = rng.integers(0, 256, 4)
        try:
            assert len(handler([instance(damaged.tobytes())])) == 1
        except PredictionException as error:
            assert error.error_code == 400


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_pillow_and_opencv_decode_a_jpeg_to_the_same_pixels(subsampling, progressive):
    file = io.BytesIO()
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (61, 47, 3), dtype=np.uint8)
    Image.fromarray(noise).save(
        file, "JPEG", quality=85, subsampling=subsampling, progressive=progressive
    )
    bgr = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)
    assert (decode(file.getvalue()) == bgr[..., ::-1]).all()


@pytest.mark.parametrize("name", ["fasterrcnn_handler.py", "model-xview.py"])
def test_what_travels_in_the_archive_is_python_39_and_stands_alone(name):
    tree = ast.parse((SERVER / name).read_text(), feature_version=(3, 9))
    assert sum(isinstance(node, ast.ClassDef) for node in tree.body) == 1
    modules = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert modules <= set(sys.stdlib_module_names) | {"numpy", "torch", "PIL", "ts"}
