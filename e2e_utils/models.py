"""Detectors by name, their settings taken by the constructor, their heads refitted.

Copy: this file. (It needs torch and torchvision only and runs on Python 3.9 with
torchvision 0.16 too, because it travels inside the archive that is served.)

`build_model` makes every architecture of the notebooks. Settings such as
`rpn_nms_thresh` are constructor arguments in torchvision; set on a model after it
was built they change nothing, so here they go through the constructor, and an
unknown one is an error.
"""

from __future__ import annotations

import functools
import inspect
import os
from urllib.error import URLError

import torch
import torchvision
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet, backbone_utils
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead
from torchvision.models.detection.retinanet import RetinaNetClassificationHead
from torchvision.models.detection.ssd import SSD, SSDClassificationHead
from torchvision.models.detection.ssdlite import SSDLiteClassificationHead
from torchvision.models.resnet import BasicBlock
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock
from torchvision.ops.misc import FrozenBatchNorm2d

CHECKPOINT_KEYS = ("model", "architecture", "settings", "class_names")

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


def _anchors(
    settings: dict, default_sizes: tuple, default_ratios: tuple
) -> AnchorGenerator:
    """`anchor_sizes` (a list of sizes per level) and `aspect_ratios` as anchors."""
    sizes = settings.pop("anchor_sizes", default_sizes)
    ratios = tuple(settings.pop("aspect_ratios", default_ratios))
    return AnchorGenerator(tuple(tuple(s) for s in sizes), (ratios,) * len(sizes))


def _small(num_classes, weights, weights_backbone, **settings):
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
    anchors = _anchors(settings, ((16,), (36,), (80,)), (0.5, 1.0, 2.0))
    defaults = {
        "min_size": 300,  # a tile enters as it is: no resizing
        "max_size": 300,
        "image_mean": [0.43] * 3,
        "image_std": [0.2] * 3,
        "rpn_pre_nms_top_n_train": 600,
        "rpn_post_nms_top_n_train": 400,
        "rpn_pre_nms_top_n_test": 500,
        "rpn_post_nms_top_n_test": 300,
        "box_batch_size_per_image": 128,
        "box_detections_per_img": 300,
    }
    pool = MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=1)
    return FasterRCNN(
        backbone,
        num_classes=None,
        rpn_anchor_generator=anchors,
        box_roi_pool=pool,
        box_head=TwoMLPHead(64 * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, num_classes),
        **{**defaults, **settings},
    )


class _NoExtraLevel(ExtraFPNBlock):
    """An FPN of just the levels given; torchvision's default adds a pooled one."""

    def forward(self, results, x, names):
        return results, names


def _torchvision(name, num_classes, weights, weights_backbone, **settings):
    if "anchor_sizes" in settings or "aspect_ratios" in settings:
        key = "rpn_anchor_generator" if "rcnn" in name else "anchor_generator"
        sizes, ratios = ((32,), (64,), (128,), (256,), (512,)), (0.5, 1.0, 2.0)
        if name.startswith("fcos"):
            sizes, ratios = ((8,), (16,), (32,), (64,), (128,)), (1.0,)
        settings[key] = _anchors(settings, sizes, ratios)
    builder = getattr(detection, name)
    if weights is None:
        return builder(
            weights=None,
            weights_backbone=weights_backbone,
            num_classes=num_classes,
            **settings,
        )
    model = builder(weights=weights, weights_backbone=None, **settings)
    return _refit_head(model, num_classes)


