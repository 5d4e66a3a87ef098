"""Lower precision: what is computed in it, who chooses it, and that it goes on."""

import copy
import dataclasses
import itertools
import pickle
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import python
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import (
    AnchorGenerator,
    DefaultBoxGenerator,
)
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

from e2e_utils import hardware, models
from e2e_utils.autocast import boxes_in_float32
from e2e_utils.config import TrainConfig
from e2e_utils.hardware import choose_precision, find_device, native_precisions
from e2e_utils.processes import start_process_group
from e2e_utils.train import fit, main, read_metrics, seed_step, train_step

pytestmark = pytest.mark.usefixtures("one_thread")
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


SIZE = {"min_size": TILE, "max_size": TILE}


def anchors_of(*sizes):
    """Square anchors, of one size for each level."""
    return AnchorGenerator(tuple((size,) for size in sizes), ((1.0,),) * len(sizes))


def faster_rcnn():
    pool = MultiScaleRoIAlign(["0", "1"], output_size=5, sampling_ratio=1)
    return FasterRCNN(
        Body(),
        rpn_anchor_generator=anchors_of(12, 24),
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=100,
        box_roi_pool=pool,
        box_head=TwoMLPHead(32 * 25, 64),
        box_predictor=FastRCNNPredictor(64, 4),
        box_batch_size_per_image=64,
        **SIZE,
    )


def fcos():
    parts = {"anchor_generator": anchors_of(8, 16)}
    parts["head"] = FCOSHead(32, 1, 4, num_convs=1)
    return FCOS(Body(), 4, score_thresh=0.0, **parts, **SIZE)


def retinanet():
    anchors = anchors_of(12, 24)
    return RetinaNet(Body(), 4, anchor_generator=anchors, score_thresh=0.0, **SIZE)


def ssd():
    boxes = DefaultBoxGenerator([[], []], scales=[0.04, 0.08, 0.16], steps=[8, 16])
    return SSD(Body([32, 32]), boxes, (TILE, TILE), 4, score_thresh=0.0)


def built(family, float32_boxes=True):
    torch.manual_seed(0)
    model = family()
    if float32_boxes:
        boxes_in_float32(model)
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


def share_on_a_raster(boxes):
    """The share of coordinates beyond 256 px that are multiples of 2, as in bf16."""
    far = boxes[(boxes > 256) & (boxes < TILE)]  # those at the border are clipped
    assert len(far) > 20
    return (far % 2 == 0).float().mean().item()


def found_at_the_edge(model, dtype):
    picture = edge_tile(99)[0] / 255
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    with torch.inference_mode(), autocast:
        return model.eval()([picture])[0]["boxes"]


@pytest.mark.parametrize("family", [faster_rcnn, fcos, retinanet, ssd])
def test_a_family_learns_in_bf16_and_its_boxes_lie_on_no_raster(family):
    """Small objects at the far edge, where bf16 holds every second pixel alone."""
    uncorrected = found_at_the_edge(built(family, float32_boxes=False), torch.bfloat16)
    assert share_on_a_raster(uncorrected) > 0.9
    model = built(family)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for step in range(30):
        seed_step(0, step)
        images, targets = zip(edge_tile(step), strict=True)
        parts = train_step(model, optimizer, images, targets, torch.bfloat16)
        losses.append(parts["loss"])
    assert torch.stack(losses).isfinite().all()
    assert torch.stack(losses[-5:]).mean() < torch.stack(losses[:5]).mean()
    # FCOS cuts a distance at zero: then a side lies on a cell's centre, in float32 too
    lower, full = (found_at_the_edge(model, dtype) for dtype in (torch.bfloat16, None))
    assert share_on_a_raster(lower) < share_on_a_raster(full) + 0.05


