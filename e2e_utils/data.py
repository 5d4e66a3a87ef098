"""COCO tiles as tensors: the data set, its augmentation, its loaders.

Copy: this file and sampling.py.

The augmentation of a tile is a function of the seed that comes with its index. With
the order of sampling.py, a run that was stopped continues at any step with the very
batches that the undisturbed run would have seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from .sampling import StepSampler


class CocoTiles(Dataset):
    """Tiles and their boxes from a COCO file.

    Args:
        image_dir: folder of the tiles.
        json_path: COCO file: images, annotations (bbox in pixels, xywh), categories.
        augment: a transform of torchvision.transforms.v2, or None.
        cache: decode each tile once, 270 kB at 300 px. "memory" (or True) keeps them
            in each process that loads; "disk" writes them into one file beside
            json_path when the data set is made, which all processes share, and makes
            it anew when a tile has changed. "off" (or False) decodes every time.

    An item is (image, target). image is a tv_tensors.Image, uint8 (3, H, W), RGB.
    target holds "boxes" (tv_tensors.BoundingBoxes, float32 (N, 4), xyxy in pixels of
    the tile), "labels" (int64 (N,), 1..C in ascending order of the category id; 0 is
    the background) and "image_id" (int, the COCO id). A tile without objects has
    boxes of shape (0, 4).

    Raises:
        ValueError: the file is no COCO file, or an annotation names an image or a
            category that is not in it; an unknown cache; on reading, a tile that is
            no image. The message names the file and the value.
    """

    def __init__(
        self,
        image_dir: str | Path,
        json_path: str | Path,
        augment: Callable | None = None,
        cache: bool | str = False,
    ) -> None:
        self.image_dir = Path(image_dir)
        self.json_path = Path(json_path)
        self.augment = augment
        if not self.image_dir.is_dir():
            raise FileNotFoundError(f"no folder of tiles at {self.image_dir}")
        self.coco = _read_coco(self.json_path)
        categories = sorted(self.coco["categories"], key=lambda c: c["id"])
        self.category_ids = [c["id"] for c in categories]
        self.class_names = ["background"] + [c["name"] for c in categories]
        self.images = self.coco["images"]
        self._targets = self._make_targets()
        kind = cache if isinstance(cache, str) else ("memory" if cache else "off")
        if kind not in ("off", "memory", "disk"):
            raise ValueError(f"cache must be 'off', 'memory' or 'disk', got {cache!r}")
        self._cache: list | None = None
        self._decoded: Path | None = None
        if kind == "memory":
            self._cache = [None] * len(self.images)
        elif kind == "disk":
            bytes_each = [3 * h * w for h, w in map(self.size, range(len(self)))]
            self._starts = np.cumsum([0, *bytes_each]).tolist()
            self._decoded = self._decode_all()

    def _make_targets(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        label_of = {c: label for label, c in enumerate(self.category_ids, start=1)}
        rows: dict[int, list] = {image["id"]: [] for image in self.images}
        for annotation in self.coco["annotations"]:
            x, y, w, h = annotation["bbox"]
            where = f"annotation {annotation['id']} of {self.json_path}"
            if annotation["category_id"] not in label_of:
                category = annotation["category_id"]
                raise ValueError(f"{where}: category_id {category} is not listed")
            if annotation["image_id"] not in rows:
                image = annotation["image_id"]
                raise ValueError(f"{where}: image_id {image} is not listed")
            if w <= 0 or h <= 0:
                raise ValueError(f"{where}: its box has no area: {annotation['bbox']}")
            label = label_of[annotation["category_id"]]
            rows[annotation["image_id"]].append((x, y, x + w, y + h, label))
        targets = []
        for image in self.images:
            table = torch.tensor(rows[image["id"]], dtype=torch.float64).reshape(-1, 5)
            targets.append((table[:, :4].float(), table[:, 4].long()))
        return targets

    def __len__(self) -> int:
        return len(self.images)

    def labels(self, index: int) -> torch.Tensor:
        """Labels of the tile's objects, int64 (N,)."""
        return self._targets[index][1]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a tile as the COCO file tells them, in pixels."""
        image = self.images[index]
        try:
            return int(image["height"]), int(image["width"])
        except KeyError as error:
            raise ValueError(
                f"image {image['id']} of {self.json_path} has no {error.args[0]}"
            ) from None

    def _decode_all(self) -> Path:
        """The file of all decoded tiles, one behind the other; made where it lacks."""
        key = hashlib.sha256()
        for index, image in enumerate(self.images):
            path = self.image_dir / image["file_name"]
            if not path.is_file():
                raise ValueError(f"the tile {path} is missing")
            stat = path.stat()
            row = (path.name, *self.size(index), stat.st_size, stat.st_mtime_ns)
            key.update(repr(row).encode())
        stem = f"{self.json_path.stem}-decoded"
        file = self.json_path.with_name(f"{stem}-{key.hexdigest()[:16]}.u8")
        if file.exists():
            return file
        beside = file.with_suffix(f".{os.getpid()}.part")
        try:
            with beside.open("wb") as out:
                for index, image in enumerate(self.images):
                    tile = self.read(index)
                    if tile.shape[1:] != self.size(index):
                        raise ValueError(
                            f"the tile {self.image_dir / image['file_name']} is "
                            f"{tuple(tile.shape[1:])}, and {self.json_path} says "
                            f"{self.size(index)} (height, width)"
                        )
                    out.write(tile.numpy().tobytes())
            os.replace(beside, file)
        finally:
            beside.unlink(missing_ok=True)
        for old in file.parent.glob(f"{stem}-*.u8"):  # of tiles that have changed
            if old != file:
                old.unlink(missing_ok=True)
        return file

    def read(self, index: int) -> torch.Tensor:
        """The tile as uint8 (3, H, W), RGB."""
        if self._cache is not None and self._cache[index] is not None:
            return self._cache[index]
        if self._decoded is not None:
            start, end = self._starts[index : index + 2]
            flat = np.fromfile(self._decoded, np.uint8, end - start, offset=start)
            return torch.from_numpy(flat).view(3, *self.size(index))
        path = self.image_dir / self.images[index]["file_name"]
        image = cv2.imread(str(path), cv2.IMREAD_COLOR) if path.is_file() else None
        if image is None:
            state = "is missing" if not path.is_file() else "is not a readable image"
            raise ValueError(f"the tile {path} {state}")
        tensor = torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        tensor = tensor.permute(2, 0, 1).contiguous()
        if self._cache is not None:
            self._cache[index] = tensor
        return tensor

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, dict]:
        index, augment_seed = item if isinstance(item, tuple) else (item, None)
        image = tv_tensors.Image(self.read(index))
        boxes, labels = self._targets[index]
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                boxes.clone(), format="XYXY", canvas_size=image.shape[-2:]
            ),
            "labels": labels.clone(),
            "image_id": self.images[index]["id"],
        }
        if self.augment is None:
            return image, target
        if augment_seed is None:
            return self.augment(image, target)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(augment_seed)
            return self.augment(image, target)


def _read_coco(path: Path) -> dict:
    try:
        coco = json.loads(path.read_text())
        missing = {"images", "annotations", "categories"} - set(coco)
    except FileNotFoundError:
        raise FileNotFoundError(f"no COCO file at {path}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if missing:
        raise ValueError(f"{path} is not a COCO file: it lacks {sorted(missing)}")
    if not coco["images"]:
        raise ValueError(f"{path} lists no images")
    return coco


class RandomTranspose(v2.Transform):
    """Swap rows and columns with probability `p`; with flips, all eight symmetries.

    A satellite picture has no up and down, so each of them is a plausible scene.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, image: torch.Tensor, target: dict) -> tuple[torch.Tensor, dict]:
        if torch.rand(()) >= self.p:
            return image, target
        boxes = target["boxes"]
        flipped = tv_tensors.Image(image.transpose(-1, -2).contiguous())
        target["boxes"] = tv_tensors.BoundingBoxes(
            boxes[:, [1, 0, 3, 2]], format="XYXY", canvas_size=flipped.shape[-2:]
        )
        return flipped, target


