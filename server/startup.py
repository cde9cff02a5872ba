"""Says in one sentence why the application could not be started, where the operator can help it."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.config import ConfigurationError

_FAILED = "lifespan.startup.failed"


class StartupErrorMiddleware:
    """Tells the server a ConfigurationError's sentence, where Starlette tells it a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, but for the message of a failed start."""
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        failed: list[Message] = []

        async def send_unless_failed(message: Message) -> None:
            if message["type"] == _FAILED:
                failed.append(message)
            else:
                await send(message)

        try:
            await self._app(scope, receive, send_unless_failed)
        except ConfigurationError as error:
            await send({"type": _FAILED, "message": str(error)})
            raise
        except BaseException:
            for message in failed:
                await send(message)
            raise
