"""Lower precision: what is computed in it, who chooses it, and that it goes on."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import (
    AnchorGenerator,
    DefaultBoxGenerator,
)
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import MultiScaleRoIAlign

from e2e_utils import hardware, models
from e2e_utils.config import TrainConfig
from e2e_utils.hardware import choose_precision, find_device, native_precisions
from e2e_utils.predict import predict_image, predict_scene
from e2e_utils.run import start_process_group
from e2e_utils.train import fit, main, read_metrics, seed_step, train_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TILE = 300


class Body(nn.Module):
    """Two maps of 32 channels at strides 8 and 16: bf16 may be emulated here."""

    def __init__(self, out_channels=32):
        super().__init__()
        self.out_channels = out_channels
        step = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1)
        layers = [step(3, 16), step(16, 32), step(32, 32)]
        self.first = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))
        self.second = nn.Sequential(step(32, 32), nn.ReLU())

    def forward(self, x):
        fine = self.first(x)
        return OrderedDict([("0", fine), ("1", self.second(fine))])


def faster_rcnn():
    anchors = AnchorGenerator(((12,), (24,)), ((1.0,),) * 2)
    pool = MultiScaleRoIAlign(["0", "1"], output_size=5, sampling_ratio=1)
    return FasterRCNN(
        Body(),
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=100,
        box_roi_pool=pool,
        box_head=TwoMLPHead(32 * 25, 64),
        box_predictor=FastRCNNPredictor(64, 4),
        box_batch_size_per_image=64,
    )


def fcos():
    anchors = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    head = FCOSHead(32, 1, 4, num_convs=1)
    return FCOS(Body(), 4, anchor_generator=anchors, head=head, score_thresh=0.0)


def retinanet():
    anchors = AnchorGenerator(((12,), (24,)), ((1.0,),) * 2)
    return RetinaNet(Body(), 4, anchor_generator=anchors, score_thresh=0.0)


def boxes_of_ssd():
    return DefaultBoxGenerator([[], []], scales=[0.04, 0.08, 0.16], steps=[8, 16])


def ssd():
    return SSD(Body([32, 32]), boxes_of_ssd(), (TILE, TILE), 4, score_thresh=0.0)


def ssdlite():
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    head = SSDLiteHead([32, 32], [2, 2], 4, norm)
    return SSD(
        Body([32, 32]), boxes_of_ssd(), (TILE, TILE), 4, head=head, score_thresh=0.0
    )


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FAMILIES = [faster_rcnn, fcos, retinanet, ssd, ssdlite]


def built(family, mended=True):
    torch.manual_seed(0)
    model = family()
    if hasattr(model, "rpn") or family in (fcos, retinanet):
        model.transform.min_size, model.transform.max_size = (TILE,), TILE
    if mended:
        models.boxes_in_float32(model)
    return model


def edge_tile(seed):
    """A tile whose objects of 10 to 15 px lie at its far edge, in all three classes."""
    rng = torch.Generator().manual_seed(seed)
    picture = torch.randint(30, 60, (3, TILE, TILE), generator=rng, dtype=torch.uint8)
    size = torch.randint(10, 16, (6, 2), generator=rng).float()
    far = TILE - size - torch.rand(6, 2, generator=rng) * 3
    along = torch.rand(6, generator=rng) * 270
    far[:3, 0], far[3:, 1] = along[:3], along[3:]
    boxes = torch.cat([far, far + size], 1)
    for x1, y1, x2, y2 in boxes.round().int().tolist():
        picture[:, y1:y2, x1:x2] = 220
    return picture, {"boxes": boxes, "labels": torch.arange(6) % 3 + 1}


def on_a_raster(model, dtype):
    """The share of coordinates beyond 256 px that are multiples of 2."""
    picture = edge_tile(99)[0] / 255
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    with torch.inference_mode(), autocast:
        boxes = model.eval()([picture])[0]["boxes"]
    far = boxes[(boxes > 256) & (boxes < TILE)]  # those at the border are clipped
    assert len(far) > 20
    return (far % 2 == 0).float().mean().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_small_objects_at_the_far_edge_in_bf16(family):
    model = built(family)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for step in range(30):
        seed_step(0, step)
        images, targets = zip(edge_tile(step), strict=True)
        losses.append(
            train_step(model, optimizer, images, targets, torch.bfloat16)["loss"]
        )
    assert torch.stack(losses).isfinite().all()
    assert torch.stack(losses[-5:]).mean() < torch.stack(losses[:5]).mean()
    # FCOS cuts a distance at zero: then a side lies on a cell's centre, in float32 too
    assert on_a_raster(model, torch.bfloat16) < on_a_raster(model, None) + 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_mend_boxes_lie_on_a_raster(family):
    """What the test above sees where there is something to see."""
    assert on_a_raster(built(family, mended=False), torch.bfloat16) > 0.9


@pytest.mark.parametrize("name", models.MODELS)
def test_every_architecture_keeps_its_boxes_in_float32(name):
    with torch.device("meta"):
        model = models.build_model(name)
    parts = dict(model.named_modules())
    heads = {"rpn.head", "roi_heads.box_predictor"} if "rpn" in parts else {"head"}
    before = {"anchor_generator"}
    if "rpn" in parts:
        before = {"rpn.anchor_generator", "roi_heads.box_roi_pool"}
    assert {n for n, m in parts.items() if m._forward_hooks} == heads
    assert {n for n, m in parts.items() if m._forward_pre_hooks} == before
    copied = dict(copy.deepcopy(model).named_modules())  # as the average of weights is
    assert all(copied[head]._forward_hooks for head in heads)
    pickle.dumps(model.rpn if "rpn" in parts else model.head)  # as Ray ships a model


class Card:
    """A GPU as torch tells of it: a test double, nothing is computed on it."""

    def __init__(self, monkeypatch, capability, bf16):
        def supported(including_emulation=True):
            return bf16 or including_emulation  # emulated wherever CUDA is

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda _=None: capability
        )


@pytest.mark.parametrize(
    ("card", "capability", "bf16", "chosen"),
    [
        ("H100", (9, 0), True, "bf16"),
        ("A100", (8, 0), True, "bf16"),
        ("T4", (7, 5), False, "fp16"),
        ("V100", (7, 0), False, "fp16"),
        ("P100", (6, 0), False, "fp32"),
    ],
)
def test_a_gpu_computes_in_what_it_has_units_for(
    monkeypatch, card, capability, bf16, chosen
):
    Card(monkeypatch, capability, bf16)
    assert choose_precision("auto", "fasterrcnn_small", CUDA) == chosen
    assert choose_precision("off", "fasterrcnn_small", CUDA) == "fp32"
    assert find_device() == torch.device("cuda", 0)
    assert find_device("cuda", 1) == find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="'cuda:2'.* finds 2 GPU here"):
        find_device("cuda:2")
    with pytest.raises(ValueError, match="no device 'cuda:01'; valid"):
        find_device("cuda:01")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="'cuda:1' for 3 processes: give 'cuda'"):
        start_process_group("cuda:1")
    with pytest.raises(ValueError, match="'cuda', but torch .* finds 2 GPU here"):
        start_process_group(None)


def test_a_cpu_takes_bf16_only_for_architectures_that_gain(monkeypatch):
    gain = {"ssd300_vgg16": (2.0, 1.9), "ssdlite320_mobilenet_v3_large": (0.8, 2.0)}
    monkeypatch.setattr(hardware, "CPU_BF16_SPEEDUP", gain)
    for has in (True, False):
        monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda has=has: has)
        expected = "bf16" if has else "fp32"
        assert choose_precision("auto", "ssd300_vgg16", CPU) == expected
        assert choose_precision("auto", "fasterrcnn_small", CPU) == "fp32"
        ssdlite = "ssdlite320_mobilenet_v3_large"
        assert choose_precision("auto", ssdlite, CPU) == "fp32"
        assert choose_precision("bf16", "fasterrcnn_small", CPU) == "bf16"


def test_the_table_names_architectures_and_the_small_one_is_not_in_it():
    assert set(hardware.CPU_BF16_SPEEDUP) < set(models.MODELS)
    assert "fasterrcnn_small" not in hardware.CPU_BF16_SPEEDUP


def test_an_older_torch_counts_no_emulation(monkeypatch):
    Card(monkeypatch, (7, 5), bf16=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert native_precisions(CUDA) == ("fp32", "fp16")


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", None])
def test_a_cpu_has_bf16_by_what_torch_tells_of_it(monkeypatch, flag):
    able = {name: name == flag for name in ("avx512_bf16", "amx_bf16", "avx2")}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert native_precisions(CPU) == ("fp32", *["bf16"] * bool(flag))


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("flags : fpu avx2 avx512f avx512_bf16 clzero", True),
        ("flags : fpu avx512f amx_bf16 amx_tile", True),
        ("flags : fpu avx2 fma", False),
        ("Features : fp asimd bf16 i8mm", False),  # ARM: not measured
    ],
)
def test_an_older_torch_reads_the_flags_of_the_cpu(monkeypatch, flags, has):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(hardware, "_cpuinfo", lambda: flags)
    assert ("bf16" in native_precisions(CPU)) == has


def test_a_system_without_such_flags_stays_in_float32(monkeypatch):
    def none():
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(hardware, "_cpuinfo", none)
    assert native_precisions(CPU) == ("fp32",)
    assert native_precisions(torch.device("mps")) == ("fp32",)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "finds no GPU here: take 'cpu'"),
        ("gpu", "no device 'gpu'; valid: cpu, cuda, cuda:0"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(
    monkeypatch, capsys, tmp_path, device, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = ["train", "--data-path", "x", "--output-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*told, "--device", device])
    with pytest.raises(SystemExit) as ended:
        main()
    assert message in str(ended.value) and "\n" not in str(ended.value)


SHORT = {"steps": 4, "eval_steps": 4, "save_steps": 2, "lr": 1e-3, "device": "cpu"}
SHORT |= {"settings": {"min_size": 96, "max_size": 96}}


def state(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def stopped_at(step, config):
    calls = iter(range(1, 99))
    fit(config, should_stop=lambda: next(calls) == step, progress=False)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_run_in_lower_precision_resumes_exactly(tiles, tmp_path, amp, monkeypatch):
    # the scale doubles on the way, so that a resume without it would be seen
    double = partial(torch.amp.GradScaler, init_scale=2.0**8, growth_interval=3)
    monkeypatch.setattr(torch.amp, "GradScaler", double)
    runs = {}
    for name in ("whole", "halves"):
        config = TrainConfig(str(tiles), str(tmp_path / name), amp=amp, **SHORT)
        if name == "halves":
            stopped_at(2, config)
            assert state(tmp_path / name)["step"] == 2
        fit(config, progress=False)
        runs[name] = state(tmp_path / name)
    assert runs["whole"]["precision"] == amp
    assert runs["whole"]["scaler"] == runs["halves"]["scaler"]
    assert bool(runs["whole"]["scaler"]) == (amp == "fp16")
    if amp == "fp16":
        assert runs["whole"]["scaler"]["scale"] == 2.0**9
    for key, value in runs["whole"]["model"].items():
        assert torch.equal(value, runs["halves"]["model"][key]), key
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in runs]
    assert lines[0] == lines[1]


def test_a_step_that_float16_cannot_hold_is_left_out(tiles):
    model = built(faster_rcnn)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    images, targets = zip(edge_tile(0), strict=True)
    train_step(model, optimizer, images, targets, torch.float16, scaler=scaler)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert scaler.get_scale() == 2.0**39


def test_a_resume_keeps_the_precision_or_refuses(tiles, tmp_path, monkeypatch):
    began = TrainConfig(str(tiles), str(tmp_path), amp="bf16", **SHORT)
    stopped_at(1, began)
    auto = dataclasses.replace(began, amp="auto")
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: False)
    refusal = f"{tmp_path} holds a run that cannot go on here: it began in bf16"
    with pytest.raises(ValueError, match=refusal + ", which cpu .*amp='bf16' goes on"):
        fit(auto, progress=False)
    with pytest.raises(ValueError, match=refusal + ", and amp='off' is asked"):
        fit(dataclasses.replace(began, amp="off"), progress=False)
    assert state(tmp_path)["step"] == 1
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: True)
    stopped_at(1, auto)
    assert state(tmp_path)["step"] == 2 and state(tmp_path)["precision"] == "bf16"
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: False)
    stopped_at(1, began)  # at its word, emulated
    assert state(tmp_path)["step"] == 3


def test_a_run_that_does_not_tell_its_precision_needs_a_word(tiles, tmp_path):
    began = TrainConfig(str(tiles), str(tmp_path), amp="fp16", **SHORT)
    stopped_at(1, began)
    old = {k: v for k, v in state(tmp_path).items() if k not in ("precision", "scaler")}
    torch.save(old, tmp_path / "last.pt")
    with pytest.raises(
        ValueError, match="last.pt does not tell its precision: give am"
    ):
        fit(dataclasses.replace(began, amp="auto"), progress=False)
    stopped_at(1, began)
    assert state(tmp_path)["step"] == 2 and state(tmp_path)["precision"] == "fp16"


def test_a_run_in_float32_stays_in_it_where_bf16_would_be_chosen(
    tiles, tmp_path, monkeypatch
):
    monkeypatch.setattr(hardware, "CPU_BF16_SPEEDUP", {"fasterrcnn_small": (9.0,)})
    config = TrainConfig(str(tiles), str(tmp_path), **SHORT)
    for has, step in ((False, 1), (True, 2)):
        monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda has=has: has)
        stopped_at(1, config)
        assert (state(tmp_path)["precision"], state(tmp_path)["step"]) == ("fp32", step)


UNLIKE = """
import dataclasses, os, sys
from pathlib import Path
import torch.distributed as dist
from e2e_utils import train
from e2e_utils.config import TrainConfig

