"""Builds the application, sends it requests, reads its streams, and scripts its engine."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
from fastapi import FastAPI
from starlette.types import Message

from interventions.registry import Registry
from server.app import create_app
from server.config import Settings
from server.engine.base import Engine, Generation
from server.engine.errors import EngineError
from server.engine.output import FinishReason, ScoredToken, StepOutput, TokenLogprobs
from server.engine.request import Request, SamplingSettings
from server.metrics import Metrics
from server.toxicity.queue import ScoringQueue
from server.toxicity.scorer import Scorer

Json = dict[str, object]

# Every sampling field that completions and chat share; SAMPLING is what the engine gets for them.
SAMPLING_FIELDS: Json = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 2,
    "frequency_penalty": -2.0,
    "logit_bias": {"5": -100, "0": 0.5, "258": 100},
    "seed": 3,
    "stop": ["a", "b"],
    "ignore_eos": True,
    "max_tokens": 9,
}
SAMPLING = SamplingSettings(
    max_tokens=9,
    temperature=0.5,
    top_p=0.9,
    top_k=7,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=2.0,
    frequency_penalty=-2.0,
    logit_bias=((5, -100.0), (0, 0.5), (258, 100.0)),
    seed=3,
    stop=("a", "b"),
    ignore_eos=True,
)


def build_app(
    engine: Engine, registry: Registry, scorer: Scorer | None = None, **settings: object
) -> FastAPI:
    """Build an application that serves the model "tiny"."""
    given = Settings.model_validate({"served_model_names": ("tiny",), **settings})
    metrics = Metrics(engine, registry, "tiny")
    scoring = None if scorer is None else ScoringQueue(scorer, metrics, given.toxicity_queue_size)
    return create_app(engine, registry, metrics, scoring, given)


async def push(client: httpx.AsyncClient, path: Path, name: str | None = None) -> Json:
    """Upload an artifact, which must succeed."""
    fields = {} if name is None else {"name": name}
    files = {"file": (path.name, bytes_of(path))}
    response = await client.post("/v1/interventions", files=files, data=fields)
    assert response.status_code in (200, 201), response.text
    body: Json = response.json()
    return body


def bytes_of(path: Path) -> bytes:
    """Return a small file's bytes; coroutines call it, in which ruff forbids Path.read_bytes."""
    return path.read_bytes()


async def complete(client: httpx.AsyncClient, **fields: object) -> httpx.Response:
    """Ask for a short greedy completion, with some fields added or replaced."""
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 6, "temperature": 0, **fields}
    return await client.post("/v1/completions", json=body)


async def text_of(client: httpx.AsyncClient, **fields: object) -> str:
    """Return the text of a completion, which must succeed."""
    response = await complete(client, **fields)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def user(content: object = "Hello", **fields: object) -> Json:
    """Return a chat message of the user."""
    return {"role": "user", "content": content, **fields}


async def chat(client: httpx.AsyncClient, **fields: object) -> httpx.Response:
    """Ask for a short greedy chat completion, with some fields added or replaced."""
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 6, "temperature": 0, **fields}
    return await client.post("/v1/chat/completions", json=body)


def usage(prompt: int, completion: int, cached: int = 0) -> Json:
    """Return OpenAI's `usage` object for these numbers of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error_of(response: httpx.Response) -> Json:
    """Return the error of a response, whose body must be OpenAI's error envelope and no more."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: Json = body["error"]
    assert error["message"]
    return error


def events(stream: str) -> list[str]:
    """Return the data of each server-sent event."""
    *blocks, rest = stream.split("\n\n")
    assert rest == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


def chunks(stream: str) -> list[Json]:
    """Return the chunks of a stream, which must end with [DONE]."""
    *data, last = events(stream)
    assert last == "[DONE]"
    return [json.loads(item) for item in data]


async def metric(client: httpx.AsyncClient, sample: str) -> float:
    """Return the value of a sample, named with its labels as /metrics prints them; 0 if absent."""
    page = (await client.get("/metrics")).text
    values = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
    return sum(float(value) for name, _, value in values if name == f"steerserve_{sample}")


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, for at most 20 seconds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - conditions of any kind, none of them an event
            await asyncio.sleep(0.005)


@dataclass
class ScriptedGeneration:
    """Yields the given outputs, then raises `error`, or ends if the last output is the final one.

    Without an error and a final output, it waits for ever.
    """

    outputs: tuple[StepOutput, ...] = ()
    error: Exception | None = None
    cancelled: bool = False

    async def __aiter__(self) -> AsyncIterator[StepOutput]:
        for output in self.outputs:
            yield output
        if self.error is not None:
            raise self.error
        if not self.outputs or self.outputs[-1].finish_reason is None:
            await asyncio.Event().wait()

    async def follow(self, request: Request) -> Generation:
        raise AssertionError("a scripted generation has no follower")

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Script:
    """Replaces `Engine.submit`: for each request, returns the next generation or raises it."""

    steps: list[ScriptedGeneration | EngineError]
    submitted: list[Request] = field(default_factory=list)

    async def submit(self, requests: Sequence[Request]) -> list[Generation]:
        generations: list[Generation] = []
        for request in requests:
            step = self.steps[len(self.submitted)]
            self.submitted.append(request)
            if isinstance(step, EngineError):
                raise step
            generations.append(step)
        return generations


def say(script: Script, text: str, reason: FinishReason = "stop") -> None:
    """Have the engine answer the next two requests with a text, in pieces of three characters."""
    pieces = [text[at : at + 3] for at in range(0, len(text), 3)] or [""]
    outputs = [StepOutput((1,), piece) for piece in pieces]
    outputs[-1] = replace(outputs[-1], finish_reason=reason)
    script.steps += [ScriptedGeneration(tuple(outputs)) for _ in range(2)]


def logprobs_of(
    text: str, logprob: float, best: Mapping[str, float], offset: int = 0
) -> TokenLogprobs:
    """Return the log-probabilities of a chosen token and of the best ones, in the given order."""
    top = tuple(
        ScoredToken(token, other, other.encode(), value)
        for token, (other, value) in enumerate(best.items())
    )
    rank = 1 + sum(value > logprob for value in best.values())
    return TokenLogprobs(ScoredToken(99, text, text.encode(), logprob), top, rank, offset)


@dataclass
class Connection:
    """Sends one request to the application without a socket, and disconnects at `leave`."""

    body: Json
    path: str = "/v1/completions"
    sent: list[Message] = field(default_factory=list)
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    _given: bool = False

    async def run(self, app: FastAPI) -> None:
        """Run the application on the request, to its end."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }
        await app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._given:
            self._given = True
            return {"type": "http.request", "body": json.dumps(self.body).encode()}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
