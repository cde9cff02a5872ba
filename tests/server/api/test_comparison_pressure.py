"""Tests that the queue place held for scoring a compared answer is freed, whatever happens."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from interventions.model import ModelDescription
from interventions.registry import Registry
from server.engine.base import Engine, Generation, PromptReader
from server.engine.chat import ChatPrompt, Conversation
from server.engine.errors import EngineError, QueueFullError, StepFailedError
from server.engine.grammar import CompiledGrammar
from server.engine.output import (
    EngineStats,
    FinishReason,
    PromptDescription,
    StepOutput,
    TokenizerDescription,
)
from server.engine.request import Request
from server.engine.torch.engine import TorchEngine
from tests.conftest import LoadTiny, MakeClient, WriteArtifact
from tests.engines import idle
from tests.serving import (
    Connection,
    Json,
    build_app,
    chat,
    chunks,
    complete,
    error_of,
    events,
    eventually,
    logprobs_of,
)

COMPARED: Json = {"steering": {"intervention": "maps"}, "compare": True, "ignore_eos": True}


@dataclass
class FakeGeneration:
    """A generation that yields the given outputs; `follow` begins the scoring at once."""

    request: Request
    outputs: Sequence[StepOutput]
    engine: "FakeEngine"
    cancelled: bool = False

    async def __aiter__(self) -> AsyncIterator[StepOutput]:
        for output in self.outputs:
            yield output

    async def follow(self, request: Request) -> Generation:
        assert self.request.has_follower
        assert not self.cancelled, "its place is given up"
        return self.engine.begin_scoring(request)

    def cancel(self) -> None:
        self.cancelled = True


class FakePrompts:
    """Implements PromptReader; every token is 1."""

    tokenizer = TokenizerDescription("Fake", None, None, None, None, None)

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * len(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return "x" * len(tokens)

    def describe_prompt(self, prompt: str | Sequence[int]) -> PromptDescription:
        tokens = (1,) * len(prompt)
        return PromptDescription(tokens, "x" * len(tokens), tuple(range(len(tokens))), "x")

    def read_chat(self, conversation: Conversation) -> ChatPrompt:
        return ChatPrompt([1] * len(conversation.messages))

    def names(self, tokens: Sequence[int]) -> list[str]:
        return ["x"] * len(tokens)


@dataclass
class FakeEngine:
    """A fake engine whose queue is full after one `submit`.

    Of `Engine` it has only the protocol's members; its other members are for this file.
    """

    model: ModelDescription
    tokens: tuple[int, ...] = (5, 6, 2)
    texts: tuple[str, ...] = ("ab", "ab", "ab")  # not the texts that these tokens spell
    end: FinishReason = "stop"
    steered: tuple[float, ...] = (-0.5, -1.0, -0.25)
    base: tuple[float, ...] = (-1.5, -1.0, -0.75)
    refusal: EngineError | None = None  # raised for a follower
    submitted: list[Request] = field(default_factory=list)
    scored: list[Request] = field(default_factory=list)
    generations: list[FakeGeneration] = field(default_factory=list)
    max_model_len: int = 100
    ready: bool = True
    died: bool = False

    @property
    def prompts(self) -> PromptReader:
        return FakePrompts()

    def compile_grammar(
        self, lark: str, field: str, *, of_schemas: bool = False
    ) -> CompiledGrammar:
        raise NotImplementedError

    async def submit(self, requests: Sequence[Request]) -> list[Generation]:
        if self.submitted:
            raise QueueFullError("full")
        self.submitted += requests
        return [self._begun(request, self._outputs(request)) for request in requests]

    def begin_scoring(self, request: Request) -> Generation:
        self.scored.append(request)
        if self.refusal is not None:
            raise self.refusal
        told = tuple(logprobs_of("?", value, {}) for value in self.base)
        output = StepOutput((), "", prompt_logprobs=told, finish_reason="length")
        return self._begun(request, [output])

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0.0, 0)

    async def start(self) -> None:
        """Do nothing: this engine is ready from the beginning."""

    async def close(self) -> bool:
        return True

    def _begun(self, request: Request, outputs: Sequence[StepOutput]) -> FakeGeneration:
        self.generations.append(FakeGeneration(request, outputs, self))
        return self.generations[-1]

    def _outputs(self, request: Request) -> list[StepOutput]:
        if not request.sampling.max_tokens:
            return [StepOutput((), "", finish_reason="length")]
        last = len(self.tokens) - 1
        return [
            StepOutput(
                (token,),
                self.texts[place],
                logprobs=(logprobs_of("?", value, {}),) if request.sampling.logprobs == 0 else (),
                finish_reason=self.end if place == last else None,
            )
            for place, (token, value) in enumerate(zip(self.tokens, self.steered, strict=True))
        ]


@pytest.fixture
def fake(load_tiny: LoadTiny, registry: Registry, affine_artifact: WriteArtifact) -> FakeEngine:
    registry.add(affine_artifact("maps"), "maps")
    return FakeEngine(load_tiny().description)


async def ask(engine: Engine, registry: Registry, **fields: object) -> httpx.Response:
    async with client_of(engine, registry) as client:
        return await complete(client, **{**COMPARED, **fields})


def client_of(engine: Engine, registry: Registry) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=build_app(engine, registry))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_needs_no_more_than_the_protocol(
    fake: FakeEngine, registry: Registry, stream: bool
) -> None:
    response = await ask(fake, registry, stream=stream, n=2, seed=3)
    body = chunks(response.text)[-1] if stream else response.json()
    assert body["comparison"]["mean_log_ratio"] == [0.5, 0.5]  # type: ignore[index]
    assert [request.has_follower for request in fake.submitted] == [True, True, False, False]
    assert sum(request.queue_places for request in fake.submitted) == 6
    assert [request.sampling.logprobs for request in fake.submitted] == [0, 0, None, None]
    prompt = fake.submitted[0].prompt
    for request in fake.scored:
        assert request.prompt == (*prompt, 5, 6, 2), "not the token ids that were drawn"
        assert (request.edits, request.has_follower) == ((), False)
        sampling = request.sampling
        assert (sampling.max_tokens, sampling.prompt_logprobs) == (0, 0)
        assert sampling.prompt_logprobs_from == len(prompt)
    assert len({request.request_id for request in (*fake.submitted, *fake.scored)}) >= 4
    assert len(fake.generations) == 6
    assert all(generation.cancelled for generation in fake.generations)


async def test_a_token_that_is_impossible_to_the_base_model_is_told_as_a_number(
    fake: FakeEngine, registry: Registry
) -> None:
    fake.base = (-1.5, float("-inf"), -0.25)
    body = (await ask(fake, registry)).json()
    [ratio] = body["comparison"]["mean_log_ratio"]
    assert ratio == pytest.approx((1 + 9998 + 0) / 3)


async def test_a_stream_has_no_chunk_for_log_probabilities_that_nobody_asked_for(
    fake: FakeEngine, registry: Registry
) -> None:
    fake.texts, fake.end = ("ab", "ab", ""), "length"  # the last token adds no text
    async with client_of(fake, registry) as client:
        response = await chat(client, stream=True, **COMPARED)
    told: list[Any] = [*chunks(response.text)]
    deltas = [choice["delta"] for chunk in told for choice in chunk["choices"]]
    assert [delta.get("content") for delta in deltas] == ["", "ab", "ab", None]


@pytest.mark.parametrize("fields", [{"max_tokens": 0, "echo": True}, {"strength": 0}])
async def test_unscored_answers_free_their_place(
    fake: FakeEngine, registry: Registry, fields: Json
) -> None:
    steering = {"intervention": "maps", **fields} if "strength" in fields else None
    asked = {"steering": steering} if steering else fields
    body = (await ask(fake, registry, **asked)).json()
    assert body["comparison"]["mean_log_ratio"] == [0.0 if steering else None]
    assert not fake.scored
    assert all(generation.cancelled for generation in fake.generations)
    assert [request.has_follower for request in fake.submitted] == [not steering, False]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_scoring_that_fails_fails_its_request(
    fake: FakeEngine, registry: Registry, stream: bool
) -> None:
    fake.refusal = StepFailedError("the step failed")
    response = await ask(fake, registry, stream=stream)
    error = json.loads(events(response.text)[-1])["error"] if stream else error_of(response)
    assert error["code"] == "step_failed"
    assert all(generation.cancelled for generation in fake.generations)


class Held:
    """Holds an engine before the step in which the base model scores an answer, until `let_go`."""

    def __init__(self, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._core, self._step = engine._core, engine._core.step
        self._may_go_on = threading.Event()
        self.begun = threading.Event()
        monkeypatch.setattr(engine._core, "step", self._held_step)

    def let_go(self) -> None:
        self._may_go_on.set()

    def _held_step(self) -> object:
        if any(
            each.request.request_id.endswith("-scored") for each in self._core.scheduler.waiting
        ):
            self.begun.set()
            assert self._may_go_on.wait(20)
        return self._step()


@pytest.fixture
def maps(registry: Registry, affine_artifact: WriteArtifact) -> None:
    registry.add(affine_artifact("maps"), "maps")


@pytest.mark.usefixtures("maps")
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_client_that_leaves_while_its_answer_is_scored_leaves_nothing(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    held = Held(tiny_engine, monkeypatch)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3, "stream": stream, **COMPARED}
    connection = Connection(body)
    request = asyncio.create_task(connection.run(build_app(tiny_engine, registry)))
    await eventually(held.begun.is_set)
    assert not request.done()
    connection.leave.set()
    async with asyncio.timeout(10):
        await request
    assert not idle(tiny_engine)
    held.let_go()
    await eventually(lambda: idle(tiny_engine))
    assert not registry._stored._pins


@pytest.mark.usefixtures("maps")
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_the_deadline_ends_a_scoring(
    tiny_engine: TorchEngine,
    make_client: MakeClient,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    held = Held(tiny_engine, monkeypatch)
    client = make_client(request_timeout=1.5)
    request = asyncio.create_task(complete(client, stream=stream, **COMPARED))
    await eventually(held.begun.is_set)
    assert code_of(await request, stream, 504) == "request_timeout"
    held.let_go()
    await eventually(lambda: idle(tiny_engine))


@pytest.mark.usefixtures("maps")
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_server_that_stops_ends_a_scoring(
    tiny_engine: TorchEngine,
    client: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    held = Held(tiny_engine, monkeypatch)
    request = asyncio.create_task(complete(client, stream=stream, **COMPARED))
    await eventually(held.begun.is_set)
    closing = asyncio.create_task(tiny_engine.close())
    assert code_of(await request, stream, 503) == "shutting_down"
    held.let_go()
    assert await closing
    assert idle(tiny_engine)


@pytest.mark.usefixtures("maps")
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("what", ["its generation", "its scoring"])
async def test_a_step_that_fails_leaves_no_place_taken(
    tiny_engine: TorchEngine,
    client: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
    what: str,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    assert (await complete(client, **COMPARED)).status_code == 200  # loads the maps
    request: Awaitable[httpx.Response]
    with monkeypatch.context() as broken:
        if what == "its generation":
            broken.setattr(tiny_engine._core._runner, "run", fail)
            request = complete(client, stream=stream, **COMPARED)
        else:
            held = Held(tiny_engine, broken)
            request = asyncio.create_task(complete(client, stream=stream, **COMPARED))
            await eventually(held.begun.is_set)
            broken.setattr(tiny_engine._core._runner, "run", fail)
            held.let_go()
        assert code_of(await request, stream, 500) == "step_failed"
    await eventually(lambda: idle(tiny_engine))
    assert (await complete(client, **COMPARED)).status_code == 200
    assert idle(tiny_engine)


def code_of(response: httpx.Response, stream: bool, status: int) -> object:
    """Check that an answer has failed, with `status` if it is no stream; return its error code."""
    if stream:
        assert "[DONE]" not in response.text
        return json.loads(events(response.text)[-1])["error"]["code"]
    assert response.status_code == status
    return error_of(response)["code"]
