"""What a folder of tiles holds: its description, `tiles.json`, and who reads it.

Copy: this file, coco.py, stretch.py and files.py.

Whoever makes tiles writes the description last, so tiles that have one are whole.
Everything after it takes tile size, overlap, file names, classes and the place of the
scenes from there. A folder has one tile size, overlap, list of classes and stretch.
"""

from __future__ import annotations

import os
from itertools import zip_longest
from pathlib import Path

import msgspec

from .coco import Category
from .files import digest, write_file
from .stretch import Stretch

FORMAT = 1  # of tiles.json; a number more where an older reader would misread it
NAME = "tiles.json"
MANIFEST = "_manifest.json"  # how the name of a manifest ends, see tile_files.py
_AGAIN = "run notebook 2, or e2e_utils.prepare, again"


class Split(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Tiles to train on or to validate; all paths are relative to the description."""

    images: str  # folder of the tiles
    coco: str  # their COCO file
    sha256: str  # of the COCO file
    tiles: int
    manifest: str | None = None  # the pixels of a scene that each tile shows
    scenes: str | None = None  # folder of the scenes
    scenes_coco: str | None = None  # COCO file of the scenes
    scenes_sha256: str | None = None  # of that file
    settings: dict = {}  # what else decided which tiles there are


class TileSet(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The description of a folder of tiles, of `read_tile_set`."""

    format: int
    tile_size: int  # side in pixels; a scene smaller than it makes a smaller tile
    overlap: float  # share of a side that neighbours have in common
    classes: list[Category]  # by ascending id: labels 1, 2, ...
    splits: dict[str, Split]
    pixel_size: float | None = None  # side of a pixel on the ground, in metres
    stretch: Stretch | None = None  # that made tiles of the scenes
    folder: str = ""  # where the description lies; not in the file

    @property
    def class_names(self) -> list[str]:
        """Index = label, the background first."""
        return ["background", *(one.name for one in self.classes)]

    @property
    def category_ids(self) -> list[int]:
        """COCO id of label 1, 2, ..."""
        return [one.id for one in self.classes]

    def split(self, name: str) -> tuple[Path, Path]:
        """(folder of tiles, COCO file) of "train" or "val", as `CocoTiles` takes them.

        Raises:
            ValueError: there is no such split.
        """
        one = self._split(name)
        return Path(self.folder, one.images), Path(self.folder, one.coco)

    def scenes(self, name: str) -> tuple[Path, Path]:
        """(folder of scenes, COCO file) that the tiles of a split were cut from.

        Raises:
            ValueError: no such split, nobody said where its scenes are, or their COCO
                file is another one by now.
            FileNotFoundError: they are there no longer.
        """
        one = self._split(name)
        if one.scenes is None or one.scenes_coco is None:
            raise ValueError(
                f"{self._path} does not say where the scenes of {name} are"
            )
        found = [
            Path(os.path.normpath(Path(self.folder, path)))
            for path in (one.scenes, one.scenes_coco)
        ]
        for path in found:
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is not there; by {self._path}, {name} was cut from it"
                )
        if digest(found[1]) != one.scenes_sha256:
            raise ValueError(
                f"{found[1]} is not the file that {name} of {self._path} was cut from: "
                f"it was changed; {_AGAIN}"
            )
        return found[0], found[1]

    def describe(self) -> dict:
        """What a checkpoint says of the tiles that its detector learned from."""
        return {
            "class_names": self.class_names,
            "category_ids": self.category_ids,
            "tile_size": self.tile_size,
            "overlap": self.overlap,
            "stretch": self.stretch and self.stretch.to_dict(),
        }

    def check_same(self, state: dict, output_dir: str) -> None:
        """ValueError if a run that goes on would learn from tiles of another kind.

        Args:
            state: what last.pt says of the tiles that it began with, see `describe`.
            output_dir: of the run, for the error.

        Example:
            >>> grid = {"tile_size": 300, "overlap": 0.2}
            >>> tiles = TileSet(format=FORMAT, classes=[], splits={}, **grid)
            >>> tiles.check_same({"tile_size": 512}, "out")
            Traceback (most recent call last):
                ...
            ValueError: out holds a run on tiles with tile_size 512, those of ...
        """
        for key, value in self.describe().items():
            before = state.get(key, value)
            if before != value:
                if isinstance(value, list):  # the first that differs says enough
                    pairs = zip_longest(before, value)
                    before, value = next(pair for pair in pairs if pair[0] != pair[1])
                raise ValueError(
                    f"{output_dir} holds a run on tiles with {key} {before!r}, "
                    f"those of {self.folder} have {value!r}: choose another "
                    "output_dir"
                )

    @classmethod
    def read(cls, path: Path) -> TileSet:
        """A description as it stands in its file; `read_tile_set` checks it as well.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        content = path.read_bytes()
        try:
            found = msgspec.json.decode(content, type=dict).get("format", 0)
            if found != FORMAT:
                raise ValueError(
                    f"{path} is of format {found}, and format {FORMAT} is read here: "
                    f"remove the folder and {_AGAIN}"
                )
            tiles = msgspec.json.decode(content, type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path} is no description of tiles: {error}") from error
        tiles.folder = str(path.parent)
        return tiles

    def write(self) -> None:
        """Write it into its folder."""
        content = msgspec.json.encode(msgspec.structs.replace(self, folder=""))
        write_file(self._path, [msgspec.json.format(content, indent=2), b"\n"])

    def check(self, name: str) -> None:
        """Hold a split against what lies in the folder.

        Raises:
            FileNotFoundError: a file that the description names is missing.
            ValueError: the COCO file is not the described one, or tiles are missing.
        """
        images, coco = self.split(name)
        for file, is_there in ((images, images.is_dir()), (coco, coco.is_file())):
            if not is_there:
                raise FileNotFoundError(
                    f"{file} is missing, {self._path} lists it for {name}"
                )
        if digest(coco) != self.splits[name].sha256:
            raise ValueError(
                f"{coco} is not the file that {self._path} describes: it was changed, "
                f"or is of another run; {_AGAIN}, or describe it with "
                "describe_tiles.describe_split"
            )
        there = sum(not entry.name.startswith(".") for entry in os.scandir(images))
        if there < (listed := self.splits[name].tiles):
            raise ValueError(
                f"{images} holds {there} of the {listed} tiles that {self._path} "
                f"lists: copy the rest, or {_AGAIN}"
            )

    @property
    def _path(self) -> Path:
        return Path(self.folder, NAME)

    def _split(self, name: str) -> Split:
        if name not in self.splits:
            there = ", ".join(self.splits) or "none"
            raise ValueError(f"{self._path} has no split {name!r}; it has {there}")
        return self.splits[name]


def read_tile_set(folder: str | Path) -> TileSet:
    """Read the description of a folder of tiles, and hold it against the folder.

    Args:
        folder: of the tiles, as `tiling.slice_coco`, `storage.sync` or
            `describe_tiles.describe_split` leave it.

    Raises:
        FileNotFoundError: there is no description, or a file that it names is missing.
        ValueError: the description is damaged or of another version; a COCO file is
            not the described one, tiles are missing, or there are tiles of another run.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from sample_data.noise import write_noise_tiles
        >>> with TemporaryDirectory() as folder:
        ...     write_noise_tiles(folder, size=64)
        ...     tiles = read_tile_set(folder)
        >>> tiles.tile_size, {name: split.tiles for name, split in tiles.splits.items()}
        (64, {'train': 8, 'val': 4})
    """
    folder = Path(folder)
    path, manifests = folder / NAME, {p.name for p in folder.glob(f"*{MANIFEST}")}
    if not path.is_file():
        todo = "make tiles there with notebook 2 or e2e_utils.prepare, or describe "
        todo += "those of another tool with describe_tiles.describe_split"
        if manifests:
            todo = f"{min(manifests)} is of an older version or of a run that was "
            todo += f"stopped; {_AGAIN}"
        raise FileNotFoundError(f"{folder} has no {NAME}: {todo}")
    tiles = TileSet.read(path)
    for name in tiles.splits:
        tiles.check(name)
    if others := manifests - {split.manifest for split in tiles.splits.values()}:
        raise ValueError(
            f"{folder} holds tiles of another run as well ({min(others)}), which "
            f"{NAME} does not list: remove the folder (or take another one of the "
            f"bucket) and {_AGAIN}"
        )
    return tiles
