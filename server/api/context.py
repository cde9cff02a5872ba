"""What the routes work with: one typed object on the application's state."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Final, TypeAlias

from fastapi import Depends, Request

from interventions.registry import Registry
from server.api.disk import RegistryDisk
from server.api.errors import shutting_down
from server.api.steering import SteeringResolver
from server.baselines import BaselineSampler
from server.config import Settings
from server.engine.base import Engine
from server.metrics import Metrics
from server.toxicity.queue import ScoringQueue

PROMPT_THREADS: Final = 4


class Lifecycle:
    """How far the server's life has come. What runs it stops it; the routes look at it."""

    def __init__(self) -> None:
        self._stopped = asyncio.Event()

    @property
    def stopping(self) -> bool:
        """Whether no new request is taken."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Take no new request from now on."""
        self._stopped.set()

    async def until_stopping(self) -> None:
        """Wait until no new request is taken."""
        await self._stopped.wait()


def _prompt_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(PROMPT_THREADS, thread_name_prefix="prompts")


def _body_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="bodies")


@dataclass(frozen=True, slots=True)
class ServerContext:
    """The parts that the application was made of."""

    engine: Engine
    registry: Registry
    metrics: Metrics
    settings: Settings
    steering: SteeringResolver
    scoring: ScoringQueue | None  # None: the operator wants no scores
    baselines: BaselineSampler
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    # Long prompts are read here: in the pool that all share, they would keep everything waiting.
    prompt_threads: ThreadPoolExecutor = field(default_factory=_prompt_threads)
    disk: RegistryDisk = field(default_factory=RegistryDisk)
    # Of its own, so that whoever asks for the state waits for no upload to a slow disk.
    state_disk: RegistryDisk = field(default_factory=lambda: RegistryDisk(threads=1))
    # Large bodies are parsed here, one at a time: parsing holds the interpreter's lock, and several
    # threads would keep everything else from it in turn.
    body_thread: ThreadPoolExecutor = field(default_factory=_body_thread)
    started: int = field(default_factory=lambda: int(time.time()))  # Unix seconds


async def get_context(request: Request) -> ServerContext:
    """The application's context, whatever the server's state."""
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context


AnyTimeContext: TypeAlias = Annotated[ServerContext, Depends(get_context)]


async def get_serving_context(context: AnyTimeContext) -> ServerContext:
    """The application's context, for a request that is new work.

    Raises:
        ApiError: 503, the server is stopping.
    """
    if context.lifecycle.stopping:
        raise shutting_down()
    return context


Context: TypeAlias = Annotated[ServerContext, Depends(get_serving_context)]
