"""Ask a model server for the boxes of a picture.

Copy: this file. (With e2e_utils/classes.py and its xview_classes.json, or pass
`class_names`.)

It needs numpy and requests only (`predict_grpc` kserve as well), so that a machine that
asks needs no torch; that is why it does not stand in export.py.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from e2e_utils.classes import class_names as xview_names


class _Retry(Retry):
    """Waits up to half longer than it is told: a crowd does not return as one."""

    def get_retry_after(self, response: Any) -> float | None:
        told = super().get_retry_after(response)
        return told and told * random.uniform(1, 1.5)


# A busy server is asked again after what its Retry-After says, of which at most 30 s
# count, or after 0, 1 and 2 s; a connection that fails is not.
_RETRY = _Retry(
    total=3,
    connect=0,
    read=False,
    status_forcelist=(429, 503),
    allowed_methods=None,
    backoff_factor=0.5,
    raise_on_status=False,
    retry_after_max=30,
)
_HINTS = {
    404: " (wrong model name, or the gateway does not know the host {host!r})",
    413: " (the picture is larger than the server's max_request_size)",
    503: " (still starting, overloaded, or the request could not be parsed)",
}


class RemoteError(RuntimeError):
    """A server did not give boxes. `status` is the HTTP code, None without answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def predict_remote(
    base_url: str,
    image: bytes | str | Path,
    model_name: str = "xview-fasterrcnn",
    *,
    host: str | None = None,
    timeout: float = 120.0,
    score_threshold: float | None = None,
    class_names: Sequence[str] | None = None,
    protocol: str = "v1",
    scene: bool = False,
) -> dict:
    """Boxes of a picture or a scene by KServe's V1 or V2, as `predict` gives them.

    Args:
        base_url: such as "http://localhost:8080".
        image: the bytes of a picture file (JPEG, PNG, TIFF), or its path. By "v2" a
            file is sent piece by piece and never whole in memory.
        model_name: of the server's model.
        host: the Host header by which a cluster's gateway finds the service, such as
            "torchserve-default.example.com".
        timeout: seconds that one answer may take.
        score_threshold: drop boxes below, 0..1; None keeps what the server gives.
        class_names: name of each label, background first; xView's by default. "v2"
            brings labels and names along and needs none.
        protocol: "v1", base64 in JSON, which every server here speaks; or "v2", the
            bytes as they are behind a JSON head, a quarter less to send.
        scene: let the server slice the picture and merge the boxes, as
            `predict.predict_scene` does. TorchServe cannot, and that is an error.

    Returns:
        "boxes_xyxy" float32 (N, 4) in pixels, "labels" int64 (N,), "scores" float32
        (N,) in 0..1, "names" list of N str.

    Raises:
        RemoteError: no connection, an error status (with the server's reason; 429 and
            503 after four attempts), or an answer of another shape.
        ValueError: no such protocol, a score_threshold out of range, or the server
            names a class that is not in `class_names`.
    """
    if protocol not in _PROTOCOLS:
        raise ValueError(f"no protocol {protocol!r}; valid: v1, v2")
    where = base_url, model_name, protocol, host, timeout
    asked = {"scene": True} if scene else {}
    url, response = _ask(image, where, score_threshold, **asked)
    try:
        answer = response.json()
        found = _PROTOCOLS[protocol][2](answer)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise RemoteError(
            f"{url} answered 200, but not with boxes: {response.text[:200]!r}", 200
        ) from error
    if protocol == "v1":
        if scene and answer.get("scene") is not True:
            raise RemoteError(
                f"{url} took the scene for one picture, as TorchServe does: ask the "
                "predictor, or slice it here with predict.predict_scene",
                200,
            )
        found["labels"] = _labels(url, found["names"], class_names)
    if score_threshold is not None:
        keep = found["scores"] >= np.float32(score_threshold)
        names = list(compress(found.pop("names"), keep))
        found = {key: column[keep] for key, column in found.items()} | {"names": names}
    return found


def scene_geojson(
    base_url: str,
    scene: bytes | str | Path,
    model_name: str = "xview-fasterrcnn",
    *,
    host: str | None = None,
    timeout: float = 120.0,
    score_threshold: float | None = None,
) -> dict:
    """Boxes of a scene for a map; arguments and errors as of `predict_remote`.

    Returns:
        A GeoJSON FeatureCollection: longitude and latitude in degrees; in pixels, as it
        then says itself, if the file does not tell its place on Earth.
    """
    where = base_url, model_name, "v2", host, timeout
    url, response = _ask(scene, where, score_threshold, scene=True, geojson=True)
    try:
        data = {one["name"]: one["data"] for one in response.json()["outputs"]}
        return json.loads(data["geojson"][0])
    except (ValueError, LookupError, TypeError) as error:
        said = response.text[:200]
        raise RemoteError(f"{url} gave no GeoJSON: {said!r}", 200) from error


def predict_grpc(
    address: str,
    image: bytes | str | Path,
    model_name: str = "xview-fasterrcnn",
    *,
    timeout: float = 120.0,
) -> dict:
    """Boxes of a picture by V2's messages over gRPC, as `predict_remote` gives them.

    Args:
        address: host and port, such as "localhost:8081".
        image: the bytes of a picture file (JPEG, PNG, TIFF), or its path; the predictor
            takes 8 MB (its --max_grpc_mb).
        model_name: of the server's model.
        timeout: seconds that the answer may take.

    Raises:
        RemoteError: no answer, or a refusal, with the server's reason.
    """
    import grpc
    from kserve import InferResponse
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
    from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    message = pb.ModelInferRequest(model_name=model_name, raw_input_contents=[content])
    message.inputs.add(name="image", datatype="UINT8", shape=[len(content)])
    try:
        with grpc.insecure_channel(address) as channel:
            stub = GRPCInferenceServiceStub(channel)
            answer = stub.ModelInfer(message, timeout=timeout)
    except grpc.RpcError as error:
        reason = f"{error.code().name}: {error.details()}"
        raise RemoteError(f"{address} answered by gRPC {reason}") from error
    outputs = InferResponse.from_grpc(answer).outputs
    data = {output.name: output.as_numpy() for output in outputs}
    names = [name.decode() for name in data["names"]]
    return _arrays(data["boxes_xyxy"], data["labels"], data["scores"], names)


