"""Serves the same paths with and without the prefix that a proxy puts before them."""

from starlette.types import ASGIApp, Receive, Scope, Send


class RootPathMiddleware:
    """Takes the prefix off a request's path, if it is there: some proxies leave it, others do not.

    It must be outside of all layers that read the path.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        """`root_path` begins with a slash, and does not end with one."""
        self._app = app
        self._prefix = f"{root_path}/"
        self._cut = len(root_path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self._prefix):
            raw = scope.get("raw_path") or b""
            scope = {**scope, "path": scope["path"][self._cut :], "raw_path": raw[self._cut :]}
        await self._app(scope, receive, send)
