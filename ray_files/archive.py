"""Where the scenes of an archive come from, where their boxes go, what became of them.

Copy: this file and e2e_utils.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import obstore
from obstore.exceptions import BaseError

from e2e_utils.coco import read_coco
from e2e_utils.georeference import FORMATS
from e2e_utils.images import is_url
from e2e_utils.predict import SCENES
from e2e_utils.scenes import Scene, open_scene
from e2e_utils.storage import open_store

SETTINGS, REPORT = "settings.json", "report.json"
TIFFS = (".tif", ".tiff")


class Archive(NamedTuple):
    """Scenes by name; a name is a path below `root`, or all of it where it is not."""

    root: str  # folder or URL
    scenes: dict[str, str]  # name: path or URL
    ids: dict[str, int | str] = {}  # of a COCO file; else the name
    classes: dict[int, str] = {}  # categories of a COCO file


def one_line(error: BaseException, most: int = 400) -> str:
    """What went wrong, in one line."""
    told = str(error).split("Debug source:")[0]  # pages of it, from obstore
    text = " ".join(told.split()).rstrip(":")[:most]
    known = isinstance(error, (OSError, ValueError)) and text
    return text if known else f"{type(error).__name__}: {text}"


def split_url(url: str) -> tuple[str, str]:
    """The folder of a file or an object, and its name."""
    folder, _, name = url.rpartition("/")
    return folder or ("/" if url.startswith("/") else "."), name


def read_object(url: str) -> bytes:
    """The bytes of a file, of an object, or of a store by its URL.

    Raises:
        OSError, ValueError: it cannot be read; the message names it.
    """
    if "://" not in url:
        return Path(url).read_bytes()
    folder, name = split_url(url)
    try:
        return bytes(obstore.get(open_store(folder), name).bytes())
    except (BaseError, FileNotFoundError) as error:
        raise OSError(f"{url}: cannot be read: {one_line(error)}") from error


@contextmanager
def local_copy(url: str) -> Iterator[str]:
    """The path of a file: its own, or that of a copy for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        if "://" in url:
            path = Path(folder, split_url(url)[1])
            path.write_bytes(read_object(url))
            url = str(path)
        yield url


def list_archive(scenes: str, images: str | None = None) -> Archive:
    """Find the scenes of an archive.

    Args:
        scenes: a folder or the URL of one (s3://, gs://, az://), with the pictures in
            and below it (`predict.SCENES`, hidden ones are not taken); a COCO file
            (.json); a picture; or any other file, with a path or URL a line.
        images: folder or URL below which a COCO file's or a list's relative paths are;
            that of the file by default.

    Raises:
        OSError, ValueError: nothing there, or not readable; the message names it.
    """
    file = scenes.lower().endswith((".json", ".txt", ".csv", ".lst"))
    picture = scenes.lower().endswith(SCENES)
    if file or "://" not in scenes and Path(scenes).is_file() and not picture:
        return _listed(scenes, images or split_url(scenes)[0])
    if images is not None:
        raise ValueError(f"images is {images}, but {scenes} is no list or COCO file")
    if picture and not Path(scenes).is_dir():
        root, name = split_url(absolute(scenes))
        return Archive(root, {name: absolute(scenes)})
    if "://" not in scenes and not Path(scenes).is_dir():
        raise FileNotFoundError(f"{scenes}: no such folder or file")
    if scenes.startswith(("http://", "https://")):
        raise ValueError(f"{scenes}: a web server lists nothing; give a list of URLs")
    root = absolute(scenes)
    store = open_store(root)
    try:
        paths = [row["path"] for rows in obstore.list(store) for row in rows]
    except BaseError as error:
        raise OSError(f"{scenes}: cannot be listed: {one_line(error)}") from error
    found = {
        path: f"{root}/{path}"
        for path in sorted(paths)
        if path.lower().endswith(SCENES) and not re.search(r"(^|/)\.", path)
    }
    if not found:
        raise ValueError(f"{scenes}: no scene there ({', '.join(SCENES)})")
    return Archive(root, found)


def absolute(url: str) -> str:
    """A path as an absolute one; a URL as it is; neither ends in a slash."""
    return url.rstrip("/") if "://" in url else str(Path(url).resolve())


def _listed(file: str, images: str) -> Archive:
    """The scenes that a COCO file or a list names."""
    ids, classes = {}, {}
    if file.lower().endswith(".json"):
        with local_copy(file) as path:
            coco = read_coco(path, strict=False)
        rows = [image.file_name for image in coco.images]
        ids = {image.file_name: image.id for image in coco.images}
        classes = {category.id: category.name for category in coco.categories}
    else:
        try:
            lines = read_object(file).decode().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no list of scenes: {error}") from error
        rows = [line.strip() for line in lines if line.strip()]
    root, by_name = absolute(images), {}
    found: dict[str, str] = {}
    for row in rows:
        source = row if "://" in row else posixpath.normpath(posixpath.join(root, row))
        if "://" in root and "://" not in row:
            source = f"{root}/{posixpath.normpath(row)}"
        name = source.removeprefix(f"{root}/").split("://")[-1].lstrip("/")
        if found.setdefault(name, source) != source:
            raise ValueError(f"{file}: {found[name]} and {source} have one name")
        if ".." in name.split("/"):  # its file would lie outside of the output
            raise ValueError(f"{file}: {row}: no URL or path below {root}")
        by_name[name] = ids.get(row, name)
    if not found:
        raise ValueError(f"{file} names no scene")
    return Archive(root, found, by_name, classes)


