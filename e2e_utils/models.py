"""Detectors by name, their settings taken by the constructor, their heads refitted.

Copy: this file. (It needs torch and torchvision only and runs on Python 3.9 with
torchvision 0.16 too, because it travels inside the archive that is served.)

`build_model` makes every architecture of the notebooks. Settings such as
`rpn_nms_thresh` are constructor arguments in torchvision; set on a model after it
was built they change nothing, so here they go through the constructor, and an
unknown one is an error. `resolved_settings` tells all of them with their values: it
is what a checkpoint keeps, so that a default that changes later changes no model.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet, backbone_utils
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.anchor_utils import (
    AnchorGenerator,
    DefaultBoxGenerator,
)
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetHead,
)
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import (
    SSD,
    SSDClassificationHead,
    SSDFeatureExtractorVGG,
)
from torchvision.models.detection.ssdlite import (
    SSDLiteClassificationHead,
    SSDLiteHead,
    _mobilenet_extractor,
)
from torchvision.models.resnet import BasicBlock
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock
from torchvision.ops.misc import FrozenBatchNorm2d

# Stage outputs at strides 4, 8, 16, 32 of the backbones that torchvision ships
# without a detector: index in `.features` -> channels.
_STAGES = {
    "convnext_small": {1: 96, 3: 192, 5: 384, 7: 768},
    "convnext_large": {1: 192, 3: 384, 5: 768, 7: 1536},
    "efficientnet_b4": {2: 32, 3: 56, 5: 160, 7: 448},
}


class SmallResNet(nn.Sequential):
    """Three stages of two BasicBlocks at widths 32, 64, 128: strides 4, 8, 16.

    Small enough to learn from scratch on a CPU in minutes; BatchNorm learns, since
    nothing is pretrained.
    """

    def __init__(self, width: int = 32) -> None:
        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            project = None
            if stride != 1 or inputs != outputs:
                project = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                    nn.BatchNorm2d(outputs),
                )
            return nn.Sequential(
                BasicBlock(inputs, outputs, stride, project),
                BasicBlock(outputs, outputs),
            )

        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        self.stage1 = stage(width, width, 1)
        self.stage2 = stage(width, 2 * width, 2)
        self.stage3 = stage(2 * width, 4 * width, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")


def _anchors(settings: dict, levels: int) -> AnchorGenerator:
    """`anchor_sizes` (a list of sizes per level) and `aspect_ratios` as anchors."""
    sizes = settings.pop("anchor_sizes")
    if len(sizes) != levels or len({len(of_level) for of_level in sizes}) != 1:
        raise ValueError(
            f"anchor_sizes is {sizes}; give {levels} lists of equal length, one for "
            "each feature level"
        )
    ratios = tuple(settings.pop("aspect_ratios", (1.0,)))
    return AnchorGenerator(tuple(tuple(s) for s in sizes), (ratios,) * levels)


def _small(
    num_classes: int,
    weights: str | None,
    weights_backbone: str | None,
    **settings: Any,
) -> FasterRCNN:
    if weights is not None or weights_backbone is not None:
        raise ValueError(
            "fasterrcnn_small has no pretrained weights: it is the detector that "
            "learns from scratch on a CPU. Pass weights=None, or take "
            "'fasterrcnn_resnet50_fpn' with weights='DEFAULT'."
        )
    backbone = backbone_utils.BackboneWithFPN(
        SmallResNet(),
        {"stage1": "0", "stage2": "1", "stage3": "2"},
        [32, 64, 128],
        64,
        extra_blocks=_NoExtraLevel(),
    )
    pool = MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=1)
    return FasterRCNN(
        backbone,
        num_classes=None,
        rpn_anchor_generator=_anchors(settings, 3),
        box_roi_pool=pool,
        box_head=TwoMLPHead(64 * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, num_classes),
        **settings,
    )


class _NoExtraLevel(ExtraFPNBlock):
    """An FPN of just the levels given; torchvision's default adds a pooled one."""

    def forward(
        self, results: list[torch.Tensor], x: list[torch.Tensor], names: list[str]
    ) -> tuple[list[torch.Tensor], list[str]]:
        return results, names


