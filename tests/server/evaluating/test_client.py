"""Tests of the client and of what is observed, against the real application and a scripted one."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
import torch

from interventions.registry import Registry
from server.engine.torch.engine import TorchEngine
from server.evaluating import EvaluationError
from server.evaluating.client import EvaluationClient
from server.evaluating.files import Item
from server.evaluating.observing import Task, observe
from server.evaluating.plan import Sampling
from server.evaluating.questions import Question
from server.evaluating.settings import BASE, Setting, parse_steering
from tests.conftest import LoadTiny, WriteArtifact
from tests.serving import build_app

GREEDY = Sampling(6)
MAPS = parse_steering("maps")


@pytest.fixture
async def client(
    tiny_engine: TorchEngine, registry: Registry, affine_artifact: WriteArtifact
) -> AsyncIterator[EvaluationClient]:
    """Connect to an application that stores maps under the name "maps"."""
    registry.add(affine_artifact("maps"), "maps")
    transport = httpx.ASGITransport(app=build_app(tiny_engine, registry))
    async with EvaluationClient.connect("http://localhost", None, "", 4, transport) as client:
        yield client


def ignore(_: str) -> None:
    """Take a step of a progress bar that nobody sees."""


def logprobs_of(load_tiny: LoadTiny, text: str) -> list[float]:
    """Return the log-probability of each byte of a text but the first, by transformers alone."""
    loaded = load_tiny()
    ids = loaded.tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([ids])).logits[0, :-1].double()
    found: list[float] = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
    return found


async def test_a_text_is_scored_as_transformers_scores_it(
    client: EvaluationClient, load_tiny: LoadTiny
) -> None:
    text = "Ca va, élève? Oui."
    expected = logprobs_of(load_tiny, text)
    whole = await client.score(text, 0, BASE)
    assert whole.tokens == len(expected)
    assert whole.nats == pytest.approx(-sum(expected), abs=1e-4)
    start = text.index("élève")
    part = await client.score(text, start, BASE)
    first = len(text[:start].encode()) - 1  # the first byte has no log-probability
    assert part.tokens == len(expected[first:])
    assert part.nats == pytest.approx(-sum(expected[first:]), abs=1e-4)


async def test_everything_is_observed_in_order(client: EvaluationClient) -> None:
    task = Task(
        GREEDY,
        gold_only=True,
        prompts=[Item("p:1", "Hello"), Item("p:2", "Good day")],
        texts=[Item("t:1", "A cat", " sat."), Item("t:2", "So", " it is")],
        questions=[[Question("q:1", "1+1=", (" 2", " three"), 0, frozenset({0}))]],
    )
    steps: list[str] = []
    seen = await observe(client, MAPS, task, steps.append)
    assert len(steps) == task.steps == 2 + 2 + 2 + 1
    [[hello], [day]] = seen.continuations
    assert hello == await client.complete("Hello", GREEDY, 0, MAPS)
    assert day == await client.complete("Good day", GREEDY, 0, MAPS)
    assert hello != await client.complete("Hello", GREEDY, 0, BASE)
    # The continuation is steered; the model that judges its fluency is not.
    assert seen.fluency == [
        [await client.score("Hello" + hello, 5, BASE)],
        [await client.score("Good day" + day, 8, BASE)],
    ]
    assert seen.texts == [
        await client.score("A cat sat.", 5, MAPS),
        await client.score("So it is", 2, MAPS),
    ]
    [[choices]] = seen.choices
    scores = [await client.score(text, 4, MAPS) for text in ("1+1= 2", "1+1= three")]
    assert choices == [-score.nats for score in scores]
    [applied] = client.applied["maps"]
    assert (applied.intervention, applied.kind) == ("maps", "affine")
    assert applied.settings == {"strength": 1.0, "positions": "all"}


async def test_samples_differ_and_settings_share_their_seeds(client: EvaluationClient) -> None:
    sampling = Sampling(8, temperature=1.0, samples=3, seed=5)
    task = Task(sampling, fluency=False, prompts=[Item("p:1", "Hello"), Item("p:2", "Hello")])
    seen = await observe(client, BASE, task, ignore)
    assert [len(samples) for samples in seen.continuations] == [3, 3]
    assert len({text for samples in seen.continuations for text in samples}) == 6
    nothing = parse_steering('{"intervention": "maps", "strength": 0}')
    assert (await observe(client, nothing, task, ignore)).continuations == seen.continuations
    assert seen.fluency == []


async def test_an_error_names_the_setting_and_the_place(client: EvaluationClient) -> None:
    task = Task(GREEDY, prompts=[Item("p.txt:7", "Hello")])
    unknown = parse_steering("unknown")
    message = 'unknown, p.txt:7: There is no intervention "unknown". (HTTP 404)'
    with pytest.raises(EvaluationError) as caught:
        await observe(client, unknown, task, ignore)
    assert str(caught.value) == message
    long = Task(GREEDY, texts=[Item("t.txt:3", "x" * 5000)])
    with pytest.raises(EvaluationError, match=r"base model, t.txt:3: .*maximum context"):
        await observe(client, BASE, long, ignore)


async def test_an_intervention_that_changes_meanwhile_is_noticed(
    client: EvaluationClient, registry: Registry, affine_artifact: WriteArtifact
) -> None:
    await client.complete("Hello", GREEDY, 0, MAPS)
    registry.add(affine_artifact("maps", seed=1), "maps")
    with pytest.raises(EvaluationError, match="of maps has changed"):
        await client.complete("Hello", GREEDY, 0, MAPS)


async def test_the_default_of_a_server_does_not_steer_the_base_model(
    tiny_engine: TorchEngine, registry: Registry, affine_artifact: WriteArtifact
) -> None:
    registry.add(affine_artifact("maps"), "maps")
    default = {"intervention": "maps"}
    texts = []
    for policy in ("optional", "locked"):
        app = build_app(tiny_engine, registry, default_steering=default, steering_policy=policy)
        transport = httpx.ASGITransport(app=app)
        async with EvaluationClient.connect("http://localhost", None, "", 1, transport) as client:
            if policy == "optional":
                texts += [await client.complete("Hello", GREEDY, 0, each) for each in (BASE, MAPS)]
            else:
                with pytest.raises(EvaluationError, match="HTTP 403"):
                    await client.complete("Hello", GREEDY, 0, BASE)
    assert texts[0] != texts[1]


Answer = Callable[[httpx.Request], httpx.Response]


async def ask(answer: Answer, setting: Setting = BASE) -> str:
    """Ask a scripted server, which lists the model "m", for a continuation."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        return answer(request)

    transport = httpx.MockTransport(handle)
    async with EvaluationClient.connect("http://h", None, "", 1, transport) as client:
        return await client.complete("Hello", GREEDY, 0, setting)


