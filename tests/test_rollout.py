"""A new version takes over under load, and no request is lost.

A small proxy does what a Service of Kubernetes does: it gives a new connection to a
backend that last said it is ready, and leaves open ones alone.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter

import pytest
import requests
import torch
from servers import MODEL, gone
from serving import NAMES, ROOT, checkpoint, decode, jpeg

from e2e_utils.models import build_model
from kserve_utils.artefact import write_artefact
from kserve_utils.export import strip_checkpoint
from kserve_utils.servers import predictor

sys.path.append(str(ROOT / "benchmarks"))  # at the end: tests have the same names

from served.load import body_of, load  # noqa: E402

pytestmark = pytest.mark.slow
PERIOD = 0.2  # seconds between two questions whether a backend is ready
CLIENTS, EACH = 8, 125
SETTINGS = {"min_size": 64, "max_size": 64, "box_score_thresh": 0.017}
SETTINGS |= {"rpn_pre_nms_top_n_test": 8, "rpn_post_nms_top_n_test": 4}


class Service:
    """Passes connections on to the ready ones of its backends, in turns.

    What is open stays where it is, also when its backend is not ready any more.
    """

    def __init__(self) -> None:
        self.backends: list[str] = []
        self.ready: list[str] = []
        self.connections: Counter = Counter()
        self.url = ""

    async def run(self, closed: asyncio.Event) -> None:
        server = await asyncio.start_server(self.passed_on, "127.0.0.1", 0)
        self.url = "http://{}:{}".format(*server.sockets[0].getsockname())
        while not closed.is_set():
            ready = [url for url in self.backends if await asyncio.to_thread(fit, url)]
            self.ready = ready
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(closed.wait(), PERIOD)
        server.close()

    async def passed_on(self, reader, writer) -> None:
        url = self.ready[sum(self.connections.values()) % len(self.ready)]
        self.connections[url] += 1
        try:
            address = url.removeprefix("http://").split(":")
            theirs = await asyncio.open_connection(*address)
            await asyncio.gather(pipe(reader, theirs[1]), pipe(theirs[0], writer))
        except OSError:  # nobody is asked again
            writer.close()


async def pipe(reader, writer) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


def fit(url: str) -> bool:
    """Whether a backend says that it is ready."""
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{url}/v2/health/ready", timeout=10).ok
    return False


@pytest.fixture
def service():
    one, loop = Service(), asyncio.new_event_loop()
    closed = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(one.run(closed),))
    thread.start()
    until(lambda: one.url, "the proxy does not listen")
    yield one
    loop.call_soon_threadsafe(closed.set)
    thread.join(60)
    loop.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An artefact whose pictures of 64 px take a few milliseconds."""
    folder = tmp_path_factory.mktemp("small")
    content = {**checkpoint(), "settings": SETTINGS, "tile_size": 64}
    model = build_model("fasterrcnn_small", len(NAMES), **SETTINGS)
    torch.save({**content, "model": model.state_dict()}, folder / "best.pt")
    stripped = strip_checkpoint(folder / "best.pt", folder / "stripped.pth")
    tiles = [decode(jpeg(64, 64, seed=seed)) for seed in (1, 2)]
    return write_artefact(stripped, folder / "artefact", tiles=tiles)


def until(true, what: str) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_no_request_is_lost_while_a_new_version_takes_over(small, service):
    found: dict = {}
    bodies = [body_of(jpeg(64, 64, seed=seed)) for seed in range(3)]

    def put_load() -> None:
        found.update(load(service.url, MODEL, bodies, CLIENTS, EACH))

    flags = {"engine": "openvino", "drain_delay": 3}  # s, as in the manifest
    with predictor(small, **flags) as old, predictor(small, **flags) as new:
        service.backends.append(old)
        until(lambda: service.ready == [old], "the old version is not ready")
        clients = threading.Thread(target=put_load)
        clients.start()
        until(lambda: answered(old) >= 100, "no load")
        service.backends.append(new)
        until(lambda: new in service.ready, "the new version is not ready")
        assert service.connections == {old: CLIENTS}  # they stay open
        os.kill(old.pid, signal.SIGTERM)
        until(lambda: service.ready == [new], "the old version is still ready")
        assert clients.is_alive()  # it was under load all the time
        clients.join(120)
        assert gone({old.pid})
        assert CLIENTS < answered(new) < CLIENTS * EACH - 100
    assert found["errors"] == {} and found["answered"] == CLIENTS * EACH


def answered(url: str) -> int:
    """Requests that a predictor gave boxes for."""
    text = requests.get(f"{url}/metrics", timeout=60).text
    name = 'predictor_requests_total{code="200",protocol="v1"} '
    counts = [row.removeprefix(name) for row in text.splitlines() if name in row]
    return int(float(counts[0])) if counts else 0