def _torchvision(
    name: str,
    num_classes: int,
    weights: str | None,
    weights_backbone: str | None,
    **settings: Any,
) -> nn.Module:
    anchors = None
    if "anchor_sizes" in settings:
        anchors = _anchors(settings, 5)
    builder = getattr(detection, name)
    if name.startswith("ssdlite"):
        if not settings.pop("reduced_tail"):
            return _ssdlite_full_tail(num_classes, weights, weights_backbone, settings)
        if weights_backbone is not None:
            raise ValueError("ImageNet's MobileNet has no reduced tail: leave it out")
    model = builder(
        weights=weights,
        weights_backbone=weights_backbone,
        num_classes=num_classes if weights is None else None,
        **settings,
    )
    if anchors is not None:
        _set_anchors(model, anchors, num_classes)
    return model if weights is None else _refit_head(model, num_classes)


def _set_anchors(model: nn.Module, anchors: AnchorGenerator, num_classes: int) -> None:
    """Other anchors; a fresh head where their number at a location changes."""
    part = model.rpn if isinstance(model, FasterRCNN) else model
    before = part.anchor_generator.num_anchors_per_location()[0]
    after = anchors.num_anchors_per_location()[0]
    part.anchor_generator = anchors
    if after == before:
        return
    channels = model.backbone.out_channels
    if isinstance(model, FCOS):
        raise ValueError(f"anchor_sizes: FCOS takes one size a level, not {after}")
    if isinstance(model, RetinaNet):
        norm = functools.partial(nn.GroupNorm, 32)
        model.head = RetinaNetHead(channels, after, num_classes, norm_layer=norm)
        model.head.regression_head._loss_type = "giou"
    else:
        depth = len(model.rpn.head.conv)  # type: ignore[arg-type]  # a Sequential
        model.rpn.head = RPNHead(channels, after, conv_depth=depth)


def _ssdlite_full_tail(
    num_classes: int,
    weights: str | None,
    weights_backbone: str | None,
    settings: dict,
) -> SSD:
    """SSDlite on the MobileNetV3 that ImageNet's weights fit.

    torchvision builds it only together with those weights, and otherwise one with
    half the channels at the end, so that it could not read a checkpoint back.
    """
    if weights is not None:
        raise ValueError(
            "the COCO weights of SSDlite have a reduced tail: leave it out"
        )
    norm = functools.partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    backbone = torchvision.models.mobilenet_v3_large(
        weights=weights_backbone, norm_layer=norm
    )
    backbone, size = _mobilenet_extractor(backbone, 6, norm), (320, 320)
    anchors = DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95)
    channels = retrieve_out_channels(backbone, size)
    head = SSDLiteHead(channels, anchors.num_anchors_per_location(), num_classes, norm)
    return SSD(backbone, anchors, size, num_classes, head=head, **settings)


def _fpn_fasterrcnn(
    body: str,
    num_classes: int,
    weights: str | None,
    weights_backbone: str | None,
    **settings: Any,
) -> FasterRCNN:
    """Faster R-CNN with an FPN over a backbone that has no COCO detector."""
    if weights is not None:
        raise ValueError(
            f"there are no COCO weights for Faster R-CNN on {body}; pass "
            "weights=None and weights_backbone='DEFAULT' (ImageNet) instead"
        )
    if body.startswith("resnet"):
        backbone = backbone_utils.resnet_fpn_backbone(
            backbone_name=body,
            weights=weights_backbone,
            norm_layer=nn.BatchNorm2d,
            trainable_layers=5,
        )
    else:
        features = torchvision.models.get_model(body, weights=weights_backbone).features
        stages = _STAGES[body]
        backbone = backbone_utils.BackboneWithFPN(
            features,
            {str(index): str(level) for level, index in enumerate(stages)},
            list(stages.values()),
            256,
        )
    anchors = _anchors(settings, 5)
    return FasterRCNN(backbone, num_classes, rpn_anchor_generator=anchors, **settings)


def _set_norm(module: nn.Module, kind: str, eps: float) -> None:
    """Make each normalisation a BatchNorm that learns, or one that is frozen."""
    classes = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}
    if kind not in classes:
        raise ValueError(f"backbone_norm must be 'batch' or 'frozen', got {kind!r}")
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            if type(child) is not classes[kind]:
                new = classes[kind](len(child.weight)).to(child.weight.device)
                new.load_state_dict(child.state_dict(), strict=False)
                setattr(module, name, new)
            getattr(module, name).eps = eps
        else:
            _set_norm(child, kind, eps)


