"""A new version takes over under load, and no request is lost.

Kubernetes is stood in for by a small proxy: it sends requests, each once, to whatever
backend last said that it is ready.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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


class Service(ThreadingHTTPServer):
    """Passes requests on to the ready ones of its backends, in turns."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.backends: list[str] = []
        self.ready: list[str] = []
        self.sent: Counter = Counter()
        self.in_flight: Counter = Counter()
        self.closed = threading.Event()
        self.lock = threading.Lock()

    def watch(self) -> None:
        """Ask all backends, every PERIOD, as the kubelet does."""
        while not self.closed.wait(PERIOD):
            self.ready = [url for url in self.backends if is_ready(url)]

    @contextlib.contextmanager
    def chosen(self):
        """A backend for one request."""
        with self.lock:
            url = self.ready[sum(self.sent.values()) % len(self.ready)]
            self.sent[url] += 1
            self.in_flight[url] += 1
        try:
            yield url
        finally:
            with self.lock:
                self.in_flight[url] -= 1


def is_ready(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{url}/v2/health/ready", timeout=10).ok
    return False


class Request(BaseHTTPRequestHandler):
    """One connection of a client, and one to each backend that it is passed on to."""

    protocol_version = "HTTP/1.1"  # both stay open from request to request
    server: Service

    def setup(self) -> None:
        super().setup()
        self.session = requests.Session()

    def finish(self) -> None:
        self.session.close()
        super().finish()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {"Content-Type": self.headers["Content-Type"]}
        try:
            with self.server.chosen() as url:
                answer = self.session.post(
                    url + self.path, data=body, headers=headers, timeout=60
                )
            status, content = answer.status_code, answer.content
        except (requests.RequestException, ZeroDivisionError) as error:
            status, content = 502, str(error).encode()  # nobody is asked again
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def service():
    with Service() as one:
        for target in (one.serve_forever, one.watch):
            threading.Thread(target=target, daemon=True).start()
        yield one
        one.closed.set()
        one.shutdown()


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
    url = f"http://127.0.0.1:{service.server_address[1]}"
    bodies = [body_of(jpeg(64, 64, seed=seed)) for seed in range(3)]

    def put_load() -> None:
        found.update(load(url, MODEL, bodies, CLIENTS, EACH))

    flags = {"engine": "openvino", "drain_delay": 3}  # s, as in the manifest
    with predictor(small, **flags) as old, predictor(small, **flags) as new:
        service.backends.append(old)
        until(lambda: service.ready == [old], "the old version is not ready")
        clients = threading.Thread(target=put_load)
        clients.start()
        until(lambda: service.sent[old] >= 100, "no load")
        service.backends.append(new)
        until(lambda: new in service.ready, "the new version is not ready")
        until(lambda: service.in_flight[old] > 1, "nothing in flight")
        os.kill(old.pid, signal.SIGTERM)
        signalled = service.sent.copy()
        until(lambda: service.ready == [new], "the old version is still ready")
        assert clients.is_alive()  # it was under load all the time
        clients.join(120)
        assert gone({old.pid})
    assert found["errors"] == {} and found["answered"] == CLIENTS * EACH
    assert service.sent[old] >= signalled[old] > 100
    assert service.sent[new] > CLIENTS
    assert sum(service.sent.values()) == CLIENTS * EACH
