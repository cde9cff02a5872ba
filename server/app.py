"""Builds the FastAPI application from its parts."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware.errors import ServerErrorMiddleware

from interventions.registry import Registry
from interventions.request_settings import Caps
from server.api import (
    chat,
    completions,
    documentation,
    interventions,
    models,
    playground,
    policy,
    responses,
    system,
    tokenization,
)
from server.api.auth import require_api_key
from server.api.context import ServerContext
from server.api.cross_origin import CrossOriginMiddleware
from server.api.documentation import ErrorEnvelope
from server.api.errors import ApiError, handle_error, install_error_handlers
from server.api.host_check import HostMiddleware, host_check
from server.api.limits import BodyLimitMiddleware
from server.api.observe import RequestObserver
from server.api.root_path import RootPathMiddleware
from server.api.steering_resolver import SteeringResolver
from server.baselines import BaselineSampler
from server.config import ConfigurationError, Settings
from server.engine.base import Engine
from server.metrics import Metrics
from server.records import RecordSink
from server.startup import StartupErrorMiddleware
from server.toxicity.queue import ScoringQueue
from server.version import installed_version


def create_app(
    engine: Engine,
    registry: Registry,
    metrics: Metrics,
    scoring: ScoringQueue | None,
    settings: Settings,
    sinks: Sequence[RecordSink] = (),
) -> FastAPI:
    """Build the HTTP service on an engine and a registry.

    The application starts an engine that is not started yet, and then closes it as well. It starts
    and closes the scoring queue, which closes its scorer. The caller closes registry and sinks.

    Args:
        scoring: scores completions; None if no scores are wanted.
        sinks: get the record of every request at its end.

    Raises:
        ConfigurationError: the default steering is not valid or cannot be applied, or the default
            length of an answer is longer than the context.
    """
    if (tokens := settings.default_max_tokens or 0) >= engine.max_model_len:
        raise ConfigurationError(
            f"The default of {tokens} tokens for a chat's answer (--default-max-tokens) leaves no "
            f"room for its messages: the context has {engine.max_model_len} tokens."
        )
    try:
        steering = SteeringResolver(
            registry, engine.model, settings.default_steering, settings.steering_policy, Caps()
        )
    except ApiError as error:
        raise ConfigurationError(error.message) from error
    baselines = BaselineSampler(
        engine, scoring, metrics, settings.baseline_sample_rate, settings.request_timeout
    )
    context = ServerContext(engine, registry, metrics, settings, steering, scoring, baselines)
    app = FastAPI(
        title="steerserve",
        description="An OpenAI-compatible server that steers a language model, per request.",
        version=installed_version(),
        lifespan=_lifespan,
        # `server.api.documentation` serves these pages.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        # This replaces FastAPI's 422 in the schema, which the server never sends.
        responses={"default": {"model": ErrorEnvelope, "description": "Any error"}},
        # Some clients drop the body at a redirect, and redirects are sent before keys are checked.
        redirect_slashes=False,
    )
    app.state.context = context
    app.include_router(_v1())
    app.include_router(tokenization.router)
    app.include_router(system.router)
    app.include_router(documentation.router)
    app.include_router(playground.router)
    install_error_handlers(app)
    _add_middleware(app, context, sinks)
    return app


def _add_middleware(app: FastAPI, context: ServerContext, sinks: Sequence[RecordSink]) -> None:
    """Put the layers around the routes, from the innermost to the outermost."""
    settings = context.settings
    app.add_middleware(BodyLimitMiddleware, settings=settings, lifecycle=context.lifecycle)
    check = host_check(settings)
    if check is not None:
        app.add_middleware(HostMiddleware, check=check)
    # This one is inside the layers that add headers to every answer; FastAPI's own is outside.
    app.add_middleware(ServerErrorMiddleware, handler=handle_error)
    if settings.cors_origins:
        app.add_middleware(CrossOriginMiddleware, origins=settings.cors_origins, check=check)
    app.add_middleware(RequestObserver, metrics=context.metrics, sinks=sinks)  # sees every answer
    if settings.root_path:
        app.add_middleware(RootPathMiddleware, root_path=settings.root_path)
    app.add_middleware(StartupErrorMiddleware)


def _v1() -> APIRouter:
    router = APIRouter(prefix="/v1", dependencies=[Depends(require_api_key)])
    for part in (completions, chat, responses, models, interventions, policy):
        router.include_router(part.router)
    return router


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context = app.state.context
    assert isinstance(context, ServerContext)
    async with AsyncExitStack() as stack:
        if context.scoring is not None:
            context.scoring.start()
            stack.push_async_callback(context.scoring.close)
        if not context.engine.ready:
            await context.engine.start()
            stack.push_async_callback(context.engine.close)
        stack.push_async_callback(context.baselines.close)
        try:
            await context.steering.try_default(context.engine)
        except ApiError as error:
            raise ConfigurationError(error.message) from error
        yield
