"""The HTTP client of `steerserve bench`, which also notes when each event of a stream arrives."""

import json
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Self, TypeAlias

import httpx
from pydantic import JsonValue

Json: TypeAlias = Mapping[str, Any]

# A long prompt on a slow machine, behind others, may take minutes to its first token.
_TIMEOUT: Final = httpx.Timeout(10.0, read=600.0, pool=None)
_LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=None)
_DATA: Final = "data: "
_SAMPLE_WORDS: Final = 40  # in the prompt from which the number of words per token is estimated
_MAX_CONTEXT: Final = 0.8  # of the model's context; the length of a prompt is an estimate
_TEXT: Final = """
the ferry leaves harbour at seven and in winter it is still dark by then she kept letters a drawer
that nobody else was allowed to open good map shows less than land does which why useful committee
will meet again on Thursday discuss budget for bridge when kettle boiled over third time he gave up
"""


class BenchError(Exception):
    """The server cannot be measured; the message is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class ListedIntervention:
    """An intervention that the server lists and can apply, with a setting's range."""

    name: str
    kind: str  # affine or reward
    setting: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """When the events of one streamed completion came, in seconds."""

    first_token: float  # since the request was sent
    gaps: list[float]  # between events; empty if the answer came in one


class BenchClient:
    """Asks a server for completions. Every prompt is random, so that no prefix cache holds it."""

    def __init__(self, http: httpx.AsyncClient, url: str) -> None:
        self._http = http
        self._url = url
        self._random = random.Random(time.time_ns())
        self._context = 0  # tokens
        self._words_per_token = 1.0
        self.model = ""

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str, api_key: str | None, model: str) -> AsyncIterator[Self]:
        """Yield a client of a server; `model` is the model's name, or empty for the first one.

        Raises:
            BenchError: the server cannot be reached, serves no such model, or does not state the
                model's context.
        """
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        try:
            http = httpx.AsyncClient(
                base_url=url, headers=headers, timeout=_TIMEOUT, limits=_LIMITS
            )
        except httpx.InvalidURL as error:
            raise BenchError(f"Cannot reach {url}: {error}") from error
        async with http:
            client = cls(http, url)
            served = await client._list("/v1/models")
            found = next((item for item in served if model in ("", item.get("id"))), None)
            if found is None:
                raise BenchError(f"{url} does not serve the model {model!r}")
            if not isinstance(context := found.get("max_model_len"), int):
                raise BenchError(f"{url} does not say how long a context its model has")
            client.model, client._context = found["id"], context
            answer = await client._complete(client._text(_SAMPLE_WORDS), 1, None)
            client._words_per_token = _SAMPLE_WORDS / client._usage(answer, "prompt_tokens")
            yield client

    async def interventions(self) -> list[ListedIntervention]:
        """Return the interventions that the server can apply, in the server's order."""
        found = []
        for item in await self._list("/v1/interventions"):
            if item.get("servable"):
                kind = item["kind"]
                setting = "strength" if kind == "affine" else "eta"
                low, high = item["limits"][setting]
                if kind == "reward":  # larger steps may make a hidden state infinite
                    high = item["defaults"][setting]
                found.append(ListedIntervention(item["name"], kind, setting, low, high))
        return found

    def prompt(self, tokens: int) -> str:
        """Make a random prompt of about `tokens` tokens, or fewer if the context is shorter."""
        tokens = min(tokens, int(_MAX_CONTEXT * self._context))
        return self._text(max(1, round(tokens * self._words_per_token)))

    def _text(self, words: int) -> str:
        return " ".join(self._random.choices(_TEXT.split(), k=words))

    async def complete(self, prompt: str, tokens: int, steering: JsonValue) -> None:
        """Have exactly `tokens` tokens generated, in one answer.

        Raises:
            BenchError: the server refuses, generates fewer tokens, or does not steer.
        """
        answer = await self._complete(prompt, tokens, steering)
        if (generated := self._usage(answer, "completion_tokens")) != tokens:
            raise BenchError(
                f"The server ended a completion after {generated} of {tokens} tokens; it does not "
                "know `ignore_eos`"
            )
        self._check_steered(steering, answer.get("steering"))

    async def stream(self, prompt: str, tokens: int, steering: JsonValue) -> StreamTimes:
        """Have `tokens` tokens generated and streamed.

        Raises:
            BenchError: the server refuses, the stream breaks off, or steering was ignored.
        """
        sent = time.perf_counter()
        arrivals: list[float] = []
        applied: JsonValue = None
        async for event in self._events({**self._body(prompt, tokens, steering), "stream": True}):
            if event.get("choices"):
                arrivals.append(time.perf_counter())
            applied = event.get("steering") or applied
        if not arrivals:
            raise BenchError("The server streamed an answer without a token")
        self._check_steered(steering, applied)
        gaps = [after - before for before, after in pairwise(arrivals)]
        return StreamTimes(arrivals[0] - sent, gaps)

    async def _events(self, body: Json) -> AsyncIterator[Json]:
        """Yield the events of a stream; raise BenchError if it ends without `[DONE]`."""
        async with self._response("POST", "/v1/completions", body) as response:
            async for line in response.aiter_lines():
                if line == f"{_DATA}[DONE]":
                    return
                if line.startswith(_DATA):
                    event = self._object(line.removeprefix(_DATA))
                    if "error" in event:
                        raise BenchError(f"The server ended a stream: {_message(event)}")
                    yield event
        raise BenchError("The server broke a stream off")

    async def _complete(self, prompt: str, tokens: int, steering: JsonValue) -> Json:
        return await self._json("POST", "/v1/completions", self._body(prompt, tokens, steering))

    def _body(self, prompt: str, tokens: int, steering: JsonValue) -> Json:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "steering": steering,  # null asks for none, also where the server has a default
        }

    def _check_steered(self, asked: JsonValue, applied: JsonValue) -> None:
        if asked and not applied:
            raise BenchError(f"{self._url} does not steer: its answer does not say what it applied")

    async def _list(self, path: str) -> list[Json]:
        data: list[Json] = (await self._json("GET", path)).get("data", [])
        return data

    async def _json(self, method: str, path: str, body: Json | None = None) -> Json:
        async with self._response(method, path, body) as response:
            return self._object((await response.aread()).decode())

    @asynccontextmanager
    async def _response(
        self, method: str, path: str, body: Json | None
    ) -> AsyncIterator[httpx.Response]:
        """Send a request, and yield the response before its body is read.

        Raises:
            BenchError: the server cannot be reached, refuses, or ends the connection.
        """
        try:
            async with self._http.stream(method, path, json=body) as response:
                if response.is_error:
                    text = (await response.aread()).decode(errors="replace")
                    message = (
                        _message(_parsed(text)) or f"{self._url} answers {response.reason_phrase}"
                    )
                    raise BenchError(f"{message} (HTTP {response.status_code})")
                yield response
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise BenchError(f"Cannot reach {self._url}: {why}") from error

    def _object(self, text: str) -> Json:
        if (found := _parsed(text)) is None:
            raise BenchError(f"{self._url} does not answer as a steerserve server")
        return found

    def _usage(self, answer: Json, name: str) -> int:
        if "usage" not in answer:
            raise BenchError(f"{self._url} does not answer as a steerserve server: no usage")
        count: int = answer["usage"][name]
        return count


def _parsed(text: str) -> Json | None:
    """Return the JSON object in a text, or None if it is something else."""
    try:
        found: JsonValue = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _message(answer: Json | None) -> str:
    problem = answer.get("error") if answer else None
    return str(problem.get("message")) if isinstance(problem, dict) else ""
