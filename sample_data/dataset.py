"""Draw a small data set in the shape of xView, to run the road without xView.

Copy: the folder sample_data.

This is drawn, it is not xView: no pixel and no label comes from xView, whose licence
does not allow passing it on. It has xView's files, fields, class ids and defects, so
that whatever reads it reads the real one too. A score on it says that the road works,
and nothing about real satellite imagery.

    python -m sample_data --output_dir DIR --scenes 12 --seed 0
"""

import argparse
import hashlib
import json
import math
import os
import struct
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import Affine
from tqdm.auto import tqdm

from . import scene

GEOJSON = "xView_train.geojson"
STAMP = ".sample.json"
MISSING_IMAGE = "1395.tif"  # the real file labels this scene and does not ship it
METRES_PER_PIXEL = 0.3
METRES_PER_DEGREE = 111_320.0
INGEST_TIME = "2017/07/24 12:49:09.118+00"
CRS = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}


def draw_dataset(
    output_dir: str | Path, scenes: int = 12, seed: int = 0, haze: float = 0.0
) -> Path:
    """Draw `scenes` scenes and their labels into `output_dir`; return its path.

    Writes `train_images/<number>.tif` (GeoTIFF in EPSG:4326, uint8 RGB, uncompressed,
    1,000 to 1,400 px a side, about 4.5 MB each, 0.3 m a pixel) and
    `xView_train.geojson`, whose features have the properties of the real file.
    `bounds_imcoords` is "x1,y1,x2,y2" in whole pixels: the box of the object without
    its shadow. The polygon is the same box in longitude and latitude, by the transform
    of its scene.

    The defects of the real file are there too: each labelled scene has one label with
    type_id 75, one with 82, one box wholly outside, one of zero area and one empty
    `bounds_imcoords`, and boxes that overhang its border; three labels are for
    `1395.tif`, which does not exist; the first scene has a `._<number>.tif` beside it;
    scene 4 of each dozen has no labels.

    `haze`, 0 to 0.6, veils all of them by so much more: a city under another sky.
    A scene depends on its place in the series, `seed` and `haze`, not on `scenes`.
    The same arguments give the same bytes with the same versions of numpy, opencv and
    rasterio. Files appear whole or not at all; a folder that is complete already is
    left as it is.

    Raises ValueError for an argument out of range, FileExistsError if the folder
    holds a data set that was not drawn here, OSError if it cannot be written.
    """
    if scenes < 1:
        raise ValueError(f"scenes must be 1 or more, not {scenes}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")
    if not 0 <= haze <= 0.6:
        raise ValueError(f"haze must be 0 to 0.6, not {haze}")
    root = Path(output_dir)
    try:
        _draw(root, scenes, seed, haze)
    except FileExistsError as error:
        if error.errno is None:
            raise
        raise NotADirectoryError(f"output_dir {root} is not a folder") from error
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write to output_dir {root}: {reason}") from error
    return root


def scene_number(index: int) -> int:
    """The number in the file name of scene `index`: ascending, with gaps."""
    return 5 + 97 * index + (37 * index * index) % 61


def scene_features(
    index: int, seed: int, objects: list[tuple], height: int, width: int
) -> list:
    """GeoJSON features of one scene: its objects, then this scene's defects.

    `objects`: (type_id, x1, y1, x2, y2) in pixels.
    """
    if not objects:
        return []
    rng = np.random.default_rng(np.random.SeedSequence((seed, 3, index)))
    rows: list[tuple] = [(type_id, box) for type_id, *box in objects]
    for type_id in (75, 82):
        x, y = (int(rng.integers(60, side - 60)) for side in (width, height))
        rows.append((type_id, [x, y, x + 24, y + 18]))
    x, y = (int(rng.integers(60, side - 60)) for side in (width, height))
    rows.append((73, [width + 12, y, width + 48, y + 30]))
    rows.append((18, [x, y, x, y + 14]))
    rows.append((18, None))
    image = f"{scene_number(index)}.tif"
    return [_feature(index, seed, i, image, *row) for i, row in enumerate(rows)]


def _draw(root: Path, scenes: int, seed: int, haze: float) -> None:
    images = root / "train_images"
    root.mkdir(parents=True, exist_ok=True)
    names = [f"train_images/{scene_number(i)}.tif" for i in range(scenes)]
    names += [f"train_images/._{scene_number(0)}.tif", GEOJSON]
    stamp = {"scenes": scenes, "seed": seed, "haze": haze, "made_with": _made_with()}
    old = _read_stamp(root)
    if old is None and ((root / GEOJSON).exists() or _has_files(images)):
        raise FileExistsError(
            f"{root} holds a data set that was not drawn by this program; "
            "give another output_dir"
        )
    files = (old or {}).get("files", {})
    sizes = {n: (root / n).stat().st_size for n in names if (root / n).is_file()}
    if old == {**stamp, "files": files} and sizes == files and len(sizes) == len(names):
        return
    images.mkdir(exist_ok=True)
    # From here on the folder is ours, and not complete: no sizes yet.
    everything = {**dict.fromkeys(files), **dict.fromkeys(names)}
    _write(root, STAMP, _dump({"files": everything}))
    features = []
    for index, name in enumerate(tqdm(names[:scenes], "Drawing", unit="scene")):
        image, objects = scene.draw_scene(index, seed, haze)
        _write(root, name, (image, place(index, seed)[1]))
        features += scene_features(index, seed, objects, *image.shape[:2])
    for i in range(3):
        box = [300 + 40 * i, 420, 316 + 40 * i, 428]
        features.append(_feature(scenes, seed, i, MISSING_IMAGE, 18, box))
    _write(root, names[-2], _apple_double())
    _write(root, GEOJSON, _collection(features))
    for name in set(files) - set(names):
        (root / name).unlink(missing_ok=True)
    sizes = {name: (root / name).stat().st_size for name in names}
    _write(root, STAMP, _dump({**stamp, "files": sizes}))


