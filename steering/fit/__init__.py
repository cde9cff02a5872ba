"""Fitting interventions: from token ids and a loaded model to the parameters that are served."""


class FitError(ValueError):
    """A fit that cannot be done, or went wrong, with a sentence that says why."""
