"""The model file of the archive: builds the detector that detector.json describes.

TorchServe makes the one class in this file without arguments. models.py, what it
imports and detector.json lie beside it in the archive, so any architecture that
`build_model` knows is served by these same lines.
"""

import importlib
import json
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = "_archived_detector"


def _models() -> ModuleType:
    """models.py of this folder, in a package made here.

    It imports its neighbours relatively, and a folder of TorchServe is no package; on
    sys.path some other module called "models" may come first.
    """
    package = ModuleType(_PACKAGE)
    package.__path__ = [_HERE]
    sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.models")


class Detector(torch.nn.Module):
    """A detector with random weights; `load_state_dict` takes a stripped "model"."""

    def __init__(self) -> None:
        super().__init__()
        with open(os.path.join(_HERE, "detector.json")) as file:
            description = json.load(file)
        self.detector = _models().build_model(
            description["architecture"],
            len(description["class_names"]),
            **description["settings"],
        )

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """As torchvision's detectors: a list of float (3, H, W) in 0..1."""
        return self.detector(images)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Into the detector itself: checkpoints know nothing of this wrapper."""
        return self.detector.load_state_dict(state_dict, strict=strict)