@pytest.mark.parametrize("name", models.MODELS)
def test_every_architecture_keeps_its_boxes_in_float32(name):
    with torch.device("meta"):
        model = models.build_model(name)
    parts = dict(model.named_modules())
    heads, before = {"head"}, {"anchor_generator"}
    if "rpn" in parts:
        heads = {"rpn.head", "roi_heads.box_predictor"}
        before = {"rpn.anchor_generator", "roi_heads.box_roi_pool"}
    assert {n for n, m in parts.items() if m._forward_hooks} == heads
    assert {n for n, m in parts.items() if m._forward_pre_hooks} == before
    copied = dict(copy.deepcopy(model).named_modules())  # as the average of weights is
    assert all(copied[head]._forward_hooks for head in heads)
    pickle.dumps(model.rpn if "rpn" in parts else model.head)  # as Ray ships a model


def pretend_gpus(monkeypatch, capability, bf16):
    """Two GPUs as torch tells of them; nothing is computed on them."""
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "device": lambda _: nullcontext(),
        # emulated wherever CUDA is
        "is_bf16_supported": lambda including_emulation=True: (
            bf16 or including_emulation
        ),
        "get_device_capability": lambda _=None: capability,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


def test_a_gpu_computes_in_what_it_has_units_for(monkeypatch):
    h100, v100, p100 = ((9, 0), True), ((7, 0), False), ((6, 0), False)
    for card, chosen in ((h100, "bf16"), (v100, "fp16"), (p100, "fp32")):
        pretend_gpus(monkeypatch, *card)
        assert choose_precision("auto", "fasterrcnn_small", CUDA) == chosen
        assert choose_precision("off", "fasterrcnn_small", CUDA) == "fp32"


def test_a_gpu_is_found_by_its_name_and_rank_or_refused(monkeypatch):
    pretend_gpus(monkeypatch, (9, 0), bf16=True)
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


def test_a_device_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--data-path", "x", "--output-dir", str(tmp_path), "--device", "cuda"]
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    with pytest.raises(SystemExit, match="^.*finds no GPU here: take 'cpu'.*$"):
        main()


def test_a_cpu_takes_bf16_only_for_architectures_that_gain(monkeypatch):
    assert set(hardware.CPU_BF16_SPEEDUP) < set(models.MODELS)
    gain = {"ssd300_vgg16": (2.0, 1.9), "ssdlite320_mobilenet_v3_large": (0.8, 2.0)}
    monkeypatch.setattr(hardware, "CPU_BF16_SPEEDUP", gain)
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda has=has: has)
        assert choose_precision("auto", "ssd300_vgg16", CPU) == expected
        assert choose_precision("auto", "ssd300_vgg16", CPU, began="fp32") == "fp32"
        for name in ("fasterrcnn_small", "ssdlite320_mobilenet_v3_large"):
            assert choose_precision("auto", name, CPU) == "fp32"
        assert choose_precision("bf16", "fasterrcnn_small", CPU) == "bf16"


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("fpu avx2 avx512f avx512_bf16 clzero", True),
        ("fpu avx512f amx_bf16 amx_tile", True),
        ("fpu avx2 fma", False),
        ("fp asimd bf16 i8mm", False),  # ARM: not measured
        (None, False),  # no Linux
    ],
)
def test_a_cpu_has_bf16_by_its_flags(monkeypatch, tmp_path, flags, has):
    if flags is not None:
        able = dict.fromkeys(("avx512_bf16", "amx_bf16"), False)
        able |= dict.fromkeys(flags.split(), True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
        assert native_precisions(CPU) == ("fp32", *["bf16"] * has)
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}")
    # an older torch does not know
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(hardware, "_cpuinfo", (tmp_path / "cpuinfo").read_text)
    assert native_precisions(CPU) == ("fp32", *["bf16"] * has)


def test_another_device_computes_in_float32():
    assert native_precisions(torch.device("mps")) == ("fp32",)


def short_run(tiles, folder, **changes):
    return TrainConfig(
        str(tiles),
        str(folder),
        **{"steps": 4, "eval_steps": 4, "save_steps": 2, "lr": 1e-3, "device": "cpu"},
        settings={"min_size": 96, "max_size": 96},
        **changes,
    )


