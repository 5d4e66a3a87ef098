"""The one door to pixels: foreign TIFFs, PNGs and JPEGs by one rule each."""

import io
import json
import socket
import struct
from pathlib import Path

import boto3
import cv2
import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image
from ts.utils.util import PredictionException

from e2e_utils.data import CocoTiles
from e2e_utils.scenes import open_scene, read_rgb, read_size
from e2e_utils.stretch import Stretch, as_stretch, read_stretch
from kserve_utils.predictor.pictures import decode
from kserve_utils.predictor.refusal import Refusal
from kserve_utils.torchserve_utils.fasterrcnn_handler import FasterRCNNHandler

PIXELS = cv2.blur(
    np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8), (3, 3)
)


def write(path: Path, bands: np.ndarray, **options) -> Path:
    """(H, W, bands) by GDAL, tiled and compressed unless told otherwise."""
    options = {"compress": "deflate", "tiled": True, "blockxsize": 32, **options}
    options.setdefault("blockysize", 32)
    height, width, count = bands.shape
    size = {"height": height, "width": width, "count": count, "dtype": bands.dtype}
    with rasterio.open(path, "w", driver="GTiff", **size, **options) as file:
        file.write(bands.transpose(2, 0, 1))
    return path


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compress": "lzw", "predictor": 2},
        {"compress": "zstd", "interleave": "band"},
        {"compress": "webp", "webp_lossless": True},
        {"compress": "jpeg", "photometric": "ycbcr", "jpeg_quality": 95},
        {"bigtiff": "yes"},
        {"tiled": False, "compress": None},
        {"driver": "COG"},
    ],
    ids=str,
)
def test_a_tiff_reads_as_gdal_reads_it_whole_by_windows_and_from_memory(
    tmp_path, options
):
    path = tmp_path / "a.tif"
    if options == {"driver": "COG"}:
        size = {"height": 900, "width": 700, "count": 3, "dtype": "uint8"}
        with rasterio.open(path, "w", driver="COG", **size) as file:
            file.write(cv2.resize(PIXELS, (700, 900)).transpose(2, 0, 1))
        with rasterio.open(path) as file:
            assert file.overviews(1)  # which are left alone
    else:
        write(path, PIXELS, **options)
    with rasterio.open(path) as file:
        wanted = file.read().transpose(1, 2, 0)
    assert read_size(path) == wanted.shape[:2]
    for source in (path, path.read_bytes()):
        assert np.array_equal(read_rgb(source), wanted)
        with open_scene(source) as scene:
            boxes = [[0, 0, 50, 40], [20, 0, 70, 40], [0, 30, 70, 90]]
            for (x1, y1, x2, y2), tile in zip(boxes, scene.tiles(boxes), strict=True):
                assert np.array_equal(tile, wanted[y1:y2, x1:x2])


