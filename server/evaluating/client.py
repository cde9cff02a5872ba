"""The HTTP client of `steerserve evaluate`: continuations and log-probabilities of texts."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Self
from urllib.parse import quote

import httpx
from pydantic import JsonValue, ValidationError

from server.evaluating import EvaluationError
from server.evaluating.answers import Applied, CompletionAnswer
from server.evaluating.plan import Sampling
from server.evaluating.settings import Setting

# A completion on a slow machine, behind others, may take minutes.
_TIMEOUT: Final = httpx.Timeout(10.0, read=600.0, pool=None)
_RETRY_SECONDS: Final = 1.0  # if the server names no time
_LONGEST_WAIT: Final = 60.0  # seconds before a refused request is sent again
_MAX_REFUSALS: Final = 60  # of one request by a full queue


@dataclass(frozen=True, slots=True)
class TextScore:
    """The negative log-likelihood of a text's tokens, summed, and the number of these tokens."""

    nats: float
    tokens: int


class EvaluationClient:
    """Asks a running server. Every answer is checked to be steered as it was asked."""

    def __init__(self, http: httpx.AsyncClient, url: str, model: str, concurrency: int) -> None:
        self._http = http
        self._url = url
        self._slots = asyncio.Semaphore(concurrency)
        self._digests: dict[str, tuple[str, ...]] = {}
        self.model = model
        self.applied: dict[str, list[Applied]] = {}
        """Maps a setting's label to the interventions that the server applied."""

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        url: str,
        api_key: str | None,
        model: str,
        concurrency: int,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> AsyncIterator[Self]:
        """Yield a client of a server.

        Args:
            model: the model's name; empty takes the first one that the server lists.
            concurrency: the most requests that are sent at once.
            transport: replaces the network.

        Raises:
            EvaluationError: the server cannot be reached, or serves no such model.
        """
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        try:
            http = httpx.AsyncClient(
                base_url=url,
                headers=headers,
                timeout=_TIMEOUT,
                limits=httpx.Limits(max_connections=concurrency),
                transport=transport,
            )
        except httpx.InvalidURL as error:
            raise EvaluationError(f"Cannot reach {url}: {error}") from error
        async with http:
            client = cls(http, url, model, concurrency)
            listed = (await client._object("GET", "/v1/models")).get("data", [])
            names = [item.get("id") for item in listed if isinstance(item, dict)]
            if not names or (model and model not in names):
                raise EvaluationError(f"{url} does not serve the model {model!r}")
            client.model = model or str(names[0])
            yield client

    async def complete(self, prompt: str, sampling: Sampling, seed: int, setting: Setting) -> str:
        """Return a continuation of a prompt.

        Raises:
            EvaluationError: the server cannot be reached, refuses, or steers in another way.
        """
        answer = await self._completion(
            setting,
            prompt=prompt,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=seed,
        )
        return answer.choices[0].text

    async def score(self, text: str, start: int, setting: Setting) -> TextScore:
        """Score the tokens of a text that reach beyond its first `start` characters.

        The text's first token follows nothing, so it has no probability and is left out.

        Raises:
            EvaluationError: the server cannot be reached, refuses, steers in another way, or
                returns no log-probabilities.
        """
        # The documented way to score a text: it is repeated, with log-probabilities, and nothing is
        # generated after it.
        answer = await self._completion(
            setting, prompt=text, max_tokens=0, temperature=0, echo=True, logprobs=0
        )
        logprobs = answer.choices[0].logprobs
        if logprobs is None:
            raise EvaluationError(f"{self._url} returns no log-probabilities of a text")
        ends = [*logprobs.text_offset[1:], len(text)]
        spans = zip(logprobs.token_logprobs, logprobs.text_offset, ends, strict=True)
        chosen = [
            value
            for value, begin, end in spans
            if value is not None and (begin >= start or end > start)
        ]
        return TextScore(-math.fsum(chosen), len(chosen))

    async def artifact(self, digest: str) -> bytes:
        """Download an artifact's bytes.

        Raises:
            EvaluationError: the server cannot be reached, or refuses.
        """
        path = f"/v1/interventions/{quote(f'sha256:{digest}', safe='')}/artifact"
        return (await self._response("GET", path)).content

    async def _completion(self, setting: Setting, **fields: JsonValue) -> CompletionAnswer:
        # Null asks for no steering, also where the server has a default.
        body = {"model": self.model, "steering": setting.steering, **fields}
        answer = await self._object("POST", "/v1/completions", body)
        try:
            parsed = CompletionAnswer.model_validate(answer)
        except ValidationError as error:
            raise self._foreign() from error
        self._check_steering(setting, parsed.steering or [])
        return parsed

    def _check_steering(self, setting: Setting, applied: list[Applied]) -> None:
        if len(applied) != len(setting.items):
            raise EvaluationError(
                f"{self._url} was asked for {setting.label}, and says that it applied "
                f"{' + '.join(item.intervention for item in applied) or 'nothing'}"
            )
        first = self.applied.setdefault(setting.label, applied)
        if first != applied:
            raise EvaluationError(
                f"An intervention of {setting.label} has changed on {self._url} meanwhile"
            )

    async def _object(
        self, method: str, path: str, body: Mapping[str, JsonValue] | None = None
    ) -> dict[str, Any]:
        found = _parsed((await self._response(method, path, body)).text)
        if found is None:
            raise self._foreign()
        return found

    async def _response(
        self, method: str, path: str, body: Mapping[str, JsonValue] | None = None
    ) -> httpx.Response:
        """Send a request, again as long as the server's queue is full; return its response."""
        async with self._slots:
            for _ in range(_MAX_REFUSALS):
                try:
                    response = await self._http.request(method, path, json=body)
                except httpx.HTTPError as error:
                    why = str(error) or type(error).__name__
                    raise EvaluationError(f"Cannot reach {self._url}: {why}") from error
                if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                    break
                await asyncio.sleep(_retry_seconds(response))
        if response.is_error:
            reason = f"{self._url} answers {response.reason_phrase}"
            message = _message(_parsed(response.text)) or reason
            raise EvaluationError(f"{message} (HTTP {response.status_code})")
        return response

    def _foreign(self) -> EvaluationError:
        return EvaluationError(f"{self._url} does not answer as a steerserve server")


def _retry_seconds(response: httpx.Response) -> float:
    """Return the seconds to wait before a refused request is sent again."""
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:  # no header, or a date
        return _RETRY_SECONDS
    return min(max(seconds, 0.0), _LONGEST_WAIT) if math.isfinite(seconds) else _RETRY_SECONDS


def _parsed(text: str) -> dict[str, Any] | None:
    """Return the JSON object in a text, or None if it is something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _message(answer: dict[str, Any] | None) -> str:
    problem = answer.get("error") if answer else None
    return str(problem.get("message")) if isinstance(problem, dict) else ""
