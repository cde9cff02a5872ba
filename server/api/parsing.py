"""From a request's bytes to a checked object; whatever is wrong becomes one short 400."""

from difflib import get_close_matches
from typing import TypeVar

from anyio import to_thread
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import Request

from interventions.strict_json import StrictJSONError, parse_json
from server.api.errors import ApiError, invalid

T = TypeVar("T", bound=BaseModel)
UNSUPPORTED = "unsupported_parameter"
MAX_MEMBERS = 1000  # of any object: more than a logit bias has; each one at fault costs time
LARGE_BODY = 64 * 1024  # bytes from which parsing is worth a thread: others' streams go on


async def read_request(schema: type[T], request: Request) -> T:
    """The request's body as an object of the schema.

    Raises:
        ApiError: the body is not one JSON object, or a field is at fault and named (400); or it
            is declared as something else (415).
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
        return _validate(schema, _parse_object(body))

    return read() if len(body) < LARGE_BODY else await to_thread.run_sync(read)


def _parse_object(body: bytes) -> dict[str, object]:
    try:
        # This parser refuses what is no Unicode (lone surrogates too) and deep nesting; the
        # second refuses a key given twice, whose earlier value would silently not count.
        from_json(body, allow_inf_nan=False, cache_strings="keys")
        value = parse_json(body.decode(), MAX_MEMBERS)
    except StrictJSONError as error:
        raise invalid(f"The request's body {error}.", None, "invalid_json") from None
    except ValueError as error:
        message = f"The request's body is not valid JSON: {error}."
        raise invalid(message, None, "invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("The request's body must be a JSON object.", None, "invalid_json")
    return value


def _validate(schema: type[T], fields: dict[str, object]) -> T:
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise _explain(details[0], tuple(schema.model_fields)) from None


def _explain(error: ErrorDetails, known: tuple[str, ...]) -> ApiError:
    param = ".".join(str(part) for part in error["loc"])[:200]
    if error["type"] == "missing":
        message = f"Missing required parameter: '{param}'."
        return invalid(message, param, "missing_required_parameter")
    if error["type"] == "extra_forbidden":
        nearest = get_close_matches(param, known, n=1)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        message = f"Unrecognized request argument supplied: {param}.{hint}"
        return invalid(message, param, "unknown_parameter")
    reason = error["msg"]
    if error["type"] == UNSUPPORTED:
        return invalid(reason, param, UNSUPPORTED)
    reason = reason.removeprefix("Value error, ")
    message = f"Invalid value for '{param}': {reason[:1].lower()}{reason[1:]}."
    code = "invalid_type" if error["type"].endswith("_type") else "invalid_value"
    return invalid(message, param, code)
