"""Requests of V1, V2 and gRPC to one kind of job, and its boxes back: no server yet."""

from __future__ import annotations

import base64
import math
import threading
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from kserve import InferOutput, InferResponse
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelInferRequest
from kserve.protocol.infer_type import RequestedOutput, to_http_parameters

from .refusal import bad

OUTPUTS = {  # name -> datatype and shape of V2 and gRPC
    "boxes_xyxy": ("FP32", [-1, 4]),
    "labels": ("INT64", [-1]),
    "scores": ("FP32", [-1]),
    "names": ("BYTES", [-1]),
}
MAX_PARTS = 1_000_000  # of a JSON text; the pixels of a tile as nested lists are 90,000
_KNOWN = ("scene", "score_threshold", "geojson", "binary_data_output")


@dataclass
class Job:
    """What a request wants, and what it holds until it is answered.

    Attributes:
        protocol: "v1", "v2" or "grpc".
        pictures: each a file's bytes, its path, or pixels uint8 (H, W, 3).
        scene: sliced inference; there is one picture then.
        score_threshold: 0..1, None for the server's own.
        geojson: answer with a FeatureCollection.
        request_id, outputs, binary: of V2, for the answer.
        found: the detections, one dict a picture; cancelled: nobody waits for them.
        files: temporary ones that go with the job.
    """

    protocol: str
    pictures: list[Any] = field(default_factory=list)
    scene: bool = False
    score_threshold: float | None = None
    geojson: bool = False
    request_id: str = ""
    outputs: list[RequestedOutput] = field(default_factory=list)
    binary: bool = False
    found: list[dict] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    files: ExitStack = field(default_factory=ExitStack)

    @property
    def kind(self) -> str:
        """A label of the metrics."""
        return "scene" if self.scene else "tile"

    def where(self, index: int) -> str:
        """What a reason begins with."""
        return f"instance {index}" if self.protocol == "v1" else "input image"


def parse_v1(job: Job, body: bytes, max_pictures: int) -> None:
    """{"instances": [{"data": base64}, ...], "parameters": {...}}, as TorchServe's.

    Raises:
        Refusal: 400, with the handler's words.
    """
    content = read_json(body)
    instances = content.get("instances") if isinstance(content, dict) else None
    if not isinstance(instances, list) or not instances:
        form = '{"instances": [{"data": "<base64 of a picture file>"}]}'
        raise bad(f'the request has no "instances": send {form}')
    if len(instances) > max_pictures:
        raise bad(f"{len(instances)} instances, at most {max_pictures} a request")
    _parameters(job, content.get("parameters"))
    if job.scene and len(instances) > 1:
        raise bad(f"{len(instances)} instances: a scene comes alone")
    for index, row in enumerate(instances):
        where = job.where(index)
        given = (row.get("data") or row.get("body")) if isinstance(row, dict) else None
        if not given:
            raise bad(f'{where}: needs the key "data" with the base64 of a picture')
        if not isinstance(given, str):
            raise bad(f"{where}: data must be text, the base64 of a picture")
        job.pictures.append(_base64(given, f"{where}: data"))


def parse_v2(job: Job, fields: object, rest: bytes | Path | None = None) -> None:
    """A V2 request: its JSON, and what follows it in the binary form.

    Args:
        fields: the parsed JSON, {"inputs": [{"name": "image", ...}], ...}.
        rest: bytes after the JSON, or the path of a file with them; None without.

    Raises:
        Refusal: 400.
    """
    if not isinstance(fields, dict):
        raise bad('the request has no "inputs"')
    _parameters(job, fields.get("parameters"))
    job.request_id = str(fields.get("id") or "")
    tensors = fields.get("inputs")
    one = tensors[0] if isinstance(tensors, list) and len(tensors) == 1 else None
    if not isinstance(one, dict) or one.get("name") != "image":
        raise bad('"inputs" must be one tensor with the name "image"')
    try:
        for row in fields.get("outputs") or []:
            options = dict(row.get("parameters") or {})
            job.outputs.append(RequestedOutput(row["name"], options))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise bad('"outputs" must be a list of {"name": ...}') from error
    known = list(OUTPUTS) + ["geojson"] * job.geojson
    for output in job.outputs:
        if output.name not in known:
            raise bad(f"no output {output.name!r}: there are {', '.join(known)}")
    job.pictures = [_picture(one, rest)]


