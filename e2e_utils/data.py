"""COCO tiles as tensors: the data set, its augmentation, its loaders.

Copy: this file, coco.py, files.py, sampling.py, scenes.py, images.py and stretch.py.

The augmentation of a tile is a function of the seed that comes with its index. With
the order of sampling.py, a run that was stopped continues at any step with the very
batches that the undisturbed run would have seen.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.transforms import v2

from .coco import Coco, boxes_xyxy, read_coco
from .sampling import StepSampler
from .scenes import read_rgb


class CocoTiles(Dataset):
    """Tiles and their boxes from a COCO file.

    Args:
        image_dir: folder of the tiles.
        json_path: COCO file: images, annotations (bbox in pixels, xywh), categories.
        augment: a transform of torchvision.transforms.v2, or None.
        cache: decode each tile once and keep it, 270 kB at 300 px, in each process
            that loads.

    An item is (image, target). image is a tv_tensors.Image, uint8 (3, H, W), RGB.
    target holds "boxes" (tv_tensors.BoundingBoxes, float32 (N, 4), xyxy in pixels of
    the tile), "labels" (int64 (N,), 1..C in ascending order of the category id; 0 is
    the background) and "image_id" (the COCO id, an int or a str). A tile without
    objects has boxes of shape (0, 4). Crowds (iscrowd 1) are no objects to learn; they
    stay in `coco`, where COCO's AP ignores what is found on them.

    Raises:
        ValueError: the file is no COCO file, or an annotation has no area in float32,
            or names an image or a category that is not in it; cache is no bool; on
            reading, a tile that is no image or not of the size that the file says.
            The message names the file and the value.
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
        if not isinstance(cache, bool):
            raise ValueError(f"cache must be True or False, got {cache!r}")
        coco = read_coco(self.json_path)
        categories = sorted(coco.categories, key=lambda category: category.id)
        self.category_ids = [category.id for category in categories]
        self.class_names = ["background", *(category.name for category in categories)]
        self._targets = self._make_targets(coco)
        self.coco = coco.to_dict()
        self.images = self.coco["images"]
        self._cache: dict[int, torch.Tensor] | None = {} if cache else None

    def _make_targets(self, coco: Coco) -> list[tuple[torch.Tensor, torch.Tensor]]:
        label_of = {c: label for label, c in enumerate(self.category_ids, start=1)}
        rows: dict[int | str, list[int]] = {image.id: [] for image in coco.images}
        for index, row in enumerate(coco.annotations):
            if not row.iscrowd:
                rows[row.image_id].append(index)
        boxes = torch.from_numpy(boxes_xyxy(coco))
        labels = torch.tensor(
            [label_of[row.category_id] for row in coco.annotations], dtype=torch.int64
        )
        return [(boxes[index], labels[index]) for index in rows.values()]

    def __len__(self) -> int:
        return len(self.images)

    def labels(self, index: int) -> torch.Tensor:
        """Labels of the tile's objects, int64 (N,)."""
        return self._targets[index][1]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a tile as the COCO file says, in pixels."""
        image = self.images[index]
        return image["height"], image["width"]

    def read(self, index: int) -> torch.Tensor:
        """The tile as uint8 (3, H, W), RGB."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        path = self.image_dir / self.images[index]["file_name"]
        if not path.is_file():
            raise ValueError(f"the tile {path} is missing")
        try:
            pixels = read_rgb(path)
        except ValueError as error:
            raise ValueError(f"the tile {error}") from error
        tensor = torch.tensor(pixels).permute(2, 0, 1).contiguous()
        if tensor.shape[1:] != self.size(index):
            height, width = self.size(index)
            raise ValueError(
                f"the tile {path} has {tensor.shape[2]} x {tensor.shape[1]} px, and "
                f"{self.json_path} says {width} x {height}: boxes would be misplaced"
            )
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


def default_augment(
    brightness: float = 0.2,
    contrast: float = 0.2,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> v2.Transform:
    """Flips, transpose and colours: what light, air and direction vary.

    Args:
        brightness, contrast, saturation, hue: of `v2.ColorJitter`; the last, 0..0.5,
            is a share of the circle of colours. Another sky changes the last two.

    Example:
        >>> [type(step).__name__ for step in default_augment().transforms]
        ['RandomHorizontalFlip', 'RandomVerticalFlip', 'RandomTranspose', 'ColorJitter']
    """
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            RandomTranspose(),
            v2.ColorJitter(brightness, contrast, saturation, hue),
        ]
    )


def collate(items: list[tuple]) -> tuple[list, list]:
    """Items to (images, targets): tiles differ in size, so they stay lists.

    Example:
        >>> collate([("tile 1", {"image_id": 1}), ("tile 2", {"image_id": 2})])
        (['tile 1', 'tile 2'], [{'image_id': 1}, {'image_id': 2}])
    """
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def _leave_sigterm_to_the_parent(worker: int) -> None:
    """A scheduler may signal all processes at once; the batch at hand is still needed.

    A worker ends with its parent in any case.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _loader(dataset: Dataset, workers: int, **options: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_sigterm_to_the_parent,
        **options,
    )


def train_loader(
    dataset: Dataset,
    batch_size: int,
    steps: int,
    *,
    workers: int = 0,
    **order: Any,
) -> DataLoader:
    """A loader that yields exactly the batches of a run, from any step on.

    Args:
        dataset: `CocoTiles`.
        batch_size: tiles a batch.
        steps: of the whole run.
        workers: processes that load.
        **order: of `StepSampler`: start, seed, rank, world_size, repeats, groups.

    Example:
        >>> batches = train_loader(range(4), batch_size=2, steps=2).batch_sampler
        >>> sorted(index for batch in batches for index, augment_seed in batch)
        [0, 1, 2, 3]
    """
    tiles = len(dataset)  # type: ignore[arg-type]  # torch's Dataset has no __len__
    sampler = StepSampler(tiles, batch_size, steps, **order)
    return _loader(
        dataset, workers, batch_sampler=sampler, persistent_workers=workers > 0
    )


def eval_loader(
    dataset: Dataset,
    batch_size: int = 4,
    *,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """A loader over this rank's share of the tiles, each tile exactly once.

    Example:
        >>> tiles = [("tile 0", {}), ("tile 1", {}), ("tile 2", {})]
        >>> [images for images, _ in eval_loader(tiles, rank=0, world_size=2)]
        [['tile 0', 'tile 2']]
    """
    tiles = len(dataset)  # type: ignore[arg-type]  # as above
    share = Subset(dataset, range(rank, tiles, world_size))
    return _loader(share, workers, batch_size=batch_size)
