"""Tiny data for the tests; what needs more makes its own."""

import json
import os
import shutil
import socket
import tempfile

# Workers of pytest-xdist share the cores: one thread each, and in what they start.
# Read when torch is imported, so it stands before the imports.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Runs are compared bit by bit, and a GPU's kernels do not repeat themselves so: tests
# run on the CPU unless asked otherwise, by CUDA_VISIBLE_DEVICES=0.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# Servers and Ray name their temporary folders by what they are. A folder of its own
# keeps a worker, or another run of the tests, from taking them for its own. The name
# is short, because the path of a socket may have 107 characters.
SHARED = os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="t-", dir=SHARED)

# The processes of a trial of Determined meet at fixed ports, unless given others.
for name in ("INTER_TRAIN_PROCESS_COMM_PORT_1", "INTER_TRAIN_PROCESS_COMM_PORT_2"):
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ[name] = str(free.getsockname()[1])

# ruff: noqa: E402
import cv2
import numpy as np
import pytest
import torch
from servers import artefact, predicted, stripped, torchserved, tree  # noqa: F401

from e2e_utils.describe_tiles import describe_split

NAMES = ["square", "bar", "dot"]


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


@pytest.fixture
def one_thread():
    """torch on one thread: small tensors, and losses that repeat themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_tiles(root, split: str, tiles: int, seed: int, size: int = 96) -> None:
    """Tiles with bright squares and bars on dark ground, and their description.

    The last tile is empty. 96 px keeps a training step under 50 ms.
    """
    rng = np.random.default_rng(seed)
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for image_id in range(1, tiles + 1):
        picture = rng.integers(20, 60, (size, size, 3), dtype=np.uint8)
        for _ in range(0 if image_id == tiles else 4):
            category = int(rng.integers(0, 2))
            w, h = (14, 14) if category == 0 else (26, 8)
            x, y = (int(v) for v in rng.integers(2, size - 30, 2))
            picture[y : y + h, x : x + w] = (220, 60, 60) if category == 0 else 230
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        name = f"{split}_{image_id}.jpg"
        cv2.imwrite(str(folder / name), picture)
        row = {"id": image_id, "file_name": name, "height": size, "width": size}
        images.append(row)
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"{split}.json").write_text(json.dumps(coco))
    describe_split(
        root, split, folder, root / f"{split}.json", tile_size=size, overlap=0.0
    )


@pytest.fixture(scope="session")
def tiles(tmp_path_factory):
    """A folder of 12 training and 5 validation tiles of 96 px with three classes."""
    root = tmp_path_factory.mktemp("tiles")
    write_tiles(root, "train", 12, seed=1)
    write_tiles(root, "val", 5, seed=2)
    return root


@pytest.fixture(scope="module")
def moto():
    """The address of a stand-in for S3 on this machine."""
    from moto.server import (
        ThreadedMotoServer,  # for few tests
    )

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()
