"""Serve an artefact by KServe's protocols.

    python -m kserve_utils.predictor --model_dir artefact --engine openvino

--model_dir is a folder of `kserve_utils.artefact.write_artefact`. Nothing listens
before the model has answered a picture. SIGTERM: not ready at once, then the requests
in flight get their answers, then the end.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def cores() -> int:
    """CPU cores that this process may use: OMP_NUM_THREADS, its limit, or its set."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")  # a pod sees all cores of its node
    if limit.is_file():
        quota, period = limit.read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the names that KServe's SDK has too are its own."""
    parser = argparse.ArgumentParser(
        "kserve_utils.predictor",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model_dir", default="/mnt/models", help="the artefact's folder")
    add("--model_name", help="in the URLs; by default the artefact's")
    add("--engine", default="openvino", choices=("torch", "openvino", "onnxruntime"))
    add("--device", help="cpu, cuda or cuda:N; of torch, a GPU if there is one")
    add("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    add("--threads", type=int, default=cores(), help="of a forward pass")
    add("--at_once", type=int, default=1, help="forward passes at the same time")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 in a pod")
    add("--http_port", type=int, default=8080)
    add("--grpc_port", type=int, default=8081)
    add("--max_queue", type=int, default=16, help="requests that wait or run")
    add("--max_request_mb", type=int, default=64, help="REST body")
    add("--max_grpc_mb", type=int, default=8, help="gRPC message")
    add("--max_pictures", type=int, default=32, help="instances of a V1 request")
    add("--max_scene_mb", type=int, default=2048, help="scene by V2's binary form")
    add("--max_scene_pixels", type=int, default=100_000_000, help="if decoded whole")
    add("--max_scenes", type=int, default=2, help="scenes that wait or run")
    add("--nms_threshold", type=float, default=0.5, help="IoU that merges in a scene")
    add("--drain_delay", type=float, default=3.0, help="s, not ready but serving")
    add("--grace_period", type=int, default=30, help="s, for requests in flight")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when torch is imported
    from kserve.logging import logger
    from PIL import Image

    from ..engines import load_engine
    from .admission import Limits
    from .model import DetectorModel
    from .server import Server

    Image.MAX_IMAGE_PIXELS = None  # the limits below, by the header
    limits = Limits(
        queue=args.max_queue,
        request=args.max_request_mb << 20,
        grpc=args.max_grpc_mb << 20,
        pictures=args.max_pictures,
        scene=args.max_scene_mb << 20,
        scene_pixels=args.max_scene_pixels,
        scenes=args.max_scenes,
    )
    try:
        detector, meta = load_engine(
            args.model_dir,
            args.engine,
            args.precision,
            args.threads,
            device=args.device,
            at_once=args.at_once,
        )
        name = args.model_name or meta["model_name"]
        model = DetectorModel(
            detector,
            meta,
            name,
            limits,
            at_once=args.at_once,
            nms_threshold=args.nms_threshold,
        )
        model.load()
        server = Server(model, args)  # from here on there is a log
        used = (model.version, args.engine, args.precision, meta["device"])
        logger.info("version %s: %s computes in %s on %s", *used)
        server.start([model])
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        sys.exit(f"predictor: {' '.join(str(error).split())}")
    if model.close():  # a forward pass cannot be interrupted, and would be waited for
        os._exit(0)


if __name__ == "__main__":
    main()
