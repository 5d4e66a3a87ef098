"""A page to try a model server: drop a picture or a scene, see its boxes.

    python -m kserve_utils.try_page --server http://localhost:8080
    python -m kserve_utils.try_page --artefact runs/demo/serving/artefact

The second starts a predictor of its own. The page listens on this machine alone and
asks no other. The browser draws and filters: a slider that moves asks nobody again.

Copy: this file, try_page.html, client.py and, for --artefact, servers.py and the
folder predictor with what it stands on. (With e2e_utils, of which it needs scenes.py,
georeference.py and visualize.py.)
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response

from e2e_utils.georeference import georeference_of, to_geojson
from e2e_utils.scenes import Scene, open_scene
from e2e_utils.visualize import class_color

from .client import RemoteError, predict_remote
from .servers import predictor

LONGEST = 2_000  # px of the picture that the browser shows; boxes stay exact
PICTURES = {".tif", ".tiff", ".png", ".jpg", ".jpeg"}


def answer(
    content: bytes,
    name: str = "",
    *,
    server: str,
    model_name: str = "xview-fasterrcnn",
    protocol: str = "v2",
    scene: bool = True,
) -> dict:
    """What the page shows of a picture.

    Args:
        content: of a TIFF, PNG or JPEG file.
        name: of that file, for the property "scene" of the GeoJSON.
        server, model_name, protocol, scene: as `predict_remote` takes them.

    Returns:
        "geojson" of `to_geojson`, "width" and "height" in pixels, "seconds" that the
        server took, "colors" {class name: "#rrggbb"}, "preview": a JPEG as data URL.

    Raises:
        RemoteError, ValueError: in the words of the server, or of what reads files.
    """
    start = time.perf_counter()
    found = predict_remote(server, content, model_name, protocol=protocol, scene=scene)
    seconds = time.perf_counter() - start
    labels = dict(zip(found["names"], found["labels"].tolist(), strict=True))
    with open_scene(content) as opened:
        found["georeference"] = georeference_of(opened)
        size = {"width": opened.width, "height": opened.height}
        shown = preview(opened)
    colors = {
        name: "#{:02x}{:02x}{:02x}".format(*class_color(label))
        for name, label in labels.items()
    }
    return {
        "geojson": to_geojson(found, name),
        "seconds": seconds,
        "colors": colors,
        "preview": shown,
        **size,
    }


def preview(scene: Scene) -> str:
    """A scene as a JPEG of at most LONGEST px a side, read by strips; a data URL.

    Example:
        >>> with open_scene(np.zeros((300, 200, 3), np.uint8)) as scene:
        ...     preview(scene)[:22]
        'data:image/jpeg;base64'
    """
    step = -(-max(scene.height, scene.width) // LONGEST)
    strips = []
    for top in range(0, scene.height, 256 * step):
        bottom = min(top + 256 * step, scene.height)
        strips.append(scene.read(0, top, scene.width, bottom)[::step, ::step])
    pixels = cv2.cvtColor(np.concatenate(strips), cv2.COLOR_RGB2BGR)
    jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()


def pictures(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Name -> path of the picture files that these are, or that these folders hold.

    Raises:
        FileNotFoundError: one of the paths is not there.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("5.tif", "6.tif", "notes.txt"):
        ...         Path(folder, name).touch()
        ...     list(pictures([folder]))
        ['5.tif', '6.tif']
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"example {path}: no such file or folder")
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.suffix.lower() in PICTURES and file.name[0] != ".":
                found.setdefault(file.name, file)
    return found


def page(examples: dict[str, Path], **ask: str) -> FastAPI:
    """The application.

    Args:
        examples: of `pictures`.
        ask: server, model_name and protocol of `answer`.

    Example:
        >>> [route.path for route in page({}).routes]
        ['/', '/examples', '/examples/{name}', '/boxes']
    """
    app = FastAPI(openapi_url=None)

    @app.get("/")
    def index() -> FileResponse:
        return FileResponse(Path(__file__).with_name("try_page.html"))

    @app.get("/examples")
    def names() -> list[str]:
        return list(examples)

    @app.get("/examples/{name}")
    def example(name: str) -> Response:
        known = name in examples
        return FileResponse(examples[name]) if known else Response(status_code=404)

    @app.post("/boxes")
    async def boxes(request: Request, name: str, scene: bool = True) -> Response:
        content = await request.body()
        try:
            given = await run_in_threadpool(answer, content, name, scene=scene, **ask)
        except (RemoteError, ValueError, OSError) as error:
            return JSONResponse({"refusal": str(error)}, status_code=422)
        return JSONResponse(given)

    return app


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "kserve_utils.try_page",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--server", help="URL of a model server that runs")
    where.add_argument("--artefact", help="folder of write_artefact, to be served here")
    parser.add_argument("--model_name", default="xview-fasterrcnn")
    parser.add_argument("--protocol", default="v2", choices=("v1", "v2"))
    parser.add_argument("--examples", nargs="*", default=[], help="files or folders")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        try:
            examples = pictures(args.examples)
            server = args.server or stack.enter_context(predictor(args.artefact))
        except (OSError, RuntimeError) as error:
            parser.exit(1, f"error: {error}\n")
        ask = {"model_name": args.model_name, "protocol": args.protocol}
        app = page(examples, server=str(server), **ask)
        # says where it listens, once it does
        uvicorn.run(app, host="127.0.0.1", port=args.port, access_log=False)


if __name__ == "__main__":
    main()