def _stages(backbone: nn.Module) -> list:
    """The backbone's modules from the picture on, grouped as torchvision freezes."""
    if hasattr(backbone, "body"):  # a ResNet
        body = backbone.body
        blocks = [[body.layer1], [body.layer2], [body.layer3], [body.layer4]]
        return [[body.conv1, body.bn1], *blocks]
    if isinstance(backbone, SSDFeatureExtractorVGG):
        modules = [*backbone.features, *list(backbone.extra[0])[:-1]]
        starts = [i for i, m in enumerate(modules) if isinstance(m, nn.MaxPool2d)]
    else:
        first, last = backbone.features[0], backbone.features[1]
        modules = [*first, *last]
        starts = [i for i, m in enumerate(first) if getattr(m, "_is_cn", False)]
        starts += [len(first) - 1, len(modules) - 1]
    ends = [0, *starts, len(modules)]
    return [modules[ends[i] : ends[i + 1]] for i in range(len(ends) - 1)]


def _train_last(backbone: nn.Module, layers: int) -> None:
    """Let the last so many stages of a backbone learn, and freeze those before."""
    stages = _stages(backbone)
    if not 0 <= layers <= len(stages):
        raise ValueError(
            f"trainable_backbone_layers is {layers}; give 0 to {len(stages)}"
        )
    for index, stage in enumerate(stages):
        for module in stage:
            module.requires_grad_(index >= len(stages) - layers)


def _refit_head(model: nn.Module, num_classes: int) -> nn.Module:
    """Replace the COCO classifier by an untrained one for `num_classes`."""
    if isinstance(model, FasterRCNN):
        inputs = model.roi_heads.box_predictor.cls_score.in_features
        model.roi_heads.box_predictor = FastRCNNPredictor(inputs, num_classes)
        return model
    old = model.head.classification_head
    if isinstance(model, RetinaNet):
        # retinanet_resnet50_fpn_v2's head is normalised by GroupNorm, v1's is not
        norm: functools.partial | None = (
            functools.partial(nn.GroupNorm, 32)
            if any(isinstance(m, nn.GroupNorm) for m in old.modules())
            else None
        )
        new = RetinaNetClassificationHead(
            model.backbone.out_channels, old.num_anchors, num_classes, norm_layer=norm
        )
    elif isinstance(model, FCOS):
        new = FCOSClassificationHead(
            model.backbone.out_channels, old.num_anchors, num_classes
        )
    else:
        anchors = model.anchor_generator.num_anchors_per_location()
        size = model.transform.fixed_size
        channels = retrieve_out_channels(model.backbone, size)
        if isinstance(old, SSDLiteClassificationHead):
            batch = functools.partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
            new = SSDLiteClassificationHead(channels, anchors, num_classes, batch)
        else:
            new = SSDClassificationHead(channels, anchors, num_classes)
    model.head.classification_head = new
    return model


# name -> (family, builder). The first six are torchvision's own; the others put an
# FPN on a backbone. The original recipe gave four of them a single stride-32 map, on
# which a 13 px car is less than half a cell: here they get the FPN too, so that
# resnet152_fasterrcnn_model and resnet152_fpn_fasterrcnn are the same network.
_FAMILIES = {
    "fasterrcnn_resnet50_fpn": FasterRCNN,
    "fasterrcnn_resnet50_fpn_v2": FasterRCNN,
    "fcos_resnet50_fpn": FCOS,
    "retinanet_resnet50_fpn_v2": RetinaNet,
    "ssd300_vgg16": SSD,
    "ssdlite320_mobilenet_v3_large": SSD,
}
_BODIES = {
    "resnet152_fasterrcnn_model": "resnet152",
    "resnet152_fpn_fasterrcnn": "resnet152",
    "efficientnet_b4_fasterrcnn_model": "efficientnet_b4",
    "convnext_small_fasterrcnn_model": "convnext_small",
    "convnext_large_fasterrcnn_model": "convnext_large",
}
MODELS = ("fasterrcnn_small", *_FAMILIES, *_BODIES)


