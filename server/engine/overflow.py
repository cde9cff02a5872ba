"""Says what went wrong where the model's output is not a number."""

from server.engine.errors import EngineError, InvalidRequestError, StepFailedError
from server.engine.request import Request


def not_a_number(request: Request) -> EngineError:
    """Return the error for a request with logits that are not finite.

    Its drawn token is meaningless.
    """
    if not request.effective_edits:
        return StepFailedError("the model's output is not a number")
    return InvalidRequestError(
        "Steered like this, the model's output is not a number; choose weaker settings.",
        "steering",
        "steering_overflow",
    )
