"""Where a scene lies on Earth, and files of boxes for the map.

Copy: this file, scenes.py, images.py, stretch.py and files.py.

The boxes of a scene with a georeference are polygons in longitude and latitude, or in
the scene's own CRS. Those of another scene stay in pixels, and every file says so: its
CRS is `PIXELS`, an engineering CRS, which GDAL and QGIS take for no place on Earth.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rasterio import warp
from rasterio.crs import CRS
from rasterio.transform import Affine

from .files import write_file
from .scenes import Scene, open_scene

WGS84 = "EPSG:4326"
PIXELS = (
    'ENGCRS["pixels of the scene",EDATUM["upper left corner"],CS[Cartesian,2],'
    'AXIS["column",east],AXIS["row",south],LENGTHUNIT["pixel",1]]'
)
FORMATS = {
    ".geojson": "GeoJSON",
    ".gpkg": "GeoPackage",
    ".parquet": "GeoParquet",
    ".json": "COCO results, in pixels",
}
COLUMNS = {"scene": "string", "class_name": "string", "class_id": "int64"}
COLUMNS |= dict.fromkeys(("score", "x1", "y1", "x2", "y2"), "float64")


class Georeference(NamedTuple):
    """Where a scene lies: x, y of `crs` are `transform` * (column, row).

    Column 0, row 0 is the upper left corner of the first pixel. `transform` is
    (a, b, c, d, e, f): x = a * column + b * row + c, y = d * column + e * row + f.
    """

    crs: CRS
    transform: Affine

    def xy(self, column: Any, row: Any) -> tuple[Any, Any]:
        """x and y of places in pixels, numbers or arrays."""
        a, b, c, d, e, f = self.transform[:6]
        return a * column + b * row + c, d * column + e * row + f


def read_georeference(source: str | Path | bytes) -> Georeference | None:
    """`georeference_of` a file, of the bytes of one, or of a URL; see `open_scene`.

    Example:
        >>> import cv2
        >>> png = cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes()
        >>> read_georeference(png) is None  # it says nothing of its place
        True
    """
    with open_scene(source) as scene:
        return georeference_of(scene)


def georeference_of(scene: Scene) -> Georeference | None:
    """What an open scene tells of its place, checked.

    Returns:
        None without a CRS on Earth, or without a transform. Ground control points and
        RPCs are no transform: `gdalwarp` makes one of them.

    Raises:
        ValueError: a corner of the scene is no place on Earth; the message names it.

    Example:
        >>> at = Affine(0.3, 0, 404211, 0, -0.3, 3285142)  # pixels of 0.3 m
        >>> lies = {"crs": CRS.from_epsg(32616), "transform": at}
        >>> place = georeference_of(Scene("5.tif", 300, 300, "uint8", None, 0, **lies))
        >>> place.xy(0, 0)
        (404211.0, 3285142.0)
    """
    crs, transform = scene.crs, scene.transform
    if crs is None or not (crs.is_geographic or crs.is_projected) or transform is None:
        return None
    place, corners = (
        Georeference(crs, transform),
        np.array([[0, 1, 0, 1], [0, 0, 1, 1]]),
    )
    x, y = place.xy(corners[0] * scene.width, corners[1] * scene.height)
    try:
        lon, lat = np.array(warp.transform(crs, WGS84, x, y))
    except Exception:  # GDAL raises many kinds: outside of the projection, above all
        lon = lat = np.array(np.inf)
    if transform.is_degenerate or not (abs(lon) <= 540).all() & (abs(lat) <= 90).all():
        raise ValueError(
            f"{scene.name}: its transform {tuple(transform)[:6]} in {crs} is no place "
            "on Earth; write the right one with gdal_edit, or none (-unsetgt)"
        )
    return place


def _rows(found: dict, scene: str | None) -> list[dict]:
    """The properties of each box; those of `COLUMNS`."""
    if "names" not in found:
        raise ValueError("the boxes have no names: give predict_scene class_names")
    names, labels = found["names"], found["labels"].tolist()
    scores = np.asarray(found["scores"], float).round(6).tolist()
    boxes = np.asarray(found["boxes_xyxy"], float).round(3).tolist()
    columns = zip(names, labels, scores, boxes, strict=True)
    rows = [(scene, name, label, score, *box) for name, label, score, box in columns]
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def _geometries(found: dict, own_crs: bool = False) -> list[dict]:
    """A GeoJSON polygon for each box, its exterior ring counterclockwise."""
    boxes = np.asarray(found["boxes_xyxy"], float).reshape(-1, 4)
    rings = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3, 0, 1]].reshape(-1, 5, 2)
    georeference = found.get("georeference")
    if georeference is not None:
        rings = np.stack(georeference.xy(rings[..., 0], rings[..., 1]), axis=2)
        if georeference.crs.is_geographic and not own_crs:  # some count to 360
            rings[..., 0] -= 360 * np.round(rings[:, :1, 0] / 360)
    polygons = [{"type": "Polygon", "coordinates": [ring]} for ring in rings.tolist()]
    if georeference is not None and not own_crs and polygons:
        # cuts a box in two at longitude 180; 8 decimals are a millimetre
        polygons = warp.transform_geom(georeference.crs, WGS84, polygons, precision=8)
    for polygon in polygons:
        parts: Any = polygon["coordinates"]
        for part in [parts] if polygon["type"] == "Polygon" else parts:
            part[0] = _counterclockwise(part[0])
    return polygons


def _counterclockwise(ring: list) -> list:
    x, y = (np.array(ring) - ring[0]).T
    return ring if x[:-1] @ y[1:] > x[1:] @ y[:-1] else ring[::-1]


def to_geojson(found: dict, scene: str | None = None) -> dict:
    """Boxes as a GeoJSON FeatureCollection (RFC 7946).

    Args:
        found: from `predict_scene` with `class_names`.
        scene: its name, for the property "scene".

    Returns:
        {"type": "FeatureCollection", "features": [...]}, polygons in longitude and
        latitude if found["georeference"] is there. Otherwise they are in pixels, y
        downwards, which the members "unit": "pixel" and "crs" (`PIXELS`) say.
        Properties of a feature: "scene", "class_name", "class_id" (the label, 1..C),
        "score" (0..1), and the box in pixels, "x1", "y1", "x2", "y2".

    Example:
        >>> box = {"boxes_xyxy": [[1, 2, 14, 15]], "names": ["car"]}
        >>> found = {**box, "labels": np.array([1]), "scores": [0.9]}
        >>> content = to_geojson(found, "5.tif")
        >>> content["unit"], content["features"][0]["geometry"]["coordinates"][0]
        ('pixel', [[1.0, 2.0], [14.0, 2.0], [14.0, 15.0], [1.0, 15.0], [1.0, 2.0]])
    """
    rows, polygons = _rows(found, scene), _geometries(found)
    features = [
        {"type": "Feature", "properties": row, "geometry": polygon}
        for row, polygon in zip(rows, polygons, strict=True)
    ]
    content: dict = {"type": "FeatureCollection"}
    if found.get("georeference") is None:
        content["unit"] = "pixel"
        content["crs"] = {"type": "name", "properties": {"name": PIXELS}}
    return {**content, "features": features}


def output_files(path: str | Path, places: dict[str, Georeference | None]) -> dict:
    """Which files `write_boxes` will write, and with which scenes.

    Args:
        path: as there.
        places: {scene: its georeference}.

    Returns:
        {file: [scenes]}.

    Raises:
        ValueError: no scene, another ending than those of `FORMATS`, scenes with and
            without georeference in one file, or two scenes with one {scene}.

    Example:
        >>> files = output_files("boxes/{scene}.gpkg", {"1.tif": None, "2.tif": None})
        >>> [(file.as_posix(), scenes) for file, scenes in files.items()]
        [('boxes/1.gpkg', ['1.tif']), ('boxes/2.gpkg', ['2.tif'])]
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        valid = ", ".join(f"{ending} ({what})" for ending, what in FORMATS.items())
        raise ValueError(f"output {path}: no ending {path.suffix!r}; valid: {valid}")
    if not places:
        raise ValueError(f"output {path}: there is no scene")
    files: dict[Path, list[str]] = {}
    for name in places:
        stem = Path(name).with_suffix("").as_posix()
        files.setdefault(Path(str(path).replace("{scene}", stem)), []).append(name)
    if "{scene}" in str(path) and len(files) < len(places):
        file, names = max(files.items(), key=lambda item: len(item[1]))
        raise ValueError(f"{' and '.join(names)} would both be {file}")
    without = [name for name, place in places.items() if place is None]
    together = path.suffix != ".json" and len(files) == 1
    if together and 0 < len(without) < len(places):
        placed = next(name for name, place in places.items() if place is not None)
        raise ValueError(
            f"{len(without)} of {len(places)} scenes have no georeference: {without[0]}"
            f" has none, {placed} has one; put {{scene}} into the output for a file "
            "each, or take .json (pixels)"
        )
    return files


