"""The served artefact: written whole or not at all, and engines that agree."""

import json
import shutil
import stat
import sys
from functools import partial

import numpy as np
import onnx
import openvino
import pytest
import torch
from commands import python
from PIL import Image
from servers import together
from serving import NAMES, ROOT, checkpoint, decode, jpeg
from torchvision.ops import poolers

from e2e_utils.checkpoint import model_from_checkpoint
from e2e_utils.describe_tiles import describe_split
from e2e_utils.models import build_model, resolved_settings
from e2e_utils.predict import predict_image, predict_scene
from kserve_utils import artefact as artefacts
from kserve_utils import engines, export, graphs
from kserve_utils.approve import approve_or_say_why_not, approve_precision
from kserve_utils.approve import main as approve_main

OTHERS = ("openvino", "onnxruntime")
SIZES = [(300, 300), (211, 157), (640, 480), (2, 2), (40, 900)]


def strip(content: dict, path) -> object:
    torch.save(content, path.with_suffix(".pt"))
    return export.strip_checkpoint(path.with_suffix(".pt"), path)


@pytest.fixture(scope="module")
def tiles():
    return [decode(jpeg(seed=seed)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def plain(stripped, tiles, tmp_path_factory):
    """An artefact for torch alone, which is written in a moment."""
    folder = tmp_path_factory.mktemp("plain") / "artefact"
    return artefacts.write_artefact(stripped, folder, ["torch"], tiles=tiles)


@pytest.fixture
def copy(plain, tmp_path):
    """A copy of `plain` that a test may spoil."""
    return shutil.copytree(plain, tmp_path / "artefact")


def describe(folder, **changes):
    content = json.loads((folder / "detector.json").read_text())
    (folder / "detector.json").write_text(json.dumps({**content, **changes}))


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def run_main(monkeypatch, capsys):
    """A command in this process: (exit status or message, what it printed)."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().out

    return run


@pytest.fixture
def every_precision(monkeypatch):
    """torch emulates what this machine has no units for."""
    native = ("fp32", "bf16", "fp16")
    monkeypatch.setattr(engines, "native_precisions", lambda device: native)


@pytest.mark.slow
def test_the_artefact_holds_all_that_a_server_needs(artefact, stripped):
    models = ["model.bin", "model.onnx", "model.pth", "model.xml"]
    assert listing(artefact) == ["detector.json", *models]
    assert (artefact / "model.pth").read_bytes() == stripped.read_bytes()
    description = json.loads((artefact / "detector.json").read_text())
    wanted = model_from_checkpoint(stripped)[1] | {"model_name": "xview-fasterrcnn"}
    wanted |= {"max_pixels": 4096 * 4096, "score_threshold": 0.0}
    assert description.items() >= {**wanted, "engines": list(engines.ENGINES)}.items()
    parity = description["parity"]
    assert parity["torch"]["checked"] == 3  # and a crop of the first
    for engine in OTHERS:
        assert parity[engine]["box_difference_px"] <= 0.05
        assert parity[engine]["score_difference"] <= 1e-4
    for path in [artefact, *artefact.iterdir()]:  # a server runs as another user
        assert path.stat().st_mode & stat.S_IROTH
    # weights in half precision would move boxes
    size = (artefact / "model.bin").stat().st_size
    assert size > 0.9 * (artefact / "model.onnx").stat().st_size


@pytest.mark.slow
def test_the_graphs_have_nothing_that_is_known_to_be_slow(artefact):
    nodes = onnx.load(str(artefact / "model.onnx")).graph.node
    large = {"ScatterElements", "Expand"}  # what merges levels in torchvision's tracing
    assert not [n.name for n in nodes if n.op_type in large and "roi_pool" in n.name]
    makes = {output: node.op_type for node in nodes for output in node.output}
    heads = [n for n in nodes if n.op_type == "Relu" and makes[n.input[0]] == "Gemm"]
    assert heads  # of ONNX Runtime, which loses nothing by them
    graph = openvino.Core().read_model(str(artefact / "model.xml")).get_ops()
    names = {op.get_friendly_name(): op.get_type_name() for op in graph}
    assert [names[n.name] for n in heads] == ["Maximum"] * len(heads)


@pytest.mark.slow
def test_proposals_are_computed_in_float32_where_the_network_is_in_bf16(artefact):
    core, hint = openvino.Core(), {"INFERENCE_PRECISION_HINT": "bf16"}
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")
    compiled = core.compile_model(str(artefact / "model.xml"), "CPU", hint)
    network, boxes = set(), {}
    for op in compiled.get_runtime_model().get_ops():
        info = {key: value.astype(str) for key, value in op.get_rt_info().items()}
        kind, precision = info["layerType"], info["runtimePrecision"]
        if kind == "Convolution":
            network.add(precision)
        elif kind not in ("Reorder", "Convert", "ROIAlign"):  # between precisions
            if graphs.BOX_LAYERS.search(op.get_friendly_name()):
                boxes.setdefault(precision, []).append(op.get_friendly_name())
    assert network == {"bf16"}
    assert len(boxes["f32"]) > 50
    # but for the pooling's own copy of the regions
    assert all("/box_roi_pool/" in name for name in boxes.get("bf16", []))


@pytest.mark.parametrize("count", [7, 1, 0])
def test_levels_are_gathered_as_torchvision_scatters_them(count):
    draw = torch.Generator().manual_seed(count)
    levels = torch.randint(0, 4, (count,), generator=draw)
    levels[levels == 2] = 1  # a level that nothing is pooled from
    parts = [torch.rand(int((levels == i).sum()), 3, 2, 2) for i in range(4)]
    wanted = poolers._onnx_merge_levels(levels, parts)
    assert torch.equal(graphs.gather_levels(levels, parts), wanted)


def same(expected: dict, found: dict) -> None:
    """Equal boxes within the tolerances; near ties may come in another order."""
    keys = {"boxes_xyxy": "boxes", "labels": "labels", "scores": "scores"}
    pair = (
        [{new: torch.as_tensor(value[key]) for key, new in keys.items()}]
        for value in (expected, found)
    )
    artefacts.compare(*pair)


@pytest.mark.slow
@pytest.mark.parametrize("engine", OTHERS)
def test_every_engine_gives_the_boxes_of_torch_to_threads_that_ask_at_once(
    artefact, engine
):
    reference, _ = engines.load_engine(artefact)
    module, meta = engines.load_engine(artefact, engine, threads=1, at_once=2)
    assert (meta["engine"], meta["threads"]) == (engine, 1)
    pictures = [decode(jpeg(*size, seed=7)) for size in SIZES]
    wanted = [predict_image(reference, picture) for picture in pictures]
    answers = together(15, lambda i: predict_image(module, pictures[i % len(SIZES)]))
    for index, found in enumerate(answers):
        assert found["boxes_xyxy"].dtype == found["scores"].dtype == np.float32
        assert found["labels"].dtype == np.int64
        assert len(found["scores"]) == 40 and (np.diff(found["scores"]) <= 0).all()
        same(wanted[index % len(SIZES)], found)
    scene, settings = decode(jpeg(500, 700, seed=3)), {"size": 300, "overlap": 0.2}
    settings |= {"score_threshold": 0.0}
    wanted, found = (predict_scene(m, scene, **settings) for m in (reference, module))
    assert len(wanted["scores"]) > 50
    same(wanted, found)


@torch.inference_mode()
def objectness(model, picture) -> float:
    """The highest score of any proposal on a picture, 0..1."""
    pixels = torch.from_numpy(picture).permute(2, 0, 1) / 255
    features = model.backbone(model.transform([pixels])[0].tensors)
    logits, _ = model.rpn.head(list(features.values()))
    return float(max(level.max() for level in logits).sigmoid())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "best"),
    [
        ("box_score_thresh", lambda m, picture: predict_image(m, picture)["scores"][0]),
        ("rpn_score_thresh", objectness),
    ],
    ids=["box", "proposal"],
)
def test_a_picture_without_a_box_or_a_proposal_is_no_error(setting, best, tmp_path):
    content = checkpoint()
    model, _ = model_from_checkpoint(strip(content, tmp_path / "stripped.pth"))
    shown = [decode(jpeg(seed=1)), np.full((300, 300, 3), 128, np.uint8)]
    # one of the two pictures passes the threshold, the other does not
    threshold = float(np.mean([best(model, picture) for picture in shown]))
    content["settings"] = {**content["settings"], setting: threshold}
    path = strip(content, tmp_path / "strict.pth")
    model, _ = model_from_checkpoint(path)
    folder = artefacts.write_artefact(path, tmp_path / "new", OTHERS, tiles=shown)
    for engine in OTHERS:
        module, _ = engines.load_engine(folder, engine, threads=1)
        counts = set()
        for picture in shown:
            wanted, found = (predict_image(m, picture) for m in (model, module))
            same(wanted, found)
            assert found["boxes_xyxy"].shape == wanted["boxes_xyxy"].shape
            counts.add(len(found["scores"]) > 0)
        assert counts == {True, False}, engine


def test_torch_is_the_checkpoint_itself_with_the_threads_asked_for(plain, stripped):
    model, _ = model_from_checkpoint(stripped)
    tile, before = decode(jpeg()), torch.get_num_threads()
    wanted = predict_image(model, tile)
    try:
        for threads in (2, 1):
            module, meta = engines.load_engine(plain, threads=threads)
            assert meta["threads"] == threads == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    device = str(engines.resolve_device("torch"))
    assert (meta["engine"], meta["precision"]) == ("torch", "fp32")
    assert meta["device"] == device == str(next(module.parameters()).device)
    assert meta["class_names"] == NAMES and not module.training
    # a thin first picture spoils no later one
    thin = decode(jpeg(40, 900, seed=7))
    same(predict_image(model, thin), predict_image(module, thin))
    for key, value in predict_image(module, tile).items():
        np.testing.assert_array_equal(value, wanted[key])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("double", "engine", "message"),
    [
        ("moved", "onnxruntime", "differs from torch on fasterrcnn_small, .*by 0\\.1"),
        ("torch.onnx.export", "openvino", "cannot run fast.*aten::odd.*Leave openvino"),
        ("openvino.save_model", "openvino", "cannot run fasterrcnn_small: .*aten::odd"),
        ("absent", "onnxruntime", "cannot run .*import of onnxruntime halted"),
    ],
)
def test_an_engine_that_fails_or_differs_is_an_error_and_nothing_is_written(
    stripped, tiles, tmp_path, monkeypatch, double, engine, message
):
    make = engines.RUNNERS["onnxruntime"]

    def moved(*args):  # a test double: the engine's boxes, a tenth of a pixel off
        run, threads = make(*args)
        return lambda image: [run(image)[0] + 0.1, *run(image)[1:]], threads

    def refuse(*args, **kwargs):  # a test double of an exporter that gives up
        raise RuntimeError("Exporting the operator 'aten::odd' is not supported")

    if double == "moved":
        monkeypatch.setitem(engines.RUNNERS, engine, moved)
    elif double == "absent":
        monkeypatch.setitem(sys.modules, engine, None)
    else:
        monkeypatch.setattr(double, refuse)
    with pytest.raises(RuntimeError, match=f"{engine} {message}"):
        artefacts.write_artefact(stripped, tmp_path / "new", [engine], tiles=tiles)
    assert listing(tmp_path) == []


def detections(boxes, scores, labels):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels),
    }


A, B = [1.0, 2.0, 30.0, 40.0], [50.0, 60.0, 70.0, 80.0]
EXPECTED = detections([A, B], [0.5, 0.5], [1, 2])


def many(count: int, moved: float = 0) -> dict:
    """Boxes side by side, 20 px each, of which one is wider by `moved`."""
    boxes = [[30.0 * i, 0.0, 30.0 * i + 20, 20.0] for i in range(count)]
    boxes[0][2] += moved
    return detections(boxes, [0.5] * count, [1] * count)


def test_parity_takes_near_ties_in_another_order_and_one_box_in_a_hundred():
    swapped = detections([B, A], [0.5, 0.49999], [2, 1])
    measured = artefacts.compare([EXPECTED], [swapped])
    assert measured["box_difference_px"] == 0
    assert 0 < measured["score_difference"] < 1e-4
    for count, alone in ((199, 1), (202, 2)):
        measured = artefacts.compare([many(200)], [many(count)])
        assert measured["boxes_of_one_side"] == alone
    served = {"boxes_xyxy": many(3)["boxes"].numpy()}  # arrays, as a client has them
    served |= {key: many(3)[key].numpy() for key in ("labels", "scores")}
    served["boxes_xyxy"].setflags(write=False)  # as those of gRPC
    assert artefacts.compare([many(4)], [served], allowed=1)["boxes_of_one_side"] == 1
    # of two pictures, also where one has none at all
    none = detections([], [], [])
    assert artefacts.compare([many(200), many(1)], [many(200), none])


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        (EXPECTED, ([A], [0.5], [1]), "1 boxes instead of 2"),
        (EXPECTED, ([A, B], [0.5, 0.5], [1, 1]), "2 boxes instead of 2"),
        (EXPECTED, ([A, A], [0.5, 0.5], [1, 2]), "2 are on one side alone"),
        (EXPECTED, ([A, B], [0.5, 0.4998], [1, 2]), "0.000200003 of its score"),
        (EXPECTED, ([A, B[:3] + [80.06]], [0.5] * 2, [1, 2]), "by 0.0599976 px"),
        (EXPECTED, ([A, B[:3] + [np.nan]], [0.5] * 2, [1, 2]), "by nan px"),
        (many(200), many(197), "197 boxes instead of 200"),
        (many(200), many(200, moved=0.1), "label 1 moves by 0.1 px"),
    ],
    ids=["count", "label", "twice", "score", "pixels", "nan", "3 of 200", "1 of 200"],
)
def test_what_parity_refuses(expected, found, message):
    found = found if isinstance(found, dict) else detections(*found)
    with pytest.raises(RuntimeError, match=f"^title, picture 0: .*{message}"):
        artefacts.compare([expected], [found], "title")


def test_an_older_artefact_is_replaced_and_anything_else_is_not(
    stripped, tiles, tmp_path
):
    out, foreign = tmp_path / "artefact", tmp_path / "foreign"
    write = partial(artefacts.write_artefact, stripped, tiles=tiles)
    for name in ("first", "second"):
        write(out, ["torch"], model_name=name)
        assert engines.read_artefact(out)["model_name"] == name
    files = ["artefact", "artefact/detector.json", "artefact/model.pth"]
    assert listing(tmp_path) == files
    foreign.mkdir()
    (foreign / "detector.json").write_text('{"architecture": "x"}')  # as in a .mar
    (foreign / "thesis.txt").write_text("only copy")
    for path in (foreign, foreign / "thesis.txt"):
        with pytest.raises(FileExistsError, match="no artefact: choose another"):
            write(path, ["torch"])
    (foreign / "detector.json").unlink()
    with pytest.raises(FileExistsError, match="no artefact: choose another"):
        write(foreign, ["torch"])
    assert (foreign / "thesis.txt").read_text() == "only copy"


def test_what_cannot_be_an_artefact_is_refused(stripped, tiles, tmp_path):
    torch.save(checkpoint(), tmp_path / "best.pt")
    (tmp_path / "text.pth").write_text("no weights")
    content = checkpoint()
    content["settings"] = {**content["settings"], "box_score_thresh": 0.99}
    blind = strip(content, tmp_path / "blind.pth")
    float_tile = np.zeros((4, 4, 3), np.float32)
    for changes, message in (
        ({"stripped_ckpt": tmp_path / "best.pt"}, r"best\.pt is not stripped .*strip"),
        ({"stripped_ckpt": tmp_path / "text.pth"}, r"text\.pth is not a readable"),
        ({"stripped_ckpt": tmp_path / "absent.pth"}, r"No such file.*absent\.pth"),
        ({"stripped_ckpt": blind}, r"blind\.pth finds no box on 2 tiles"),
        ({"engines": ["tensorrt"]}, "no engine .'tensorrt'.; valid: torch, op"),
        ({"tiles": []}, "tiles is empty"),
        ({"tiles": [float_tile]}, r"uint8 \(H, W, 3\), got float32 \(4, 4, 3\)"),
    ):
        options = {"stripped_ckpt": stripped, "out_dir": tmp_path / "new"}
        options |= {"engines": ["torch"], "tiles": tiles, **changes}
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            artefacts.write_artefact(**options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["tensorrt"], {}, "no engine 'tensorrt'; valid: torch, openv"),
        (["torch", "int8"], {}, "no precision 'int8'; valid: fp32, bf16, fp"),
        ([], {"threads": 0}, "threads must be at least 1, got 0"),
        ([], {"at_once": 0}, "at_once must be at least 1, got 0"),
        (["openvino"], {}, "was written for torch, not for openvino"),
        (["openvino"], {"device": "cuda"}, "openvino runs on the CPU alone, not on"),
        *(
            ([], {"device": name}, f"no device '{name}'; valid: cpu, cuda, cu")
            for name in ("gpu", "cuda:-1", "")
        ),
    ],
)
def test_what_load_engine_refuses(plain, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        engines.load_engine(plain, *arguments, **options)


def test_a_damaged_artefact_names_the_file(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no artefact at .*absent: it has no"):
        engines.load_engine(tmp_path / "absent")
    whole = (copy / "model.pth").read_bytes()
    (copy / "model.pth").write_bytes(whole[:-1] + b"?")
    with pytest.raises(ValueError, match=r"model\.pth is damaged"):
        engines.load_engine(copy)
    (copy / "model.pth").unlink()
    with pytest.raises(ValueError, match=r"is not whole: model\.pth is missing"):
        engines.load_engine(copy)
    for text, reason in (("{", "is damaged"), ("3", "is damaged"), ("[]", "lacks")):
        (copy / "detector.json").write_text(text)
        with pytest.raises(ValueError, match=rf"detector\.json .*{reason}"):
            engines.load_engine(copy)


def test_torch_takes_the_gpu_if_there_is_one_and_the_others_the_cpu(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    # test doubles: this machine need not have a GPU
    for there, own in ((False, cpu), (True, torch.device("cuda:0"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert engines.resolve_device("torch") == own
        assert engines.resolve_device("openvino") == cpu
        assert {engines.resolve_device(e, "cpu") for e in engines.ENGINES} == {cpu}
        # before the artefact is read
        with pytest.raises(ValueError, match="'cuda:1', but torch .* GPU here"):
            engines.load_engine(ROOT / "absent", device="cuda:1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_the_boxes_are_those_of_the_cpu(plain):
    on_cpu, _ = engines.load_engine(plain, device="cpu")
    on_gpu, meta = engines.load_engine(plain, device="cuda")
    assert meta["device"] == "cuda:0" and not torch.backends.cudnn.allow_tf32
    for size in SIZES:
        picture = decode(jpeg(*size, seed=7))
        same(predict_image(on_cpu, picture), predict_image(on_gpu, picture))
    scene = decode(jpeg(500, 700, seed=3))
    same(
        *(
            predict_scene(m, scene, 300, 0.2, score_threshold=0.0)
            for m in (on_cpu, on_gpu)
        )
    )


# In a process of its own: the libraries of other roads are gone there.
WITHOUT = """
import sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None
import numpy as np
from kserve_utils.engines import load_engine
from e2e_utils.predict import predict_image, predict_scene
module, meta = load_engine(sys.argv[1], device="cpu")
pixels = np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8)
found = predict_image(module, pixels, class_names=meta["class_names"])
scene = predict_scene(module, pixels, 300, 0.2, score_threshold=0.0)
assert len(found["names"]) and len(scene["scores"])
"""
ELSEWHERE = ("kserve", "openvino", "onnx", "onnxruntime", "determined", "ray")
ELSEWHERE += ("msgspec", "obstore", "fastapi", "grpc", "psutil", "requests")


def test_torch_serves_an_artefact_without_the_libraries_of_other_roads(plain):
    python("-c", WITHOUT, plain, ",".join(ELSEWHERE), cwd=ROOT)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lower_precision_is_refused_unless_approved_and_native(
    copy, monkeypatch, every_precision, precision
):
    option = " --precision fp16" if precision == "fp16" else ""
    wanted = (
        f"{precision} is not approved for torch.*kserve_utils.approve{option} --dev"
    )
    for approvals in ({}, {precision: {"torch": {"approved": False}}}):
        describe(copy, **approvals)
        with pytest.raises(ValueError, match=wanted):
            engines.load_engine(copy, precision=precision)
    describe(copy, **{precision: {"torch": {"approved": True}}})
    module, meta = engines.load_engine(copy, precision=precision, device="cpu")
    assert meta["precision"] == precision
    output = module([torch.rand(3, 120, 90)])[0]
    assert output["boxes"].dtype == output["scores"].dtype == torch.float32
    monkeypatch.setattr(engines, "native_precisions", lambda device: ("fp32",))
    with pytest.raises(
        RuntimeError, match=f"CPU has no units for {precision}.*ke fp32"
    ):
        engines.load_engine(copy, precision=precision, device="cpu")


@pytest.mark.slow
def test_onnxruntime_has_no_bf16_and_openvino_only_where_the_cpu_has(artefact):
    load = partial(engines.load_engine, artefact, approved_only=False)
    refused = [("onnxruntime", "bf16"), ("openvino", "fp16"), ("openvino", "bf16")]
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        load(*refused.pop())
    for engine, precision in refused:
        with pytest.raises(
            RuntimeError, match=f"{engine}: this CPU has no.*{precision}"
        ):
            load(engine, precision)


@pytest.fixture
def labelled(plain, tmp_path):
    """Two tiles, labelled with what the detector itself finds on them in fp32."""
    folder = tmp_path / "tiles"
    folder.mkdir()
    model, _ = engines.load_engine(plain)
    names = [{"id": i, "name": name} for i, name in enumerate(NAMES[1:])]
    coco = {"images": [], "annotations": [], "categories": names}
    for index in (1, 2):
        picture = decode(jpeg(seed=index))
        Image.fromarray(picture).save(folder / f"{index}.png")
        row = {"id": index, "file_name": f"{index}.png", "height": 300, "width": 300}
        coco["images"].append(row)
        boxes = predict_image(model, picture)
        for box, label in zip(boxes["boxes_xyxy"], boxes["labels"], strict=True):
            x1, y1, x2, y2 = map(float, box)
            row = {"id": len(coco["annotations"]) + 1, "image_id": index, "iscrowd": 0}
            row |= {"category_id": int(label) - 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            coco["annotations"].append({**row, "area": (x2 - x1) * (y2 - y1)})
    (tmp_path / "labels.json").write_text(json.dumps(coco))
    return tmp_path / "labels.json", folder


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "other"), [("bf16", "fp16"), ("fp16", "bf16")])
def test_approval_is_measured_on_labelled_tiles_and_remembered(
    copy, labelled, every_precision, precision, other, run_main
):
    path, folder = labelled
    describe_split(path.parent, "val", folder, path, tile_size=300, overlap=0.2)
    command = ["--artefact", copy, "--engine", "torch", "--tiles", path.parent]
    command += ["--precision", precision, "--max-drop"]
    status, printed = run_main(approve_main, *command, 1)
    device = str(engines.resolve_device("torch"))
    assert status == 0
    assert f"{precision} is approved for torch on {device}: AP 1.0000 in" in printed
    outcome = engines.read_artefact(copy)[precision]["torch"]
    ap, lower = outcome.pop("AP_fp32"), outcome.pop(f"AP_{precision}")
    wanted = {"approved": True, "drop": ap - lower, "max_drop": 1.0, "tiles": 2}
    assert ap == pytest.approx(1.0) and outcome == {**wanted, "device": device}
    engines.load_engine(copy, precision=precision)
    with pytest.raises(ValueError, match=f"{other} is not approved"):
        engines.load_engine(copy, precision=other)
    assert listing(copy) == ["detector.json", "model.pth"]
    # measured again with what it loses not allowed: the approval is taken back
    status, printed = run_main(approve_main, *command, -1)
    assert status == 1 and f"{precision} is not approved" in printed
    with pytest.raises(ValueError, match=f"{precision} is not approved"):
        engines.load_engine(copy, precision=precision)
    status, _ = run_main(approve_main, *command, 1, "--device", "gpu")
    assert status.startswith("error: no device 'gpu'")


def test_approval_refuses_tiles_that_tell_nothing(
    copy, labelled, every_precision, capsys
):
    path, folder = labelled
    coco = {**json.loads(path.read_text()), "annotations": []}
    path.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="is None: it tells nothing of bf16"):
        approve_precision(copy, "torch", path, folder)
    for most, why in ((2, "it tells nothing of bf16"), (1, "2 tiles take long")):
        said = approve_or_say_why_not(copy, "torch", path, folder, most_tiles=most)
        assert said == {} and why in capsys.readouterr().out
    path.write_text(json.dumps({**coco, "categories": coco["categories"][:3]}))
    with pytest.raises(ValueError, match="3 categories that are not the 60 classes"):
        approve_precision(copy, "torch", path, folder)
    with pytest.raises(ValueError, match="no lower precision 'fp32'; valid: bf16, fp1"):
        approve_precision(copy, "torch", path, folder, precision="fp32")
    assert "bf16" not in engines.read_artefact(copy)


@pytest.mark.slow
def test_the_command_writes_an_artefact_and_tells_what_it_measured(
    stripped, tmp_path, run_main
):
    out, folder = tmp_path / "new", tmp_path / "tiles"
    command = ["--stripped-ckpt", stripped, "--out-dir", out, "--tiles-dir", folder]
    status, _ = run_main(artefacts.main, *command)
    assert status == f"error: no pictures in {folder}"
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")
    for index in range(20):  # of which every other, or every third, is taken
        Image.fromarray(decode(jpeg(60, 60, index))).save(folder / f"{index:02}.png")
    read = artefacts.read_tiles(folder)
    wanted = [decode(jpeg(60, 60, i)) for i in (0, 2, 5, 7, 10, 12, 15, 17)]
    assert np.array_equal(read, wanted)
    status, printed = run_main(artefacts.main, *command, "--engines", "torch")
    assert status == 0 and "torch: checked 9" in printed
    assert set(engines.read_artefact(out)["files"]) == {"model.pth"}


def architecture(name: str) -> dict:
    """A checkpoint with random weights whose scores differ from place to place.

    Scores that are all the same would leave the order of boxes to chance.
    """
    torch.manual_seed(0)
    settings = {} if name.startswith("ssd") else {"min_size": 160, "max_size": 200}
    pretrained = {"weights_backbone": "DEFAULT"} if "lite0" in name else {}
    model = build_model(name, 5, **pretrained, **settings)
    if pretrained:  # what they change
        settings = resolved_settings(name, **pretrained, **settings)
    if name.startswith("ssdlite"):  # keep a signal alive through its random layers
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        model.backbone(torch.rand(4, 3, 320, 320))
    content = {"model": model.state_dict(), "architecture": name}
    settings["box_score_thresh" if "rcnn" in name else "score_thresh"] = 0.0
    tiles = {"tile_size": 160, "overlap": 0.2}
    return {**content, **tiles, "settings": settings, "class_names": NAMES[:5]}


FAMILIES = (
    "fasterrcnn_lite0_fpn",
    "fcos_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "ssdlite320_mobilenet_v3_large",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_are_exported_too(name, tmp_path):
    path = strip(architecture(name), tmp_path / "stripped.pth")
    pictures = [decode(jpeg(160, 160, seed=1)), decode(jpeg(200, 130, seed=2))]
    folder = artefacts.write_artefact(path, tmp_path / "artefact", tiles=pictures)
    assert engines.read_artefact(folder)["parity"]["torch"]["boxes"] > 20
