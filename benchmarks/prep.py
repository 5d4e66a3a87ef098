"""Data preparation against the original way: json, PIL and SAHI, written plainly.

    python benchmarks/prep.py            # 601,937 labels, 12 scenes: several minutes
    python benchmarks/prep.py --quick    # a tenth of it, about a minute

Builds a data set shaped like xView in a temporary folder, runs both sides in one go,
each side in a process of its own, and checks that what they wrote is equal. CPU is user
plus system time of the work, without imports; peak is the process's largest resident
memory. The folder is in memory where the system has /dev/shm, so that a slow disk
weighs on neither side. The scenes are noise with the texture of imagery, not xView's.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

FEATURES, IMAGES, SCENES, BOXES, DENSE = 601_937, 846, 12, 700, 6_000
SIZE, OVERLAP = 300, 0.2


def build_labels(folder: Path, features: int, images: int) -> None:
    """A label file of xView's fields and defects over scenes that are all header."""
    import tifffile

    from e2e_utils.classes import read_classes

    rng = np.random.default_rng(0)
    scenes = folder / "train_images"
    scenes.mkdir(parents=True)
    numbers = rng.choice(np.arange(5, 2600), images, replace=False)
    shapes = rng.integers(2500, 4000, (images, 2))
    for number, (height, width) in zip(numbers, shapes, strict=True):
        shape = (int(height), int(width), 3)
        path = scenes / f"{number}.tif"  # sparse: takes no room on the disk
        tifffile.memmap(path, shape=shape, dtype=np.uint8, photometric="rgb")
    types = np.array([*read_classes(), 75, 82])
    weight = np.full(len(types), 0.002)
    weight[[5, 48]], weight[-2:] = (0.35, 0.5), 0.0001
    types = rng.choice(types, features, p=weight / weight.sum())
    image = rng.integers(0, images, features)
    side = np.exp(rng.normal(2.9, 0.7, (features, 2))).astype(int)
    corner = rng.integers(-20, shapes[image][:, ::-1], (features, 2))
    bounds = np.concatenate([corner, corner + side], axis=1)
    bounds[:: features // 50, 2] = bounds[:: features // 50, 0]
    bounds[7 :: features // 40] += 9000
    head = '{"type":"FeatureCollection","crs":{"type":"name","properties":{"name":'
    line = (
        '{"type":"Feature","properties":{"bounds_imcoords":%s,"edited_by":"somebody",'
        '"cat_id":"10400100%08X","type_id":%d,'
        '"ingest_time":"2017/07/24 12:49:09.118+00","index_right":2356.0,'
        '"image_id":"%d.tif",'
        '"point_geom":"0101000020E6100000B1A8B4F1EEF25640AC5FE0C7D4A3F33F",'
        '"feature_id":%d,"grid_file":"Grid2.shp"},"geometry":{"type":"Polygon",'
        '"coordinates":[[[%.14f,14.58167428533192],[%.14f,14.58242171345234],'
        "[-90.53196218230314,14.58242171345234],[-90.53214372452126,14.5824217134523],"
        "[-90.53214372452126,14.58167428533192]]]}}"
    )
    with open(folder / "xView_train.geojson", "w") as file:
        file.write(head + '"urn:ogc:def:crs:OGC:1.3:CRS84"}},"features":[\n')
        rows = zip(
            bounds.tolist(), types.tolist(), numbers[image].tolist(), strict=True
        )
        for i, (box, type_id, number) in enumerate(rows):
            text = "[]" if i % 30_011 == 0 else '"' + ",".join(map(str, box)) + '"'
            name = 1395 if i % 9_001 == 0 else number
            lon = box[0] * 1e-5
            row = line % (text, number, type_id, name, i, lon, lon)
            file.write((",\n" if i else "") + row)
        file.write("]}")


def build_scenes(folder: Path, scenes: int) -> None:
    """Scenes of real size of imagery-like texture, with 700 and with 6,000 boxes."""
    import cv2
    import tifffile

    (folder / "lzw").mkdir(parents=True)
    rng = np.random.default_rng(1)
    images, boxes = [], {BOXES: [], DENSE: []}
    for i in range(scenes):
        height, width = (int(n) for n in rng.integers(2600, 3600, 2))
        pixels = np.full((height, width, 3), 110, np.float32)
        for cell, strength in ((256, 40), (32, 25), (6, 14), (1, 4)):
            noise = rng.normal(0, strength, (height // cell + 1, width // cell + 1, 3))
            pixels += cv2.resize(noise.astype(np.float32), (width, height))
        pixels = np.clip(pixels, 0, 255).astype(np.uint8)
        tifffile.imwrite(folder / f"{i}.tif", pixels, photometric="rgb")
        options = {"photometric": "rgb", "compression": "lzw", "tile": (256, 256)}
        tifffile.imwrite(folder / "lzw" / f"{i}.tif", pixels, **options)
        size = {"height": height, "width": width}
        images.append({**size, "id": i + 1, "file_name": f"{i}.tif"})
        for count, rows in boxes.items():
            side = np.exp(rng.normal(2.9, 0.7, (count, 2))).astype(int) + 1
            corner = rng.integers(0, [width, height], (count, 2))
            for box in np.concatenate([corner, side], axis=1).astype(float).tolist():
                row = {"id": len(rows) + 1, "image_id": i + 1, "bbox": box}
                rows.append({**row, "category_id": len(rows) % 60, "iscrowd": 0})
    categories = [{"id": i, "name": str(i)} for i in range(60)]
    for count, rows in boxes.items():
        coco = {"images": images, "annotations": rows, "categories": categories}
        (folder / f"tif{count}.json").write_text(json.dumps(coco))
        for image in images:
            image["file_name"] = image["file_name"].replace(".tif", ".png")
        (folder / f"png{count}.json").write_text(json.dumps(coco))
        for image in images:
            image["file_name"] = image["file_name"].replace(".png", ".tif")


# The sides. Each imports, then works, and its work alone is timed.


def convert_original(data: Path, out: Path, rate: float = 0.75):
    from PIL import Image
    from sahi.utils.coco import Coco, CocoAnnotation, CocoCategory, CocoImage
    from sahi.utils.file import load_json, save_json

    from e2e_utils.classes import read_classes

    def work():
        labels = load_json(str(data / "xView_train.geojson"))
        scenes = {file.name for file in (data / "train_images").glob("*.tif")}
        classes, coco = read_classes(), Coco()
        for category_id, name in classes.values():
            coco.add_category(CocoCategory(id=category_id, name=name))
        coords = np.zeros((len(labels["features"]), 4))
        types = np.zeros(len(labels["features"]))
        by_image = defaultdict(list)
        for i, feature in enumerate(labels["features"]):
            row = feature["properties"]
            if row["bounds_imcoords"] != [] and row["image_id"] in scenes:
                numbers = row["bounds_imcoords"].split(",")
                coords[i] = np.array([int(number) for number in numbers])
                types[i] = row["type_id"]
                by_image[row["image_id"]].append(i)
        for name in sorted(by_image, key=lambda name: int(name.split(".")[0])):
            width, height = Image.open(data / "train_images" / name).size
            image = CocoImage(file_name=name, height=height, width=width)
            for i in by_image[name]:
                if int(types[i]) not in classes:
                    continue
                x1, y1, x2, y2 = coords[i].tolist()
                category_id, category = classes[int(types[i])]
                annotation = CocoAnnotation(
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    category_id=category_id,
                    category_name=category,
                )
                if annotation.area > 0:
                    image.add_annotation(annotation)
            coco.add_image(image)
        random.seed(0)
        halves = coco.split_coco_as_train_val(train_split_rate=rate)
        for split in ("train", "val"):
            save_json(halves[f"{split}_coco"].json, str(out / f"{split}.json"))

    return work


def convert_ours(data: Path, out: Path):
    import tifffile  # noqa: F401  # what scenes.py imports for its first TIFF

    from e2e_utils.convert import geojson_to_coco

    labels = data / "xView_train.geojson"
    return lambda: geojson_to_coco(data / "train_images", labels, out, 0.75)


def tile_original(data: Path, out: Path):
    from PIL import Image
    from sahi.slicing import slice_coco

    def work():
        png = out / "png"
        png.mkdir()
        for tif in sorted(data.glob("*.tif")):
            Image.open(tif).convert("RGB").save(png / f"{tif.stem}.png")
        coco, _ = slice_coco(
            coco_annotation_file_path=str(data / f"png{BOXES}.json"),
            image_dir=str(png),
            output_coco_annotation_file_name="",
            output_dir=str(out / "tiles"),
            ignore_negative_samples=False,
            slice_height=SIZE,
            slice_width=SIZE,
            overlap_height_ratio=OVERLAP,
            overlap_width_ratio=OVERLAP,
            min_area_ratio=0.1,
            out_ext=".jpg",
        )
        (out / "coco.json").write_text(json.dumps(coco))

    return work


def _tile(data: Path, out: Path, boxes: int, images: str = ""):
    import rasterio  # noqa: F401  # as above
    import tifffile  # noqa: F401

    from e2e_utils.tiling import slice_coco

    coco = data / f"tif{boxes}.json"
    options = {"slice_size": SIZE, "overlap_ratio": OVERLAP}
    return lambda: slice_coco(
        data / images,
        coco,
        out,
        split="train",
        ignore_negative_samples=False,
        **options,
    )


def tile_ours(data: Path, out: Path):
    return _tile(data, out, BOXES)


def tile_ours_dense(data: Path, out: Path):
    return _tile(data, out, DENSE)


def tile_ours_lzw(data: Path, out: Path):
    return _tile(data, out, BOXES, "lzw")


def tile_floor(data: Path, out: Path):
    """Decode and encode alone: no labels, no names, nothing written."""
    from e2e_utils.scenes import read_rgb

    return _encode(sorted(data.glob("*.tif")), read_rgb)


def tile_floor_lzw(data: Path, out: Path):
    """The same of compressed scenes, each decoded by one call of rasterio."""
    import rasterio

    def read(tif: Path) -> np.ndarray:
        with rasterio.open(tif) as file:
            return file.read().transpose(1, 2, 0)

    return _encode(sorted((data / "lzw").glob("*.tif")), read)


def _encode(tifs: list[Path], read):
    import cv2
    import rasterio  # noqa: F401  # as above
    import tifffile  # noqa: F401

    from e2e_utils.grid import tile_grid

    def work():
        for tif in tifs:
            pixels = read(tif)
            for x1, y1, x2, y2 in tile_grid(*pixels.shape[:2], SIZE, OVERLAP).tolist():
                bgr = cv2.cvtColor(pixels[y1:y2, x1:x2], cv2.COLOR_RGB2BGR)
                cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 75])

    return work


SIDES = {
    side.__name__: side
    for side in (
        convert_original,
        convert_ours,
        tile_original,
        tile_ours,
        tile_ours_dense,
        tile_ours_lzw,
        tile_floor,
        tile_floor_lzw,
    )
}


def run_side(name: str, data: Path, out: Path) -> None:
    """In the side's own process: time the work, print its cost as JSON."""
    out.mkdir(parents=True)
    work = SIDES[name](data, out)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    peak = after.ru_maxrss  # kB; on Linux it starts at the parent's, VmHWM does not
    if os.path.exists("/proc/self/status"):
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0])
    print(json.dumps({"cpu": cpu, "wall": wall, "peak_gb": peak * 1024 / 1e9}))