def write_boxes(
    path: str | Path, scenes: dict[str, dict], category_ids: Sequence[int] | None = None
) -> list[Path]:
    """Write the boxes of scenes to a file that appears whole or not at all.

    Args:
        path: its ending tells the format, see `FORMATS`. All scenes go into one file,
            in longitude and latitude (EPSG:4326). With {scene} in the path each has a
            file of its own, GeoPackage and GeoParquet in the CRS of the scene.
        scenes: {name: from `predict_scene` with `class_names`}. Without georeference
            their boxes are in pixels, and the file's CRS says so (`PIXELS`).
        category_ids: COCO id of label 1, 2, ...; the label minus one by default, as
            `evaluate.to_coco` has it.

    Returns:
        The files. GeoPackage (layer "boxes") and GeoParquet have the columns of
        `to_geojson`'s properties. COCO results are [{"image_id", "category_id",
        "bbox" (xywh, pixels), "score", "file_name"}]; image ids count from 1.

    Raises:
        ValueError: see `output_files`, or boxes without names.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> box = {"boxes_xyxy": [[1, 2, 14, 15]], "names": ["car"]}
        >>> found = {**box, "labels": np.array([1]), "scores": [0.9]}
        >>> with TemporaryDirectory() as folder:
        ...     (file,) = write_boxes(f"{folder}/boxes.json", {"5.tif": found})
        ...     json.loads(file.read_text())[0]["bbox"]
        [1.0, 2.0, 13.0, 13.0]
    """
    places = {name: found.get("georeference") for name, found in scenes.items()}
    files, own_crs = output_files(path, places), "{scene}" in str(path)
    contents: dict[Path, bytes] = {}
    for file, names in files.items():
        some = {name: scenes[name] for name in names}
        if file.suffix == ".json":
            contents[file] = json.dumps(_coco_results(some, category_ids)).encode()
        else:
            contents[file] = _map(file.suffix, some, own_crs)
    for file, content in contents.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, [content])
    return list(files)


