"""(d) How long clients wait for tokens under a mixed load, over HTTP, as `steerserve bench`."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import httpx

from benchmarks.core import POLL_SECONDS, BenchmarkError
from benchmarks.models import default_dtype, model_folder
from benchmarks.options import Options
from benchmarks.processes import ROOT
from benchmarks.report import Section
from server.cli.bench_client import BenchClient, BenchError
from server.cli.bench_run import BenchPlan, run

START_SECONDS = 300.0
STOP_SECONDS = 60.0


def measure_latency(options: Options) -> Section:
    """Against `steerserve serve` with its default settings, in a process of its own.

    Raises:
        BenchmarkError: the server did not start, or refused something.
    """
    plan = BenchPlan(
        ("latency",),
        options.batches,
        options.latency_tokens,
        options.fewer_rounds,
        long_prompt_tokens=options.long_prompt_tokens,
        prompt_tokens=options.prompt_tokens,
    )
    with _server(options.model) as url:
        try:
            report = run(BenchClient(url, None), None, plan)
        except BenchError as error:
            raise BenchmarkError(f"the server cannot be measured: {error}") from error
    return Section(
        "latency",
        "Waiting for tokens under mixed load",
        f"{options.model}, over HTTP: {plan.clients} clients send prompts of about "
        f"{plan.prompt_tokens} tokens, {plan.tokens} new tokens each, every other client steered. "
        f"In every other phase a prompt of about {plan.long_prompt_tokens} tokens comes as soon as "
        f"the one before it is answered, every other one steered. {plan.rounds} rounds of both "
        "phases. The clients share the machine with the server.",
        default_dtype(model_folder(options.model)),
        report.tables(),
        {"plan": asdict(plan), "latency": report.json()["latency"]},
    )


def at_full_speed(url: str) -> None:
    """Wait until the server runs as fast as it ever will."""
    done = "\nsteerserve_engine_compiling 0.0\n"
    while done not in httpx.get(f"{url}/metrics").raise_for_status().text:
        time.sleep(POLL_SECONDS)


@contextmanager
def _server(model: str) -> Iterator[str]:
    """`steerserve serve` with a registry of its own; its address."""
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        url = f"http://127.0.0.1:{port}"
        log = Path(folder) / "server.log"
        command = [sys.executable, "-m", "server", "serve", "--model", model, "--port", str(port)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--registry", str(Path(folder) / "registry")],
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            _wait_until_ready(process, url, log)
            at_full_speed(url)
            yield url
            process.terminate()
            process.wait(STOP_SECONDS)
        finally:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_SECONDS)
    raise BenchmarkError(f"the server did not start:\n{log.read_text(errors='replace')}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
