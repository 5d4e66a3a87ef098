"""Requests of V1, V2 and gRPC to one kind of job, and its boxes back again.

Nothing here knows of a server: bodies in, answers out.
"""

from __future__ import annotations

import base64
import binascii
import math
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from kserve import InferOutput, InferResponse
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelInferRequest
from kserve.protocol.infer_type import RequestedOutput, to_http_parameters

from .refusal import bad

OUTPUTS = {  # name -> datatype and shape of V2 and gRPC
    "boxes_xyxy": ("FP32", [-1, 4]),
    "labels": ("INT64", [-1]),
    "scores": ("FP32", [-1]),
    "names": ("BYTES", [-1]),
}
_GEOJSON = ("BYTES", [1])
MAX_PARTS = 1_000_000  # of a JSON text; the pixels of a tile as nested lists are 90,000
_KNOWN = ("scene", "score_threshold", "geojson", "binary_data_output")


@dataclass
class Job:
    """What a request wants, in whatever protocol it came.

    Attributes:
        protocol: "v1", "v2" or "grpc".
        pictures: each a file's bytes, its path, or pixels uint8 (H, W, 3).
        scene: sliced inference; there is one picture then.
        score_threshold: 0..1, None for the server's own.
        geojson: answer with a FeatureCollection.
        request_id, outputs, binary: of V2, for the answer.
        found: the detections, one dict a picture, once there are any.
        cancelled: nobody waits for them any more.
    """

    protocol: str
    pictures: list[Any]
    scene: bool = False
    score_threshold: float | None = None
    geojson: bool = False
    request_id: str = ""
    outputs: list[RequestedOutput] | None = None
    binary: bool = False
    found: list[dict] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def where(self, index: int) -> str:
        """What a reason begins with."""
        return f"instance {index}" if self.protocol == "v1" else "input image"


def parse_v1(body: bytes, max_pictures: int) -> Job:
    """{"instances": [{"data": base64}, ...], "parameters": {...}}, as TorchServe's.

    Raises:
        Refusal: 400, with the handler's words.
    """
    content = read_json(body)
    instances = content.get("instances") if isinstance(content, dict) else None
    if not isinstance(instances, list) or not instances:
        raise bad(
            'the request has no "instances": send {"instances": [{"data": "<base64 of '
            'a picture file>"}]}'
        )
    if len(instances) > max_pictures:
        raise bad(f"{len(instances)} instances, at most {max_pictures} a request")
    job = Job("v1", [], **_parameters(content.get("parameters")))
    if job.scene and len(instances) > 1:
        raise bad(f"{len(instances)} instances: a scene comes alone")
    for index, row in enumerate(instances):
        given = (row.get("data") or row.get("body")) if isinstance(row, dict) else None
        if not given:
            raise bad(
                f'instance {index}: needs the key "data" with the base64 of a picture'
            )
        if not isinstance(given, str):
            raise bad(f"instance {index}: data must be text, the base64 of a picture")
        job.pictures.append(_base64(given, f"instance {index}: data"))
    return job


def parse_v2(head: object, rest: bytes | Path | None = None) -> Job:
    """A V2 request: its JSON, and what follows it in the binary form.

    Args:
        head: the parsed JSON, {"inputs": [{"name": "image", ...}], ...}.
        rest: bytes after the JSON, or the path of a file with them; None without.

    Raises:
        Refusal: 400.
    """
    if not isinstance(head, dict):
        raise bad('the request has no "inputs"')
    job = Job("v2", [], **_parameters(head.get("parameters")))
    job.binary = bool((head.get("parameters") or {}).get("binary_data_output"))
    job.request_id = str(head.get("id") or "")
    tensors = head.get("inputs")
    one = tensors[0] if isinstance(tensors, list) and len(tensors) == 1 else None
    if not isinstance(one, dict) or one.get("name") != "image":
        raise bad('"inputs" must be one tensor with the name "image"')
    wanted = head.get("outputs")
    if wanted is not None:
        try:
            job.outputs = [
                RequestedOutput(row["name"], row.get("parameters")) for row in wanted
            ]
        except (TypeError, KeyError, AttributeError) as error:
            raise bad('"outputs" must be a list of {"name": ...}') from error
    if rest is None and one.get("data") is None:
        raise bad('input image has no "data", and the binary form has its header')
    if rest is not None:
        told = one.get("parameters")
        size = told.get("binary_data_size") if isinstance(told, dict) else None
        there = rest.stat().st_size if isinstance(rest, Path) else len(rest)
        if size != there:
            raise bad(f"binary_data_size is {size}, {there} bytes follow the JSON")
    _finish(job, one.get("datatype"), one.get("shape"), rest, one.get("data"))
    return job


