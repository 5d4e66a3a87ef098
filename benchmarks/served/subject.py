"""What benchmarks/serve.py serves: a detector, pictures, and labelled tiles if any."""

import io
import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

from e2e_utils.config import TrainConfig
from e2e_utils.describe_tiles import describe_split
from e2e_utils.models import build_model
from e2e_utils.predict import predict_image
from e2e_utils.tile_set import read_tile_set
from e2e_utils.train import fit
from kserve_utils.engines import load_engine
from kserve_utils.export import strip_checkpoint

SIZE = 320  # px of a side


class Subject(NamedTuple):
    """What is served: its stripped checkpoint, pictures, and labelled tiles if any."""

    stripped: Path
    pictures: list[bytes]
    labelled: tuple[Path, Path] | None  # COCO file, folder


def texture(rng: np.random.Generator) -> np.ndarray:
    """uint8 (320, 320, 3) with texture from 64 px down to single pixels."""
    pixels = np.full((SIZE, SIZE, 3), 110, np.float32)
    for cell, strength in ((64, 40), (16, 25), (4, 14), (1, 4)):
        noise = rng.normal(0, strength, (SIZE // cell, SIZE // cell, 3))
        pixels += cv2.resize(noise.astype(np.float32), (SIZE, SIZE))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def draw_tiles(path: Path, folder: Path, count: int, seed: int) -> None:
    """Tiles with twelve shapes each, 12 to 39 px, and their COCO file."""
    rng, names = np.random.default_rng(seed), ("square", "bar", "disc")
    coco = {"images": [], "annotations": []}
    coco["categories"] = [{"id": i, "name": name} for i, name in enumerate(names)]
    folder.mkdir(parents=True)
    for image_id in range(1, count + 1):
        pixels = texture(rng)
        for _ in range(12):
            kind, side = int(rng.integers(0, 3)), int(rng.integers(12, 40))
            width, height = side, side // 3 if kind == 1 else side
            x, y = (int(v) for v in rng.integers(0, SIZE - 40, 2))
            shape = np.ones((height, width), bool)
            if kind == 2:
                up, across = np.ogrid[:side, :side]
                off = np.hypot(up - (side - 1) / 2, across - (side - 1) / 2)
                shape = off <= side / 2
            pixels[y : y + height, x : x + width][shape] = rng.integers(150, 256, 3)
            row = {"id": len(coco["annotations"]) + 1, "image_id": image_id}
            row |= {"category_id": kind, "bbox": [x, y, width, height], "iscrowd": 0}
            coco["annotations"].append({**row, "area": width * height})
        name = f"{image_id}.jpg"
        (folder / name).write_bytes(jpeg(pixels))
        size = {"height": SIZE, "width": SIZE}
        coco["images"].append({"id": image_id, "file_name": name, **size})
    path.write_text(json.dumps(coco))


def trained(folder: Path) -> Subject:
    """fasterrcnn_small after 120 steps on drawn tiles."""
    config = TrainConfig(str(folder), str(folder / "run"), steps=120)
    config.settings = {"min_size": SIZE, "max_size": SIZE}
    config.amp, config.eval_steps = "off", 120  # what bf16 costs is asked of serving
    for split, count, seed in (("train", 40, 0), ("val", 16, 1)):
        images, path = folder / split, folder / f"{split}.json"
        draw_tiles(path, images, count, seed)
        describe_split(folder, split, images, path, tile_size=SIZE, overlap=0.0)
    fit(config, progress=False)
    return own(folder / "run" / "best.pt", folder, folder)


def own(checkpoint: Path, tiles: Path, folder: Path) -> Subject:
    """A checkpoint of e2e_utils.train and the validation tiles below `tiles`."""
    stripped = strip_checkpoint(checkpoint, folder / "stripped.pth")
    images, path = read_tile_set(tiles).split("val")
    rows = json.loads(path.read_text())["images"]
    some = [rows[i * len(rows) // 8]["file_name"] for i in range(8)]
    return Subject(stripped, [(images / n).read_bytes() for n in some], (path, images))


def untrained(name: str, folder: Path) -> Subject:
    """Random weights whose class scores are spread until some boxes are found."""
    torch.manual_seed(0)
    settings = {"min_size": SIZE, "max_size": SIZE}
    classes = ["background"] + [f"class {i}" for i in range(1, 61)]
    model = build_model(name, len(classes), **settings)
    # Some boxes, no ties: of equal scores, chance decides which box stays.
    model.roi_heads.box_predictor.cls_score.weight.data.mul_(2)
    model.roi_heads.box_predictor.cls_score.bias.data[0] = 2.4
    content = {"model": model.state_dict(), "architecture": name, "settings": settings}
    content |= {"class_names": classes, "tile_size": SIZE, "overlap": 0.2}
    torch.save(content, folder / "untrained.pt")
    stripped = strip_checkpoint(folder / "untrained.pt", folder / "stripped.pth")
    return Subject(stripped, drawn(8), None)


def drawn(count: int) -> list[bytes]:
    """JPEG files of 320 px with texture."""
    rng = np.random.default_rng(1)
    return [jpeg(texture(rng)) for _ in range(count)]


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def decode(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def self_labelled(artefact: Path, pictures: list[bytes], folder: Path) -> tuple:
    """Pictures labelled with what the detector itself finds: for a detector that knows
    nothing, so that it may be served in a lower precision at all."""
    model, meta = load_engine(artefact)
    names = [{"id": i, "name": n} for i, n in enumerate(meta["class_names"][1:])]
    coco = {"images": [], "annotations": [], "categories": names}
    for index, content in enumerate(pictures, start=1):
        pixels = decode(content)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        coco["images"].append({"id": index, "file_name": f"{index}.png", **size})
        found = predict_image(model, pixels)
        for (x1, y1, x2, y2), label in zip(
            found["boxes_xyxy"].tolist(), found["labels"].tolist(), strict=True
        ):
            row = {"id": len(coco["annotations"]) + 1, "image_id": index, "iscrowd": 0}
            row |= {"category_id": label - 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            coco["annotations"].append({**row, "area": (x2 - x1) * (y2 - y1)})
    (folder / "labels.json").write_text(json.dumps(coco))
    return folder / "labels.json", folder