def _ask(
    image: bytes | str | Path,
    where: tuple[str, str, str, str | None, float],
    score_threshold: float | None,
    **parameters: object,
) -> tuple[str, requests.Response]:
    """The URL that was asked, and its answer if the status is 200."""
    base_url, model_name, protocol, host, timeout = where
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must be in 0..1, got {score_threshold}")
    if score_threshold is not None and (parameters or protocol == "v2"):
        # a scene's boxes are merged after it; TorchServe, which has none, ignores it
        parameters["score_threshold"] = score_threshold
    path, request, _ = _PROTOCOLS[protocol]
    url = f"{base_url.rstrip('/')}/{path.format(model_name)}"
    body, headers = request(image, {"parameters": parameters} if parameters else {})
    if host:
        headers["Host"] = host
    response = _post(url, body, headers, timeout)
    if response.status_code != 200:
        raise RemoteError(_failure(url, response, host), response.status_code)
    return url, response


def _v1(image: bytes | str | Path, head: dict) -> tuple[bytes, dict]:
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    instances = [{"data": base64.b64encode(content).decode("ascii")}]
    body = json.dumps({"instances": instances, **head}).encode()
    return body, {"Content-Type": "application/json"}


def _v2(image: bytes | str | Path, head: dict) -> tuple[_Pieces, dict]:
    """The binary form of KServe's V2: a JSON head, then the tensor's bytes."""
    size = len(image) if isinstance(image, bytes) else Path(image).stat().st_size
    tensor: dict = {"name": "image", "datatype": "UINT8", "shape": [size]}
    tensor["parameters"] = {"binary_data_size": size}
    first = json.dumps({"inputs": [tensor], **head}).encode()
    headers = {"Content-Type": "application/octet-stream"}
    headers["Inference-Header-Content-Length"] = str(len(first))
    return _Pieces(first, image, size), headers


class _Pieces:
    """A body of known length that is read anew for each attempt."""

    def __init__(self, head: bytes, image: bytes | str | Path, size: int) -> None:
        self.head, self.image, self.size = head, image, size

    def __len__(self) -> int:
        return len(self.head) + self.size

    def __iter__(self) -> Iterator[bytes]:
        yield self.head
        if isinstance(self.image, bytes):
            yield self.image
            return
        with open(self.image, "rb") as file:
            while piece := file.read(1 << 20):
                yield piece


def _post(
    url: str, body: bytes | _Pieces, headers: dict, timeout: float
) -> requests.Response:
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=_RETRY))
        try:
            return session.post(url, data=body, headers=headers, timeout=timeout)
        except requests.RequestException as error:
            raise RemoteError(
                f"no answer from {url}: is the server, or the port-forward, running, "
                f"and does it take a body of this size? {error}"
            ) from error


def refusal(response: requests.Response) -> str:
    """Why a server refused: KServe's "error", TorchServe's "message", else the text."""
    try:
        content = response.json()
        reason = content.get("message") or content.get("error") or content
    except (ValueError, AttributeError):
        reason = response.text.strip() or response.reason or "no reason given"
    return str(reason)[:500]


def _failure(url: str, response: requests.Response, host: str | None) -> str:
    hint = _HINTS.get(response.status_code, "").format(host=host)
    return f"{url} answered {response.status_code}: {refusal(response)}{hint}"


def _rows(answer: dict) -> dict:
    """V1: a row is {class name: [x1, y1, x2, y2], "score": s}; it tells no labels."""
    names, boxes, scores = [], [], []
    for row in answer["predictions"][0]:
        ((name, box),) = [(key, value) for key, value in row.items() if key != "score"]
        names.append(name)
        boxes.append([float(side) for side in box])
        scores.append(float(row["score"]))
    return _arrays(boxes, [0] * len(names), scores, names)


def _columns(answer: dict) -> dict:
    """V2: four outputs."""
    data = {output["name"]: output["data"] for output in answer["outputs"]}
    return _arrays(data["boxes_xyxy"], data["labels"], data["scores"], data["names"])


def _arrays(boxes: Any, labels: Any, scores: Any, names: list) -> dict:
    found: dict = {
        "boxes_xyxy": np.array(boxes, dtype=np.float32).reshape(-1, 4),
        "labels": np.array(labels, dtype=np.int64),
        "scores": np.array(scores, dtype=np.float32),
        "names": [str(name) for name in names],
    }
    if len({len(column) for column in found.values()}) != 1:
        raise ValueError("columns of different lengths")
    return found


def _labels(url: str, names: list, class_names: Sequence[str] | None) -> np.ndarray:
    """The label of each name of an answer."""
    known = list(class_names) if class_names is not None else xview_names()
    label_of = {name: label for label, name in enumerate(known)}
    unknown = sorted(set(names) - set(label_of))
    if unknown:
        raise ValueError(f"{url} names classes that class_names lacks: {unknown}")
    return np.array([label_of[name] for name in names], dtype=np.int64)


# path below the base URL, the request, the boxes of an answer
_PROTOCOLS: dict[str, tuple] = {
    "v1": ("v1/models/{}:predict", _v1, _rows),
    "v2": ("v2/models/{}/infer", _v2, _columns),
}
