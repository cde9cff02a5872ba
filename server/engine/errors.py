"""The errors of engines: requests that are not served, and why."""


class EngineError(Exception):
    """Raised for a request that the engine does not serve; the message tells the client why."""


class InvalidRequestError(EngineError):
    """The request itself is at fault; `param` names the faulty field."""

    def __init__(self, message: str, param: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(EngineError):
    """The waiting queue is full; the client may try again later."""


class BankFullError(EngineError):
    """Admitted requests pin every slot of the bank; the client may try again later."""


class UnservableInterventionError(EngineError):
    """The engine cannot apply the intervention, and never serves the request unsteered instead."""


class EngineDeadError(EngineError):
    """The engine thread has ended; no request can be served any more."""


class ShuttingDownError(EngineError):
    """The server is stopping, and ended this request before it was complete."""


class NoBackgroundRoomError(EngineError):
    """Background work was ended, or refused, because requests need its room."""


class StepFailedError(EngineError):
    """A step raised an exception; its requests are lost, and the engine goes on."""
