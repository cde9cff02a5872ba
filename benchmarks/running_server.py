"""`steerserve serve` in a process of its own, which benchmarks measure over HTTP."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import psutil

from benchmarks.decoding import BenchmarkError
from benchmarks.processes import ROOT

_START_SECONDS: Final = 300.0
_STOP_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers."""

    url: str
    process: psutil.Popen

    def metric(self, name: str) -> float:
        """Return the value of a metric without labels, by its name without the common prefix."""
        text = httpx.get(f"{self.url}/metrics").raise_for_status().text
        begin = f"steerserve_{name} "
        lines = (line for line in text.splitlines() if line.startswith(begin))
        return float(next(lines).removeprefix(begin))

    def wait_for_zero(self, name: str) -> None:
        """Wait until a metric is zero."""
        while self.metric(name):
            time.sleep(_POLL_SECONDS)


@contextmanager
def running_server(model: str, *options: str) -> Iterator[RunningServer]:
    """Yield a server with a registry of its own, which has compiled all that it wants to.

    Raises:
        BenchmarkError: the server did not start.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        log = Path(folder) / "server.log"
        registry = str(Path(folder) / "registry")
        command = [sys.executable, "-m", "server", "serve", "--model", model, "--port", port]
        with log.open("wb") as output:
            process = psutil.Popen(
                [*command, "--registry", registry, *options],
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            server = RunningServer(f"http://127.0.0.1:{port}", process)
            _wait_until_ready(server, log)
            server.wait_for_zero("engine_compiling")
            yield server
            process.terminate()
            process.wait(_STOP_SECONDS)
        finally:
            with suppress(psutil.NoSuchProcess):  # it has ended, as it was told to
                process.kill()
            process.wait()


def _wait_until_ready(server: RunningServer, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while server.process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{server.url}/ready", timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(_POLL_SECONDS)
    raise BenchmarkError(f"the server did not start:\n{log.read_text(errors='replace')}")
