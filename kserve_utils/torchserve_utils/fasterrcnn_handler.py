"""What a TorchServe worker does with a request: base64 picture in, boxes out.

Travels in the archive and stands alone: torch, Pillow and TorchServe, nothing of the
packages of this repository. Python 3.9, which KServe's TorchServe image has, is
enough.

One instance of a request is {"data": "<base64 of a JPEG, PNG or TIFF file>"}. Its
answer is a list of {class name: [x1, y1, x2, y2], "score": s}, best first, in pixels
of the picture. Pillow decodes; for PNG and JPEG that gives the very pixels that tiling
and training see. What is turned by an orientation tag is refused, as there.
"""

import base64
import binascii
import importlib
import io
import json
import os
import struct
import zlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import PredictionException

# TorchServe wants exactly one class in this file.

_UNREADABLE: tuple = (OSError, SyntaxError, ValueError, struct.error, zlib.error)
_UNREADABLE += (Image.DecompressionBombError,)
_MAX_RATIO = 100  # of the sides: a thinner picture is scaled to less than a pixel


def _bad(index: int, reason: str) -> PredictionException:
    return PredictionException(f"instance {index}: {reason}", 400)


def _turned(picture: Any) -> str:
    """Why a picture that a viewer would rotate is refused; "" if it is upright."""
    tag = picture.getexif().get(274, 1)
    return (
        "" if tag == 1 else f"its orientation tag, {tag}, rotates it; store it upright"
    )


class FasterRCNNHandler(BaseHandler):
    """Serves any detector of models.py; detector.json in the archive says which."""

    stretch: Any = None  # of scenes that the detector learned from

    def initialize(self, context: Any) -> None:
        """Build the detector and read the limits; called once in each worker.

        On the GPU that TorchServe gives this worker (context's "gpu_id"), else the CPU.
        """
        # cuDNN takes TF32 by default, and BaseHandler switches it on for products too:
        # it keeps 10 bits of a factor's 23, and boxes of servers that agree need all
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        super().initialize(context)
        folder = context.system_properties.get("model_dir")
        with open(os.path.join(folder, "detector.json")) as file:
            description = json.load(file)
        self.score_threshold = description["score_threshold"]
        self.max_pixels = description["max_pixels"]
        self.stretch = description.get("stretch")
        # torchvision's pooling of regions takes the scales of the feature maps from
        # the first picture, and from a very thin one it takes wrong ones, for good
        size = description["tile_size"]
        with torch.inference_mode():
            self.model([torch.zeros(3, size, size, device=self.device)])

    def _load_pickled_model(
        self, model_dir: str, model_file: str, model_pt_path: str
    ) -> torch.nn.Module:
        """As BaseHandler's, but the weights are read as data only."""
        model = importlib.import_module(os.path.splitext(model_file)[0]).Detector()
        weights = torch.load(model_pt_path, self.device, weights_only=True)["model"]
        model.load_state_dict(weights)
        return model

    def preprocess(self, data: Any) -> list[torch.Tensor]:
        """Instances to pictures: a list of uint8 (3, H, W), RGB."""
        if not isinstance(data, list) or not data:
            raise PredictionException(
                'the request has no "instances": send {"instances": [{"data": '
                '"<base64 of a picture file>"}]}',
                400,
            )
        return [self._picture(index, row) for index, row in enumerate(data)]

    def _picture(self, index: int, row: Any) -> torch.Tensor:
        if not isinstance(row, dict) or not (row.get("data") or row.get("body")):
            raise _bad(index, 'needs the key "data" with the base64 of a picture')
        content = row.get("data") or row.get("body")
        if isinstance(content, str):
            try:  # some encoders break lines
                content = base64.b64decode("".join(content.split()), validate=True)
            except (binascii.Error, ValueError) as error:
                raise _bad(index, f"data is not base64: {error}") from error
        if not isinstance(content, (bytes, bytearray)):
            raise _bad(index, "data must be text, the base64 of a picture")
        try:
            # of these formats the header alone is read; ICO's, say, decodes
            picture = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "TIFF"))
            reason = self._fault_of_header(picture, content)
        except _UNREADABLE as error:
            reason = f"{len(content)} bytes that are not a picture (JPEG, PNG or TIFF)"
            raise _bad(index, reason) from error
        if reason:
            raise _bad(index, reason)
        try:
            pixels = np.array(picture.convert("RGB"))
            # of a PNG its tags may stand at the end; of a TIFF Pillow drops this one
            reason = _turned(picture) if picture.format == "PNG" else ""
        except _UNREADABLE as error:
            reason = f"the picture is damaged or cut short: {error}"
            raise _bad(index, reason) from error
        if reason:
            raise _bad(index, reason)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _fault_of_header(self, picture: Any, content: Any) -> str:
        """Why a picture is not decoded; "" if it is."""
        width, height = picture.size
        size = f"the picture has {width} x {height} pixels"
        if width * height > self.max_pixels:
            return f"{size}, at most {self.max_pixels} are taken: send tiles of it"
        if max(width, height) > _MAX_RATIO * min(width, height):
            return f"{size}: a side is at most {_MAX_RATIO} times the other"
        # Pillow calls 16 bits of RGB "RGB"; the 25th byte of a PNG is its depth
        bits = content[24] if picture.format == "PNG" else 8
        if picture.format == "TIFF":
            if self.stretch:
                return "of a TIFF no bands are chosen here: send RGB as PNG or JPEG"
            bits = max(picture.tag_v2.get(258, (8,)))
        if bits > 8:
            return f"{bits} bits a channel: send 8 bits a channel"
        return "" if picture.format == "PNG" else _turned(picture)

    @torch.inference_mode()
    def inference(
        self, data: list[torch.Tensor], *args: Any, **kwargs: Any
    ) -> list[dict[str, torch.Tensor]]:
        """One picture after the other: memory is that of one, results do not mix."""
        pictures = (picture.to(self.device).float() / 255 for picture in data)
        return [self.model([picture])[0] for picture in pictures]

    def postprocess(self, data: list[dict[str, torch.Tensor]]) -> list[list[dict]]:
        """Detections to the answer: a list of boxes for each picture."""
        answers = []
        for output in data:
            columns = (output[key].tolist() for key in ("boxes", "labels", "scores"))
            answers.append(
                [
                    {self.mapping[str(label)]: box, "score": score}
                    for box, label, score in zip(*columns)  # noqa: B905, Python 3.9
                    if score >= self.score_threshold
                ]
            )
        return answers