rank, _, _ = train.start_process_group()
train.native_precisions = lambda _: ("fp32", "fp16", *["bf16"] * rank)
gpu = train.torch.device("cuda")
config = TrainConfig("", sys.argv[1], model="fasterrcnn_resnet50_fpn")
_, chosen = train.open_run(config, gpu)
mine = Path(sys.argv[1], str(rank))  # as if output_dir were a disk of each machine
mine.mkdir()
if rank:
    told = {"config": dataclasses.asdict(config), "step": 7, "precision": "bf16"}
    train.torch.save(told, mine / "last.pt")
try:
    config = dataclasses.replace(config, output_dir=str(mine))
    train.open_run(config, train.torch.device("cpu"))
except ValueError as error:
    chosen += " " + str("is not the same on all machines" in str(error))
os.write(1, f"{chosen}\\n".encode())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_that_differ_choose_what_all_have_or_say_so(tmp_path):
    """Two processes that claim an A100 and a T4: gloo, nothing is computed."""
    (tmp_path / "unlike.py").write_text(UNLIKE)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launch, tmp_path / "unlike.py", tmp_path],
        # without the GPU that may be here, or the second process wants one of its own
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["fp16 True", "fp16 True"]


@pytest.mark.parametrize("predict", [predict_image, predict_scene])
def test_prediction_under_autocast_keeps_its_boxes_off_the_raster(predict):
    model = built(ssd).eval()
    scene = edge_tile(99)[0].permute(1, 2, 0).numpy()
    with torch.autocast("cpu", torch.bfloat16):
        found = predict(model, scene, score_threshold=0.0)
    boxes = torch.from_numpy(found["boxes_xyxy"])
    far = boxes[(boxes > 256) & (boxes < TILE)]
    assert len(far) > 20 and (far % 2 == 0).float().mean() < 0.02
