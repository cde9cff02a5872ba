"""Runs a real Prometheus in a process of its own, and queries it."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml

from server.variables import TEST_ALL

FOLDER = Path(__file__).parent.parent / "docker" / "prometheus"
START_SECONDS = 30
STOP_SECONDS = 30
QUERY_SECONDS = 30


def tool(name: str) -> str:
    """Return the path of a program that is not installed by pip; skip the test if it is missing.

    With STEERSERVE_TEST_ALL set, a missing program fails the test instead.
    """
    path = shutil.which(name)
    if path is None and TEST_ALL.read():
        pytest.fail(f"{name} is not installed, and STEERSERVE_TEST_ALL is set")
    if path is None:
        pytest.skip(f"{name} is not installed (Debian has it)")
    return path


@dataclass(frozen=True)
class Series:
    """A series' labels, and its points as (seconds since the epoch, value)."""

    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]


class Prometheus:
    """A client of Prometheus's HTTP API; a query that Prometheus refuses fails the test."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=f"{url}/api/v1/", timeout=QUERY_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def query(self, expression: str) -> list[Series]:
        """Evaluate an expression now: one point for each series."""
        found = self.get("query", query=expression)["result"]
        return [Series(item["metric"], (_point(item["value"]),)) for item in found]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        """Evaluate an expression from `start` to `end`, in seconds since the epoch."""
        times = {"start": str(start), "end": str(end), "step": str(step)}
        found = self.get("query_range", query=expression, **times)["result"]
        return [Series(item["metric"], tuple(map(_point, item["values"]))) for item in found]

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data at a path under /api/v1."""
        body = self._client.get(path, params=parameters).json()
        assert body["status"] == "success", (body["error"], parameters)
        return body["data"]


def _point(pair: list[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


def fill_in(text: str, values: Mapping[str, str]) -> str:
    """Replace `$name` and `${name}`, as Grafana does before a query."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values[found[1] or found[2]], text)


@dataclass(frozen=True)
class PrometheusProcess:
    """A running Prometheus."""

    process: subprocess.Popen[bytes]
    api: Prometheus
    log: Path

    def wait_for(self, expression: str, seconds: float) -> list[Series]:
        """Wait until a query returns a series, or fail after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = self.api.query(expression)
            if found:
                return found
            time.sleep(0.1)
        raise TimeoutError(f"{expression} gives nothing: {self.log.read_text()}")


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[PrometheusProcess]:
    """Run a Prometheus with the project's rules that scrapes `target` (host:port) every second."""
    program = tool("prometheus")
    log = folder / "prometheus.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={_write_config(folder, target)}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        with Prometheus(_wait_until_ready(process, log)) as api:
            yield PrometheusProcess(process, api, log)
        process.terminate()
        assert process.wait(STOP_SECONDS) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def _write_config(folder: Path, target: str) -> Path:
    """Write docker/prometheus/local.yml with another target and a scrape each second."""
    config = yaml.safe_load((FOLDER / "local.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / path) for path in config["rule_files"]]
    (scraped,) = config["scrape_configs"]
    scraped["static_configs"] = [{"targets": [target]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until Prometheus answers, and return its address, whose port it has chosen itself."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        found = re.search(r'"?Listening on"? address=(\S+)', log.read_text())
        try:
            if found and httpx.get(f"http://{found[1]}/-/ready", timeout=2).status_code == 200:
                return f"http://{found[1]}"
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise TimeoutError(log.read_text())