# Names whose ResNet torchvision gives a frozen BatchNorm where it is pretrained; from
# scratch BatchNorm must learn.
_FREEZES_NORM = (
    "fasterrcnn_resnet50_fpn",
    "fcos_resnet50_fpn",
    "resnet152_fasterrcnn_model",
    "resnet152_fpn_fasterrcnn",
)
_OBJECTS: tuple[str, ...] = ("backbone", "num_classes", "size", "head", "kwargs")
_OBJECTS += ("anchor_generator", "rpn_anchor_generator", "rpn_head", "proposal_matcher")
_OBJECTS += ("box_roi_pool", "box_head", "box_predictor")
# Defaults that are not those of the family's constructor.
_DEFAULTS: dict[str, dict] = {
    "fasterrcnn_small": {
        "min_size": 300,  # a tile enters as it is: no resizing
        "max_size": 300,
        "image_mean": [0.43] * 3,
        "image_std": [0.2] * 3,
        "anchor_sizes": [[16], [36], [80]],
        "rpn_pre_nms_top_n_train": 600,
        "rpn_post_nms_top_n_train": 400,
        "rpn_pre_nms_top_n_test": 500,
        "rpn_post_nms_top_n_test": 300,
        "box_batch_size_per_image": 128,
        "box_detections_per_img": 300,
    },
    "retinanet_resnet50_fpn_v2": {
        "anchor_sizes": [
            [x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))]
            for x in (32, 64, 128, 256, 512)
        ],
    },
    "fcos_resnet50_fpn": {"anchor_sizes": [[8], [16], [32], [64], [128]]},
    "ssd300_vgg16": {
        "image_mean": [0.48235, 0.45882, 0.40784],
        "image_std": [1 / 255] * 3,
    },
    "ssdlite320_mobilenet_v3_large": {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "score_thresh": 0.001,
        "nms_thresh": 0.55,
        "detections_per_img": 300,
        "topk_candidates": 300,
    },
}


def _default_settings(
    name: str, weights: str | None, weights_backbone: str | None
) -> dict:
    family = _FAMILIES.get(name, FasterRCNN)
    parameters = inspect.signature(family).parameters
    values = {k: p.default for k, p in parameters.items() if k not in _OBJECTS}
    values["image_mean"] = [0.485, 0.456, 0.406]
    values["image_std"] = [0.229, 0.224, 0.225]
    if family is not SSD:
        values["anchor_sizes"] = [[32], [64], [128], [256], [512]]
    if family in (FasterRCNN, RetinaNet):
        values["aspect_ratios"] = [0.5, 1.0, 2.0]
    if family is FasterRCNN:
        values["bbox_reg_weights"] = [10.0, 10.0, 5.0, 5.0]
    pretrained = weights is not None or weights_backbone is not None
    if name in _FAMILIES or name in _FREEZES_NORM:
        layers = {"ssd300_vgg16": 4, "ssdlite320_mobilenet_v3_large": 6}.get(name, 3)
        most = 6 if name.startswith("ssdlite") else 5
        values["trainable_backbone_layers"] = layers if pretrained else most
    if name in _FREEZES_NORM:
        values["backbone_norm"] = "frozen" if pretrained else "batch"
        # these COCO weights were trained with an eps of 0
        coco = weights is not None and name == "fasterrcnn_resnet50_fpn"
        values["norm_eps"] = 0.0 if coco else 1e-5
    if name.startswith("ssdlite"):
        values["reduced_tail"] = weights is not None or weights_backbone is None
    return {**values, **_DEFAULTS.get(name, {})}