def place(index: int, seed: int) -> tuple[str, Affine]:
    """The pass that a scene was cut from (`cat_id`), and where it lies.

    The transform takes (column, row) to (longitude, latitude). Scenes of one pass lie
    side by side.
    """
    strip = scene.strip_of(index)
    rng = np.random.default_rng(np.random.SeedSequence((seed, 4, strip)))
    lon, lat = rng.uniform(-100, 100), rng.uniform(-40, 55)
    step = METRES_PER_PIXEL / METRES_PER_DEGREE
    along = step / math.cos(math.radians(lat))
    west = lon + 1600 * index * along
    cat_id = f"1040010{int(rng.integers(16**9)):09X}"
    return cat_id, Affine(along, 0, west, 0, -step, lat)


def _feature(
    index: int, seed: int, number: int, image: str, type_id: int, box: list | None
) -> dict:
    cat_id, transform = place(index, seed)

    def lonlat(x: float, y: float) -> list[float]:
        lon = transform.c + x * transform.a
        return [round(lon, 9), round(transform.f + y * transform.e, 9)]

    x1, y1, x2, y2 = box or (100, 100, 115, 107)
    ring = [(x1, y2), (x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    middle = struct.pack(
        "<BIIdd", 1, 0x20000001, 4326, *lonlat((x1 + x2) / 2, (y1 + y2) / 2)
    )
    properties = {
        "bounds_imcoords": ",".join(map(str, box)) if box else "",
        "edited_by": "drawn",
        "cat_id": cat_id,
        "type_id": type_id,
        "ingest_time": INGEST_TIME,
        "index_right": int(image[:-4]) + 1,
        "image_id": image,
        "point_geom": middle.hex().upper(),
        "feature_id": 1000 + 5000 * index + number,
        "grid_file": f"Grid{1 + scene.strip_of(index) % 2}.shp",
    }
    geometry = {"type": "Polygon", "coordinates": [[lonlat(*p) for p in ring]]}
    return {"type": "Feature", "properties": properties, "geometry": geometry}


def _collection(features: list[dict]) -> bytes:
    lines = ",\n".join(json.dumps(f) for f in features)
    head = f'{{"type": "FeatureCollection", "crs": {json.dumps(CRS)}, "features": [\n'
    return (head + lines + "\n]}\n").encode()


def _apple_double() -> bytes:
    """What macOS leaves beside a copied file: its Finder info, and no image."""
    header = struct.pack(">II16sH", 0x00051607, 0x00020000, b"Mac OS X".ljust(16), 1)
    return header + struct.pack(">III", 9, 38, 32) + bytes(32)


def _made_with() -> dict[str, str]:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    code = b"".join(path.read_bytes() for path in sources)
    libraries = {n: version(n) for n in ("numpy", "opencv-python-headless", "rasterio")}
    return {"code": hashlib.sha256(code).hexdigest()[:16], **libraries}


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _read_stamp(root: Path) -> dict | None:
    path = root / STAMP
    return json.loads(path.read_text()) if path.is_file() else None


def _dump(value: dict) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _write(root: Path, name: str, content: bytes | tuple[np.ndarray, Affine]) -> None:
    """Write bytes, or a scene and its place, beside its path; then rename it there."""
    partial = root / f".part.{Path(name).name}"
    if isinstance(content, bytes):
        partial.write_bytes(content)
    else:
        pixels, transform = content
        height, width, bands = pixels.shape
        kind = {"driver": "GTiff", "dtype": "uint8", "count": bands}
        kind |= {"interleave": "pixel", "photometric": "rgb"}
        where = {"crs": "EPSG:4326", "transform": transform}
        size = {"height": height, "width": width}
        with rasterio.open(partial, "w", **kind, **size, **where) as file:
            file.write(np.moveaxis(pixels, 2, 0))
    os.replace(partial, root / name)


def main(argv: list[str] | None = None) -> int:
    """Command line: draw, then say what was drawn."""
    parser = argparse.ArgumentParser(
        prog="python -m sample_data",
        description="Draw a small data set in the shape of xView. It is not xView.",
    )
    parser.add_argument("--output_dir", required=True, help="folder to write to")
    parser.add_argument("--scenes", type=int, default=12, help="how many scenes")
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed, other scenes"
    )
    parser.add_argument("--haze", type=float, default=0.0, help="more haze, 0 to 0.6")
    arguments = parser.parse_args(argv)
    try:
        root = draw_dataset(**vars(arguments))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files = json.loads((root / STAMP).read_text())["files"]
    labels = len((root / GEOJSON).read_text().splitlines()) - 2
    size = sum(files.values()) / 1e6
    print(f"{root}: {arguments.scenes} scenes, {labels} labels, {size:.0f} MB")
    print("Drawn, not photographed, and none of it is xView: it has xView's files,")
    print("fields, class ids and defects. Scores on it say nothing of real imagery.")
    return 0