def _map(ending: str, scenes: dict[str, dict], own_crs: bool) -> bytes:
    """The bytes of a GeoJSON, GeoPackage or GeoParquet file."""
    if ending == ".geojson":
        parts = [to_geojson(found, name) for name, found in scenes.items()]
        features = [feature for part in parts for feature in part["features"]]
        return json.dumps({**parts[0], "features": features}).encode()
    import geopandas  # here, because a server writes no files
    import pandas
    from shapely.geometry import shape

    rows: list[dict] = []
    geometry: list = []
    crs = WGS84
    for name, found in scenes.items():
        rows += _rows(found, name)
        geometry += map(shape, _geometries(found, own_crs))
        if (georeference := found.get("georeference")) is None:
            crs = PIXELS
        elif own_crs:
            crs = georeference.crs.to_wkt()
    table = pandas.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    frame = geopandas.GeoDataFrame(table, geometry=geometry, crs=crs)
    buffer = io.BytesIO()
    if ending == ".gpkg":
        frame.to_file(buffer, driver="GPKG", engine="pyogrio", layer="boxes")
    else:
        frame.to_parquet(buffer)
    return buffer.getvalue()


def _coco_results(
    scenes: dict[str, dict], category_ids: Sequence[int] | None
) -> list[dict]:
    results = []
    for image_id, (name, found) in enumerate(scenes.items(), 1):
        for row in _rows(found, name):
            x1, y1, x2, y2 = (row[side] for side in ("x1", "y1", "x2", "y2"))
            index = row["class_id"] - 1
            category_id = index if category_ids is None else category_ids[index]
            result: dict = {"image_id": image_id, "category_id": category_id}
            result["bbox"] = [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)]
            results.append({**result, "score": row["score"], "file_name": name})
    return results