GREY = PIXELS[..., 0]
CMYK = np.dstack([PIXELS, GREY // 3])


def as_rgb(mode: str, stored: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(stored, mode).convert("RGB"))


@pytest.mark.parametrize(
    ("stored", "options", "wanted"),
    [
        (GREY, {"photometric": "minisblack"}, np.dstack([GREY] * 3)),
        (GREY, {"photometric": "miniswhite"}, np.dstack([255 - GREY] * 3)),
        (GREY > 99, {"photometric": "minisblack"}, np.dstack([GREY > 99] * 3) * 255),
        (PIXELS, {"photometric": "minisblack", "planarconfig": "contig"}, PIXELS),
        (CMYK, {"photometric": "separated"}, as_rgb("CMYK", 255 - (255 - CMYK))),
        (PIXELS, {"photometric": "ycbcr"}, as_rgb("YCbCr", PIXELS)),
        (
            GREY,
            {
                "photometric": "palette",
                "colormap": np.tile(np.arange(256) * 257, (3, 1)),
            },
            np.dstack([GREY] * 3),
        ),
        (
            np.dstack([PIXELS, GREY]),
            {"photometric": "rgb", "extrasamples": ["unassalpha"]},
            PIXELS,
        ),
    ],
    ids=[
        "grey",
        "white is 0",
        "1 bit",
        "3 grey",
        "CMYK",
        "YCbCr",
        "palette",
        "alpha",
    ],
)
def test_colours_are_converted_by_the_photometric_interpretation(
    tmp_path, stored, options, wanted
):
    path = tmp_path / "a.tif"
    if "colormap" in options:
        options = {**options, "colormap": options["colormap"].astype(np.uint16)}
    tifffile.imwrite(path, stored, **options)
    assert np.abs(read_rgb(path).astype(int) - wanted).max() <= 1  # of rounding


def test_the_largest_page_is_the_scene_and_not_its_preview(tmp_path):
    for kind in (0, 1):  # the preview said to be one, and not
        path = tmp_path / f"{kind}.tif"
        with tifffile.TiffWriter(path) as tiff:
            for part, subfile in ((PIXELS[:20, :20], kind), (PIXELS, 0)):
                options = {"photometric": "rgb", "metadata": None}
                tiff.write(part, subfiletype=subfile, compression="zlib", **options)
        assert read_size(path) == (90, 70)
        for source in (path, path.read_bytes()):
            assert np.array_equal(read_rgb(source), PIXELS)


def test_parts_that_a_sparse_tiff_lacks_are_zero(tmp_path):
    size = {"height": 64, "width": 96, "count": 3, "dtype": "uint8"}
    options = {"tiled": True, "blockxsize": 32, "blockysize": 32, "sparse_ok": True}
    for name, more in (("a.tif", {}), ("b.tif", {"compress": "lzw"})):
        with rasterio.open(
            tmp_path / name, "w", driver="GTiff", **size, **options, **more
        ) as file:
            file.write(np.full((3, 32, 32), 9, np.uint8), window=((32, 64), (0, 32)))
        pixels = read_rgb(tmp_path / name)
        assert (pixels[32:, :32] == 9).all() and pixels.sum() == 9 * 3 * 32 * 32


def test_bands_are_red_green_and_blue_as_the_file_or_the_caller_says(tmp_path):
    four = np.dstack([PIXELS, GREY])  # blue, green, red, infrared
    path = write(tmp_path / "a.tif", four, photometric="minisblack")
    assert np.array_equal(read_rgb(path), PIXELS)
    assert np.array_equal(read_rgb(path, bands=(3, 2, 1)), PIXELS[..., ::-1])
    with rasterio.open(path, "r+") as file:
        names = ("blue", "green", "red", "undefined")
        file.colorinterp = [rasterio.enums.ColorInterp[name] for name in names]
    assert np.array_equal(read_rgb(path), PIXELS[..., ::-1])
    for wrong in ((1, 2), (0, 1, 2), (3, 4, 5)):
        with pytest.raises(ValueError, match=r"a.tif.*bands are .*three of 1 to 4"):
            read_rgb(path, bands=wrong)
    (tmp_path / "a.png").write_bytes(encode(Image.fromarray(PIXELS), "PNG"))
    with pytest.raises(ValueError, match="a.png.*of a TIFF|a.png.*for a TIFF alone"):
        read_rgb(tmp_path / "a.png", bands=(3, 2, 1))


def test_place_and_nodata_come_with_the_scene(tmp_path):
    place = rasterio.transform.from_origin(500_000, 4_600_000, 0.5, 0.5)
    path = write(
        tmp_path / "a.tif", PIXELS, crs="EPSG:32616", transform=place, nodata=0
    )
    with open_scene(path) as scene:
        assert (scene.crs.to_epsg(), scene.transform, scene.nodata) == (32616, place, 0)
    with open_scene(write(tmp_path / "b.tif", PIXELS)) as scene:
        assert (scene.crs, scene.transform, scene.nodata) == (None, None, None)


# PNG and JPEG

PICTURE = Image.fromarray(PIXELS)
KINDS = {
    f"{kind} {mode}": encode(PICTURE.convert(mode), kind)
    for kind, modes in {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
        "JPEG": ("L", "RGB", "CMYK"),
    }.items()
    for mode in modes
}
KINDS["a JPEG with bytes behind its end"] = KINDS["JPEG RGB"] + bytes(9000)
KINDS["a PNG with bytes behind its end"] = KINDS["PNG RGB"] + b"more"


def by_handler(content: bytes) -> np.ndarray:
    handler = FasterRCNNHandler()
    handler.max_pixels = 10_000
    picture = handler._picture(0, {"body": content})
    return picture.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_png_and_jpeg_have_the_pixels_of_the_torchserve_handler(tmp_path, kind):
    path = tmp_path / "a"
    path.write_bytes(KINDS[kind])
    for source in (path, KINDS[kind]):
        assert np.array_equal(read_rgb(source), by_handler(KINDS[kind]))
    assert read_size(path) == (90, 70)


def turned(kind: str) -> bytes:
    """A picture that its orientation tag turns by a quarter."""
    exif = Image.Exif()
    exif[274] = 6
    if kind == "TIFF":
        return encode(PICTURE, kind, tiffinfo={274: 6})
    content = encode(PICTURE, kind.split()[0], exif=exif)
    if kind == "PNG late":  # behind the pixels, where the standard allows it too
        start = content.index(b"eXIf") - 4
        end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
        chunk, content = content[start:end], content[:start] + content[end:]
        return content[:-12] + chunk + content[-12:]
    return content


def six_teen(kind: str) -> bytes:
    """RGB of 16 bits, which Pillow takes for 8."""
    deep, file = PIXELS.astype(np.uint16) * 257, io.BytesIO()
    if kind == "PNG":
        return cv2.imencode(".png", deep)[1].tobytes()
    tifffile.imwrite(file, deep, photometric="rgb")
    return file.getvalue()


REFUSED = {f"turned {k}": turned(k) for k in ("JPEG", "PNG", "PNG late", "TIFF")}
REFUSED |= {f"16 bits {kind}": six_teen(kind) for kind in ("PNG", "TIFF")}


@pytest.mark.parametrize("kind", REFUSED)
def test_every_reader_refuses_what_is_turned_or_deep(tmp_path, kind):
    reason = "16 bits a channel" if "16" in kind else "orientation tag, 6, rotates it"
    with pytest.raises(PredictionException, match=reason):
        by_handler(REFUSED[kind])
    with pytest.raises(Refusal, match=f"it: .*{reason}"):
        decode(REFUSED[kind], 10_000, "it")
    said = "rotates it; store it upright" if "turned" in kind else "of uint16 where"
    (tmp_path / "a.jpg").write_bytes(REFUSED[kind])
    image = {"id": 1, "file_name": "a.jpg", "height": 90, "width": 70}
    coco = {
        "images": [image],
        "annotations": [],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(coco))
    for read in (
        lambda: read_rgb(tmp_path / "a.jpg"),
        lambda: CocoTiles(tmp_path, tmp_path / "a.json")[0],
    ):
        with pytest.raises(ValueError, match=f"a.jpg.*{said}"):
            read()


# More than 8 bits


def test_a_record_stretches_by_windows_and_other_records_are_named(tmp_path):
    deep = PIXELS.astype(np.uint16) * 10 + 500
    path, record = write(tmp_path / "a.tif", deep), tmp_path / "a.json"
    given = {"bands": [3, 2, 1], "low": [500] * 3, "high": [3050] * 3}
    record.write_text(json.dumps(given))
    with open_scene(path, stretch=record) as scene:
        assert np.array_equal(scene.read(10, 20, 50, 60), PIXELS[20:60, 10:50, ::-1])
    for wrong in (
        {**given, "low": [500] * 2},
        {**given, "low": [5000] * 3},
        {**given, "gamma": [1]},
        {**given, "dtype": 16},
        {**given, "high": ["x"] * 3},
        [],
    ):
        record.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="a.json: no record of a stretch"):
            read_stretch(record)


def test_a_record_is_for_its_kind_of_numbers_and_8_bits_stay_as_they_are(tmp_path):
    four = np.dstack([PIXELS, PIXELS[..., 0]])
    deep = four.astype(np.uint16) * 10 + 500
    ends = {"bands": [3, 2, 1], "low": [500] * 3, "high": [3050] * 3}
    paths = {v.dtype.name: v for v in (four, deep, deep.astype(np.float32))}
    paths = {k: write(tmp_path / f"{k}.tif", v) for k, v in paths.items()}
    for record in (ends, {**ends, "dtype": "uint16"}, {**ends, "dtype": "int32"}):
        found = read_rgb(paths["uint16"], stretch=record)
        assert np.array_equal(found, PIXELS[..., ::-1])
        assert np.array_equal(read_rgb(paths["uint8"], stretch=record), PIXELS)
    with pytest.raises(ValueError, match="float32.tif.* float32, .* is of uint16"):
        read_rgb(paths["float32"], stretch={**ends, "dtype": "uint16"})
    bands = as_stretch(None, (3, 2, 1))
    assert np.array_equal(read_rgb(paths["uint8"], stretch=bands), PIXELS[..., ::-1])
    with pytest.raises(ValueError, match="uint16 where uint8 is needed"):
        read_rgb(paths["uint16"], stretch=bands)
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert np.array_equal(read_rgb(tmp_path / "a.png", stretch=ends), PIXELS)
    cv2.imwrite(str(tmp_path / "deep.png"), deep[..., :3])
    with pytest.raises(ValueError, match="deep.png.*uint16 where uint8 is needed"):
        read_rgb(tmp_path / "deep.png", stretch=ends)


def test_what_is_not_finite_or_nodata_is_drawn_as_zero():
    stored = np.array([[[0.02, np.nan, -9999], [0.3, np.inf, 0.3]]], np.float32)
    stretch = Stretch((1, 2, 3), (0.02,) * 3, (0.3,) * 3)
    assert stretch.apply(stored, -9999).tolist() == [[[0, 0, 0], [255, 0, 255]]]


# What a caller must not reach


@pytest.fixture
def host(monkeypatch):
    """The address of a host that must not be asked, and is not when the test ends."""
    monkeypatch.setenv("GDAL_HTTP_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield "http://127.0.0.1:{1}".format(*server.getsockname())
        with pytest.raises(BlockingIOError):  # nobody waits in the line
            server.accept()


def vrt(source: str) -> bytes:
    band = '<VRTRasterBand dataType="Byte" band="{0}"><SimpleSource><SourceFilename>'
    band += f"{source}</SourceFilename><SourceBand>{{0}}</SourceBand></SimpleSource>"
    bands = "".join((band + "</VRTRasterBand>").format(n) for n in (1, 2, 3))
    return (
        f'<VRTDataset rasterXSize="70" rasterYSize="90">{bands}</VRTDataset>'.encode()
    )


def test_a_vrt_that_calls_itself_a_tiff_opens_no_file_and_no_url(tmp_path, host):
    secret = write(tmp_path / "secret.tif", PIXELS)
    url = f"/vsicurl/{host}/a.tif"
    for source in (str(secret), url):
        for content in (vrt(source), b"II*\0" + vrt(source)):
            (tmp_path / "a.tif").write_bytes(content)
            for given in (content, tmp_path / "a.tif"):
                with pytest.raises(ValueError, match="cannot be read as a scene"):
                    read_rgb(given)


@pytest.mark.parametrize("compress", [None, "deflate"])
def test_sidecar_files_and_named_overviews_change_nothing(
    tmp_path, host, compress, monkeypatch
):
    for name in ("GDAL_PAM_ENABLED", "GTIFF_IGNORE_READ_ERRORS"):
        monkeypatch.setenv(name, "YES")
    monkeypatch.setenv("GDAL_DISABLE_READDIR_ON_OPEN", "NO")
    path = write(tmp_path / "a.tif", PIXELS, compress=compress, tiled=bool(compress))
    url = f"/vsicurl/{host}/a.vrt"
    with rasterio.open(path, "r+") as file:  # asks nobody yet
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=url)
    swapped = "".join(
        f'<PAMRasterBand band="{n}"><ColorInterp>{name}</ColorInterp></PAMRasterBand>'
        for n, name in enumerate(("Blue", "Green", "Red"), 1)
    )
    geo = "<GeoTransform>1, 2, 0, 3, 0, -2</GeoTransform>"
    sidecar = f"<PAMDataset>{geo}{swapped}</PAMDataset>"
    (tmp_path / "a.tif.aux.xml").write_text(sidecar)
    (tmp_path / "a.tfw").write_text("2\n0\n0\n-2\n5\n5\n")
    (tmp_path / "a.tif.ovr").write_bytes(path.read_bytes())
    for source in (path, path.read_bytes()):
        with open_scene(source) as scene:
            assert np.array_equal(scene.read(), PIXELS)
            assert scene.transform is None
    with open_scene(path), rasterio.open(path) as file:  # under the same options
        assert file.overviews(1) == []


# URLs


@pytest.mark.slow
def test_s3_and_http_are_read_by_gdals_own_drivers(tmp_path, moto, monkeypatch):
    path = write(tmp_path / "a.tif", PIXELS)
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    options = {"endpoint_url": moto, "region_name": "us-east-1", **keys}
    client = boto3.client("s3", **options)
    client.create_bucket(Bucket="scenes")
    client.upload_file(str(path), "scenes", "a.tif", ExtraArgs={"ACL": "public-read"})
    for name, value in {
        **{key.upper(): value for key, value in keys.items()},
        "AWS_S3_ENDPOINT": moto.removeprefix("http://"),
        "AWS_HTTPS": "NO",
        "AWS_VIRTUAL_HOSTING": "FALSE",
    }.items():
        monkeypatch.setenv(name, value)
    for url in ("s3://scenes/a.tif", f"{moto}/scenes/a.tif"):
        assert read_size(url) == (90, 70)
        assert np.array_equal(read_rgb(url), PIXELS)
    with pytest.raises(ValueError, match="s3://scenes/b.tif: cannot be read"):
        read_rgb("s3://scenes/b.tif")
