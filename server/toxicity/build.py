"""From the settings to a scorer."""

from server.config import ConfigurationError, Settings
from server.toxicity.process import ScorerProcess
from server.toxicity.scorer import ScoringError, parse_spec


def build_scorer(settings: Settings) -> ScorerProcess | None:
    """Start the scorer that the settings name; None where they name `none`.

    It loads in the background; `wait_ready` tells how that went. The caller closes it, or the
    queue that it is given to.

    Raises:
        ConfigurationError: no process can be started.
    """
    if parse_spec(settings.toxicity_scorer).kind == "none":
        return None
    try:
        return ScorerProcess(settings.toxicity_scorer)
    except ScoringError as error:
        raise ConfigurationError(str(error)) from error
