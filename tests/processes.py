"""Starts the `steerserve` command as a user does, in a process of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import httpx

ROOT = Path(__file__).parent.parent
START_SECONDS = 240  # a busy machine takes long to import torch
STOP_SECONDS = 60


@dataclass(frozen=True)
class ServerProcess:
    """A running server, its address, and the file that its output goes to."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait_until_ready(self) -> None:
        """Wait for /ready, or fail with what the server printed."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/ready", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text())


@contextmanager
def steerserve(
    folder: Path,
    *arguments: str,
    module: str = "server",
    env: Mapping[str, str] = MappingProxyType({}),
    port: int | None = None,
    registry: Path | None = None,
) -> Iterator[ServerProcess]:
    """Run `steerserve serve`, on a free port if none is given, with its log in `folder`.

    The registry is in `folder` too unless one is given. A server that the test has not stopped
    itself must stop cleanly at the end.
    """
    port = free_port() if port is None else port
    command = [sys.executable, "-m", module, "serve", "--port", str(port), *arguments]
    log = folder / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--registry", str(registry or folder / "registry")],
            cwd=ROOT,
            # Layers are not compiled, because compiling would take processor time from the tests.
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "STEERSERVE_COMPILE_LAYERS": "false",
                **env,
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    server = ServerProcess(process, f"http://127.0.0.1:{port}", log)
    try:
        server.wait_until_ready()
        yield server
        if process.poll() is None:
            process.terminate()
            assert process.wait(STOP_SECONDS) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