def measure(name: str, data: Path, out: Path, runs: int = 1) -> dict[str, float]:
    """The cheapest of so many runs, for steps short enough for noise to matter."""
    costs = []
    for i in range(runs):
        target = out / f"{name}{i or ''}"
        line = [sys.executable, __file__, "--side", name, str(data), str(target)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        costs.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"  {name:<18} {costs[-1]['cpu']:8.2f} s CPU", file=sys.stderr)
    return min(costs, key=lambda cost: cost["cpu"])


def same_labels(original: Path, ours: Path) -> bool:
    """Equal but for boxes wholly outside their scene, which ours drops and counts."""
    for split in ("train", "val"):
        theirs, mine = (
            json.loads((side / f"{split}.json").read_bytes())
            for side in (original, ours)
        )
        size = {row["id"]: (row["width"], row["height"]) for row in theirs["images"]}

        def inside(row, size=size):
            (x, y, w, h), (width, height) = row["bbox"], size[row["image_id"]]
            return x < width and y < height and x + w > 0 and y + h > 0

        theirs["annotations"] = [row for row in theirs["annotations"] if inside(row)]
        for row in theirs["annotations"] + mine["annotations"]:
            del row["id"]  # numbered from 1 in both; dropping shifts it
        if mine != theirs:
            return False
    return True