@contextmanager
def open_source(source: str, **options: Any) -> Iterator[Scene]:
    """`scenes.open_scene`, also of a PNG or JPEG in a bucket, fetched whole."""
    if "://" not in source or is_url(source) and source.lower().endswith(TIFFS):
        given: str | bytes = source
    else:
        given = read_object(source)
    with open_scene(given, **options) as scene:
        yield scene


def gdal_settings() -> None:
    """Give GDAL, which reads TIFFs in buckets, the settings that `storage` takes.

    Of S3 that is the endpoint and whether to sign; keys and regions have one name. And
    as many retries of a 5xx. What the environment sets in GDAL's own words stays.
    """
    settings = {"GDAL_HTTP_MAX_RETRY": "5", "GDAL_HTTP_RETRY_DELAY": "1"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL"))
    if endpoint:
        scheme, _, host = endpoint.rstrip("/").partition("://")
        settings |= {"AWS_S3_ENDPOINT": host, "AWS_VIRTUAL_HOSTING": "FALSE"}
        settings["AWS_HTTPS"] = "NO" if scheme == "http" else "YES"
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("true", "1"):
        settings["AWS_NO_SIGN_REQUEST"] = "YES"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


class Output:
    """The folder or bucket of the results; each appears whole or not at all."""

    def __init__(self, url: str, ending: str) -> None:
        """Raises ValueError for another ending than those of `FORMATS`."""
        self.url, self.ending = absolute(url), f".{ending.lstrip('.')}"
        if self.ending not in FORMATS:
            valid = ", ".join(FORMATS)
            raise ValueError(f"format must be one of {valid}, got {ending!r}")

    def put(self, name: str, content: bytes) -> None:
        """Raises OSError, which names the file."""
        try:
            obstore.put(open_store(self.url), name, content)
        except (BaseError, OSError, ValueError) as error:
            reason = one_line(error)
            raise OSError(f"{self.url}/{name}: not written: {reason}") from error

    def file_of(self, scene: str) -> str:
        """Of a scene; its own ending stays, so that 5.tif and 5.png do not meet."""
        return f"{scene}{self.ending}"

    def start(self, settings: dict, scenes: Sequence[str]) -> set[str]:
        """Record how these boxes are made, before the work.

        Args:
            settings: what decides on the boxes.
            scenes: their names.

        Returns:
            Those that are there already.

        Raises:
            ValueError: made with other settings.
            OSError: cannot be read, or not written.
        """
        try:
            store = open_store(self.url)
            there = {row["path"] for rows in obstore.list(store) for row in rows}
        except (BaseError, OSError) as error:
            raise OSError(f"{self.url}: cannot be read: {one_line(error)}") from error
        if SETTINGS in there:
            before = json.loads(read_object(f"{self.url}/{SETTINGS}"))
            for key in settings.keys() | before.keys():
                old, new = before.get(key), settings.get(key)
                if old != new:
                    raise ValueError(
                        f"{self.url} holds boxes of {key} {old!r}, {new!r} is asked: "
                        "give another output, or remove it"
                    )
        self.put(SETTINGS, json.dumps(settings, indent=2).encode())
        return {scene for scene in scenes if self.file_of(scene) in there}


@dataclass
class Report:
    """What became of an archive; `str` for people, `to_json` for programs."""

    output: str
    scenes: int
    skipped: int = 0  # there already
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # scene: the reason
    boxes: Counter = field(default_factory=Counter)  # of this run, by class
    pixels: int = 0
    seconds: float = 0.0  # by the clock, from the first actor's start to the last scene
    # what each did: scenes, blocks, seconds at work, seconds that its start took, and
    # when its first work began and its last ended, in seconds since 1970
    actors: dict[str, dict] = field(default_factory=dict)

    def count(self, worker: dict, record: dict) -> None:
        """Take in who did a scene or a block, from when to when."""
        none = {"scenes": 0, "blocks": 0, "seconds": 0.0, **worker}
        actor = self.actors.setdefault(none.pop("actor"), none)
        actor["seconds"] += worker["to"] - worker["from"]
        actor["to"] = worker["to"]
        actor["scenes"] += "boxes" in record
        actor["blocks"] += "block" in record

    def finish(self, record: dict) -> None:
        """Take in a scene whose boxes are written."""
        self.done += 1
        self.pixels += record["pixels"]
        self.boxes.update(record["boxes"])

    def to_json(self) -> str:
        busy = sum(actor["seconds"] for actor in self.actors.values())
        rate = self.pixels / max(self.seconds, 1e-9)
        figures = {"pixels_a_second": round(rate), "actor_seconds": round(busy, 2)}
        return json.dumps({**vars(self), **figures}, indent=2)

    def __str__(self) -> str:
        busy = sum(actor["seconds"] for actor in self.actors.values())
        each = busy / max(1, self.done)
        lines = [f"{count:>9} {name}" for name, count in self.boxes.most_common()]
        lines += [
            f"{self.boxes.total():>9} boxes in {self.done} scene(s)",
            f"{self.scenes} scene(s): {self.done} done, {len(self.failed)} failed, "
            f"{self.skipped} were there already",
            f"{self.pixels / 1e6:.1f} million pixels in {self.seconds:.1f} s, "
            f"{self.pixels / 1e6 / max(self.seconds, 1e-9):.2f} million a second",
            f"{len(self.actors)} actor(s), {busy:.1f} s of work, {each:.2f} a scene",
            *(f"failed: {name}: {reason}" for name, reason in self.failed.items()),
        ]
        return "\n".join([*lines, f"wrote {self.output}"])
