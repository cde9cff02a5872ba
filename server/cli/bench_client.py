"""The HTTP client of `steerserve bench`, which also notes when the pieces of a stream arrive."""

import json
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, TypeAlias

import httpx
from pydantic import JsonValue

from server.cli.bench_text import SENTENCES

Json: TypeAlias = Mapping[str, JsonValue]

# A long prompt on a slow machine, behind others, may take minutes to its first token.
_TIMEOUT: Final = httpx.Timeout(10.0, read=600.0, pool=None)
_LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=None)
_DATA: Final = "data: "


class BenchError(Exception):
    """The server cannot be measured; the message is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class Listed:
    """An intervention that the server lists and can apply."""

    name: str
    kind: str  # affine or reward
    defaults: Json
    limits: Json


@dataclass(frozen=True, slots=True)
class Stream:
    """The times when a streamed completion was requested and when its pieces came, in seconds."""

    sent: float
    arrivals: tuple[float, ...]  # at least one

    @property
    def first_token_seconds(self) -> float:
        """Seconds from the request to the first piece of the answer."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [
            after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)
        ]


class BenchClient:
    """Asks one server for completions. Every prompt is random, so that no prefix cache holds it."""

    def __init__(self, url: str, api_key: str | None, model: str = "") -> None:
        """`model` is the model to ask for; if it is empty, `find_model` chooses one."""
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._url = url
        self._random = random.Random(time.time_ns())
        self.model = model
        try:
            self._http = httpx.AsyncClient(
                base_url=url, headers=headers, timeout=_TIMEOUT, limits=_LIMITS
            )
        except httpx.InvalidURL as error:
            raise BenchError(f"Cannot reach {url}: {error}") from error

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def find_model(self) -> int:
        """Take the first served model, unless one was given; return its context in tokens.

        Raises:
            BenchError: the server serves no such model, or does not state its context.
        """
        served = await self._list("/v1/models")
        wanted = [item for item in served if self.model in ("", item.get("id"))]
        if not wanted:
            raise BenchError(f"{self._url} does not serve the model {self.model!r}")
        self.model = str(wanted[0]["id"])
        context = wanted[0].get("max_model_len")
        if not isinstance(context, int):
            raise BenchError(f"{self._url} does not say how long a context its model has")
        return context

    async def interventions(self) -> list[Listed]:
        """Return the interventions that the server can apply, in the server's order."""
        found = []
        for item in await self._list("/v1/interventions"):
            defaults, limits = item.get("defaults"), item.get("limits")
            if item.get("servable") and isinstance(defaults, dict) and isinstance(limits, dict):
                found.append(Listed(str(item["name"]), str(item["kind"]), defaults, limits))
        return found

    def prompt(self, words: int) -> str:
        """Make a prompt of `words` words from English sentences in a random order."""
        text: list[str] = []
        while len(text) < words:
            text += self._random.choice(SENTENCES).split()
        return " ".join(text[:words])

    async def count_tokens(self, prompt: str) -> int:
        """Return the number of tokens that the server counts in a prompt."""
        _, usage = await self._complete(prompt, 1, None)
        return usage["prompt_tokens"]

    async def complete(self, prompt: str, tokens: int, steering: JsonValue) -> None:
        """Have exactly `tokens` tokens generated, in one answer.

        Raises:
            BenchError: the server refuses, generates fewer tokens, or does not steer.
        """
        answer, usage = await self._complete(prompt, tokens, steering)
        if usage["completion_tokens"] != tokens:
            raise BenchError(
                f"The server ended a completion after {usage['completion_tokens']} of {tokens} "
                "tokens; it does not know `ignore_eos`"
            )
        self._check_steered(steering, answer.get("steering"))

    async def _complete(
        self, prompt: str, tokens: int, steering: JsonValue
    ) -> tuple[Json, dict[str, int]]:
        body = self._body(prompt, tokens, steering)
        answer = await self._json("POST", "/v1/completions", body)
        usage = answer.get("usage")
        if not isinstance(usage, dict):
            raise BenchError(f"{self._url} does not answer as a steerserve server: no usage")
        return answer, {name: value for name, value in usage.items() if isinstance(value, int)}

    async def stream(self, prompt: str, tokens: int, steering: JsonValue) -> Stream:
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
        return Stream(sent, tuple(arrivals))

    async def _events(self, body: dict[str, JsonValue]) -> AsyncIterator[dict[str, JsonValue]]:
        """Yield the events of a stream; raise BenchError if it ends without `[DONE]`."""
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    await response.aread()
                    raise self._refusal(response)
                async for line in response.aiter_lines():
                    if not line.startswith(_DATA):
                        continue
                    data = line.removeprefix(_DATA)
                    if data == "[DONE]":
                        return
                    event: dict[str, JsonValue] = json.loads(data)
                    if "error" in event:
                        raise BenchError(f"The server ended a stream: {_message(event)}")
                    yield event
        except (httpx.HTTPError, ValueError) as error:
            raise self._unreachable(error) from error
        raise BenchError("The server broke a stream off")

    def _body(self, prompt: str, tokens: int, steering: JsonValue) -> dict[str, JsonValue]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "steering": steering,  # null asks for none, also where the server has a default
        }

    def _check_steered(self, wanted: JsonValue, applied: JsonValue) -> None:
        if wanted and not applied:
            raise BenchError(f"{self._url} does not steer: its answer does not say what it applied")

    async def _list(self, path: str) -> list[dict[str, JsonValue]]:
        data = (await self._json("GET", path)).get("data")
        return [item for item in data if isinstance(item, dict)] if isinstance(data, list) else []

    async def _json(
        self, method: str, path: str, body: dict[str, JsonValue] | None = None
    ) -> dict[str, JsonValue]:
        try:
            response = await self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.is_error:
            raise self._refusal(response)
        answer = _object(response)
        if answer is None:
            raise BenchError(f"{self._url} does not answer as a steerserve server")
        return answer

    def _refusal(self, response: httpx.Response) -> BenchError:
        answer = _object(response) or {}
        message = _message(answer) or f"{self._url} answers {response.reason_phrase}"
        return BenchError(f"{message} (HTTP {response.status_code})")

    def _unreachable(self, error: Exception) -> BenchError:
        return BenchError(f"Cannot reach {self._url}: {error or type(error).__name__}")


def _object(response: httpx.Response) -> dict[str, JsonValue] | None:
    try:
        answer = response.json()
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _message(answer: Json) -> str:
    problem = answer.get("error")
    return str(problem.get("message")) if isinstance(problem, dict) else ""
