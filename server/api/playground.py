"""The playground: a page at /playground that shows a steered model beside the base model.

The page is static files, and uses this server's public API alone.
"""

from importlib.resources import files
from typing import Final

from anyio import to_thread
from fastapi import APIRouter, Depends
from starlette.responses import Response

from server.api.context import AnyTimeContext
from server.api.errors import ApiError

_FOLDER: Final = files("server") / "playground"
_PAGE: Final = "index.html"
_MEDIA_TYPES: Final = {
    "css": "text/css",
    "html": "text/html",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
_HEADERS: Final = {
    # The page shows texts of models and of strangers' manifests: nothing in them may run.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


async def _refuse_if_off(context: AnyTimeContext) -> None:
    """Raise a 404 if the playground is off."""
    if not context.settings.serves_playground:
        raise ApiError(
            404,
            "The playground is off, because this server does not listen on a loopback address "
            "only: --playground turns it on.",
            code="playground_off",
        )


router = APIRouter(
    prefix="/playground", include_in_schema=False, dependencies=[Depends(_refuse_if_off)]
)


@router.get("")
async def show_page() -> Response:
    """Show the page. Its files have relative addresses, because a proxy may put a path before."""
    return await _send(_PAGE)


@router.get("/{file}")
async def show_file(file: str) -> Response:
    """Send one of the page's files."""
    if file not in {each.name for each in _FOLDER.iterdir()}:
        raise ApiError(404, f"The playground has no file '{file[:100]}'.")
    return await _send(file)


async def _send(name: str) -> Response:
    content = await to_thread.run_sync((_FOLDER / name).read_bytes)
    media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
    return Response(content, media_type=media_type, headers=_HEADERS)