def default_augment(brightness: float = 0.2, contrast: float = 0.2) -> v2.Transform:
    """Flips, transpose, brightness and contrast: what light and direction vary."""
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            RandomTranspose(),
            v2.ColorJitter(brightness=brightness, contrast=contrast),
        ]
    )


def collate(items: list[tuple]) -> tuple[list, list]:
    """Items to (images, targets): tiles differ in size, so they stay lists."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def _leave_sigterm_to_the_parent(worker: int) -> None:
    """A scheduler may signal all processes at once; the batch at hand is still needed.

    A worker ends with its parent in any case.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def train_loader(
    dataset: Dataset,
    batch_size: int,
    steps: int,
    *,
    start: int = 0,
    seed: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    repeats: list[float] | None = None,
    groups: list[int] | None = None,
) -> DataLoader:
    """A loader that yields exactly the batches `start`..`steps` of a run.

    The arguments are those of `StepSampler`, and `workers`, the processes that load.
    """
    tiles = len(dataset)  # type: ignore[arg-type]  # torch's Dataset has no __len__
    sampler = StepSampler(
        tiles, batch_size, steps, start, seed, rank, world_size, repeats, groups
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_leave_sigterm_to_the_parent,
    )


def eval_loader(
    dataset: Dataset,
    batch_size: int = 4,
    *,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """A loader over this rank's share of the tiles, each tile exactly once."""
    tiles = len(dataset)  # type: ignore[arg-type]  # as above
    return DataLoader(
        torch.utils.data.Subset(dataset, range(rank, tiles, world_size)),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_sigterm_to_the_parent,
    )
