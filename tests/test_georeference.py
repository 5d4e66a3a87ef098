"""Boxes on the map, read back by GDAL (pyogrio) and held against PROJ (pyproj)."""

import json
import re

import geopandas
import numpy as np
import pyproj
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import Affine
from shapely.geometry import shape

from e2e_utils.evaluate import to_coco
from e2e_utils.georeference import (
    COLUMNS,
    PIXELS,
    Georeference,
    read_georeference,
    to_geojson,
    write_boxes,
)
from e2e_utils.map_figure import map_figure

FOUND = {
    "boxes_xyxy": np.array([[10.25, 20.5, 30, 60], [100, 200, 130, 210]], np.float32),
    "labels": np.array([3, 1]),
    "scores": np.array([0.9, 0.5], np.float32),
    "names": ["square", "ship"],
}
NOTHING = {key: value[:0] for key, value in FOUND.items()}
UTM = Affine(0.3, 0, 500_000, 0, -0.3, 4_000_000)
TURNED = Affine(0.26, -0.15, 500_000, -0.15, -0.26, 4_000_000)
TOGETHER = (".geojson", ".gpkg", ".parquet")


def placed(transform=UTM, crs=32616, found=FOUND):
    return {**found, "georeference": Georeference(CRS.from_epsg(crs), transform)}


def corners(box) -> np.ndarray:
    x1, y1, x2, y2 = box.tolist()
    return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])


def on_map(transform, box) -> np.ndarray:
    matrix = np.array(transform).reshape(3, 3)
    return corners(box) @ matrix[:2, :2].T + matrix[:2, 2]


def read(path) -> geopandas.GeoDataFrame:
    if path.suffix == ".parquet":
        return geopandas.read_parquet(path)
    return geopandas.read_file(path)