def last_of(config):
    return torch.load(Path(config.output_dir, "last.pt"), weights_only=True)


def stopped_after(calls, config):
    """Train until should_stop has been asked so many times; return the checkpoint."""
    asked = itertools.count(1)
    fit(config, should_stop=lambda: next(asked) == calls, progress=False)
    return last_of(config)


def test_a_run_in_fp16_resumes_exactly(tiles, tmp_path, monkeypatch):
    # the scale doubles on the way, so that a resume without it would be seen
    double = partial(torch.amp.GradScaler, init_scale=2.0**8, growth_interval=3)
    monkeypatch.setattr(torch.amp, "GradScaler", double)
    whole, halves = (
        short_run(tiles, tmp_path / name, amp="fp16") for name in ("whole", "halves")
    )
    stopped = stopped_after(2, halves)
    assert stopped["step"] == 2
    del stopped["precision"]  # as a run of before it was kept has it
    torch.save(stopped, Path(halves.output_dir, "last.pt"))
    with pytest.raises(ValueError, match="last.pt lacks its precision: give am"):
        fit(dataclasses.replace(halves, amp="auto"), progress=False)
    for run in (whole, halves):
        fit(run, progress=False)
    one, other = last_of(whole), last_of(halves)
    assert one["precision"] == "fp16" and one["scaler"]["scale"] == 2.0**9
    assert one["scaler"] == other["scaler"]
    for key, value in one["model"].items():
        assert torch.equal(value, other["model"][key]), key
    lines = [read_metrics(f"{run.output_dir}/metrics.jsonl") for run in (whole, halves)]
    assert lines[0] == lines[1]


def test_a_resume_keeps_the_precision_or_refuses(tiles, tmp_path, monkeypatch):
    began = short_run(tiles, tmp_path, amp="bf16")
    assert not stopped_after(1, began)["scaler"]
    auto = dataclasses.replace(began, amp="auto")
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: False)
    refusal = f"{tmp_path} holds a run that cannot go on here: it began in bf16"
    with pytest.raises(ValueError, match=refusal + ", which cpu .*amp='bf16' goes on"):
        fit(auto, progress=False)
    with pytest.raises(ValueError, match=refusal + ", and amp='off' is asked"):
        fit(dataclasses.replace(began, amp="off"), progress=False)
    assert last_of(began)["step"] == 1
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: True)
    saved = stopped_after(1, auto)
    assert (saved["step"], saved["precision"]) == (2, "bf16")


UNLIKE = """
import dataclasses, os, sys
from pathlib import Path
import torch.distributed as dist
import torch
from e2e_utils import processes, run
from e2e_utils.config import TrainConfig

rank, _, _ = processes.start_process_group()
run.native_precisions = lambda _: ("fp32", "fp16", *["bf16"] * rank)
config = TrainConfig("", sys.argv[1], model="fasterrcnn_resnet50_fpn")
chosen = run.agree_on_precision(config, torch.device("cuda"), {})
mine = Path(sys.argv[1], str(rank))  # as if output_dir were a disk of each machine
mine.mkdir()
if rank:
    saved = {"config": dataclasses.asdict(config), "step": 7, "precision": "bf16"}
    torch.save(saved, mine / "last.pt")
try:
    config = dataclasses.replace(config, output_dir=str(mine))
    run.read_last(config, torch.device("cpu"))
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
    # without the GPU that may be here, or the second process wants one of its own
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    printed = python(*launch, tmp_path / "unlike.py", tmp_path, env=env)
    assert printed.splitlines() == ["fp16 True", "fp16 True"]


def test_the_machine_is_described_in_words():
    told = hardware.machine()
    assert list(told) == ["Python", "system", "cores", "memory", "GPU"]
    assert told["memory"].endswith(" GiB") and int(told["cores"].split(",")[0]) >= 1
