"""Defines toxicity scorers and their specs.

It imports the standard library only, so that the scoring process starts quickly.
"""

import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

ScorerKind: TypeAlias = Literal["none", "embedded", "hf", "http", "python"]


class ScoringError(Exception):
    """Texts were not scored, or a scorer was not loaded; the message is one sentence."""


class Backend(Protocol):
    """Scores how toxic texts are."""

    def score(self, texts: Sequence[str]) -> list[float]:
        """Score texts; blocks until they are scored.

        Returns:
            The texts' toxicity, 0 to 1 each, in their order.

        Raises:
            ScoringError: a text could not be scored; no score is returned. The message is logged,
                so it must quote no text and no secret of the operator's.
        """


class Scorer(Backend, Protocol):
    """A backend that its owner closes, from any thread, even while another waits for scores."""

    @property
    def processor_seconds(self) -> float:
        """Processor time of this machine that scoring has taken so far, in seconds."""

    def close(self) -> None:
        """Fail the running call of `score`, and all later calls, with a ScoringError.

        Any thread may call this, and more than once.
        """


@dataclass(frozen=True, slots=True)
class ScorerSpec:
    """A scorer's kind, and its model's id or folder (hf), URL (http) or function (python)."""

    kind: ScorerKind
    target: str = ""


def parse_spec(text: str) -> ScorerSpec:
    """Read the spec of a scorer.

    Specs are `embedded`, `hf:<model id or folder>`, `http:<url>`, a bare URL,
    `python:<module>:<function>`, and `none`.

    Raises:
        ValueError: the text is none of these; the message is a sentence that says what is wrong.
    """
    match text:
        case "none":
            return ScorerSpec("none")
        case "embedded":
            return ScorerSpec("embedded")
    kind, colon, target = text.partition(":")
    if kind == "hf" and colon:
        if not target.strip():
            raise ValueError("the toxicity scorer 'hf:' names no model: write hf:<model id>")
        return ScorerSpec("hf", target)
    if kind in ("http", "https"):
        bare = kind == "https" or target.startswith("//")
        return ScorerSpec("http", _checked_url(text if bare else target))
    if kind == "python" and colon:
        module, _, function = target.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), function)):
            raise ValueError(
                f"the toxicity scorer {text!r} names no function: write python:<module>:<function>"
            )
        return ScorerSpec("python", target)
    raise ValueError(
        f"the toxicity scorer {text!r} is none of embedded, hf:<model id or folder>, http:<url>, "
        "python:<module>:<function>, none"
    )


def check_scores(scores: object, count: int) -> list[float]:
    """Return the answer of a scorer in another process as floats.

    Raises:
        ScoringError: the answer is not a list of `count` numbers from 0 to 1.
    """
    if not isinstance(scores, list):
        raise ScoringError("the toxicity scorer has not answered with a list of scores")
    if len(scores) != count:
        raise ScoringError(f"the toxicity scorer gave {len(scores)} scores for {count} texts")
    return [_checked_score(score) for score in scores]


def _checked_score(score: object) -> float:
    # NaN is in no range, so it is refused too; True is an int in Python, but no score.
    if isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 1:
        return float(score)
    # The value is left out of the message, because it may be a text.
    kind = type(score).__name__
    raise ScoringError(f"the toxicity scorer gave a {kind} that is no number from 0 to 1")


def _checked_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or brackets that do not match
        valid = False
    if not valid:
        raise ValueError(f"the toxicity scorer's address {url!r} is no http:// or https:// URL")
    return url
