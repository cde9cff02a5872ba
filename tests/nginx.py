"""A real nginx with the committed configuration, in front of servers that a test has started."""

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.processes import free_port
from tests.prometheus import tool

FOLDER = Path(__file__).parent.parent / "docker" / "nginx"
CONFIGURATION = FOLDER / "steerserve.conf"
SERVERS = FOLDER / "servers.conf"
FAIL_SECONDS = 2  # for which nginx sends nothing to a server that has failed, as in servers.conf
START_SECONDS = 20
STOP_SECONDS = 20

# What a distribution's own nginx.conf has around the committed file. Workers keep the user that
# owns the test's folder.
_MAIN = """
daemon off;
user root;
worker_processes 2;
pid nginx.pid;
error_log error.log info;
events {}
http {
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include steerserve.conf;
}
"""
_LINE = re.compile(
    r'^\S+ "(?P<method>\S+) (?P<path>\S+)" (?P<status>\d+) time=\S+ addr=\[(?P<addresses>.*?)\] '
    r"status=\[(?P<statuses>.*?)\] sent=\[(?P<sent>.*?)\] id=(?P<id>\S+)$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Passage:
    """One request's line in the log: where it was tried, in order, and how it ended."""

    method: str
    path: str
    status: int
    addresses: tuple[str, ...]
    statuses: tuple[str, ...]
    sent: tuple[int, ...]  # bytes, to each


@dataclass(frozen=True)
class NginxProcess:
    """A running nginx."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path

    def passages(self) -> list[Passage]:
        """The requests that have ended, in the order of their ends."""
        log = (self.folder / "access.log").read_text()
        found = list(_LINE.finditer(log))
        assert len(found) == len(log.splitlines()), log
        return [
            Passage(
                line["method"],
                line["path"],
                int(line["status"]),
                _values(line["addresses"]),
                _values(line["statuses"]),
                tuple(map(int, _values(line["sent"]))),
            )
            for line in found
        ]


def write_configuration(folder: Path, port: int, servers: Sequence[str]) -> Path:
    """The committed configuration with other places: the port, the log and the servers.

    Args:
        servers: host:port of each; the parameters are those of the committed list.
    """
    text = CONFIGURATION.read_text()
    for given, other in (
        ("listen 8080;", f"listen 127.0.0.1:{port};"),
        ("/var/log/nginx/", ""),
    ):
        assert text.count(given) == 1
        text = text.replace(given, other)
    (folder / "steerserve").mkdir(parents=True)
    (folder / "steerserve.conf").write_text(text)
    parameters = f"max_fails=1 fail_timeout={FAIL_SECONDS}s"
    lines = [f"server {server} {parameters};\n" for server in servers]
    (folder / "steerserve" / "servers.conf").write_text("".join(lines))
    path = folder / "nginx.conf"
    path.write_text(_MAIN)
    return path


def idle_seconds() -> float:
    """How long nginx keeps a connection to a server that no request needs."""
    (value,) = re.findall(
        r"upstream steerserve \{.*?^    keepalive_timeout (\d+)s;.*?^\}",
        CONFIGURATION.read_text(),
        re.DOTALL | re.MULTILINE,
    )
    return float(value)


@contextmanager
def nginx(folder: Path, servers: Sequence[str]) -> Iterator[NginxProcess]:
    """nginx in front of servers, each as host:port, none of which has to be there yet."""
    port = free_port()
    path = write_configuration(folder, port, servers)
    with (folder / "output.log").open("ab") as output:
        process = subprocess.Popen(
            [tool("nginx"), "-p", str(folder), "-c", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}", folder)
        yield NginxProcess(process, f"http://127.0.0.1:{port}", folder)
    finally:
        process.terminate()  # no more than that: its workers would outlive it
        assert process.wait(STOP_SECONDS) == 0


def _wait(process: subprocess.Popen[bytes], url: str, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "output.log").read_text()
        try:
            httpx.get(f"{url}/metrics", timeout=2)  # which nginx answers itself
        except httpx.TransportError:
            time.sleep(0.02)
        else:
            return
    raise TimeoutError((folder / "error.log").read_text())


def _values(text: str) -> tuple[str, ...]:
    """Of one try each: nginx separates them by commas, or by colons after an error page."""
    return tuple(value for value in re.split(", | : ", text) if value != "-")
