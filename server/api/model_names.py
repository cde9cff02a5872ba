"""The ids that a request may give as its model: `<served name>` or `<served name>+<name>`."""

from collections.abc import Sequence
from typing import Final

from server.api.errors import ApiError

SEPARATOR: Final = "+"


def split_model(model: str, served: Sequence[str]) -> tuple[str, str | None]:
    """Split a model id into the served name and the intervention's name, None if it has none.

    Raises:
        ApiError: 404, the model is not served.
    """
    name, separator, intervention = model.partition(SEPARATOR)
    if name not in served or (separator and not intervention):
        raise model_not_found(model, served)
    return name, intervention if separator else None


def model_not_found(model: str, served: Sequence[str]) -> ApiError:
    """Return the error for a model that is not served."""
    return ApiError(
        404,
        f"The model '{model[:200]}' does not exist; this server has {', '.join(served)}.",
        param="model",
        code="model_not_found",
    )