def completion(**fields: object) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"text": " a"}], **fields})


async def test_a_full_queue_is_asked_again_after_the_time_that_it_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    named = ["3", "1e9", "-1", "nan", "Fri, 31 Dec 1999 23:59:59 GMT", None]
    bodies: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        if len(bodies) > len(named):
            return completion()
        value = named[len(bodies) - 1]
        return httpx.Response(429, headers={} if value is None else {"Retry-After": value})

    assert await ask(answer) == " a"
    assert waits == [3.0, 60.0, 0.0, 1.0, 1.0, 1.0]
    assert len(set(bodies)) == 1
    assert json.loads(bodies[0])["steering"] is None

    error = {"error": {"message": "The queue is full."}}
    with pytest.raises(EvaluationError, match=r"^The queue is full\. \(HTTP 429\)$"):
        await ask(lambda _: httpx.Response(429, json=error))


@pytest.mark.parametrize(
    ("response", "setting", "named"),
    [
        (httpx.Response(500, text="oops"), BASE, r"http://h answers .* \(HTTP 500\)"),
        (httpx.Response(200, text="<html>"), BASE, "does not answer as a steerserve server"),
        (httpx.Response(200, json={"choices": []}), BASE, "does not answer as a steerserve server"),
        (httpx.Response(200, json=[1]), BASE, "does not answer as a steerserve server"),
        (completion(), MAPS, "was asked for maps, and says that it applied nothing"),
        (
            completion(
                steering=[{"intervention": "x", "digest": "d", "kind": "affine", "settings": {}}]
            ),
            BASE,
            "was asked for base model, and says that it applied x",
        ),
    ],
)
async def test_other_servers_and_wrong_steering_are_found_out(
    response: httpx.Response, setting: Setting, named: str
) -> None:
    with pytest.raises(EvaluationError, match=named):
        await ask(lambda _: response, setting)


async def test_a_server_that_gives_no_logprobs_is_found_out() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        models = {"data": [{"id": "m"}]}
        return httpx.Response(200, json=models) if request.method == "GET" else completion()

    transport = httpx.MockTransport(handle)
    async with EvaluationClient.connect("http://h", None, "", 1, transport) as client:
        with pytest.raises(EvaluationError, match="no log-probabilities"):
            await client.score("Hello", 0, BASE)


async def test_a_connection_that_breaks_is_said() -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("Server disconnected")

    with pytest.raises(EvaluationError, match=r"^Cannot reach http://h: Server disconnected$"):
        await ask(answer)


async def test_no_more_requests_than_allowed_are_sent_at_once() -> None:
    running, most = 0, 0

    async def handle(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return (
            httpx.Response(200, json={"data": [{"id": "m"}]})
            if request.method == "GET"
            else (completion())
        )

    transport = httpx.MockTransport(handle)
    async with EvaluationClient.connect("http://h", None, "", 3, transport) as client:
        asked = [client.complete("a", GREEDY, 0, BASE) for _ in range(20)]
        await asyncio.gather(*asked)
    assert most == 3
