"""Tells browsers which other origins' pages may use the server (CORS)."""

from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from server.api.errors import ApiError
from server.api.host_check import HostCheck

METHODS: Final = ("DELETE", "GET", "HEAD", "POST")
# The headers of an answer that a page may read.
EXPOSED: Final = ("Location", "Retry-After", "X-Request-Id", "X-Should-Retry")


class CrossOriginMiddleware(CORSMiddleware):
    """Lets pages of the allowed origins use the server, with the keys that they send.

    Every answer to a request with an Origin header carries the CORS headers, also an error of an
    inner layer; only a preflight request refused for its Host gets none. The server uses no
    cookies, so browsers are not allowed to send credentials: a page has to know a key to send it.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str], check: HostCheck | None) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),
            # Browsers ask for this permission if a public site's page calls a private address.
            allow_private_network=True,
            expose_headers=EXPOSED,
        )
        self._check = check

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight request; a refusal has OpenAI's error envelope."""
        refusal = self._check(request_headers.getlist("host")) if self._check else None
        if refusal is not None:
            return refusal.response
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        headers = {
            name: value
            for name, value in response.headers.items()
            if name.startswith("access-control-") or name == "vary"
        }
        return ApiError(
            response.status_code,
            "A page of this origin may not send such a request from a browser: allow its origin "
            f"with --cors-origin, and use one of the methods {', '.join(METHODS)}.",
            code="origin_not_allowed",
            headers=headers,
        ).response
