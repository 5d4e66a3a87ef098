"""An untrained detector, its checkpoint and a picture, for the tests of serving.

The weights are random: the boxes mean nothing, but they are many, and they are the
same for the same pixels, which is all that a parity test needs.
"""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from e2e_utils.models import build_model

ROOT = Path(__file__).parent.parent
TABLE = json.loads((ROOT / "e2e_utils" / "xview_classes.json").read_text())
NAMES = ["background"] + [row["name"] for row in TABLE["classes"]]
# untrained scores are all near 1/61: the default threshold of 0.05 would drop them
SETTINGS = {"box_score_thresh": 0.017, "box_detections_per_img": 40}


def checkpoint() -> dict:
    """What e2e_utils.train writes, with weights that never saw a picture."""
    torch.manual_seed(0)
    model = build_model("fasterrcnn_small", len(NAMES), **SETTINGS)
    return {
        "model": model.state_dict(),
        "architecture": "fasterrcnn_small",
        "settings": SETTINGS,
        "class_names": NAMES,
        "category_ids": list(range(len(NAMES) - 1)),
        "tile_size": 300,
        "overlap": 0.2,
        "stretch": None,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(100_000)}}},
        "scheduler": {"last_epoch": 7},
        "step": 7,
        "epoch": 1,
        "config": {"lr": 1e-3},
        "metrics": {"AP50": 0.0},
        "best": 0.0,
    }


def jpeg(
    height: int = 300, width: int = 300, seed: int = 0, quality: int = 90
) -> bytes:
    """The bytes of a JPEG of soft coloured blobs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    smooth = cv2.resize(coarse, (width, height))
    Image.fromarray(smooth).save(file, "JPEG", quality=quality)
    return file.getvalue()


def decode(content: bytes) -> np.ndarray:
    """Pixels as the handler decodes them: uint8 (H, W, 3), RGB."""
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))