def parse_grpc(request: ModelInferRequest) -> Job:
    """A V2 request by gRPC, its data in raw_input_contents or in contents.

    Raises:
        Refusal: 400.
    """
    job = Job("grpc", [], **_parameters(to_http_parameters(request.parameters)))
    job.request_id = request.id
    if len(request.inputs) != 1 or request.inputs[0].name != "image":
        raise bad('"inputs" must be one tensor with the name "image"')
    job.outputs = [RequestedOutput(row.name) for row in request.outputs] or None
    one, raw = request.inputs[0], None
    data: Any = None
    if request.raw_input_contents:
        raw = request.raw_input_contents[0]
    elif one.datatype == "BYTES":
        data = list(one.contents.bytes_contents)
    else:
        data = np.fromiter(one.contents.uint_contents, np.uint32)
    _finish(job, one.datatype, list(one.shape), raw, data)
    return job


def _finish(
    job: Job, datatype: object, shape: object, raw: bytes | Path | None, data: object
) -> None:
    """Put the picture of a V2 tensor into the job; check the outputs it asks for."""
    known = list(OUTPUTS) + ["geojson"] * job.geojson
    for output in job.outputs or []:
        if output.name not in known:
            raise bad(f"no output {output.name!r}: there are {', '.join(known)}")
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise bad(f"input image has the shape {shape!r}")
    if datatype == "BYTES" and shape == [1]:
        job.pictures = [_one_string(raw, data)]
    elif datatype == "UINT8" and (len(shape) == 1 or (len(shape), shape[2:]) == _HW3):
        job.pictures = [_bytes(raw, data, shape)]
    else:
        raise bad(
            f"input image is {datatype} {shape}: send UINT8 [n] or BYTES [1] with the "
            "bytes of a picture file, or UINT8 [height, width, 3]"
        )


_HW3 = (3, [3])


def _one_string(raw: bytes | Path | None, data: object) -> bytes | Path:
    """BYTES [1]: a length in 4 bytes and the file, or a list of one."""
    if isinstance(raw, Path):
        raise bad("a scene by the binary form is UINT8 [n]")
    if raw is not None:
        length = int.from_bytes(raw[:4], "little")
        if len(raw) < 4 or length != len(raw) - 4:
            raise bad(f"BYTES begins with its length, {length}; {len(raw) - 4} follow")
        return raw[4:]
    if not isinstance(data, list) or len(data) != 1:
        raise bad("BYTES [1] is a list of one")
    if isinstance(data[0], bytes):
        return data[0]
    if not isinstance(data[0], str):
        raise bad("BYTES in JSON is text, the base64 of a picture file")
    return _base64(data[0], "input image")


def _bytes(
    raw: bytes | Path | None, data: object, shape: list[int]
) -> bytes | Path | np.ndarray:
    """UINT8: a file's bytes [n], or pixels [H, W, 3]."""
    count = math.prod(shape)
    if raw is None:
        try:
            values = np.asarray(data).reshape(-1)
            fits = values.dtype.kind in "iu" and 0 <= values.min() <= values.max() < 256
        except ValueError as error:
            raise bad("input image: data is not a list of numbers") from error
        if not fits:
            raise bad("input image: UINT8 is whole numbers in 0..255")
        raw = values.astype(np.uint8).tobytes()
    there = raw.stat().st_size if isinstance(raw, Path) else len(raw)
    if there != count:
        raise bad(f"input image: the shape {shape} is {count} bytes, {there} are there")
    if len(shape) == 1:
        return raw
    if isinstance(raw, Path):  # touched window by window, never as a whole
        return np.memmap(raw, np.uint8, "r", shape=tuple(shape))
    return np.frombuffer(raw, np.uint8).reshape(shape)


