"""COCO tiles as tensors: the data set, its augmentation, its loaders.

Copy: this file.

Everything random in a training run is a function of (seed, epoch, position): the
order of the tiles, and the augmentation of each. A run that was stopped continues at
any step with the very batches that the undisturbed run would have seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2


class CocoTiles(Dataset):
    """Tiles and their boxes from a COCO file.

    Args:
        image_dir: folder of the tiles.
        json_path: COCO file: images, annotations (bbox in pixels, xywh), categories.
        augment: a transform of torchvision.transforms.v2, or None.
        cache: keep decoded tiles in memory, 270 kB each at 300 px. For small sets.

    An item is (image, target). image is a tv_tensors.Image, uint8 (3, H, W), RGB.
    target holds "boxes" (tv_tensors.BoundingBoxes, float32 (N, 4), xyxy in pixels of
    the tile), "labels" (int64 (N,), 1..C in ascending order of the category id; 0 is
    the background) and "image_id" (int, the COCO id). A tile without objects has
    boxes of shape (0, 4).

    Raises:
        ValueError: the file is no COCO file, or an annotation names an image or a
            category that is not in it; on reading, a tile that is no image. The
            message names the file and the value.
    """

    def __init__(
        self,
        image_dir: str | Path,
        json_path: str | Path,
        augment: Callable | None = None,
        cache: bool = False,
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
        self._cache: list | None = [None] * len(self.images) if cache else None

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

    def read(self, index: int) -> torch.Tensor:
        """The tile as uint8 (3, H, W), RGB."""
        if self._cache is not None and self._cache[index] is not None:
            return self._cache[index]
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

    def forward(self, image, target):
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


class StepSampler(Sampler):
    """Batches of (index, augmentation seed) for a whole run, from any step on.

    Each epoch is a fresh permutation; all ranks see the same number of batches.
    Every rank takes its own part of each global batch.

    Args:
        length: number of tiles.
        batch_size: tiles a batch on each rank.
        steps: total number of steps of the run.
        start: first step to yield (a resumed run passes the step of its checkpoint).
        seed: of the order and of the augmentation.
        rank, world_size: of the process.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        steps: int,
        start: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.length, self.batch_size, self.steps = length, batch_size, steps
        self.start, self.seed = start, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        chunk = self.batch_size * self.world_size
        for step in range(self.start, self.steps):
            batch = []
            for i in range(self.batch_size):
                position = step * chunk + self.rank * self.batch_size + i
                if position // self.length != epoch:
                    epoch = position // self.length
                    generator = torch.Generator().manual_seed(self.seed + epoch)
                    order = torch.randperm(self.length, generator=generator)
                # seeds of neighbouring positions must not be neighbours themselves
                mixed = (self.seed * 1_000_003 + position) * 2_654_435_761 % 2**31
                batch.append((int(order[position % self.length]), mixed))
            yield batch


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
) -> DataLoader:
    """A loader that yields exactly the batches `start`..`steps` of a run."""
    return DataLoader(
        dataset,
        batch_sampler=StepSampler(
            len(dataset), batch_size, steps, start, seed, rank, world_size
        ),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
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
    return DataLoader(
        torch.utils.data.Subset(dataset, range(rank, len(dataset), world_size)),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )
