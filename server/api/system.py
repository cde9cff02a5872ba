"""Routes for operators: health, readiness, version, and metrics, which may have a key."""

from anyio import to_thread
from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, PlainTextResponse, Response

from server.api.auth import require_metrics_key
from server.api.context import AnyTimeContext, Context
from server.api.default_steering import default_unavailable
from server.api.errors import RETRY_SECONDS, ApiError
from server.metrics import CONTENT_TYPE
from server.version import installed_version

router = APIRouter()


@router.get("/health", summary="Check that the process is up")
async def health() -> Response:
    """Answer 200."""
    return JSONResponse({"status": "ok"})


@router.get("/ready", summary="Check that the model is served")
async def ready(context: Context) -> Response:
    """Answer 200 while new requests are served, else 503.

    The 503 comes while the server starts or stops, after the engine has ended, while the registry's
    folder cannot be read, and if the artifacts of the default steering cannot be loaded any more.
    """
    if not context.engine.ready:
        raise ApiError(
            503, "The model is not loaded yet, or the engine has ended.", code="not_ready"
        )
    unreadable = context.registry.problem()
    if unreadable is not None:
        raise ApiError(
            503,
            unreadable,
            code="registry_unreadable",
            headers={"Retry-After": RETRY_SECONDS},
        )
    artifacts = context.steering.default_artifacts
    problem = await context.state_disk.call(artifacts.problem) if artifacts.exist else None
    if problem is not None:
        raise default_unavailable(problem)
    return JSONResponse({"status": "ready"})


@router.get("/version", summary="Show the version")
async def show_version() -> Response:
    """Show the installed version of steerserve."""
    return JSONResponse({"version": installed_version()})


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=PlainTextResponse,
    dependencies=[Depends(require_metrics_key)],
)
async def metrics(context: AnyTimeContext) -> Response:
    """Show the metrics in Prometheus's text format."""
    page = await to_thread.run_sync(context.metrics.render)
    return Response(page, media_type=CONTENT_TYPE)