def read_json(body: bytes, what: str = "the body is not JSON") -> Any:
    """The value of a JSON text.

    Raises:
        Refusal: 400, not JSON, or of so many parts that they would fill the memory: an
            empty object is 2 bytes here and 64 in Python.
    """
    if not body:
        raise bad("the body is empty")
    parts = sum(body.count(mark) for mark in (b"{", b"[", b'"'))
    if parts > MAX_PARTS:
        raise bad(
            f"the JSON has {parts} objects, lists and texts, at most {MAX_PARTS} are "
            "taken: send the bytes of a picture file"
        )
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad(f"{what}: {error}") from error


def _base64(text: str, where: str) -> bytes:
    try:  # some encoders break lines
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad(f"{where} is not base64: {error}") from error


def _parameters(given: object) -> dict:
    """Checked parameters of a request, as arguments of `Job`."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise bad('"parameters" must be an object')
    unknown = sorted(set(given) - set(_KNOWN))
    if unknown:
        raise bad(f"no parameter {', '.join(unknown)}: there are {', '.join(_KNOWN)}")
    found: dict[str, Any] = {}
    for key in ("scene", "geojson"):
        value = given.get(key, False)
        if not isinstance(value, bool):
            raise bad(f"parameter {key} is {value!r}: true or false")
        found[key] = value
    if (value := given.get("score_threshold")) is not None:
        try:  # gRPC's parameters have no fractions: text there
            found["score_threshold"] = float(value)
        except (TypeError, ValueError):
            found["score_threshold"] = math.nan
        if isinstance(value, bool) or not 0 <= found["score_threshold"] <= 1:
            raise bad(f"parameter score_threshold is {value!r}: a number in 0..1")
    return found


def answer_v1(job: Job) -> bytes:
    """{"predictions": [[{class name: [x1, y1, x2, y2], "score": s}, ...], ...]}.

    With `geojson`, a FeatureCollection in place of each list. A scene's answer says
    {"scene": true} beside it: a server that does not know the parameter would not.
    """
    answers = [found["geojson"] if job.geojson else _rows(found) for found in job.found]
    return orjson.dumps(
        {"predictions": answers} | ({"scene": True} if job.scene else {})
    )


def _rows(found: dict) -> list[dict]:
    columns = found["names"], found["boxes_xyxy"].tolist(), found["scores"].tolist()
    return [{n: box, "score": score} for n, box, score in zip(*columns, strict=True)]


def answer_v2(job: Job, model_name: str) -> InferResponse:
    """The outputs of `OUTPUTS`, and "geojson" BYTES [1] if it was asked for."""
    found = job.found[0]
    arrays = {name: found[name] for name in OUTPUTS}
    arrays["names"] = _text(found["names"])
    types = {name: datatype for name, (datatype, _) in OUTPUTS.items()}
    if job.geojson:
        arrays["geojson"] = _text([orjson.dumps(found["geojson"]).decode()])
        types["geojson"] = _GEOJSON[0]
    names = list(arrays)
    if job.outputs and job.protocol == "grpc":  # REST: the SDK picks them
        names = [output.name for output in job.outputs]
    return InferResponse(
        response_id=job.request_id or str(uuid.uuid4()),
        model_name=model_name,
        infer_outputs=[
            InferOutput(name, list(arrays[name].shape), types[name], arrays[name])
            for name in names
        ],
        use_binary_outputs=job.binary,
        requested_outputs=job.outputs if job.protocol == "v2" else None,
    )


def _text(values: Sequence[str]) -> np.ndarray:
    return np.array([value.encode() for value in values], dtype=object)
