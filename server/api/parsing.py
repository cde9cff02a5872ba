"""Parses a request's bytes into a checked object; any fault in them becomes one short 400."""

import asyncio
from collections.abc import Collection
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from interventions.spelling import nearest_name
from interventions.strict_json import StrictJSONError, UnknownKeyError, parse_json
from server.api.context import get_context
from server.api.errors import ApiError, invalid

T = TypeVar("T", bound=BaseModel)
UNSUPPORTED = "unsupported_parameter"
LARGE_BODY = 64 * 1024  # bytes; from this size on, parsing on the event loop would delay streams


async def read_request(schema: type[T], request: Request) -> T:
    """Read the request's body as an object of the schema.

    Raises:
        ApiError: the body is not one JSON object, or has a wrong field, which is named (400); or
            its Content-Type is not JSON (415).
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(
            415,
            "The request needs the header Content-Type: application/json.",
            code="unsupported_media_type",
        )
    body = await request.body()

    def read() -> T:
        known = {field.alias or name for name, field in schema.model_fields.items()}
        return _validate(schema, _parse_object(body, known))

    if len(body) < LARGE_BODY:
        return read()
    context = await get_context(request)
    return await asyncio.get_running_loop().run_in_executor(context.body_thread, read)


def string(value: object, param: str) -> str:
    """Return a string, or raise a 400 that names the field."""
    if not isinstance(value, str):
        raise invalid(f"'{param}' must be a string.", param, "invalid_type")
    return value


def required(fields: dict[str, object], name: str, param: str) -> object:
    """Return a field of the object at `param`, or raise a 400 if it lacks the field."""
    if name not in fields:
        field = f"{param}.{name}"
        message = f"Missing required parameter: '{field}'."
        raise invalid(message, field, "missing_required_parameter")
    return fields[name]


def _parse_object(body: bytes, known: Collection[str]) -> dict[str, object]:
    try:
        # Some clients put a byte order mark before the JSON.
        value = parse_json(body.decode("utf-8-sig"), known=known)
    except UnknownKeyError as error:
        raise _unknown(error.key, known) from None
    except StrictJSONError as error:
        raise invalid(f"The request's body {error}.", None, "invalid_json") from None
    except UnicodeDecodeError:
        message = "The request's body is not valid JSON: it is not UTF-8."
        raise invalid(message, None, "invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("The request's body must be a JSON object.", None, "invalid_json")
    return value


def _validate(schema: type[T], fields: dict[str, object]) -> T:
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise _explain(details[0]) from None


def _unknown(param: str, known: Collection[str] = ()) -> ApiError:
    nearest = nearest_name(param, known)
    hint = f" Did you mean '{nearest}'?" if nearest else ""
    param = param[:200]
    message = f"Unrecognized request argument supplied: {param}.{hint}"
    return invalid(message, param, "unknown_parameter")


def _explain(error: ErrorDetails) -> ApiError:
    param = ".".join(str(part) for part in error["loc"])[:200]
    if error["type"] == "missing":
        message = f"Missing required parameter: '{param}'."
        return invalid(message, param, "missing_required_parameter")
    if error["type"] == "extra_forbidden":
        return _unknown(param)
    reason = error["msg"]
    if error["type"] == UNSUPPORTED:
        return invalid(reason, param, UNSUPPORTED)
    reason = reason.removeprefix("Value error, ")
    if not param:  # what is wrong is how fields go together
        return invalid(f"The request is invalid: {reason}.", None, "invalid_value")
    message = f"Invalid value for '{param}': {reason[:1].lower()}{reason[1:]}."
    code = "invalid_type" if error["type"].endswith("_type") else "invalid_value"
    return invalid(message, param, code)
