"""Answers every error in OpenAI's envelope: `{"error": {"message", "type", "param", "code"}}`."""

import logging
from collections.abc import Mapping
from typing import Final, TypeAlias

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import JsonValue
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from interventions.errors import (
    DamagedInterventionError,
    NameInUseError,
    RegistryBusyError,
    RegistryDiskError,
    RegistryUnreadableError,
    UnknownInterventionError,
)
from server.engine.errors import (
    BankFullError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    ShuttingDownError,
    StepFailedError,
    UnservableInterventionError,
)

CLIENT_CLOSED_REQUEST: Final = 499  # for the metrics and the log; the client is gone
RETRY_SECONDS: Final = "1"

ErrorBody: TypeAlias = dict[str, JsonValue]

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An error to answer with: its status, and a sentence for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> ErrorBody:
        """OpenAI's envelope."""
        return {
            "error": {
                "message": self.message,
                "type": _error_type(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def response(self) -> JSONResponse:
        """The answer, with its status, body and headers."""
        return JSONResponse(self.body, self.status, headers=self.headers)


class ClientGoneError(Exception):
    """The client closed the connection before it had its answer."""


def invalid(message: str, param: str | None, code: str | None = None) -> ApiError:
    """Return the 400 for a faulty request; `param` names the faulty field."""
    return ApiError(400, message, param=param, code=code)


def too_large(what: str, limit: int, param: str | None = None) -> ApiError:
    """Return the 413 for a body that is larger than `limit` bytes."""
    message = f"The {what} is larger than the {limit:,} bytes that the server takes."
    close = {"Connection": "close"}
    return ApiError(413, message, param=param, code="request_too_large", headers=close)


def as_api_error(error: Exception) -> ApiError:
    """Return the answer to a request that has raised an exception."""
    match error:
        case ApiError():
            return error
        case EngineError():
            return _from_engine(error)
        case UnknownInterventionError():
            return from_registry(error)
        case NameInUseError():
            return ApiError(409, str(error), param="name", code="intervention_in_use")
        case RegistryBusyError() | RegistryUnreadableError() | RegistryDiskError():
            return _from_unavailable_registry(error)
        case RequestValidationError():
            first = error.errors()[0]
            param = ".".join(str(part) for part in first["loc"][1:]) or None
            return invalid(f"{param}: {first['msg']}", param)
        case _:
            return internal_error()


def from_registry(error: UnknownInterventionError, param: str | None = None) -> ApiError:
    """Return the answer for an intervention that is not stored (404), or is damaged (500)."""
    if isinstance(error, DamagedInterventionError):
        # Only the log gives the reason, which may name a path on this machine.
        logger.error("%s", error)
        message = f"The intervention '{error.reference[:100]}' is stored but damaged."
        return ApiError(500, message, param=param, code="intervention_damaged")
    return ApiError(404, str(error), param=param, code="intervention_not_found")


def unreadable_upload() -> ApiError:
    """Return the 503 for a disk that does not give back the bytes that were just written to it."""
    message = "The upload cannot be read back from the registry's disk; nothing was changed."
    return ApiError(503, message, code="registry_unwritable")


def shutting_down() -> ApiError:
    """Return the 503 of a server that is stopping; another server may answer the next try."""
    message = "The server is shutting down; try again later."
    headers = {"Retry-After": RETRY_SECONDS, "Connection": "close"}
    return ApiError(503, message, code="shutting_down", headers=headers)


def timed_out(seconds: float) -> ApiError:
    """Return the 504 for an answer that was not complete within `--request-timeout` seconds."""
    message = f"The request was not complete {seconds:g} s after its arrival; it was cancelled."
    # OpenAI's clients retry a 504 unless they are told not to; it would only time out again.
    stop = {"X-Should-Retry": "false"}
    return ApiError(504, message, code="request_timeout", headers=stop)


def internal_error() -> ApiError:
    """Return the 500 for an unexpected failure; only the log says what failed."""
    return ApiError(500, "The server failed to answer this request.", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception of the application with OpenAI's envelope."""
    answered = (
        ApiError,
        EngineError,
        NameInUseError,
        RegistryBusyError,
        RegistryDiskError,
        RegistryUnreadableError,
        RequestValidationError,
        UnknownInterventionError,
        Exception,
    )
    for kind in answered:
        app.add_exception_handler(kind, handle_error)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    for kind in (ClientDisconnect, ClientGoneError):
        app.add_exception_handler(kind, _handle_client_gone)


async def handle_error(request: Request, error: Exception) -> Response:
    """Answer a request that has raised an exception."""
    answer = as_api_error(error)
    request.state.error_code = answer.code  # for the request's record
    return answer.response


async def _handle_http_exception(request: Request, error: Exception) -> Response:
    """Answer an unknown path or method as OpenAI does."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method[:20]} {request.url.path[:200]}"
    answers = {
        404: (f"Unknown request URL: {asked}.", "unknown_url"),
        405: (f"Not allowed method: {asked}.", "method_not_allowed"),
    }
    message, code = answers.get(error.status_code, (str(error.detail), None))
    answer = ApiError(error.status_code, message, code=code, headers=error.headers)
    return await handle_error(request, answer)


async def _handle_client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _from_engine(error: EngineError) -> ApiError:
    retry = {"Retry-After": RETRY_SECONDS}
    match error:
        case InvalidRequestError():
            return invalid(str(error), error.param, error.code)
        case UnservableInterventionError():
            return invalid(str(error), "steering", "intervention_not_servable")
        case QueueFullError():
            message = "The server's queue is full; try again later."
            return ApiError(429, message, code="queue_full", headers=retry)
        case BankFullError():
            message = "Running requests hold every slot for a loaded intervention; try again later."
            return ApiError(503, message, code="intervention_slots_full", headers=retry)
        case EngineDeadError():
            return ApiError(503, "The engine has ended; it serves no more.", code="engine_dead")
        case ShuttingDownError():
            return shutting_down()
        case StepFailedError():
            message = "The step that this request was part of failed; the request is lost."
            return ApiError(500, message, code="step_failed")
        case _:
            return internal_error()


def _from_unavailable_registry(
    error: RegistryBusyError | RegistryUnreadableError | RegistryDiskError,
) -> ApiError:
    logger.error("%s (%s)", error, error.__cause__)  # the cause may name a path
    if isinstance(error, RegistryDiskError):
        if error.full:
            return ApiError(507, str(error), code="registry_full")
        return ApiError(503, str(error), code="registry_unwritable")
    busy = isinstance(error, RegistryBusyError)
    code = "registry_busy" if busy else "registry_unreadable"
    return ApiError(503, str(error), code=code, headers={"Retry-After": RETRY_SECONDS})


def _error_type(status: int) -> str:
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
