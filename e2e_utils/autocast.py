"""Detectors in bfloat16 and float16: the network in it, the coordinates not.

Copy: this file. (It runs on Python 3.9 with torchvision 0.16 too, see models.py.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN

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

    Example:
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> untrained = {"weights": None, "weights_backbone": None, "min_size": 64}
        >>> model = fcos_resnet50_fpn(**untrained).eval()
        >>> boxes_in_float32(model)
        >>> with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ...     model([torch.zeros(3, 64, 64)])[0]["boxes"].dtype
        torch.float32
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
