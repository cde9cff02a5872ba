"""Tests the committed configuration of nginx: where it sends requests, which it repeats.

The servers behind nginx are imitations, which can fail at a chosen moment as a killed server does.
tests/docker/test_replicas.py runs real servers.
"""

import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.limits import MULTIPART_OVERHEAD
from server.config import Settings
from tests.nginx import (
    CONFIGURATION,
    FAIL_SECONDS,
    SERVERS,
    NginxProcess,
    idle_seconds,
    nginx,
    write_configuration,
)
from tests.processes import free_port
from tests.prometheus import tool


@dataclass(frozen=True)
class Seen:
    """A request as a server received it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    client: tuple[str, int]


Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Imitation:
    """A server that handles each request with `answer`, and records it."""

    address: str
    answer: Answer
    seen: list[Seen] = field(default_factory=list)


def answers(status: int = 200, body: bytes = b'{"ok": true}') -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def dies(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without an answer, like a server that is killed during a request."""
    handler.close_connection = True


@contextmanager
def imitation(answer: Answer) -> Iterator[Imitation]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            imitated.seen.append(Seen(self.command, self.path, headers, body, self.client_address))
            imitated.answer(self)

        do_GET = do_POST = do_DELETE = handle_any  # noqa: N815  # names of http.server's

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Log nothing, to keep the output of the tests readable."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        host, port = server.server_address[:2]
        imitated = Imitation(f"{host!s}:{port}", answer)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield imitated
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class Stand:
    """An nginx, the imitations behind it, and a client of the nginx."""

    nginx: NginxProcess
    servers: tuple[Imitation, ...]
    client: httpx.Client

    def seen(self) -> list[Seen]:
        return [seen for server in self.servers for seen in server.seen]


@contextmanager
def stand(folder: Path, *servers: Answer | None) -> Iterator[Stand]:
    """Run nginx in front of imitations; None stands for a server that does not run."""
    with ExitStack() as stack:
        imitations = [
            Imitation(f"127.0.0.1:{free_port()}", dies)
            if answer is None
            else stack.enter_context(imitation(answer))
            for answer in servers
        ]
        balancer = stack.enter_context(nginx(folder, [each.address for each in imitations]))
        client = stack.enter_context(httpx.Client(base_url=balancer.url, timeout=30))
        yield Stand(balancer, tuple(imitations), client)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


CHANGES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/interventions"),
    ("DELETE", "/v1/interventions/x"),
]


def test_nginx_takes_the_configuration(tmp_path: Path) -> None:
    path = write_configuration(tmp_path, 8080, ["127.0.0.1:8000", "127.0.0.1:8001"])
    run_nginx_test(tmp_path, path)


def test_nginx_takes_the_list_of_servers_but_for_what_only_newer_ones_know(tmp_path: Path) -> None:
    path = write_configuration(tmp_path, 8080, [])
    text, found = re.subn("steerserve-[12]:8000 resolve", "127.0.0.1:8000", SERVERS.read_text())
    text, resolvers = re.subn("^resolver .*;$", "", text, flags=re.MULTILINE)
    assert (found, resolvers) == (2, 1)
    (tmp_path / "steerserve" / "servers.conf").write_text(text)
    run_nginx_test(tmp_path, path)
    assert len(re.findall(rf"max_fails=1 fail_timeout={FAIL_SECONDS}s;$", text, re.MULTILINE)) == 2


