"""Tests of starting the server: JSON logs, caches, bundled interventions, the OTLP endpoint."""

import errno
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from interventions.registry import Registry
from server.cli import launch
from server.config import ConfigurationError, Settings
from server.engine.torch.engine import TorchEngine
from tests.conftest import WriteArtifact
from tests.disk import FaultyDisk, watching
from tests.processes import ROOT, STOP_SECONDS, steerserve
from tests.tiny import SITES


def entries(log: str) -> list[dict[str, object]]:
    """Parse each line as JSON, and assert that it has the fields that every log entry has."""
    found = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in found)
    return found


def test_a_json_log_has_nothing_but_json(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    model = str(tiny_folders["llama"])
    with steerserve(tmp_path, "--model", model, "--log-format", "json") as server:
        body = {"model": "tiny-llama", "prompt": "secret words", "max_tokens": 3}
        answer = httpx.post(f"{server.url}/v1/completions", json=body)
        assert answer.status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(STOP_SECONDS) == 0
        log = server.log.read_text()
    told = [entry for entry in entries(log) if entry["logger"] == "steerserve.requests"]
    assert [entry["request_id"] for entry in told] == [answer.headers["x-request-id"]]
    assert told[0]["completion_tokens"] == 3
    assert "secret" not in log


def test_that_it_cannot_start_is_said_in_json_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "serve", "--registry", str(tmp_path)]
    ended = subprocess.run(
        [*command, "--model", str(tmp_path / "nowhere"), "--log-format", "json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    last = entries(ended.stderr)[-1]
    assert last["level"] == "CRITICAL"
    assert "nowhere" in str(last["message"])


def test_what_is_compiled_is_kept_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    launch._keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "steerserve" / "compiled")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    launch._keep_compiled()  # what an operator has set stays
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "steerserve" / "compiled")


async def test_loaded_objects_are_frozen_for_gc(
    tiny_engine: TorchEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[int] = []

    class Idle:
        started = True
        engine_died = False

        def __init__(self, _: object) -> None:
            pass

        def run(self) -> None:
            looked_at.append(len(gc.get_objects()))

    monkeypatch.setattr(launch, "_load_engine", lambda *_: tiny_engine)
    monkeypatch.setattr(launch, "Server", Idle)
    settings = Settings(model="tiny", registry=tmp_path, toxicity_scorer="none")
    loaded = len(gc.get_objects())
    try:
        assert launch._run(settings, lambda _: None)
    finally:
        gc.unfreeze()
    assert looked_at[0] < loaded / 100


def test_a_full_disk_stores_no_bundled_intervention_and_stops_no_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Registry(tmp_path / "registry") as registry:
        with watching(tmp_path / "registry", FaultyDisk(0, errno.ENOSPC, lasting=True).before):
            launch._add_bundled(registry)
        assert registry.entries() == []
        assert "detox-lineas is not stored. The registry's disk is full" in caplog.text
        launch._add_bundled(registry)
        names = [entry.name for entry in registry.entries()]
        assert names == ["detox-argre", "detox-dsas", "detox-lineas"]


def test_without_the_extra_the_endpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    with pytest.raises(ConfigurationError, match=r"steerserve\[otel\]"):
        launch.load_trace_sink("http://localhost:4318", with_content=False)


def test_another_module_that_is_missing_is_not_blamed_on_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "server.tracing", None)
    with pytest.raises(ModuleNotFoundError, match=r"server\.tracing"):
        launch.load_trace_sink("http://localhost:4318", with_content=False)


@pytest.mark.parametrize(
    "endpoint",
    ["localhost:4318", "ftp://x", "http://", "http://x:port", "http://[", "http://x/?a=b", "grpc"],
)
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match="http://localhost:4318"):
        launch.load_trace_sink(endpoint, with_content=False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--engine", "vllm", "--attention", "slabs"), "vllm does not have the setting attention"),
        (("--engine", "vllm", "--no-cuda-graphs"), "vllm does not have the setting cuda_graphs"),
        (("--vllm-args", "--enforce-eager"), "torch does not have the setting vllm_args"),
        (("--vllm-runner", "v2"), "torch does not have the setting vllm_runner"),
        (("--site", "x"), "torch does not have the setting sites"),
    ],
)
def test_a_setting_of_the_other_engine_ends_the_start(
    words: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "server", "serve", "--registry", str(tmp_path), *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert told in ended.stderr + ended.stdout


def test_the_sites_of_stored_interventions_are_those_of_all_that_are_still_there(
    registry: Registry,
    affine_artifact: WriteArtifact,
    reward_artifact: WriteArtifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry.add(reward_artifact("head"))
    assert launch._stored_sites(registry) == frozenset()
    registry.add(affine_artifact("maps"))
    assert launch._stored_sites(registry) == {*SITES}
    listed = registry.entries()
    monkeypatch.setattr(registry, "entries", lambda: listed)
    registry.delete("maps")  # as another server may between the list and a look at its items
    assert launch._stored_sites(registry) == frozenset()
