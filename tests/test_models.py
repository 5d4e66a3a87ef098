from urllib.error import URLError

import pytest
import torch
import torchvision
from torchvision.models import detection

from e2e_utils import models
from e2e_utils.models import MODELS, build_model, model_from_checkpoint, model_settings

# these take gigabytes, or many seconds on a CPU
LARGE = (
    "convnext",
    "resnet152",
    "efficientnet",
    "ssd300",
    "fasterrcnn_resnet50_fpn_v2",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n.startswith(LARGE) else ())
        for n in MODELS
    ],
)
def test_every_model_trains_a_step_and_predicts(name):
    torch.manual_seed(0)
    small = (
        {"min_size": 128, "max_size": 128} if "min_size" in model_settings(name) else {}
    )
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


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match="fasterrcnn_resnet50_fpn_v2") as error:
        build_model("fasterrcnn_resnet51")
    assert "fasterrcnn_resnet51" in str(error.value)


def test_a_misspelt_setting_lists_the_valid_ones():
    with pytest.raises(ValueError, match="box_nms_threshold.*valid.*box_nms_thresh"):
        build_model("fasterrcnn_small", box_nms_threshold=0.3)


@pytest.mark.parametrize(
    ("setting", "value", "where"),
    [
        ("box_score_thresh", 0.25, lambda m: m.roi_heads.score_thresh),
        ("box_nms_thresh", 0.33, lambda m: m.roi_heads.nms_thresh),
        ("box_detections_per_img", 77, lambda m: m.roi_heads.detections_per_img),
        ("rpn_nms_thresh", 0.61, lambda m: m.rpn.nms_thresh),
        ("min_size", 200, lambda m: m.transform.min_size[0]),
        ("max_size", 640, lambda m: m.transform.max_size),
        (
            "anchor_sizes",
            [[8], [24], [48]],
            lambda m: list(map(list, m.rpn.anchor_generator.sizes)),
        ),
    ],
)
def test_a_setting_takes_effect_in_the_built_model(setting, value, where):
    assert where(build_model("fasterrcnn_small", 4)) != value
    assert where(build_model("fasterrcnn_small", 4, **{setting: value})) == value


def test_the_small_detector_says_that_it_has_no_pretrained_weights():
    with pytest.raises(ValueError, match="from scratch"):
        build_model("fasterrcnn_small", weights="DEFAULT")


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
        "ssd300_vgg16",
        "ssdlite320_mobilenet_v3_large",
    ],
)
def test_a_refitted_head_has_the_layout_of_a_fresh_one(name):
    """The COCO weights themselves need a network; the refit does not."""
    fresh = build_model(name, num_classes=61).state_dict()
    builder = getattr(detection, name)
    refitted = models._refit_head(builder(weights=None, weights_backbone=None), 61)
    shapes = {key: value.shape for key, value in refitted.state_dict().items()}
    assert shapes == {key: value.shape for key, value in fresh.items()}


def test_a_failed_download_says_what_to_do(monkeypatch):
    def no_network(**_):
        raise URLError("no route to host")

    monkeypatch.setattr(detection, "fasterrcnn_resnet50_fpn", no_network)
    with pytest.raises(RuntimeError, match="could not be downloaded.*weights=None"):
        build_model("fasterrcnn_resnet50_fpn", weights="DEFAULT")


def content(name="fasterrcnn_small", classes=4):
    model = build_model(name, classes, box_detections_per_img=50)
    return {
        "model": model.state_dict(),
        "architecture": name,
        "settings": {"box_detections_per_img": 50},
        "class_names": ["background", *"abcdefgh"[: classes - 1]],
        "step": 7,
    }


def test_a_checkpoint_gives_back_its_model(tmp_path):
    saved = content()
    torch.save(saved, tmp_path / "model.pt")
    model, meta = model_from_checkpoint(tmp_path / "model.pt")
    assert not model.training and model.roi_heads.detections_per_img == 50
    assert meta["step"] == 7 and "model" not in meta
    for key, value in model.state_dict().items():
        assert torch.equal(value, saved["model"][key])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b""), "not a readable checkpoint"),
        (lambda p: p.write_bytes(b"PK\x03\x04 cut"), "not a readable checkpoint"),
        (lambda p: p.write_text("this is no checkpoint"), "not a readable checkpoint"),
        (lambda p: torch.save({"model": {}, "epoch": 3}, p), "lacks architecture"),
        (lambda p: torch.save([1, 2], p), "lacks model"),
        (lambda p: torch.save(torchvision.ops.MLP(2, [2]), p), "not a readable"),
        (
            lambda p: torch.save({**content(), "class_names": ["background", "x"]}, p),
            "do not fit",
        ),
    ],
)
def test_a_foreign_checkpoint_is_named_with_what_is_wrong(tmp_path, write, message):
    path = tmp_path / "foreign.pt"
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        model_from_checkpoint(path)
    assert "foreign.pt" in str(error.value)