def scene(path, transform=None, crs=None, **options):
    kind = {"width": 50, "height": 40, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", crs=crs, transform=transform, **kind, **options):
        return path


def same_corners(polygon, expected, tolerance):
    ring = np.array(polygon.exterior.coords)
    assert polygon.exterior.is_ccw and (ring[0] == ring[-1]).all() and len(ring) == 5
    distance = np.abs(ring[:-1, None] - expected[None]).max(axis=2)
    assert distance.min(axis=0).max() < tolerance


# ---- the files


@pytest.mark.parametrize("ending", TOGETHER)
@pytest.mark.parametrize(
    "transform, crs",
    [(UTM, 32616), (TURNED, 32616), (Affine(2e-6, 0, 9, 0, -2e-6, 50), 4326)],
)
def test_boxes_lie_in_degrees_where_proj_puts_them(tmp_path, ending, transform, crs):
    (path,) = write_boxes(
        tmp_path / f"boxes{ending}", {"a/5.tif": placed(transform, crs)}
    )
    frame = read(path)
    assert frame.crs.to_epsg() == 4326
    assert frame.columns.tolist() == [*COLUMNS, "geometry"]
    row = ["a/5.tif", "square", 3, 0.9, 10.25, 20.5, 30, 60]
    assert frame.drop(columns="geometry").iloc[0].tolist() == row
    degrees = pyproj.Transformer.from_crs(crs, 4326, always_xy=True)
    for polygon, box in zip(frame.geometry, FOUND["boxes_xyxy"], strict=True):
        x, y = on_map(transform, box).T
        same_corners(polygon, np.stack(degrees.transform(x, y), 1), 2e-8)
    if ending == ".geojson":  # RFC 7946 knows no other CRS
        assert set(json.loads(path.read_text())) == {"type", "features"}


def test_rings_run_counterclockwise_also_where_axes_point_south_and_west():
    for crs, east, north in ((5513, 1_058_147, 703_011), (32733, 5e5, 8e6)):
        transform = Affine(0.3, 0, east, 0, -0.3, north)
        for feature in to_geojson(placed(transform, crs))["features"]:
            assert shape(feature["geometry"]).exterior.is_ccw


@pytest.mark.parametrize("crs, west", [(32660, 833_900), (4326, 200), (4326, -190)])
def test_no_box_spans_the_earth_at_longitude_180(crs, west):
    step = 0.3 if crs == 32660 else 3e-6
    boxes = np.array([[0, 0, 10, 10], [0, 0, 800, 10]], np.float32)
    found = placed(Affine(step, 0, west, 0, -step, 0), crs) | {"boxes_xyxy": boxes}
    shapes = [shape(f["geometry"]) for f in to_geojson(found)["features"]]
    parts = [part for one in shapes for part in getattr(one, "geoms", [one])]
    assert len(parts) == (3 if crs == 32660 else 2)
    for west, south, east, north in (part.bounds for part in parts):
        assert -180 <= west < east <= 180 and east - west < 0.01 > north - south


def test_a_file_for_each_scene_is_in_its_own_crs(tmp_path):
    scenes = {"a/5.tif": placed(TURNED), "b/5.tif": placed(crs=32617)}
    for ending in (".gpkg", ".parquet"):
        paths = write_boxes(tmp_path / f"{{scene}}{ending}", scenes)
        assert paths == [tmp_path / f"{name}/5{ending}" for name in "ab"]
        frames = [read(path) for path in paths]
        assert [frame.crs.to_epsg() for frame in frames] == [32616, 32617]
        xy = on_map(TURNED, FOUND["boxes_xyxy"][0])
        same_corners(frames[0].geometry[0], xy, 1e-6)
    for path in write_boxes(tmp_path / "{scene}.geojson", scenes):
        assert read(path).crs.to_epsg() == 4326
    mixed = {"5.tif": placed(), "6.png": FOUND}  # a file each holds no two kinds
    frames = [read(path) for path in write_boxes(tmp_path / "{scene}.gpkg", mixed)]
    assert [f.crs.type_name for f in frames] == ["Projected CRS", "Engineering CRS"]


@pytest.mark.parametrize("ending", TOGETHER)
def test_boxes_without_georeference_are_in_pixels_and_no_reader_takes_them_for_degrees(
    tmp_path, ending
):
    (path,) = write_boxes(tmp_path / f"boxes{ending}", {"5.png": FOUND})
    frame = read(path)
    assert frame.crs.type_name == "Engineering CRS" and "pixels" in frame.crs.name
    same_corners(frame.geometry[0], corners(FOUND["boxes_xyxy"][0]), 1e-6)
    if ending == ".geojson":
        content = json.loads(path.read_text())
        assert content["unit"] == "pixel"
        assert content["crs"]["properties"]["name"] == PIXELS


@pytest.mark.parametrize("ending", TOGETHER)
def test_nothing_found_is_a_file_with_all_columns_and_no_row(tmp_path, ending):
    (path,) = write_boxes(tmp_path / f"n{ending}", {"5.tif": placed(found=NOTHING)})
    frame = read(path)
    assert len(frame) == 0 and frame.crs.to_epsg() == 4326
    if ending != ".geojson":
        assert frame.columns.tolist() == [*COLUMNS, "geometry"]
        assert [str(frame.dtypes[name]) for name in ("score", "class_id")] == [
            "float64",
            "int64",
        ]


@pytest.mark.parametrize("ids", [None, [10, 20, 30]])
def test_coco_results_are_those_of_evaluate_with_the_scenes_names(tmp_path, ids):
    scenes = {"a/5.tif": placed(), "b/5.png": FOUND}  # pixels, so they may be mixed
    (path,) = write_boxes(tmp_path / "boxes.json", scenes, ids)
    rows = json.loads(path.read_text())
    assert [row.pop("file_name") for row in rows] == ["a/5.tif"] * 2 + ["b/5.png"] * 2
    expected = to_coco(1, FOUND, ids) + to_coco(2, FOUND, ids)
    for row, wanted in zip(rows, expected, strict=True):
        assert row["bbox"] == pytest.approx(wanted.pop("bbox"), abs=1e-3)
        assert row["score"] == pytest.approx(wanted.pop("score"), abs=1e-6)
        assert wanted.items() <= row.items()


@pytest.mark.parametrize(
    "name, scenes, reason",
    [
        (
            "b.shp",
            {"5.tif": FOUND},
            r"b\.shp: no ending '.shp'; valid: .geojson .*gpkg",
        ),
        ("b.gpkg", {}, "b.gpkg: there is no scene"),
        (
            "b.gpkg",
            {"5.tif": placed(), "6.png": FOUND},
            "6.png has none, 5.tif has one",
        ),
        (
            "{scene}.gpkg",
            {"5.tif": FOUND, "5.png": FOUND},
            "5.tif and 5.png would both",
        ),
        ("b.gpkg", {"5.tif": {**FOUND, "names": ["ship"]}}, "zip"),
    ],
)
def test_what_cannot_be_written_is_refused_and_the_old_file_stays(
    tmp_path, name, scenes, reason
):
    (tmp_path / name).write_text("old")
    with pytest.raises(ValueError, match=reason):
        write_boxes(tmp_path / name, scenes)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    without = {key: value for key, value in FOUND.items() if key != "names"}
    with pytest.raises(ValueError, match="give predict_scene class_names"):
        to_geojson(without)


# ---- the georeference of a scene


def test_a_georeference_comes_from_the_file_or_its_bytes(tmp_path):
    path = scene(tmp_path / "a.tif", TURNED, "EPSG:32616")
    for source in (path, str(path), path.read_bytes()):
        crs, transform = read_georeference(source)
        assert crs.to_epsg() == 32616 and transform.almost_equals(TURNED, 1e-9)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_file_that_tells_no_place_on_earth_has_none(tmp_path):
    points = [GroundControlPoint(r, c, c, r) for r, c in ((0, 0), (0, 9), (9, 0))]
    local = CRS.from_wkt('LOCAL_CS["site",UNIT["metre",1]]')
    for name, options in {
        "plain.tif": {},
        "plain.png": {},
        "no_crs.tif": {"transform": UTM},
        "no_transform.tif": {"crs": "EPSG:32616"},
        "points.tif": {"crs": "EPSG:4326", "gcps": points},
        "site.tif": {"crs": local, "transform": UTM},
    }.items():
        assert read_georeference(scene(tmp_path / name, **options)) is None, name


def test_what_is_no_picture_or_no_place_on_earth_is_named(tmp_path):
    metres = scene(tmp_path / "metres.tif", UTM, "EPSG:4326")  # as a wrong -a_srs does
    with pytest.raises(
        ValueError, match=r"metres.tif: its transform \(0.3, .*EPSG:4326"
    ):
        read_georeference(metres)
    far = scene(tmp_path / "far.tif", Affine(1, 0, 1e9, 0, -1, 4e12), "EPSG:32616")
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"II*\0 and then nothing")
    notes = tmp_path / "notes.tif"
    notes.write_text("no picture")
    for path in (far, broken, notes):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_georeference(path)
    with pytest.raises(FileNotFoundError, match="nowhere.tif"):
        read_georeference(tmp_path / "nowhere.tif")


# ---- the picture


def test_a_picture_on_the_map_has_its_pixels_where_the_scene_lies():
    image = np.zeros((40, 60, 3), np.uint8)  # twice the pixels of the scene
    for transform, crs, unit in (
        (TURNED, 32616, "metre, EPSG:32616"),
        (Affine(2e-6, 0, 9, 0, -2e-6, 50), 4326, "degrees"),
    ):
        place = Georeference(CRS.from_epsg(crs), transform)
        (axis,) = map_figure(image, place, scale=2).axes
        to_data = axis.images[0].get_transform() - axis.transData
        for column, row in ((0, 0), (60, 0), (60, 40), (13, 7)):
            xy = place.xy(column / 2, row / 2)
            assert to_data.transform((column, row)) == pytest.approx(xy, rel=1e-12)
            assert axis.get_xlim()[0] <= xy[0] <= axis.get_xlim()[1]
            assert axis.get_ylim()[0] <= xy[1] <= axis.get_ylim()[1]
        assert unit in axis.get_xlabel() and unit in axis.get_ylabel()
