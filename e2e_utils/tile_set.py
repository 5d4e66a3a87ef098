"""What a folder of tiles holds: its description, `tiles.json`, and who reads it.

Copy: this file, coco.py, stretch.py and files.py.

Whoever makes tiles writes the description last, so tiles that have one are whole.
Everything after it takes tile size, overlap, file names, classes and the place of the
scenes from there. A folder has one tile size, overlap, list of classes and stretch.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from .coco import Category
from .files import digest, relative_path, write_file
from .stretch import Stretch, as_stretch

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
            `describe_split` leave it.

    Raises:
        FileNotFoundError: there is no description, or a file that it names is missing.
        ValueError: the description is damaged or of another version; a COCO file is
            not the described one, tiles are missing, or there are tiles of another run.
    """
    folder = Path(folder)
    path, manifests = folder / NAME, {p.name for p in folder.glob(f"*{MANIFEST}")}
    if not path.is_file():
        todo = "make tiles there with notebook 2 or e2e_utils.prepare, or describe "
        todo += "those of another tool with describe_split"
        if manifests:
            todo = f"{min(manifests)} is of an older version or of a run that was "
            todo += f"stopped; {_AGAIN}"
        raise FileNotFoundError(f"{folder} has no {NAME}: {todo}")
    tiles = _read(path)
    for name, split in tiles.splits.items():
        _check_split(path, name, split)
    if others := manifests - {split.manifest for split in tiles.splits.values()}:
        raise ValueError(
            f"{folder} holds tiles of another run as well ({min(others)}), which "
            f"{NAME} does not list: remove the folder (or take another one of the "
            f"bucket) and {_AGAIN}"
        )
    return tiles


def _check_split(path: Path, name: str, split: Split) -> None:
    images, coco = path.parent / split.images, path.parent / split.coco
    for file, is_there in ((images, images.is_dir()), (coco, coco.is_file())):
        if not is_there:
            raise FileNotFoundError(f"{file} is missing, {path} lists it for {name}")
    if digest(coco) != split.sha256:
        raise ValueError(
            f"{coco} is not the file that {path} describes: it was changed, or is of "
            f"another run; {_AGAIN}, or describe it with tile_set.describe_split"
        )
    there = sum(not entry.name.startswith(".") for entry in os.scandir(images))
    if there < split.tiles:
        raise ValueError(
            f"{images} holds {there} of the {split.tiles} tiles that {path} lists: "
            f"copy the rest, or {_AGAIN}"
        )


def _read(path: Path) -> TileSet:
    content = path.read_bytes()
    try:
        found = msgspec.json.decode(content, type=dict).get("format", 0)
        if found != FORMAT:
            raise ValueError(
                f"{path} is of format {found}, and format {FORMAT} is read here: "
                f"remove the folder and {_AGAIN}"
            )
        tiles = msgspec.json.decode(content, type=TileSet)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is no description of tiles: {error}") from error
    tiles.folder = str(path.parent)
    return tiles


def _write(tiles: TileSet) -> None:
    content = msgspec.json.encode(msgspec.structs.replace(tiles, folder=""))
    write_file(tiles._path, [msgspec.json.format(content, indent=2), b"\n"])


def start_split(
    folder: str | Path,
    name: str,
    tile_size: int,
    overlap: float,
    categories: list[Category],
    stretch: Stretch | None = None,
    *,
    write: bool = True,
) -> TileSet:
    """The description of a folder without a split that is about to be made anew.

    It is out of the file until `describe_split` says that it is whole; `write` False
    leaves the file and looks for errors alone, those of a stretch not yet.

    Raises:
        ValueError: the folder has tiles of another size, overlap, stretch or classes.
    """
    path = Path(folder, NAME)
    ordered = sorted(categories, key=lambda one: one.id)
    classes = [Category(one.id, one.name) for one in ordered]
    new = TileSet(
        format=FORMAT,
        tile_size=tile_size,
        overlap=float(overlap),
        classes=classes,
        splits={},
        stretch=stretch,
        folder=str(folder),
    )
    if not path.exists():
        return new
    there = _read(path)
    there.splits.pop(name, None)
    if (there.tile_size, there.overlap) != (new.tile_size, new.overlap):
        raise ValueError(
            f"{folder} holds tiles of {there.tile_size} px with overlap {there.overlap}"
            f", not {tile_size} px with {overlap}: remove it, or choose another folder"
        )
    if not there.splits:
        if write:
            path.unlink()
        return new
    others = f"{', '.join(there.splits)} of {folder}"
    if write and there.stretch != stretch:
        raise ValueError(
            f"{name} has the stretch {stretch} and {others} {there.stretch}: remove "
            "the folder, or choose another"
        )
    if there.classes != classes:
        before, now = ({c.id: c.name for c in t.classes} for t in (there, new))
        one = min(i for i in {*before, *now} if before.get(i) != now.get(i))
        raise ValueError(
            f"category {one} is {now.get(one)!r} in {name} and {before.get(one)!r} in "
            f"{others}: all splits need the same ones"
        )
    if write:
        _write(there)
    return there


class _Listed(msgspec.Struct):
    images: list[msgspec.Raw]
    categories: list[Category]


def describe_split(
    folder: str | Path,
    name: str,
    images: str | Path,
    coco: str | Path,
    *,
    tile_size: int,
    overlap: float,
    pixel_size: float | None = None,
    manifest: str | Path | None = None,
    scenes: tuple[str | Path, str | Path] | None = None,
    settings: dict | None = None,
    stretch: Stretch | str | Path | None = None,
) -> TileSet:
    """Say in the description of a folder that a split is there, whole.

    `slice_coco` does it for the tiles that it cuts. For tiles that another tool made,
    such as pictures of one size with a COCO file, call it for "train" and for "val".

    Args:
        folder: gets `tiles.json`, or a split more in it.
        name: "train" or "val".
        images: folder of the tiles.
        coco: their COCO file.
        tile_size: side of a tile in pixels; prediction cuts scenes into tiles of it.
        overlap: share of a side that neighbours have in common, 0 <= overlap < 1.
        pixel_size: side of a pixel on the ground in metres, if it is known.
        manifest: see `slice_coco`.
        scenes: (folder of the scenes, their COCO file), if they are there.
        settings: what else decided which tiles there are.
        stretch: that made the tiles of scenes, or its path; see `slice_coco`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: as `start_split`, or `coco` is no COCO file.
    """
    folder, coco = Path(folder), Path(coco)
    try:
        listed = msgspec.json.decode(coco.read_bytes(), type=_Listed)
    except msgspec.DecodeError as error:
        raise ValueError(f"{coco}: not a COCO file: {error}") from error
    record, classes = as_stretch(stretch), listed.categories
    tiles = start_split(folder, name, tile_size, overlap, classes, record)
    there = manifest, *(scenes or (None, None))
    paths = [path and relative_path(path, folder) for path in there]
    tiles.splits[name] = Split(
        images=relative_path(images, folder),
        coco=relative_path(coco, folder),
        sha256=digest(coco),
        tiles=len(listed.images),
        manifest=paths[0],
        scenes=paths[1],
        scenes_coco=paths[2],
        scenes_sha256=scenes and digest(Path(scenes[1])),
        settings=settings or {},
    )
    tiles.pixel_size = pixel_size if pixel_size is not None else tiles.pixel_size
    _check_split(tiles._path, name, tiles.splits[name])
    _write(tiles)
    return tiles