def parse_grpc(job: Job, request: ModelInferRequest) -> None:
    """A V2 request by gRPC, its data in raw_input_contents or in contents.

    Raises:
        Refusal: 400.
    """
    count, wanted = len(request.inputs), len(request.outputs)
    if count != 1 or wanted > 10:  # before any is looked at: 8 MiB hold a million
        raise bad(f"{count} inputs for {wanted} outputs: send one input, image")
    one, raw = request.inputs[0], None
    tensor: dict[str, Any] = {"name": one.name, "datatype": one.datatype}
    tensor["shape"] = list(one.shape)
    if request.raw_input_contents:
        raw = request.raw_input_contents[0]
        tensor["parameters"] = {"binary_data_size": len(raw)}
    elif one.datatype == "BYTES":
        tensor["data"] = list(one.contents.bytes_contents)
    else:  # not a list of Python's numbers, as InferRequest.from_grpc makes it
        tensor["data"] = np.fromiter(one.contents.uint_contents, np.uint32)
    fields = {
        "id": request.id,
        "parameters": to_http_parameters(request.parameters),
        "inputs": [tensor],
        "outputs": [{"name": output.name} for output in request.outputs],
    }
    parse_v2(job, fields, raw)


def _picture(tensor: dict, raw: bytes | Path | None) -> bytes | Path | np.ndarray:
    """The picture of a V2 tensor, whose data is `raw` or stands in it."""
    shape, datatype, data = (tensor.get(key) for key in ("shape", "datatype", "data"))
    if raw is None and data is None:
        raise bad('input image has no "data", and the binary form has its header')
    if raw is not None:
        given = tensor.get("parameters")
        size = given.get("binary_data_size") if isinstance(given, dict) else None
        if size != _size(raw):
            raise bad(f"binary_data_size is {size}, {_size(raw)} bytes follow the JSON")
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise bad(f"input image has the shape {shape!r}")
    if datatype == "BYTES" and shape == [1]:
        return _one_string(raw, data)
    if datatype == "UINT8" and (len(shape) == 1 or (len(shape) == 3 and shape[2] == 3)):
        return _bytes(raw, data, shape)
    raise bad(
        f"input image is {datatype} {shape}: send UINT8 [n] or BYTES [1] with the "
        "bytes of a picture file, or UINT8 [height, width, 3]"
    )


def _one_string(raw: bytes | Path | None, data: object) -> bytes:
    """BYTES [1]: a length in 4 bytes and the file, or a list of one."""
    if isinstance(raw, Path):
        raise bad("a scene by the binary form is UINT8 [n]")
    if raw is not None:
        length = int.from_bytes(raw[:4], "little")
        if len(raw) < 4 or length != len(raw) - 4:
            raise bad(f"BYTES begins with its length, {length}; {len(raw) - 4} follow")
        return raw[4:]
    one = data[0] if isinstance(data, list) and len(data) == 1 else None
    if isinstance(one, bytes):
        return one
    if not isinstance(one, str):
        raise bad("BYTES [1] is a list of one text, the base64 of a picture file")
    return _base64(one, "input image")


def _bytes(
    raw: bytes | Path | None, data: object, shape: list[int]
) -> bytes | Path | np.ndarray:
    """UINT8: a file's bytes [n], or pixels [H, W, 3]."""
    if raw is None:
        try:
            values = np.asarray(data).reshape(-1)
            fits = values.dtype.kind in "iu" and 0 <= values.min() <= values.max() < 256
        except ValueError as error:
            raise bad("input image: data is not a list of numbers") from error
        if not fits:
            raise bad("input image: UINT8 is whole numbers in 0..255")
        raw = values.astype(np.uint8).tobytes()
    count, size = math.prod(shape), _size(raw)
    if size != count:
        raise bad(f"input image: the shape {shape} is {count} bytes, {size} are there")
    if len(shape) == 1:
        return raw
    if isinstance(raw, Path):  # touched window by window, never as a whole
        return np.memmap(raw, np.uint8, "r", shape=tuple(shape))
    return np.frombuffer(raw, np.uint8).reshape(shape)


