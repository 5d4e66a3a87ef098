"""Write the description of a folder of tiles, split by split.

Copy: this file, tile_set.py, coco.py, stretch.py and files.py.

`slice_coco` does so for the tiles that it cuts; `describe_split` is for tiles that
another tool made.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from .coco import Category
from .files import digest, relative_path
from .stretch import Stretch, as_stretch
from .tile_set import FORMAT, NAME, Split, TileSet


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

    Example:
        >>> classes = [Category(18, "car"), Category(11, "aeroplane")]
        >>> tiles = start_split("no such folder", "train", 300, 0.2, classes)
        >>> tiles.class_names, tiles.splits
        (['background', 'aeroplane', 'car'], {})
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
    there = TileSet.read(path)
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
        there.write()
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

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> content = {"images": [], "categories": [{"id": 18, "name": "car"}]}
        >>> with TemporaryDirectory() as folder:
        ...     coco = Path(folder, "train.json")
        ...     _ = coco.write_bytes(msgspec.json.encode(content))
        ...     size = {"tile_size": 512, "overlap": 0.0}
        ...     _ = describe_split(folder, "train", folder, coco, **size)
        ...     TileSet.read(Path(folder, NAME)).class_names
        ['background', 'car']
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
    tiles.check(name)
    tiles.write()
    return tiles
