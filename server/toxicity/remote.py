"""Scores texts with a service that the operator runs.

The contract: `POST` to the URL with `{"texts": ["...", ...]}` as JSON; the answer is a 200 with
`{"scores": [0.1, ...]}`, one finite number from 0 to 1 for each text, in the texts' order. Further
members of the answer are ignored. Any other answer means that none of the texts was scored.
"""

import urllib.parse
from collections.abc import Sequence
from typing import Final

import httpx

from interventions.strict_json import StrictJSONError, parse_json
from server.toxicity.scorer import ScoringError, check_scores

# The limit for the connection, and again for each piece of the answer.
TIMEOUT_SECONDS: Final = 10.0


class RemoteScorer:
    """Asks a service over HTTP.

    Errors name the service by its host and port only, because a URL may hold a password.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._host = urllib.parse.urlsplit(url).netloc.rpartition("@")[2]
        self._client = httpx.Client(timeout=TIMEOUT_SECONDS)

    def score(self, texts: Sequence[str]) -> list[float]:
        """See `Backend.score`. The texts must be valid Unicode."""
        try:
            response = self._client.post(self._url, json={"texts": list(texts)})
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ScoringError(
                f"the toxicity scorer at {self._host} cannot be asked: {_reason(error)}"
            ) from error
        if response.status_code != httpx.codes.OK:
            raise ScoringError(
                f"the toxicity scorer at {self._host} answered with status {response.status_code}"
            )
        return check_scores(_scores(response), len(texts))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def load(target: str) -> RemoteScorer:
    """Return the scorer at a URL, without asking it anything yet."""
    return RemoteScorer(target)


def _reason(error: httpx.HTTPError | httpx.InvalidURL) -> str:
    """Return the error's message if nothing was sent yet, else only its type, to quote no text."""
    if isinstance(error, httpx.ConnectError) and str(error):
        return str(error)
    return type(error).__name__


def _scores(response: httpx.Response) -> object:
    try:
        answer = parse_json(response.content.decode())
    except (UnicodeDecodeError, StrictJSONError) as error:
        # The parser's message is left out, because it may quote a text.
        raise ScoringError("the toxicity scorer's answer is no JSON") from error
    if not isinstance(answer, dict) or "scores" not in answer:
        raise ScoringError('the toxicity scorer\'s answer is no JSON object with "scores"')
    return answer["scores"]
