"""What the routes work with: one typed object on the application's state."""

import time
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

from fastapi import Depends, Request

from interventions.registry import Registry
from server.api.steering import SteeringResolver
from server.config import Settings
from server.engine.base import Engine
from server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class ServerContext:
    """The parts that the application was made of."""

    engine: Engine
    registry: Registry
    metrics: Metrics
    settings: Settings
    steering: SteeringResolver
    started: int = field(default_factory=lambda: int(time.time()))  # Unix seconds


async def get_context(request: Request) -> ServerContext:
    """The application's context, as a dependency."""
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context


Context: TypeAlias = Annotated[ServerContext, Depends(get_context)]
