"""Warns that a part of the engine runs more slowly, because its faster path has failed."""

import logging

import torch

from server.engine.model.description import ModelLoadError
from server.engine.torch.model.devices import has_failed

logger = logging.getLogger(__name__)


def fall_back(error: Exception, device: torch.device, failed: str, instead: str) -> None:
    """Warn that a slower path is taken.

    Args:
        error: raised by the faster path.
        failed: the faster path, as in "the GPU failed in ...".
        instead: what is slower from now on, and how an operator asks for that without a warning.

    Raises:
        ModelLoadError: the device itself has failed, so that no path computes anything.
    """
    if has_failed(device):
        raise ModelLoadError(f"the GPU failed in {failed}: {error}") from error
    logger.warning("%s: %s", instead, first_line(error))
    logger.debug("%s failed", failed, exc_info=error)


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its message: compilers write many lines."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