def same_tiles(original: Path, ours: Path) -> bool:
    """Every tile file byte for byte, every annotation but for its vertex order."""
    from e2e_utils.tile_set import read_tile_set

    theirs = json.loads((original / "coco.json").read_text())
    image_dir, labels = read_tile_set(ours).split("train")
    mine = json.loads(labels.read_text())
    for row in theirs["annotations"] + mine["annotations"]:
        points = row["segmentation"][0]
        row["segmentation"] = sorted(zip(points[::2], points[1::2], strict=True))
    files = [sorted(folder.iterdir()) for folder in (original / "tiles", image_dir)]
    names = [[file.name for file in side] for side in files]
    return (
        mine == theirs
        and names[0] == names[1]
        and all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the size")
    parser.add_argument("--json", metavar="FILE", help="write the claims as JSON")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        name, data, out = arguments.side
        return run_side(name, Path(data), Path(out))
    features, images, scenes = FEATURES, IMAGES, SCENES
    if arguments.quick:
        features, images, scenes = features // 10, images // 10, 4
    machine = (
        f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}"
    )
    print(f"{features:,} labels, {scenes} scenes, on {machine}")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        data, out = Path(folder, "data"), Path(folder, "out")
        build_labels(data / "labels", features, images)
        build_scenes(data / "scenes", scenes)
        cost = {
            name: measure(name, data / kind, out, runs)
            for name, kind, runs in (
                ("convert_original", "labels", 1),
                ("convert_ours", "labels", 3),
                ("tile_original", "scenes", 1),
                ("tile_ours", "scenes", 3),
                ("tile_floor", "scenes", 3),
                ("tile_ours_dense", "scenes", 3),
                ("tile_ours_lzw", "scenes", 3),
                ("tile_floor_lzw", "scenes", 3),
            )
        }
        labels_equal = same_labels(out / "convert_original", out / "convert_ours")
        tiles_equal = all(
            same_tiles(out / "tile_original", out / side)
            for side in ("tile_ours", "tile_ours_lzw")
        )

    print(f"\n{'step':<20}{'CPU s':>9}{'wall s':>9}{'peak GB':>9}")
    for name, row in cost.items():
        print(f"{name:<20}{row['cpu']:>9.2f}{row['wall']:>9.2f}{row['peak_gb']:>9.2f}")
    claims = [
        {
            "claim": claim,
            "unit": "GB" if field == "peak_gb" else "CPU s",
            "ours": round(cost[ours][field], 4),
            "peer": round(cost[peer][field], 4),
            "ratio": round(cost[peer][field] / cost[ours][field], 3),
            "equal": equal,
            "machine": machine,
        }
        for claim, ours, peer, field, equal in (
            (
                "xView labels to COCO: json and SAHI's objects",
                "convert_ours",
                "convert_original",
                "cpu",
                labels_equal,
            ),
            (
                "the same, peak memory",
                "convert_ours",
                "convert_original",
                "peak_gb",
                labels_equal,
            ),
            (
                "TIFF to tiles: PIL to PNG, then SAHI",
                "tile_ours",
                "tile_original",
                "cpu",
                tiles_equal,
            ),
            (
                "TIFF to tiles: decode and encode alone",
                "tile_ours",
                "tile_floor",
                "cpu",
                tiles_equal,
            ),
            (
                "tiled LZW TIFF to tiles: decode and encode alone",
                "tile_ours_lzw",
                "tile_floor_lzw",
                "cpu",
                tiles_equal,
            ),
            (
                "6,000 boxes a scene: 700 boxes a scene",
                "tile_ours_dense",
                "tile_ours",
                "cpu",
                tiles_equal,
            ),
        )
    ]
    print(f"\n{'claim':<50}{'ours':>8}{'peer':>9}{'ratio':>8}  equal")
    for row in claims:
        numbers = f"{row['ours']:>8.2f}{row['peer']:>9.2f}{row['ratio']:>8.2f}"
        print(f"{row['claim']:<50}{numbers}  {'yes' if row['equal'] else 'NO'}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(claims, indent=2) + "\n")
    if not (labels_equal and tiles_equal):
        sys.exit("the two sides differ")


if __name__ == "__main__":
    main()
