"""The context of the routes: one typed object on the application's state."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Final, TypeAlias

from fastapi import Depends, Request

from interventions.registry import Registry
from server.api.disk import RegistryDisk
from server.api.errors import shutting_down
from server.api.steering_resolver import SteeringResolver
from server.baselines import BaselineSampler
from server.config import Settings
from server.engine.base import Engine
from server.metrics import Metrics
from server.toxicity.queue import ScoringQueue

PROMPT_THREADS: Final = 4


class Lifecycle:
    """Tells the routes when the server stops. The code that runs the server calls `stop`."""

    def __init__(self) -> None:
        self._stopped = asyncio.Event()

    @property
    def stopping(self) -> bool:
        """True once no new request is taken."""
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
    """The parts that the application is made of."""

    engine: Engine
    registry: Registry
    metrics: Metrics
    settings: Settings
    steering: SteeringResolver
    scoring: ScoringQueue | None  # None with --toxicity-scorer none
    baselines: BaselineSampler
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    # Long prompts are tokenized in these threads: in the shared pool they would block other work.
    prompt_threads: ThreadPoolExecutor = field(default_factory=_prompt_threads)
    disk: RegistryDisk = field(default_factory=RegistryDisk)
    # Has a thread of its own, so that requests for the state do not wait for slow uploads.
    state_disk: RegistryDisk = field(default_factory=lambda: RegistryDisk(threads=1))
    # Large bodies are parsed one at a time: parsing holds the interpreter's lock, and several such
    # threads would pass the lock among themselves while everything else waits.
    body_thread: ThreadPoolExecutor = field(default_factory=_body_thread)
    started: int = field(default_factory=lambda: int(time.time()))  # Unix seconds


async def get_context(request: Request) -> ServerContext:
    """Return the application's context, also while the server stops."""
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context


AnyTimeContext: TypeAlias = Annotated[ServerContext, Depends(get_context)]


async def get_serving_context(context: AnyTimeContext) -> ServerContext:
    """Return the application's context for new work; raise a 503 if the server is stopping."""
    if context.lifecycle.stopping:
        raise shutting_down()
    return context


Context: TypeAlias = Annotated[ServerContext, Depends(get_serving_context)]
