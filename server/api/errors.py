"""Errors in OpenAI's envelope: `{"error": {"message", "type", "param", "code"}}`, everywhere."""

import logging
from collections.abc import Mapping
from typing import Final, TypeAlias

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import JsonValue
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from interventions.registry import (
    DamagedInterventionError,
    NameInUseError,
    RegistryBusyError,
    RegistryDiskError,
    RegistryUnreadableError,
    UnknownInterventionError,
)
from server.engine.base import (
    BankFullError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    ShuttingDownError,
    StepFailedError,
    UnservableInterventionError,
)

CLIENT_CLOSED_REQUEST: Final = 499  # nobody is left to read it: for the metrics and the log
RETRY_SECONDS: Final = "1"

ErrorBody: TypeAlias = dict[str, JsonValue]

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer that is an error: a status, and a sentence for the client."""

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
        """The envelope."""
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
        """The whole answer."""
        return JSONResponse(self.body, self.status, headers=self.headers)


class ClientGoneError(Exception):
    """The client closed the connection before it had its answer."""


def invalid(message: str, param: str | None, code: str | None = None) -> ApiError:
    """A 400: the request itself is at fault, and `param` names the field."""
    return ApiError(400, message, param=param, code=code)


def from_engine(error: EngineError) -> ApiError:
    """What the client is told of an engine's exception."""
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


def from_registry(error: UnknownInterventionError, param: str | None = None) -> ApiError:
    """What the client is told where the registry has not what it asked for, or not whole."""
    if isinstance(error, DamagedInterventionError):
        # The reason may name a path on this machine.
        logger.error("%s", error)
        message = f"The intervention '{error.reference[:100]}' is stored but damaged."
        return ApiError(500, message, param=param, code="intervention_damaged")
    return ApiError(404, str(error), param=param, code="intervention_not_found")


def from_name_in_use(error: NameInUseError) -> ApiError:
    """A 409: a server's default steering needs the name."""
    return ApiError(409, str(error), param="name", code="intervention_in_use")


def registry_unavailable(error: RegistryBusyError | RegistryUnreadableError) -> ApiError:
    """A 503: another server is changing the registry, or its folder cannot be read now."""
    logger.error("%s (%s)", error, error.__cause__)  # the cause may name a path
    busy = isinstance(error, RegistryBusyError)
    code = "registry_busy" if busy else "registry_unreadable"
    return ApiError(503, str(error), code=code, headers={"Retry-After": RETRY_SECONDS})


def from_registry_disk(error: RegistryDiskError) -> ApiError:
    """What the client is told where the registry's disk is full (507), or does not work (503)."""
    logger.error("%s (%s)", error, error.__cause__)  # the cause may name a path
    if error.full:
        return ApiError(507, str(error), code="registry_full")
    return ApiError(503, str(error), code="registry_unwritable")


def unreadable_upload() -> ApiError:
    """A 503: the registry's disk does not give back the bytes that were just written to it."""
    message = "The upload cannot be read back from the registry's disk; nothing was changed."
    return ApiError(503, message, code="registry_unwritable")


def shutting_down() -> ApiError:
    """A 503: this server is stopping; another one, or the next one, may answer."""
    message = "The server is shutting down; try again later."
    headers = {"Retry-After": RETRY_SECONDS, "Connection": "close"}
    return ApiError(503, message, code="shutting_down", headers=headers)


def timed_out(seconds: float) -> ApiError:
    """A 504: the answer was not complete in the time that the operator gives a request."""
    message = f"The request was not complete {seconds:g} s after its arrival; it was cancelled."
    # OpenAI's clients retry a 504 unless they are told not to; it would only time out again.
    stop = {"X-Should-Retry": "false"}
    return ApiError(504, message, code="request_timeout", headers=stop)


def internal_error() -> ApiError:
    """A 500 that says nothing of what went wrong inside; the log does."""
    return ApiError(500, "The server failed to answer this request.", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of the application an envelope."""
    app.add_exception_handler(ApiError, _handle_api_error)
    app.add_exception_handler(EngineError, _handle_engine_error)
    app.add_exception_handler(UnknownInterventionError, _handle_registry_error)
    app.add_exception_handler(RegistryDiskError, _handle_registry_disk_error)
    app.add_exception_handler(NameInUseError, _handle_name_in_use)
    app.add_exception_handler(RegistryBusyError, _handle_registry_unavailable)
    app.add_exception_handler(RegistryUnreadableError, _handle_registry_unavailable)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)
    app.add_exception_handler(ClientDisconnect, _handle_client_gone)
    app.add_exception_handler(ClientGoneError, _handle_client_gone)
    app.add_exception_handler(Exception, handle_unexpected)


def _answer(request: Request, error: ApiError) -> Response:
    request.state.error_code = error.code  # for the request's record
    return error.response


async def _handle_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _answer(request, error)


async def _handle_engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    return _answer(request, from_engine(error))


async def _handle_registry_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UnknownInterventionError)
    return _answer(request, from_registry(error))


async def _handle_registry_disk_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RegistryDiskError)
    return _answer(request, from_registry_disk(error))


async def _handle_name_in_use(request: Request, error: Exception) -> Response:
    assert isinstance(error, NameInUseError)
    return _answer(request, from_name_in_use(error))


async def _handle_registry_unavailable(request: Request, error: Exception) -> Response:
    assert isinstance(error, RegistryBusyError | RegistryUnreadableError)
    return _answer(request, registry_unavailable(error))


async def _handle_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method[:20]} {request.url.path[:200]}"
    messages = {
        404: f"Unknown request URL: {asked}.",
        405: f"Not allowed method: {asked}.",
    }
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    told = ApiError(
        error.status_code,
        messages.get(error.status_code, str(error.detail)),
        code=codes.get(error.status_code),
        headers=error.headers,
    )
    return _answer(request, told)


async def _handle_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    return _answer(request, invalid(f"{param}: {first['msg']}", param))


async def _handle_client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def handle_unexpected(request: Request, _: Exception) -> Response:
    """Answers what nothing else has caught; whoever runs the application hears of it too."""
    return _answer(request, internal_error())


def _error_type(status: int) -> str:
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
