"""The order in which a run sees its tiles: shuffled, repeated, grouped.

Copy: this file.

Which tiles a batch holds is a function of (seed, step, position) alone, so a run
continues at any step, on any rank, without a saved sampler.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.data import Sampler


class Tiles(Protocol):
    """What is asked of a data set here; `e2e_utils.data.CocoTiles` answers."""

    def __len__(self) -> int: ...

    def labels(self, index: int) -> torch.Tensor: ...

    def size(self, index: int) -> tuple[int, int]: ...


def repeat_factors(dataset: Tiles, threshold: float) -> list[float] | None:
    """How often an epoch shows each tile, so that rare classes are seen more.

    A class in a share f of the tiles asks for max(1, sqrt(threshold / f)), a tile for
    the largest of its classes, an empty tile for 1 (Gupta, Dollar and Girshick, LVIS,
    2019, section "repeat factor sampling"; 0.001 there).

    Args:
        dataset: its labels are read, its tiles are not.
        threshold: classes in a smaller share of the tiles are repeated; 0 for none.

    Returns:
        A factor >= 1 for each tile, None where threshold is 0.

    Example:
        >>> class Tiles(list):
        ...     def labels(self, index):
        ...         return torch.tensor(self[index])
        >>> tiles = Tiles([[1], [1], [1], [1, 2]])  # label 2 in a quarter of the tiles
        >>> repeat_factors(tiles, threshold=1.0)
        [1.0, 1.0, 1.0, 2.0]
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"repeat_threshold must be in 0..1, got {threshold!r}")
    if not threshold:
        return None
    present = [set(dataset.labels(i).tolist()) for i in range(len(dataset))]
    tiles = Counter(label for labels in present for label in labels)
    factor = {
        label: max(1.0, math.sqrt(threshold * len(dataset) / count))
        for label, count in tiles.items()
    }
    return [max((factor[label] for label in labels), default=1.0) for labels in present]


def aspect_ratio_groups(dataset: Tiles, factor: int) -> list[int] | None:
    """The group of each tile by height / width; a batch then holds one group.

    A batch is padded to its largest height and width, which wastes most where tall
    and wide tiles meet. The borders of the groups are those of torchvision's
    references: 2^-1 to 2^1 in 2 * factor + 1 steps, or 1 alone for factor 0.

    Returns:
        A number for each tile; None where factor is -1, and where all tiles are of
        one group, since there is nothing to keep apart.

    Example:
        >>> class Tiles(list):
        ...     size = list.__getitem__
        >>> aspect_ratio_groups(Tiles([(300, 300), (300, 100), (290, 300)]), factor=1)
        [2, 3, 1]
    """
    if factor < -1:
        raise ValueError(f"aspect_ratio_group_factor must be >= -1, got {factor!r}")
    if factor == -1:
        return None
    count = 2 * factor + 1
    borders = [2 ** (2 * i / max(1, count - 1) - (factor > 0)) for i in range(count)]
    sizes = map(dataset.size, range(len(dataset)))
    groups = [bisect_right(borders, height / width) for height, width in sizes]
    return groups if len(set(groups)) > 1 else None


def _members(length: int, groups: list[int] | None) -> list[list[int]]:
    """The tiles of each group, in ascending order of the groups."""
    members = defaultdict(list)
    for index in range(length):
        members[groups[index] if groups else 0].append(index)
    return [members[group] for group in sorted(members)]


def _count(tiles: list[int], repeats: list[float] | None) -> int:
    """How many of these tiles, repeated, an epoch shows: always the same number."""
    if repeats is None:
        return len(tiles)
    return math.ceil(sum(repeats[i] for i in tiles) - 1e-6)


def epoch_length(
    length: int,
    batch_size: int,
    repeats: list[float] | None = None,
    groups: list[int] | None = None,
) -> int:
    """Tiles that one epoch shows; the arguments are those of `StepSampler`.

    Example:
        >>> epoch_length(10, batch_size=4), epoch_length(3, 4, repeats=[1, 1, 2.4])
        (10, 5)
    """
    counts = [_count(tiles, repeats) for tiles in _members(length, groups)]
    if groups is None:
        return counts[0]
    return sum(math.ceil(count / batch_size) * batch_size for count in counts)


@dataclass(eq=False)
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
        repeats: see `repeat_factors`. An epoch shows a tile with factor 2.4 two or
            three times, by lot, and lasts `epoch_length` tiles, always the same
            number: so a step belongs to an epoch without counting the ones before.
        groups: see `aspect_ratio_groups`. Each batch is of one group. The last of a
            group is filled up with tiles of that group, so none is ever left out.
    """

    length: int
    batch_size: int
    steps: int
    start: int = 0
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    repeats: list[float] | None = None
    groups: list[int] | None = None

    def __post_init__(self) -> None:
        self.epoch_length = epoch_length(
            self.length, self.batch_size, self.repeats, self.groups
        )

    def __len__(self) -> int:
        return self.steps - self.start

    def _order(self, epoch: int) -> list[int]:
        """The tiles of an epoch, in the order in which batches take them."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        place = {index: rank for rank, index in enumerate(order)}
        shown = []
        for tiles in _members(self.length, self.groups):
            tiles = sorted(tiles, key=place.__getitem__)
            shown.append(self._repeated(tiles, generator))
        if self.groups is None:
            return shown[0]
        batches = []
        for tiles in shown:
            for first in range(0, len(tiles), self.batch_size):
                last = first + self.batch_size
                batches.append([tiles[i % len(tiles)] for i in range(first, last)])
        mixed = torch.randperm(len(batches), generator=generator).tolist()
        return [index for batch in mixed for index in batches[batch]]

    def _repeated(self, tiles: list[int], generator: torch.Generator) -> list[int]:
        if self.repeats is None:
            return tiles
        # systematic sampling: equidistant marks along the factors laid end to end
        # hit each tile floor(factor) or ceil(factor) times, and the sum is fixed
        factors = [self.repeats[i] for i in tiles]
        ends = torch.tensor(factors, dtype=torch.float64).cumsum(0)
        count = _count(tiles, self.repeats)
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        marks = (torch.arange(count) + offset) * (ends[-1] / count)
        hit = torch.searchsorted(ends, marks, right=True).clamp(max=len(tiles) - 1)
        mixed = hit[torch.randperm(count, generator=generator)]
        return [tiles[i] for i in mixed.tolist()]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        for step in range(self.start, self.steps):
            batch = []
            first = (step * self.world_size + self.rank) * self.batch_size
            for position in range(first, first + self.batch_size):
                if position // self.epoch_length != epoch:
                    epoch = position // self.epoch_length
                    order = self._order(epoch)
                # seeds of neighbouring positions must not be neighbours themselves
                mixed = (self.seed * 1_000_003 + position) * 2_654_435_761 % 2**31
                batch.append((order[position % self.epoch_length], mixed))
            yield batch