def _size(raw: bytes | Path) -> int:
    return raw.stat().st_size if isinstance(raw, Path) else len(raw)


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
        reason = f"{parts} objects, lists and texts, at most {MAX_PARTS} are taken"
        raise bad(f"the JSON has {reason}: send the bytes of a picture file")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad(f"{what}: {error}") from error


def _base64(text: str, where: str) -> bytes:
    try:  # some encoders break lines
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise bad(f"{where} is not base64: {error}") from error


def _parameters(job: Job, given: object) -> None:
    """Check the parameters of a request and put them into the job."""
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise bad('"parameters" must be an object')
    unknown = sorted(set(given) - set(_KNOWN))
    if unknown:
        raise bad(f"no parameter {', '.join(unknown)}: there are {', '.join(_KNOWN)}")
    for key in ("scene", "geojson"):
        if not isinstance(given.get(key, False), bool):
            raise bad(f"parameter {key} is {given[key]!r}: true or false")
    job.scene, job.geojson = given.get("scene", False), given.get("geojson", False)
    job.binary = bool(given.get("binary_data_output"))
    if (value := given.get("score_threshold")) is not None:
        try:  # gRPC's parameters have no fractions: text there
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= 1:
            raise bad(f"parameter score_threshold is {value!r}: a number in 0..1")
        job.score_threshold = number


def answer(job: Job, model_name: str, version: str | None = None) -> Any:
    """The boxes in the protocol of the request.

    V1: {"predictions": [[{class name: [x1, y1, x2, y2], "score": s}, ...], ...]}, with
    `geojson` a FeatureCollection in place of each list. A scene's answer says {"scene":
    true} too: a server that does not know the parameter would not. V2: `OUTPUTS`, and
    "geojson" BYTES [1] if it was asked for: in longitude and latitude if the picture's
    file tells its place, else in pixels (`to_geojson`). V2 tells the `version`, too.

    Returns:
        (body, headers) of V1 and V2; a ModelInferResponse of gRPC.
    """
    headers = {"content-type": "application/json"}
    if job.protocol == "v1":
        rows = [one["geojson"] if job.geojson else _rows(one) for one in job.found]
        scene = {"scene": True} if job.scene else {}
        return orjson.dumps({"predictions": rows, **scene}), headers
    response = _infer_response(job, model_name, version)
    if job.protocol == "grpc":
        return response.to_grpc()
    content, head = response.to_rest()
    if head is None:
        return orjson.dumps(content), headers
    headers = {"content-type": "application/octet-stream"}
    return content, {**headers, INFERENCE_CONTENT_LENGTH_HEADER: str(head)}


def _rows(found: dict) -> list[dict]:
    columns = found["names"], found["boxes_xyxy"].tolist(), found["scores"].tolist()
    return [{n: box, "score": score} for n, box, score in zip(*columns, strict=True)]


def _infer_response(job: Job, model_name: str, version: str | None) -> InferResponse:
    found, types = job.found[0], {name: kind for name, (kind, _) in OUTPUTS.items()}
    if job.geojson:
        found["geojson"] = [orjson.dumps(found["geojson"]).decode()]
        types["geojson"] = "BYTES"
    outputs = []
    for name in [output.name for output in job.outputs] or types:
        values = found[name]
        if types[name] == "BYTES":
            values = np.array([text.encode() for text in values], dtype=object)
        outputs.append(InferOutput(name, list(values.shape), types[name], values))
    return InferResponse(
        response_id=job.request_id or str(uuid.uuid4()),
        model_name=model_name,
        model_version=version,
        infer_outputs=outputs,
        use_binary_outputs=job.binary,
        requested_outputs=job.outputs,
    )
