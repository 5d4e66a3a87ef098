"""Detectors by name, their settings taken by the constructor.

Copy: this file, backbones.py, efficientnet_lite.py and autocast.py. (They need torch
and torchvision only and run on Python 3.9 with torchvision 0.16 too, in the archive.)

A setting such as `rpn_nms_thresh`, set after a model was built, changes nothing; here
all go through the constructor, and an unknown one is an error. `resolved_settings` has
their values for a checkpoint, so that a default that changes later changes no model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
from torch import nn
from torchvision.models import detection, get_model_weights
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.ssd import SSD

from . import backbones
from .autocast import boxes_in_float32
from .backbones import features_fpn, resnet_fpn


class _Architecture(NamedTuple):
    """What a name stands for; its settings are the plain arguments of the first two."""

    detector: type[nn.Module]
    backbone: Callable[..., nn.Module]  # of weights, and its settings
    heads: Callable[..., dict]  # of backbone, num_classes and anchors
    defaults: dict  # replace theirs
    pretrained: dict = {}  # and these, where weights are loaded
    coco: dict = {}  # and these, if they are COCO's


_SIDES, _RATIOS = (32, 64, 128, 256, 512), [0.5, 1.0, 2.0]
_ANCHORS = {"anchor_sizes": [[x] for x in _SIDES], "aspect_ratios": _RATIOS}
_THIRDS = [[x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))] for x in _SIDES]
# What torchvision does to a pretrained ResNet; from scratch all of it must learn.
_FROZEN = {"trainable_backbone_layers": 3, "backbone_norm": "frozen"}
# Small objects on small tiles
_TILES = {
    "min_size": 300,  # a tile enters as it is: no resizing
    "max_size": 300,
    "anchor_sizes": [[16], [36], [80]],
    "aspect_ratios": _RATIOS,
    "rpn_pre_nms_top_n_train": 600,
    "rpn_post_nms_top_n_train": 400,
    "rpn_pre_nms_top_n_test": 500,
    "rpn_post_nms_top_n_test": 300,
    "box_batch_size_per_image": 128,
    "box_detections_per_img": 300,
}

# The first two are our own; the next six are torchvision's, which has COCO weights of
# them; the others get an FPN: on a single stride-32 map a car is half a cell.
_ARCHITECTURES: dict[str, _Architecture] = {
    "fasterrcnn_small": _Architecture(
        FasterRCNN,
        backbones.small_fpn,
        backbones.small_heads,
        {**_TILES, "image_mean": [0.43] * 3, "image_std": [0.2] * 3},
    ),
    "fasterrcnn_lite0_fpn": _Architecture(
        FasterRCNN,
        backbones.lite0_fpn,
        backbones.small_heads,
        _TILES,
        {"backbone_norm": "folded"},
    ),
    "fasterrcnn_resnet50_fpn": _Architecture(
        FasterRCNN,
        partial(resnet_fpn, "resnet50", 0, None),
        backbones.rcnn_heads,
        _ANCHORS,
        _FROZEN,
        {"norm_eps": 0.0},  # these weights were trained so
    ),
    "fasterrcnn_resnet50_fpn_v2": _Architecture(
        FasterRCNN,
        partial(resnet_fpn, "resnet50", 0, nn.BatchNorm2d),
        backbones.rcnn_v2_heads,
        _ANCHORS,
        {"trainable_backbone_layers": 3},
    ),
    "fcos_resnet50_fpn": _Architecture(
        FCOS,
        partial(resnet_fpn, "resnet50", 256, None),
        backbones.fcos_heads,
        {"anchor_sizes": [[8], [16], [32], [64], [128]]},
        _FROZEN,
    ),
    "retinanet_resnet50_fpn_v2": _Architecture(
        RetinaNet,
        partial(resnet_fpn, "resnet50", 2048, None),
        backbones.retinanet_v2_heads,
        {"anchor_sizes": _THIRDS, "aspect_ratios": _RATIOS},
        {"trainable_backbone_layers": 3},
    ),
    "ssd300_vgg16": _Architecture(
        SSD,
        backbones.vgg16_ssd,
        backbones.ssd300_heads,
        {"image_mean": [0.48235, 0.45882, 0.40784], "image_std": [1 / 255] * 3},
        {"trainable_backbone_layers": 4},
    ),
    "ssdlite320_mobilenet_v3_large": _Architecture(
        SSD,
        backbones.mobilenet_ssdlite,
        backbones.ssdlite_heads,
        {
            **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "score_thresh": 0.001},
            **{"nms_thresh": 0.55, "detections_per_img": 300, "topk_candidates": 300},
        },
        {"reduced_tail": False},
        {"reduced_tail": True},
    ),
}
for _name, _backbone, _pretrained in (
    ("resnet152_fasterrcnn_model", partial(resnet_fpn, "resnet152", 0, None), _FROZEN),
    ("resnet152_fpn_fasterrcnn", partial(resnet_fpn, "resnet152", 0, None), _FROZEN),
    ("efficientnet_b4_fasterrcnn_model", partial(features_fpn, "efficientnet_b4"), {}),
    ("convnext_small_fasterrcnn_model", partial(features_fpn, "convnext_small"), {}),
    ("convnext_large_fasterrcnn_model", partial(features_fpn, "convnext_large"), {}),
):
    _ARCHITECTURES[_name] = _Architecture(
        FasterRCNN, _backbone, backbones.rcnn_heads, _ANCHORS, _pretrained
    )
MODELS = tuple(_ARCHITECTURES)

# What None stands for in torchvision's constructors
_NONE_MEANS = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "bbox_reg_weights": [10.0, 10.0, 5.0, 5.0],
}


def _plain_arguments(function: Callable) -> dict:
    """The arguments that are numbers, words or lists, with their defaults."""
    parameters = inspect.signature(function).parameters
    values = {k: _NONE_MEANS.get(k, p.default) for k, p in parameters.items()}
    kinds = (int, float, str, list, tuple)
    return {k: _lists(v) for k, v in values.items() if isinstance(v, kinds)}


def _lists(value: Any) -> Any:
    """Tuples as lists, as they come back from JSON."""
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def _default_settings(
    name: str, weights: str | None = None, weights_backbone: str | None = None
) -> dict:
    its = _ARCHITECTURES[name]
    values = {**_plain_arguments(its.detector), **_plain_arguments(its.backbone)}
    values.update(its.defaults)
    if weights is not None or weights_backbone is not None:
        values.update(its.pretrained)
    return values if weights is None else {**values, **its.coco}


def model_settings(name: str) -> tuple[str, ...]:
    """The settings that `build_model(name, ...)` accepts, sorted.

    Plain numbers, words and lists, for a checkpoint, a YAML file and an artefact. Those
    of torchvision's constructors have its names and meaning; further ones are

    - `anchor_sizes`: a list of sizes per feature level, such as `[[16], [32]]`, in
      pixels of the resized tile, and `aspect_ratios`, height / width. COCO weights of
      another number of them start afresh.
    - `trainable_backbone_layers`: stages of the backbone that learn, from its end.
    - `backbone_norm`: "batch" learns, "frozen" keeps the pretrained statistics,
      "folded" has them in the convolutions; and `norm_eps`, of its denominator.
    - `reduced_tail`: of SSDlite's backbone; ImageNet's weights fit the full one.

    Example:
        >>> "anchor_sizes" in model_settings("fasterrcnn_small")
        True
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; valid names: {', '.join(MODELS)}")
    return tuple(sorted(_default_settings(name)))


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

    Example:
        >>> resolved_settings("fasterrcnn_small", min_size=512)["min_size"]
        512
    """
    valid = model_settings(name)
    if unknown := sorted(set(settings) - set(valid)):
        raise ValueError(
            f"{name} has no setting {', '.join(unknown)}; valid: {', '.join(valid)}"
        )
    given = {key: value for key, value in settings.items() if value is not None}
    values = {**_default_settings(name, weights, weights_backbone), **given}
    key = "trainable_backbone_layers"
    most = _default_settings(name).get(key, 0)  # from scratch, all of them
    if not 0 <= values.get(key, 0) <= most:
        raise ValueError(f"{key} is {values[key]}; give 0 to {most}")
    return {key: _lists(values[key]) for key in valid}


def _take_anchors(values: dict, levels: int) -> AnchorGenerator:
    sizes, ratios = values.pop("anchor_sizes"), values.pop("aspect_ratios", [1.0])
    if len(sizes) != levels or len({len(of_level) for of_level in sizes}) != 1:
        raise ValueError(
            f"anchor_sizes is {sizes}; give {levels} lists of equal length, one for "
            "each feature level"
        )
    return AnchorGenerator(tuple(map(tuple, sizes)), (tuple(ratios),) * levels)


def _load_coco(model: nn.Module, name: str, weights: str) -> None:
    """Load COCO weights into all but the head that tells the classes apart.

    Of the other heads, tensors for another number of anchors stay untrained as well.
    """
    if not hasattr(detection, name):
        raise ValueError(
            f"there are no COCO weights for {name}; pass weights=None and "
            "weights_backbone='DEFAULT' (ImageNet), or train from scratch"
        )
    classifiers = ("roi_heads.box_predictor.", "head.classification_head.")
    coco = get_model_weights(name).verify(weights).get_state_dict(progress=True)
    state = {key: coco[key] for key in coco if not key.startswith(classifiers)}
    for key, own in model.state_dict().items():
        of_anchors = key in state and key.startswith(("rpn.head.", "head."))
        differs = of_anchors and own.shape != state[key].shape
        if differs or key.startswith(classifiers):
            state[key] = own
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the COCO weights of {name} do not fit its settings: {what}"
        ) from error


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
        **settings: those of `model_settings`; None stands for the default.

    Returns:
        A module in torchvision's convention: images are a list of float (3, H, W) in
        0..1; targets a list of {"boxes": float32 (N, 4) xyxy, "labels": int64 (N,)}.
        It returns a dict of losses in training and a list of {"boxes", "labels",
        "scores"} in evaluation. Under autocast its boxes, scores and losses are
        float32 as well.

    Raises:
        ValueError: an unknown name or setting; the message lists the valid ones.
        RuntimeError: the weights are neither here nor could they be downloaded.

    Example:
        >>> model = build_model("fasterrcnn_small", 3).eval()  # has learned nothing
        >>> sorted(model([torch.zeros(3, 300, 300)])[0])
        ['boxes', 'labels', 'scores']
    """
    values = resolved_settings(name, weights, weights_backbone, **settings)
    its = _ARCHITECTURES[name]
    of_backbone = {key: values.pop(key) for key in _plain_arguments(its.backbone)}
    anchors = None
    if "anchor_sizes" in values:
        anchors = _take_anchors(values, len(its.defaults["anchor_sizes"]))
    try:
        pretrained = weights_backbone if weights is None else None  # COCO's include it
        backbone = its.backbone(weights=pretrained, **of_backbone)
        heads = its.heads(backbone, num_classes, anchors)
        model = its.detector(backbone, **heads, **values)
        if weights is not None:
            _load_coco(model, name, weights)
    except (URLError, ConnectionError) as error:
        raise RuntimeError(
            f"the pretrained weights of {name} could not be downloaded ({error}). Put "
            f"the file into {torch.hub.get_dir()}/checkpoints, or pass weights=None, "
            "weights_backbone=None."
        ) from error
    boxes_in_float32(model)
    return model
