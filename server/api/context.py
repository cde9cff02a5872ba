"""What the routes work with: one typed object on the application's state."""

import time
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

from fastapi import Depends, Request

from interventions.registry import Registry
from server.api.errors import shutting_down
from server.api.steering import SteeringResolver
from server.config import Settings
from server.engine.base import Engine
from server.metrics import Metrics


@dataclass(slots=True)
class Lifecycle:
    """How far the server's life has come. What runs it sets this; the routes read it."""

    stopping: bool = False  # no new request is taken


@dataclass(frozen=True, slots=True)
class ServerContext:
    """The parts that the application was made of."""

    engine: Engine
    registry: Registry
    metrics: Metrics
    settings: Settings
    steering: SteeringResolver
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
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