def run_nginx_test(folder: Path, path: Path) -> None:
    command = [tool("nginx"), "-t", "-p", str(folder), "-c", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0, ran.stderr
    assert "[warn]" not in ran.stderr.replace('[warn] the "user" directive makes sense', "")


def test_requests_go_round(tmp_path: Path) -> None:
    with stand(tmp_path, answers(), answers(), answers()) as there:
        for _ in range(9):
            there.client.post("/v1/completions", json={}).raise_for_status()
        # nginx's workers share which servers fail, but each worker counts its own round robin.
        assert all(2 <= len(server.seen) <= 4 for server in there.servers)


@pytest.mark.parametrize(("method", "path"), [*CHANGES, ("GET", "/v1/models")])
def test_a_request_that_was_not_begun_goes_to_the_next_server(
    tmp_path: Path, method: str, path: str
) -> None:
    with stand(tmp_path, None, answers()) as there:
        for _ in range(6):
            answer = there.client.request(method, path)
            assert (answer.status_code, answer.json()) == (200, {"ok": True})
        assert len(there.seen()) == 6
        tries = [passage for passage in there.nginx.passages() if len(passage.addresses) > 1]
        assert tries
        assert all(passage.sent[0] == 0 for passage in tries)


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_a_request_that_may_have_been_begun_is_never_repeated(
    tmp_path: Path, method: str, path: str
) -> None:
    with stand(tmp_path, dies, answers()) as there:
        statuses: list[int] = []
        for _ in range(6):
            answer = there.client.request(method, path, headers={"Number": str(len(statuses))})
            statuses.append(answer.status_code)
            if answer.status_code != 200:
                assert answer.status_code == 502
                assert error_of(answer)["code"] == "server_lost"
        assert statuses.count(502) >= 1
        numbers = [seen.headers["number"] for seen in there.seen()]
        assert sorted(numbers) == [str(number) for number in range(6)]
        lost = [each for each in there.nginx.passages() if each.status == 502]
        assert all(len(passage.addresses) == 1 and passage.sent[0] > 0 for passage in lost)


def test_what_changes_nothing_is_repeated(tmp_path: Path) -> None:
    with stand(tmp_path, dies, answers()) as there:
        for _ in range(6):
            assert there.client.get("/v1/models").status_code == 200
        assert len(there.servers[0].seen) >= 1


@pytest.mark.parametrize(("method", "path"), [*CHANGES, ("GET", "/v1/models")])
def test_without_a_server_the_error_is_in_the_envelope(
    tmp_path: Path, method: str, path: str
) -> None:
    with stand(tmp_path, None, None) as there:
        for _ in range(3):  # after the first, nginx tries neither: both count as failed
            answer = there.client.request(method, path)
            assert answer.status_code == 502
            assert error_of(answer)["code"] == "server_lost"


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_the_servers_own_errors_pass_and_end_nothing(tmp_path: Path, status: int) -> None:
    """A 503 may come after generation, for example if the toxicity score fails: never repeat it."""
    body = b'{"error": {"message": "m", "type": "t", "param": null, "code": "its own"}}'
    with stand(tmp_path, answers(status, body), answers(status, body)) as there:
        for number in range(1, 6):
            for method, path in CHANGES:
                answer = there.client.request(method, path)
                assert (answer.status_code, answer.content) == (status, body)
            assert len(there.seen()) == number * len(CHANGES)


def test_servers_see_the_clients_host_and_that_there_is_a_proxy(tmp_path: Path) -> None:
    with stand(tmp_path, answers()) as there:
        for method, path in [*CHANGES, ("GET", "/ready")]:
            headers = {"Host": "llm.example.org:8443", "Connection": "close"}
            there.client.request(method, path, headers=headers)
        assert len(there.seen()) == len(CHANGES) + 1
        for seen in there.seen():
            assert seen.headers["host"] == "llm.example.org"
            assert seen.headers["x-forwarded-for"] == "127.0.0.1"
            assert seen.headers["x-forwarded-proto"] == "http"
            assert "connection" not in seen.headers


def test_connections_to_servers_are_kept(tmp_path: Path) -> None:
    with stand(tmp_path, answers()) as there:
        for _ in range(10):
            there.client.post("/v1/completions", json={})
        assert (
            len({seen.client for seen in there.seen()}) <= 2
        )  # one for each of nginx's two workers


def test_tokens_are_not_held_back(tmp_path: Path) -> None:
    read = threading.Event()
    waited = []

    def stream(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"9\r\ndata: 1\n\n\r\n")
        waited.append(read.wait(20))
        handler.wfile.write(b"0\r\n\r\n")

    with (
        stand(tmp_path, stream) as there,
        there.client.stream("POST", "/v1/completions", json={}) as answer,
    ):
        pieces = answer.iter_raw()
        assert next(pieces) == b"data: 1\n\n"
        read.set()
        assert list(pieces) == []
    assert waited == [True]


def test_an_answer_that_had_begun_is_cut_off_and_not_given_anew(tmp_path: Path) -> None:
    def begin_and_die(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b"begun")
        handler.close_connection = True

    with stand(tmp_path, begin_and_die, begin_and_die) as there:
        for method, path in [("POST", "/v1/completions"), ("GET", "/v1/models")]:
            with pytest.raises(httpx.RemoteProtocolError):
                there.client.request(method, path)
        assert len(there.seen()) == 2


def test_bodies_pass_whole_up_to_the_largest_artifact(tmp_path: Path) -> None:
    largest = Settings().max_artifact_bytes + MULTIPART_OVERHEAD
    with stand(tmp_path, None, answers()) as there:
        body = bytes(range(256)) * 20_000
        for _ in range(4):
            there.client.post("/v1/interventions", content=body)
        assert [seen.body == body for seen in there.seen()] == [True] * 4
        host, port = there.nginx.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as client:
            head = "POST /v1/interventions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n"
            client.sendall(head.format(limit_in_bytes() + 1).encode())
            refused = client.recv(4096)
        assert refused.startswith(b"HTTP/1.1 413 ")
        assert b'"code": "request_too_large"' in refused
        assert largest < limit_in_bytes() < largest + 2**20


def limit_in_bytes() -> int:
    (megabytes,) = re.findall(r"client_max_body_size (\d+)m;", CONFIGURATION.read_text())
    return int(megabytes) * 2**20


def test_each_server_has_its_own_metrics(tmp_path: Path) -> None:
    with stand(tmp_path, answers()) as there:
        answer = there.client.get("/metrics")
        assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_url")
        assert not there.seen()


def test_ready_is_of_any_server_and_takes_none_out(tmp_path: Path) -> None:
    def not_ready(handler: BaseHTTPRequestHandler) -> None:
        answers(503 if handler.path == "/ready" else 200)(handler)

    with stand(tmp_path, not_ready, answers()) as there:
        for _ in range(4):
            assert there.client.get("/ready").status_code == 200
        for _ in range(8):
            there.client.post("/v1/completions", json={})
        assert all(
            len([seen for seen in server.seen if seen.method == "POST"]) >= 2
            for server in there.servers
        )


def test_ready_says_no_where_no_server_is(tmp_path: Path) -> None:
    with stand(tmp_path, answers(503), answers(503)) as there:
        assert [there.client.get("/ready").status_code for _ in range(3)] == [503, 502, 502]


def test_a_server_that_comes_back_is_used_again(tmp_path: Path) -> None:
    with stand(tmp_path, answers(), answers()) as there:
        there.servers[0].answer = dies
        lost = 0
        for _ in range(10):
            lost += there.client.post("/v1/completions", json={}).status_code == 502
        # While a failure counts (`fail_timeout`), the server gets no further request.
        assert lost == len(there.servers[0].seen) <= 2
        there.servers[0].answer = answers()
        time.sleep(FAIL_SECONDS + 1)
        before = len(there.servers[0].seen)
        for _ in range(6):
            assert there.client.post("/v1/completions", json={}).status_code == 200
        assert len(there.servers[0].seen) - before >= 2


def test_times_suit_those_of_the_servers() -> None:
    settings = Settings()
    assert seconds("proxy_read_timeout") > settings.request_timeout
    assert seconds("client_body_timeout") == settings.body_timeout
    assert seconds("send_timeout") == settings.write_timeout
    assert idle_seconds() < settings.keep_alive


def seconds(directive: str) -> float:
    (value,) = re.findall(rf"^ *{directive} (\w+);", CONFIGURATION.read_text(), re.MULTILINE)
    number, unit = value[:-1], value[-1]
    return int(number) * {"s": 1, "m": 60}[unit]
