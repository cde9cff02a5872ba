"""Runs a real nginx with the committed configuration, in front of a test's servers."""

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
FAIL_SECONDS = 2  # time in which nginx sends nothing to a failed server (its fail_timeout)
START_SECONDS = 20
STOP_SECONDS = 20

# A main configuration like a distribution's, which includes the committed file. Workers keep the
# user that owns the test's folder.
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
    """One request's line in the access log: the servers tried, in order, and the result."""

    method: str
    path: str
    status: int
    addresses: tuple[str, ...]
    statuses: tuple[str, ...]
    sent: tuple[int, ...]  # bytes sent to each of `addresses`


@dataclass(frozen=True)
class NginxProcess:
    """A running nginx."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path

    def passages(self) -> list[Passage]:
        """Return the requests that have ended, in the order in which they ended."""
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
    """Write the committed configuration with another port, log folder and list of servers.

    Args:
        servers: host:port of each; they get parameters like those of the committed list.
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
    """Return how long nginx keeps an idle connection to a server, by the configuration."""
    (value,) = re.findall(
        r"upstream steerserve \{.*?^    keepalive_timeout (\d+)s;.*?^\}",
        CONFIGURATION.read_text(),
        re.DOTALL | re.MULTILINE,
    )
    return float(value)


@contextmanager
def nginx(folder: Path, servers: Sequence[str]) -> Iterator[NginxProcess]:
    """Run nginx in front of servers, given as host:port; they need not have started."""
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
        process.terminate()  # not kill(), which its worker processes would outlive
        assert process.wait(STOP_SECONDS) == 0


def _wait(process: subprocess.Popen[bytes], url: str, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "output.log").read_text()
        try:
            httpx.get(f"{url}/metrics", timeout=2)  # a path that nginx answers itself
        except httpx.TransportError:
            time.sleep(0.02)
        else:
            return
    raise TimeoutError((folder / "error.log").read_text())


def _values(text: str) -> tuple[str, ...]:
    """Return the values of each try, which nginx separates by commas, or by colons."""
    return tuple(value for value in re.split(", | : ", text) if value != "-")
