"""Fixtures that serve a tiny random model with the real engine and the real application.

Interventions (affine maps or reward heads) are stored in a registry and named by their digest.
"""

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Protocol

# Triton reads this when it is imported (transformers does that): without a GPU, it then
# interprets its kernels on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")

import httpx
import hypothesis
import pytest
import torch
from pydantic import JsonValue

from interventions.artifact import write_artifact
from interventions.registry import Registry
from server.engine.output import StepOutput
from server.engine.torch.engine import TorchEngine
from server.engine.torch.loaded_interventions import Parameters
from server.engine.torch.model.loader import LoadedModel, load_model
from server.engine.torch.options import EngineOptions
from tests.engines import close_checked
from tests.manifests import manifest_of
from tests.serving import Script, ScriptedGeneration, build_app
from tests.tiny import CHAT_TEMPLATE, random_head, random_maps, save_families, save_tiny
from tests.tool_templates import write_templates

# Threads do not speed up operations on tiny tensors, and wait for each other on a busy machine.
torch.set_num_threads(1)

# A busy machine takes longer than Hypothesis' 200 ms for an example now and then.
hypothesis.settings.register_profile("steerserve", deadline=None)
hypothesis.settings.load_profile("steerserve")

TINY_OPTIONS = EngineOptions(
    kv_cache_gb=0.02, max_batch_tokens=64, max_batch_size=32, check_invariants=True
)


class LoadTiny(Protocol):
    """Loads a tiny model in float32: a new one each time, since engines put hooks into theirs."""

    def __call__(self, family: str = "llama") -> LoadedModel: ...


class StartEngine(Protocol):
    """Starts an engine on a tiny model, with the given interventions by digest."""

    async def __call__(
        self,
        interventions: Mapping[str, Parameters],
        family: str = "llama",
        options: EngineOptions = TINY_OPTIONS,
    ) -> TorchEngine: ...


class WriteArtifact(Protocol):
    """Writes an artifact that fits the tiny Llama."""

    def __call__(
        self,
        name: str,
        seed: int = 0,
        limits: dict[str, tuple[float, float]] | None = None,
    ) -> Path: ...


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Save a tiny random model of each family, and a Llama with a chat template; return folders."""
    root = tmp_path_factory.mktemp("models")
    folders = save_families(root)
    folders["llama-chat"] = save_tiny(root / "tiny-chat", chat_template=CHAT_TEMPLATE)
    return folders


@pytest.fixture(scope="session")
def load_tiny(tiny_folders: Mapping[str, Path]) -> LoadTiny:
    """Read each family from its folder once: to copy a model is several times as fast."""

    @cache
    def read(family: str) -> LoadedModel:
        return load_model(str(tiny_folders[family]), dtype="float32")

    def load(family: str = "llama") -> LoadedModel:
        return deepcopy(read(family))

    return load


@pytest.fixture
async def start_engine(load_tiny: LoadTiny) -> AsyncIterator[StartEngine]:
    engines: list[TorchEngine] = []

    async def start(
        interventions: Mapping[str, Parameters],
        family: str = "llama",
        options: EngineOptions = TINY_OPTIONS,
    ) -> TorchEngine:
        engine = TorchEngine(load_tiny(family), interventions.__getitem__, options)
        engines.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in engines:
        await close_checked(engine)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
async def tiny_engine(load_tiny: LoadTiny, registry: Registry) -> AsyncIterator[TorchEngine]:
    """Start an engine on the tiny Llama that reads its interventions from `registry`."""
    engine = TorchEngine(load_tiny(), lambda digest: registry.load(digest).parameters, TINY_OPTIONS)
    await engine.start()
    yield engine
    await close_checked(engine)


@pytest.fixture
def affine_artifact(tmp_path: Path, load_tiny: LoadTiny) -> WriteArtifact:
    """Return a function that writes random affine maps that fit the tiny Llama."""

    def write(
        name: str, seed: int = 0, limits: dict[str, tuple[float, float]] | None = None
    ) -> Path:
        path = tmp_path / f"{name}-{seed}.safetensors"
        parameters = random_maps(seed)
        write_artifact(
            path, manifest_of(parameters, load_tiny().description, name, limits), parameters
        )
        return path

    return write


@pytest.fixture
def reward_artifact(tmp_path: Path, load_tiny: LoadTiny) -> WriteArtifact:
    """Return a function that writes a random reward head that fits the tiny Llama."""

    def write(
        name: str, seed: int = 0, limits: dict[str, tuple[float, float]] | None = None
    ) -> Path:
        path = tmp_path / f"{name}-{seed}.safetensors"
        parameters = random_head(seed)
        write_artifact(
            path, manifest_of(parameters, load_tiny().description, name, limits), parameters
        )
        return path

    return write


class MakeClient(Protocol):
    """Makes a client of an application that has the given settings and runs on the tiny engine."""

    def __call__(self, **settings: JsonValue) -> httpx.AsyncClient: ...


@pytest.fixture
async def make_client(tiny_engine: TorchEngine, registry: Registry) -> AsyncIterator[MakeClient]:
    clients: list[httpx.AsyncClient] = []

    def make(**settings: JsonValue) -> httpx.AsyncClient:
        app = build_app(tiny_engine, registry, None, **settings)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://localhost"))
        return clients[-1]

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
def client(make_client: MakeClient) -> httpx.AsyncClient:
    """Make a client of an application with the default settings; the model is called "tiny"."""
    return make_client()


@pytest.fixture
async def chat_engine(load_tiny: LoadTiny, registry: Registry) -> AsyncIterator[TorchEngine]:
    """Start an engine on the tiny Llama with a chat template."""
    engine = TorchEngine(
        load_tiny("llama-chat"), lambda digest: registry.load(digest).parameters, TINY_OPTIONS
    )
    await engine.start()
    yield engine
    await close_checked(engine)


@pytest.fixture
async def chat_client(
    chat_engine: TorchEngine, registry: Registry
) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=build_app(chat_engine, registry))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.fixture
def script(chat_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Make `chat_engine` record its requests, and answer the only one with "one"."""
    script = Script([ScriptedGeneration((StepOutput((1,), "one", finish_reason="stop"),))])
    monkeypatch.setattr(chat_engine, "submit", script.submit)
    return script


@pytest.fixture
async def tool_engine(
    load_tiny: LoadTiny, registry: Registry, tmp_path: Path
) -> AsyncIterator[TorchEngine]:
    """Start an engine whose templates, given by the operator, know tools and reasoning."""
    options = replace(TINY_OPTIONS, templates=write_templates(tmp_path))
    engine = TorchEngine(load_tiny(), lambda digest: registry.load(digest).parameters, options)
    await engine.start()
    yield engine
    await close_checked(engine)


@pytest.fixture
async def tool_client(
    tool_engine: TorchEngine, registry: Registry
) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=build_app(tool_engine, registry))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.fixture
def tool_script(tool_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Make `tool_engine` record its requests, and answer them as the test says."""
    script = Script([])
    monkeypatch.setattr(tool_engine, "submit", script.submit)
    return script
