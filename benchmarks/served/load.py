"""Load on a server: so many clients, each with its next request after its last answer.

What benchmarks/serve.py measures its own servers with, and what its --url puts to a
predictor anywhere.
"""

import base64
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import requests

TIMEOUT = 300  # s that an answer may take


def body_of(picture: bytes) -> bytes:
    """KServe's V1 request of one picture file."""
    return json.dumps(
        {"instances": [{"data": base64.b64encode(picture).decode()}]}
    ).encode()


def _session(url: str, host: str | None) -> requests.Session:
    session = requests.Session()
    # a proxy does not know this machine's loopback
    session.trust_env = urlsplit(url).hostname not in ("127.0.0.1", "localhost")
    session.headers["Content-Type"] = "application/json"
    if host:
        session.headers["Host"] = host
    return session


def _ask(
    url: str,
    bodies: list[bytes],
    host: str | None,
    seconds: list[float],
    errors: list[str],
) -> None:
    """One client: a connection, and its requests on it one after the other."""
    with _session(url, host) as session:
        for body in bodies:
            start = time.perf_counter()
            try:
                answer = session.post(url, data=body, timeout=TIMEOUT)
            except requests.RequestException as error:
                errors.append(type(error).__name__)
                continue
            if answer.status_code == 200:
                seconds.append(time.perf_counter() - start)
            else:
                errors.append(str(answer.status_code))


def load(
    base: str,
    model: str,
    bodies: list[bytes],
    clients: int,
    each: int,
    host: str | None = None,
) -> dict:
    """What so many clients get, with `each` requests one after the other.

    Args:
        base: URL of the server, or of the gateway before it.
        model: its name in the URL.
        bodies: of the requests, taken in turns; see `body_of`.
        clients: at once, each with a connection of its own.
        each: requests of a client.
        host: the Host header by which a gateway finds the service.

    Returns:
        {"rate": pictures a second that were answered, "p50", "p90", "p99": ms that a
        client waited for those, "answered": how many, "seconds": the load took,
        "errors": Counter of the others by status ("429") or by the kind of failure
        ("ConnectionError")}. The first four are NaN or 0 if there was no answer.
    """
    url = f"{base}/v1/models/{model}:predict"
    seconds: list[float] = []  # appending is atomic
    errors: list[str] = []
    threads = []
    for client in range(clients):  # they begin with different ones
        own = [bodies[(client + index) % len(bodies)] for index in range(each)]
        arguments = (url, own, host, seconds, errors)
        threads.append(threading.Thread(target=_ask, args=arguments))
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start
    waits = np.array(seconds or [np.nan]) * 1000
    p50, p90, p99 = (float(p) for p in np.percentile(waits, [50, 90, 99]))
    found = {"rate": len(seconds) / wall, "p50": p50, "p90": p90, "p99": p99}
    found |= {"answered": len(seconds), "seconds": wall}
    return {**found, "errors": Counter(errors)}


def show(found: dict, clients: int) -> str:
    """The lines that --url prints."""
    failed = sum(found["errors"].values())
    kinds = ", ".join(f"{kind} {n}" for kind, n in found["errors"].most_common())
    lines = [
        f"{found['answered'] + failed} requests of {clients} client(s) "
        f"in {found['seconds']:.1f} s",
        f"pictures a second  {found['rate']:.2f}",
        "a client's wait    "
        + "  ".join(f"{p} {found[p]:.0f} ms" for p in ("p50", "p90", "p99")),
        f"errors             {kinds or 'none'}",
    ]
    return "\n".join(lines)


def claims_of(found: dict, clients: int, machine: str) -> list[dict]:
    """Rows of --json; there is no peer, and nothing is compared."""
    rows = [
        ("images/s", "images/s", "rate"),
        ("p50", "ms", "p50"),
        ("p99", "ms", "p99"),
    ]
    rest = {"peer": None, "ratio": None, "equal": None, "machine": machine}
    claims = [
        (f"served {what}, {clients} client(s)", unit, round(found[key], 3))
        for what, unit, key in rows
    ]
    claims.append(("requests that failed", "", sum(found["errors"].values())))
    return [
        {"claim": claim, "unit": unit, "ours": ours, **rest}
        for claim, unit, ours in claims
    ]


def measure_url(
    base: str,
    model: str,
    host: str | None,
    pictures: list[bytes],
    clients: int,
    each: int,
    json_file: str | None = None,
) -> None:
    """Put the load to a server that runs somewhere, and print what its clients got.

    Exits with a line if the first request, which is not counted, gets no boxes; with
    status 1 if any later one failed.
    """
    base, bodies = base.rstrip("/"), [body_of(picture) for picture in pictures]
    url = f"{base}/v1/models/{model}:predict"
    try:
        with _session(url, host) as session:
            first = session.post(url, data=bodies[0], timeout=TIMEOUT)
    except (requests.RequestException, ValueError) as error:  # also of no URL
        sys.exit(f"error: no answer from {url}: {error}")
    if first.status_code != 200 or '"predictions"' not in first.text:
        told = " ".join(first.text.split())[:200]
        hint = f" (does the gateway know the host {host!r}?)" if host else ""
        sys.exit(f"error: {url} answered {first.status_code}, no boxes: {told}{hint}")
    found = load(base, model, bodies, clients, each, host)
    print(show(found, clients))
    if json_file:
        claims = claims_of(found, clients, f"{base}, {host or model}")
        Path(json_file).write_text(json.dumps(claims, indent=2) + "\n")
    sys.exit(1 if found["errors"] else 0)
