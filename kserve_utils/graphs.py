"""A detector of torchvision as a graph for ONNX Runtime and OpenVINO.

Copy: this file.

Both graphs take one float32 picture (3, height, width) of any size in 0..1 and give
boxes, labels and scores. What torchvision traces to is mended on the way where it would
fail without boxes, be slow, or lose coordinates in bf16.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import torch
from torch import nn
from torch.onnx import operators
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import boxes as box_ops
from torchvision.ops import poolers

OPSET = 17  # torchvision's detectors are tested with the exporter of this age
# layers of an exported graph by torch's names: boxes, and what stays in the network
BOX_LAYERS = re.compile(r"/rpn/(?!head/)|/roi_heads/(?!box_head/|box_predictor/)")
_COMPUTE = ("Const", "Convolution", "MatMul", "ROIAlign")


class _OnePicture(nn.Module):
    """One picture in, three arrays out: what a graph can express."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.detector([image])[0]
        return found["boxes"], found["labels"], found["scores"]


def _nms_of_any_count(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threshold: float
) -> torch.Tensor:
    """torchvision's batched_nms, with one more box that takes no part.

    Of no box at all, OpenVINO's NMS makes one with what its memory happens to hold.
    """
    boxes = torch.cat([boxes, boxes.new_tensor([[-2.0, -2.0, -1.0, -1.0]])])
    scores_ = torch.cat([scores, scores.new_tensor([-1.0])])
    labels = torch.cat([labels, labels.new_zeros(1)])
    keep = box_ops._batched_nms_coordinate_trick(boxes, scores_, labels, threshold)
    return keep[keep < operators.shape_as_tensor(scores)[0]]


def _decode_of_any_count(
    self: BoxCoder, rel_codes: torch.Tensor, boxes: list[torch.Tensor]
) -> torch.Tensor:
    """torchvision's decode, with a constant number of classes.

    Its own reshape to (boxes, -1) fails in ONNX Runtime where there is no box.
    """
    classes = int(rel_codes.shape[1]) // 4
    return self.decode_single(rel_codes, torch.cat(boxes)).reshape(-1, classes, 4)


def gather_levels(levels: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
    """Pooled regions, level by level, in the order of their proposals.

    torchvision's own, for tracing, scatters each level into a copy of the whole, by an
    index as large as the whole. With a ResNet-50 that took 8 % of OpenVINO's time for a
    picture, and 26 % of ONNX Runtime's.

    Args:
        levels: int64 (N,), the level that each proposal is pooled from.
        parts: of each level its regions, float32 (n, C, H, W).

    Example:
        >>> parts = [torch.tensor([10.0, 30.0]), torch.tensor([20.0])]
        >>> gather_levels(torch.tensor([0, 1, 0]), parts).tolist()
        [10.0, 20.0, 30.0]
    """
    order = torch.cat([torch.where(levels == i)[0] for i in range(len(parts))])
    return torch.cat(parts)[torch.argsort(order)]


@torch.inference_mode()
def write_onnx(model: nn.Module, path: Path, example: torch.Tensor) -> None:
    """Write the ONNX graph of a detector; `example` is a picture to trace it with."""
    axes = {"image": {1: "height", 2: "width"}}
    axes |= {key: {0: "found"} for key in ("boxes", "labels", "scores")}
    with (
        warnings.catch_warnings(),
        mock.patch.object(box_ops, "batched_nms", _nms_of_any_count),
        mock.patch.object(BoxCoder, "decode", _decode_of_any_count),
        mock.patch.object(poolers, "_onnx_merge_levels", gather_levels),
    ):
        warnings.simplefilter("ignore")  # each shape that Python reads is one
        torch.onnx.export(
            _OnePicture(model).eval(),
            (example,),
            str(path),
            input_names=["image"],
            output_names=["boxes", "labels", "scores"],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,  # the newer exporter fails on torchvision's batched_nms
        )


def write_openvino(onnx_path: Path) -> None:
    """Write OpenVINO's .xml and .bin of an ONNX graph, with the same stem."""
    import onnx
    import openvino

    graph, path = onnx.load(str(onnx_path)), onnx_path.with_suffix(".xml")
    _keep_relu_apart(graph.graph)
    # read_model, not convert_model, which reports its use over the network
    graph = openvino.Core().read_model(graph.SerializeToString())
    openvino.save_model(graph, str(path), compress_to_fp16=False)
    _keep_coordinates_in_float32(path)


def _keep_relu_apart(graph: Any) -> None:
    """Write Relu after a product of matrices as the maximum with 0, in place.

    OpenVINO computes a product that a Relu is fused into by another kernel, which on
    AVX2 takes 430 ms instead of 330 for the first layer of a ResNet-50 Faster R-CNN's
    box head (1,000 x 12,544 x 1,024).
    """
    import onnx

    made = {output: node.op_type for node in graph.node for output in node.output}
    zero = onnx.numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    graph.initializer.append(zero)
    for node in graph.node:
        if node.op_type == "Relu" and made.get(node.input[0]) == "Gemm":
            node.op_type = "Max"
            node.input.append(zero.name)


def _keep_coordinates_in_float32(path: Path) -> None:
    """Mark what computes proposals and boxes, so that it does so in bf16 too.

    By itself OpenVINO leaves in float32 only what follows the last product. Proposals
    came in bf16, above 256 px in steps of 2, and a fasterrcnn_small of 300 steps on
    drawn shapes fell from an AP of 0.793 to 0.770 on 64 tiles; marked, it stays.
    """
    tree = ElementTree.parse(path)
    for layer in tree.iterfind("layers/layer"):
        if layer.get("type") in _COMPUTE or not BOX_LAYERS.search(layer.attrib["name"]):
            continue
        marks = layer.find("rt_info")
        if marks is None:
            marks = ElementTree.Element("rt_info")
            layer.insert(0 if layer.find("data") is None else 1, marks)
        ElementTree.SubElement(marks, "attribute", name="precise", version="0")
    tree.write(path)