def model_settings(name: str) -> tuple[str, ...]:
    """The settings that `build_model(name, ...)` accepts, sorted.

    Plain numbers, words and lists only, so that they fit into a checkpoint, a YAML
    file and a served artefact. Those of torchvision's constructors have its names and
    meaning; further ones are

    - `anchor_sizes`: a list of sizes per feature level, such as `[[16], [32], [64]]`,
      in pixels of the resized tile, and `aspect_ratios`, height / width. Another
      number of them starts the head that uses them afresh.
    - `trainable_backbone_layers`: stages of the backbone that learn, from its end.
    - `backbone_norm`: "batch" learns, "frozen" keeps the pretrained statistics; and
      `norm_eps`, the number in its denominator.
    - `reduced_tail`: of SSDlite's backbone; ImageNet's weights fit the full one.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; valid names: {', '.join(MODELS)}")
    return tuple(sorted(_default_settings(name, None, None)))


def resolved_settings(
    name: str,
    weights: str | None = None,
    weights_backbone: str | None = None,
    **settings: Any,
) -> dict:
    """Every setting of a model with the value it gets; for a checkpoint.

    Args:
        name, weights, weights_backbone, **settings: as for `build_model`.

    Returns:
        All of `model_settings(name)`, JSON types only. `build_model(name, num_classes,
        **resolved)` needs no pretrained weights and makes the same network, ready for
        `load_state_dict`, whatever the defaults are by then.

    Raises:
        ValueError: an unknown name or setting; the message lists the valid ones.
    """
    valid = model_settings(name)
    unknown = sorted(set(settings) - set(valid))
    if unknown:
        raise ValueError(
            f"{name} has no setting {', '.join(unknown)}; valid: {', '.join(valid)}"
        )
    given = {key: value for key, value in settings.items() if value is not None}
    values = {**_default_settings(name, weights, weights_backbone), **given}
    return {key: _plain(values[key]) for key in valid}


_LOWER = (torch.bfloat16, torch.float16)


def _float32(value: Any) -> Any:
    """Tensors of lower precision as float32, also in a list, a tuple or a dict."""
    if isinstance(value, dict):
        return {key: _float32(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_float32(one) for one in value)
    return value.float() if value.dtype in _LOWER else value


def _outputs_in_float32(_: nn.Module, args: tuple, outputs: Any) -> Any:
    return _float32(outputs)


def _anchors_in_float32(_: nn.Module, args: tuple) -> tuple | None:
    images, maps = args
    if maps[0].dtype not in _LOWER:
        return None
    # of the maps only dtype, device and size are asked
    return images, [m.new_empty(1, dtype=torch.float32).expand(m.shape) for m in maps]


def _regions_in_float32(_: nn.Module, args: tuple) -> tuple:
    return (_float32(dict(args[0])), *args[1:])


def boxes_in_float32(model: nn.Module) -> None:
    """Keep coordinates in float32 under autocast, whatever the network computes in.

    torchvision makes anchors in the dtype of the feature maps, and decodes boxes in
    that of the heads' outputs. bfloat16 has 8 significant bits: above 256 px each
    coordinate would be a multiple of 2, a small proposal lose its width, and the loss
    become infinite. The maps and the heads themselves stay as they are.

    Args:
        model: a FasterRCNN, FCOS, RetinaNet or SSD of torchvision, changed in place.
            Those of `build_model` come so.
    """
    if isinstance(model, FasterRCNN):
        heads = [model.rpn.head, model.roi_heads.box_predictor]
        anchors = model.rpn.anchor_generator
        # newer torchvisions do this themselves; 0.16 wants one dtype of maps and boxes
        model.roi_heads.box_roi_pool.register_forward_pre_hook(_regions_in_float32)
    else:
        heads, anchors = [model.head], model.anchor_generator
    for head in heads:
        head.register_forward_hook(_outputs_in_float32)
    anchors.register_forward_pre_hook(_anchors_in_float32)


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come back from JSON."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def build_model(
    name: str,
    num_classes: int = 61,
    weights: str | None = None,
    weights_backbone: str | None = None,
    **settings: Any,
) -> nn.Module:
    """A detector by name, in training mode.

    Args:
        name: one of `MODELS`.
        num_classes: classes with the background, 61 for xView's 60.
        weights: "DEFAULT" for COCO weights with a fresh head for `num_classes`
            (downloaded once by torch.hub), None for none.
        weights_backbone: "DEFAULT" for ImageNet weights of the backbone, None for
            random ones. Ignored where `weights` is given.
        **settings: constructor arguments of the detector, see `model_settings`:
            thresholds, proposals, detections per image, min_size and max_size,
            anchor_sizes. None stands for the default.

    Returns:
        A module in torchvision's convention: images are a list of float (3, H, W) in
        0..1; targets a list of {"boxes": float32 (N, 4) xyxy, "labels": int64 (N,)}.
        It returns a dict of losses in training and a list of {"boxes", "labels",
        "scores"} in evaluation. Under autocast its boxes, scores and losses are
        float32 as well.

    Raises:
        ValueError: an unknown name or setting; the message lists the valid ones.
        RuntimeError: the weights could not be downloaded.
    """
    values = resolved_settings(name, weights, weights_backbone, **settings)
    layers = values.pop("trainable_backbone_layers", None)
    norm = values.pop("backbone_norm", None), values.pop("norm_eps", None)
    if weights is not None:
        weights_backbone = None  # COCO weights include the backbone
    try:
        if name == "fasterrcnn_small":
            model = _small(num_classes, weights, weights_backbone, **values)
        elif name in _BODIES:
            body = _BODIES[name]
            model = _fpn_fasterrcnn(
                body, num_classes, weights, weights_backbone, **values
            )
        else:
            model = _torchvision(name, num_classes, weights, weights_backbone, **values)
    except (URLError, ConnectionError) as error:
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise RuntimeError(
            f"the pretrained weights of {name} could not be downloaded ({error}). Put "
            f"the file into {folder}, or pass weights=None, weights_backbone=None to "
            "train from scratch."
        ) from error
    if norm[0] is not None:
        _set_norm(model.backbone.body, *norm)
    if layers is not None:
        _train_last(model.backbone, layers)
    boxes_in_float32(model)
    return model
