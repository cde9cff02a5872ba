"""`steerserve evaluate`: what steering takes away and what it costs, measured over HTTP.

Everything goes through the public API of a running server, so that every engine is measured alike.
"""


class EvaluationError(Exception):
    """The server or a scorer failed, so nothing was measured; the message is one sentence."""


class EvaluationInputError(ValueError):
    """A file or an option is wrong; the message is one sentence that names it."""
