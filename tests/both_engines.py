"""Starts either engine on the same model, with the same limits and interventions.

Tests of what both must do take the fixture `subject`, and one of the marks at the end of this file.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import pytest

from interventions.registry import Registry
from server.engine.base import Engine
from server.engine.errors import BankFullError, QueueFullError
from server.engine.output import StepOutput
from server.engine.request import Edit, Request, SamplingSettings
from server.engine.torch.engine import TorchEngine
from server.engine.torch.loaded_interventions import Parameters
from server.engine.torch.model.loader import load_model
from server.engine.torch.options import EngineOptions
from server.engine.vllm.environment import prepare_environment
from server.engine.vllm.options import VllmOptions
from tests.engines import close_checked, idle
from tests.oracles import Oracle
from tests.serving import eventually
from tests.steered import GREEDY, STACKS, interventions_of
from tests.tiny import CHAT_TEMPLATE, random_maps, tiny_tokenizer
from tests.tool_templates import write_templates
from tests.vllm_models import artifact_bytes, vllm_model

CONTEXT: Final = 256
BLOCK: Final = 32  # tokens; vLLM's smallest block on a CPU
_TOKEN_BYTES: Final = 2 * 2 * 2 * 32 * 4  # layers, keys and values, heads, their size, float32
# vLLM has prepared the default sites and these; none is the input of a module.
_ATTENTION: Final = r"model\.layers\.1\.self_attn"
UNREADABLE: Final = "unreadable"  # the digest of an artifact whose file is lost
BOTH_STACKS: Final = {name: edits for name, edits in STACKS.items() if name != "inputs"}
INTERVENTIONS: Final[Mapping[str, Parameters]] = {
    **{name: each for name, each in interventions_of().items() if name != "inputs"},
    "c": random_maps(11),
    "elsewhere": random_maps(12, sites=("model.layers.7.mlp",)),
    "unprepared": random_maps(13, sites=("model.layers.0.mlp",)),
}


@dataclass(frozen=True)
class Setup:
    """Says which engine is started, and how much it may hold."""

    name: str
    engine: str  # torch or vllm
    batch: int  # sequences running at once
    waiting: int
    step_tokens: int
    kv_tokens: int
    slots: int
    compiled: bool = False  # of vLLM's model; the other engine's compiled layers have own tests

    @property
    def kv_cache_gb(self) -> float:
        """The memory of keys and values."""
        return self.kv_tokens * _TOKEN_BYTES / 1e9


_ROOMY = Setup(
    "torch", "torch", batch=16, waiting=16, step_tokens=64, kv_tokens=256 * BLOCK, slots=8
)
# Few sequences reach their end without taking K/V from others, and a stack of four fills the slots.
_TIGHT = Setup(
    "torch-tight", "torch", batch=12, waiting=12, step_tokens=29, kv_tokens=12 * BLOCK, slots=4
)
ROOMY: Final = (_ROOMY, replace(_ROOMY, name="vllm-compiled", engine="vllm", compiled=True))
TIGHT: Final = (_TIGHT, replace(_TIGHT, name="vllm-tight", engine="vllm"))


@dataclass(frozen=True)
class Subject:
    """A started engine that tests share: each leaves it without requests."""

    engine: Engine
    setup: Setup
    registry: Registry  # what applications over this engine store
    oracle: Oracle  # of its model

    async def submit(self, *requests: Request) -> list[Any]:
        """Admit requests together."""
        return list(await self.engine.submit(requests))

    async def generate(self, *requests: Request) -> list[list[StepOutput]]:
        """Return the outputs of requests that are admitted together."""
        return await asyncio.gather(*map(finished, await self.submit(*requests)))

    async def answer(self, request: Request, delay: float = 0) -> list[StepOutput]:
        """Return the outputs of a request that comes again where there is no room for it."""
        await asyncio.sleep(delay)
        while True:
            try:
                [outputs] = await self.generate(request)
            except (BankFullError, QueueFullError):
                await asyncio.sleep(0.01)
            else:
                return outputs

    async def settle(self) -> None:
        """Assert that nothing is held for any request, when the last cancellations were seen."""
        if isinstance(self.engine, TorchEngine):
            engine = self.engine
            await eventually(lambda: idle(engine))
            await asyncio.wrap_future(engine._thread.call(engine._core.check))
        else:
            vllm: Any = self.engine
            await eventually(lambda: not vllm._running)
            assert (vllm._places, vllm._kept_places) == (0, 0)
            vllm._slots.table.check({})
            assert not vllm._llm.output_processor.request_states
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_cache_usage) == (0, 0, 0)
        assert self.engine.ready


def request(
    prompt: Sequence[int], edits: tuple[Edit, ...] = (), sampling: SamplingSettings = GREEDY
) -> Request:
    """Return a request for a greedy completion, unless other settings are given."""
    return Request("test", tuple(prompt), sampling, edits)


async def finished(generation: Any) -> list[StepOutput]:
    """Return all outputs."""
    return [output async for output in generation]


@asynccontextmanager
async def started(setup: Setup, folder: Path) -> AsyncIterator[Subject]:
    """Start an engine, and close it at the end."""
    model, stored = folder / "model", folder / "stored"
    vllm_model("llama").save_pretrained(model)
    tiny_tokenizer(CHAT_TEMPLATE).save_pretrained(model)
    stored.mkdir()
    for digest, parameters in INTERVENTIONS.items():
        (stored / digest).write_bytes(artifact_bytes(parameters))
    start = _started_torch if setup.engine == "torch" else _started_vllm
    with Registry(folder / "registry") as registry:
        async with start(setup, model, stored, registry) as engine:
            yield Subject(engine, setup, registry, Oracle(vllm_model("llama")))


@asynccontextmanager
async def _started_torch(
    setup: Setup, model: Path, _stored: Path, registry: Registry
) -> AsyncIterator[Engine]:
    options = EngineOptions(
        max_batch_size=setup.batch,
        max_batch_tokens=setup.step_tokens,
        max_waiting=setup.waiting,
        max_model_len=CONTEXT,
        kv_cache_gb=setup.kv_cache_gb,
        max_loaded_interventions=setup.slots,
        check_invariants=True,
        templates=write_templates(model.parent),
    )

    def read(digest: str) -> Parameters:
        if digest == UNREADABLE:
            raise FileNotFoundError("the file is lost")
        return INTERVENTIONS.get(digest) or registry.load(digest).parameters

    engine = TorchEngine(load_model(str(model), dtype="float32"), read, options)
    await engine.start()
    yield engine
    await close_checked(engine)


@asynccontextmanager
async def _started_vllm(
    setup: Setup, model: Path, stored: Path, registry: Registry
) -> AsyncIterator[Engine]:
    options = VllmOptions(
        max_batch_size=setup.batch,
        max_batch_tokens=setup.step_tokens,
        max_waiting=setup.waiting,
        max_model_len=CONTEXT,
        kv_cache_gb=setup.kv_cache_gb,
        max_loaded_interventions=setup.slots,
        sites=(_ATTENTION,),
        templates=write_templates(model.parent),
        vllm_args=f"--block-size {BLOCK}" + (" --enforce-eager" * (not setup.compiled)),
    )

    def path(digest: str) -> Path:
        own = digest in INTERVENTIONS or digest == UNREADABLE
        return stored / digest if own else registry.path(digest)

    with patch.dict(os.environ):
        prepare_environment()
        # vLLM is imported only where it is installed, and after the environment is prepared.
        from server.engine.vllm.build import build_engine  # noqa: PLC0415

        engine = await asyncio.to_thread(
            build_engine,
            str(model),
            "float32",
            options,
            path,
            stored_sites=(),
            report=lambda _sentence: None,
        )
        try:
            assert not engine.ready
            await engine.start()
            yield engine
        finally:
            assert await engine.close()


def _each(setups: Sequence[Setup]) -> pytest.MarkDecorator:
    """Return the mark that runs a test with the fixture `subject` once for each setup."""
    vllm = [
        pytest.mark.vllm,
        pytest.mark.timeout(900),  # vLLM compiles a model while it starts
        pytest.mark.skipif(
            find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"
        ),
    ]
    return pytest.mark.parametrize(
        "started_engine",
        [
            pytest.param(each, id=each.name, marks=vllm if each.engine == "vllm" else [])
            for each in setups
        ],
        indirect=True,
        scope="session",
    )


each_engine: Final = _each(ROOMY)
each_setup: Final = _each((*ROOMY, *TIGHT))
each_tight: Final = _each(TIGHT)
each_torch: Final = _each((_ROOMY, _TIGHT))
each_vllm: Final = _each(ROOMY[1:])
