"""Ask a model server for the boxes of a picture.

Copy: this file. (With xview_classes.json, or pass `class_names`.)

It needs numpy and requests only, so that a machine that asks needs no torch; that is
why it does not stand in export.py.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import requests

_BUSY = (429, 503)


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
    retries: int = 3,
    score_threshold: float = 0.0,
    class_names: Sequence[str] | None = None,
) -> dict:
    """Boxes of a picture by KServe's V1 protocol, as `predict.predict_image` gives.

    Args:
        base_url: such as "http://localhost:8080".
        image: the bytes of a picture file (JPEG, PNG, TIFF), or its path.
        model_name: of the server's model.
        host: the Host header by which a cluster's gateway finds the service, such as
            "torchserve-default.example.com".
        timeout: seconds that one answer may take.
        retries: how often a busy server (503, 429) is asked again, after 0.5 s, 1 s,
            2 s, ..., or after what its Retry-After says, at most 30 s.
        score_threshold: drop boxes below, 0..1.
        class_names: name of each label, background first; xView's by default.

    Returns:
        "boxes_xyxy" float32 (N, 4) in pixels, "labels" int64 (N,), "scores" float32
        (N,) in 0..1, "names" list of N str.

    Raises:
        RemoteError: no connection, an error status (with the server's reason), or an
            answer of another shape.
        ValueError: the server names a class that is not in `class_names`.
    """
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    body = {"instances": [{"data": base64.b64encode(content).decode("ascii")}]}
    url = f"{base_url.rstrip('/')}/v1/models/{model_name}:predict"
    headers = {"Host": host} if host else {}
    for attempt in range(retries + 1):
        try:
            response = requests.post(url, json=body, headers=headers, timeout=timeout)
        except requests.Timeout as error:
            raise RemoteError(f"{url} gave no answer in {timeout:g} s") from error
        except requests.ConnectionError as error:
            raise RemoteError(
                f"no connection to {url}: is the server, or the port-forward, running?"
            ) from error
        if response.status_code not in _BUSY or attempt == retries:
            break
        time.sleep(_pause(response, attempt))
    if response.status_code != 200:
        raise RemoteError(_failure(url, response, host), response.status_code)
    try:
        rows = response.json()["predictions"][0]
        found = [_row(row) for row in rows]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RemoteError(
            f"{url} answered 200, but not with boxes: {response.text[:200]!r}", 200
        ) from error
    names = list(class_names) if class_names is not None else _xview_names()
    label_of = {name: label for label, name in enumerate(names)}
    unknown = sorted({name for name, _, _ in found} - set(label_of))
    if unknown:
        raise ValueError(f"{url} names classes that class_names lacks: {unknown}")
    found = [row for row in found if row[2] >= score_threshold]
    boxes = np.array([box for _, box, _ in found], dtype=np.float32)
    return {
        "boxes_xyxy": boxes.reshape(-1, 4),
        "labels": np.array([label_of[name] for name, _, _ in found], dtype=np.int64),
        "scores": np.array([score for _, _, score in found], dtype=np.float32),
        "names": [name for name, _, _ in found],
    }


def _row(row: dict) -> tuple[str, list[float], float]:
    """(class name, box xyxy, score) of {class name: [x1, y1, x2, y2], "score": s}."""
    score = float(row["score"])
    ((name, box),) = [(k, v) for k, v in row.items() if k != "score"]
    x1, y1, x2, y2 = map(float, box)
    return name, [x1, y1, x2, y2], score


def _pause(response: requests.Response, attempt: int) -> float:
    wanted = response.headers.get("Retry-After", "")
    return min(30.0, float(wanted) if wanted.isdigit() else 0.5 * 2**attempt)


def _failure(url: str, response: requests.Response, host: str | None) -> str:
    status = response.status_code
    try:  # TorchServe says "message", KServe's wrapper "error"
        told = response.json()
        reason = str(told.get("message") or told.get("error") or told)
    except (ValueError, AttributeError):
        reason = response.text.strip() or response.reason or "no reason given"
    hint = {
        404: f" (wrong model name, or the gateway does not know the host {host!r})",
        413: " (the picture is larger than the server's max_request_size)",
        503: " (still starting, overloaded, or the request could not be parsed)",
    }.get(status, "")
    return f"{url} answered {status}: {reason[:500]}{hint}"


def _xview_names() -> list[str]:
    table = json.loads(Path(__file__).with_name("xview_classes.json").read_text())
    return ["background"] + [row["name"] for row in table["classes"]]