def _fpn_fasterrcnn(body, num_classes, weights, weights_backbone, **settings):
    """Faster R-CNN with an FPN over a backbone that has no COCO detector."""
    if weights is not None:
        raise ValueError(
            f"there are no COCO weights for Faster R-CNN on {body}; pass "
            "weights=None and weights_backbone='DEFAULT' (ImageNet) instead"
        )
    if body.startswith("resnet"):
        # BatchNorm must learn where nothing is pretrained; frozen, it cannot
        norm = nn.BatchNorm2d if weights_backbone is None else FrozenBatchNorm2d
        layers = settings.pop("trainable_backbone_layers", 3)
        backbone = backbone_utils.resnet_fpn_backbone(
            backbone_name=body,
            weights=weights_backbone,
            norm_layer=norm,
            trainable_layers=5 if weights_backbone is None else layers,
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
    anchors = _anchors(
        settings, ((32,), (64,), (128,), (256,), (512,)), (0.5, 1.0, 2.0)
    )
    return FasterRCNN(backbone, num_classes, rpn_anchor_generator=anchors, **settings)


def _refit_head(model: nn.Module, num_classes: int) -> nn.Module:
    """Replace the COCO classifier by an untrained one for `num_classes`."""
    if isinstance(model, FasterRCNN):
        inputs = model.roi_heads.box_predictor.cls_score.in_features
        model.roi_heads.box_predictor = FastRCNNPredictor(inputs, num_classes)
        return model
    old = model.head.classification_head
    if isinstance(model, RetinaNet):
        # retinanet_resnet50_fpn_v2's head is normalised by GroupNorm, v1's is not
        norm = (
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
            norm = functools.partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
            new = SSDLiteClassificationHead(channels, anchors, num_classes, norm)
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


def model_settings(name: str) -> tuple[str, ...]:
    """The settings that `build_model(name, ...)` accepts, sorted.

    Plain numbers and lists only, so that they fit into a checkpoint, a YAML file and
    a served artefact. `anchor_sizes` is a list of sizes per feature level, such as
    `[[16], [32], [64]]`, in pixels of the resized tile.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; valid names: {', '.join(MODELS)}")
    family = _FAMILIES.get(name, FasterRCNN)
    objects = {"backbone", "num_classes", "size", "head", "kwargs", "proposal_matcher"}
    objects |= {"anchor_generator", "rpn_anchor_generator", "rpn_head"}
    objects |= {"box_roi_pool", "box_head", "box_predictor"}
    valid = set(inspect.signature(family).parameters) - objects
    if family is not SSD and not name.endswith("_v2"):  # these fix their anchors
        valid |= {"anchor_sizes", "aspect_ratios"}
    if name in _FAMILIES or name.startswith("resnet152"):
        valid.add("trainable_backbone_layers")
    return tuple(sorted(valid))


def build_model(
    name: str,
    num_classes: int = 61,
    weights: str | None = None,
    weights_backbone: str | None = None,
    **settings,
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
            anchor_sizes.

    Returns:
        A module in torchvision's convention: images are a list of float (3, H, W) in
        0..1; targets a list of {"boxes": float32 (N, 4) xyxy, "labels": int64 (N,)}.
        It returns a dict of losses in training and a list of {"boxes", "labels",
        "scores"} in evaluation.

    Raises:
        ValueError: an unknown name or setting; the message lists the valid ones.
        RuntimeError: the weights could not be downloaded.
    """
    valid = model_settings(name)
    unknown = sorted(set(settings) - set(valid))
    if unknown:
        raise ValueError(
            f"{name} has no setting {', '.join(unknown)}; valid: {', '.join(valid)}"
        )
    if weights is not None and weights_backbone is not None:
        weights_backbone = None  # COCO weights include the backbone
    try:
        if name == "fasterrcnn_small":
            return _small(num_classes, weights, weights_backbone, **settings)
        if name in _BODIES:
            body = _BODIES[name]
            return _fpn_fasterrcnn(
                body, num_classes, weights, weights_backbone, **settings
            )
        return _torchvision(name, num_classes, weights, weights_backbone, **settings)
    except (URLError, ConnectionError) as error:
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise RuntimeError(
            f"the pretrained weights of {name} could not be downloaded ({error}). Put "
            f"the file into {folder}, or pass weights=None, weights_backbone=None to "
            "train from scratch."
        ) from error


def model_from_checkpoint(path, device="cpu"):
    """The model of a checkpoint file, in evaluation mode, and what describes it.

    Args:
        path: a file written by `e2e_utils.train` or `e2e_utils.export`.
        device: where the weights go.

    Returns:
        (model, meta): meta is the checkpoint without its weights and optimizer state:
        architecture, settings, class_names (index = label), tile_size, overlap, and
        what else the checkpoint says.

    Raises:
        ValueError: not such a checkpoint; the message names the file and what lacks.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's unpickler raises whatever the bytes lead to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error
    keys = set(checkpoint) if isinstance(checkpoint, dict) else set()
    missing = [key for key in CHECKPOINT_KEYS if key not in keys]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: it was not written by e2e_utils.train "
            f"(its keys: {', '.join(map(str, sorted(keys, key=str)))[:200]})"
        )
    model = build_model(
        checkpoint["architecture"],
        len(checkpoint["class_names"]),
        **checkpoint["settings"],
    )
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {path} do not fit {checkpoint['architecture']} with "
            f"{len(checkpoint['class_names'])} classes: {str(error)[:300]}"
        ) from error
    heavy = ("model", "optimizer", "scheduler", "rng")
    meta = {key: value for key, value in checkpoint.items() if key not in heavy}
    return model.to(device).eval(), meta
