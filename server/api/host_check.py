"""Refuses requests whose Host header names another host, in plain ASGI, before a body is read.

This stops DNS rebinding. A browser lets a page read the answers of the page's own host, and the
owner of that host's name can have it resolve to 127.0.0.1 while the page is open. The page's
requests then reach this server, and only their Host header differs from a local client's.
"""

from collections.abc import Callable
from typing import TypeAlias

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import ApiError
from server.config import Settings
from server.hosts import is_loopback, named_host

HostCheck: TypeAlias = Callable[[list[str]], ApiError | None]


def host_check(settings: Settings) -> HostCheck | None:
    """Make the check of a request's Host headers; None if the server answers for any host.

    Hosts are checked if the server is bound to loopback, or if the operator has named allowed
    hosts. Loopback's own names always pass, because no page of another machine can have them. A
    request without the header passes too: HTTP/1.0 allows it (health checks of load balancers), and
    no browser sends one.
    """
    if not settings.binds_loopback and not settings.allowed_hosts:
        return None

    def check(hosts: list[str]) -> ApiError | None:
        name = named_host(hosts[0]) if len(hosts) == 1 else None
        if not hosts or (name and (is_loopback(name) or name in settings.allowed_hosts)):
            return None
        return ApiError(
            403,
            f"This server does not answer for the host '{', '.join(hosts)[:100]}': it is neither "
            "localhost, nor a loopback address, nor a host that the server was started with "
            "(--allowed-host).",
            code="host_not_allowed",
            headers={"Connection": "close"},
        )

    return check


class HostMiddleware:
    """Refuses HTTP requests for foreign hosts, and passes on all else."""

    def __init__(self, app: ASGIApp, check: HostCheck) -> None:
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None
        if scope["type"] == "http":
            refusal = self._check(Headers(scope=scope).getlist("host"))
        if refusal is None:
            await self._app(scope, receive, send)
            return
        scope["state"]["error_code"] = refusal.code  # for the request's record
        await refusal.response(scope, receive, send)
