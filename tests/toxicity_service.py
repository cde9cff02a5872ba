"""Runs a fake toxicity scoring service over HTTP, on a thread of the test's process."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Service:
    """Makes the service's answers and records the texts of each request.

    After `hold`, requests wait until `go_on` is set.
    """

    answer: Callable[[list[str]], tuple[int, bytes]]
    url: str = ""
    asked: list[list[str]] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def hold(self) -> None:
        """Make the next requests wait for `go_on`."""
        self.arrived.clear()
        self.go_on.clear()


def by_length(texts: list[str]) -> tuple[int, bytes]:
    """Return a valid answer, in which a text's score is a hundredth of its length."""
    return 200, json.dumps({"scores": [len(text) / 100 for text in texts]}).encode()


@contextmanager
def scoring_service(
    answer: Callable[[list[str]], tuple[int, bytes]] = by_length,
) -> Iterator[Service]:
    """Run a service on a free port of this machine."""
    service = Service(answer)
    service.go_on.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert set(body) == {"texts"}
            service.asked.append(body["texts"])
            service.arrived.set()
            assert service.go_on.wait(60)
            status, content = service.answer(body["texts"])
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None:
            """Log nothing, since `asked` records the requests."""

        def handle(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # a client that was killed
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_address[1]}/score"
    # server_close() then waits for the requests' threads, so that none outlives the test.
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield service
    finally:
        service.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()
