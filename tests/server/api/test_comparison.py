"""Tests of `comparison.mean_log_ratio`: an answer's mean log p_steered - log p_base per token."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from interventions.registry import Registry
from server.api.comparison import mean_log_ratio
from server.api.progress import Progress
from server.engine.request import Edit, Request, SamplingSettings
from server.engine.torch.engine import TorchEngine
from steering.settings import AffineSettings, RewardSettings
from tests import oracles
from tests.conftest import WriteArtifact
from tests.oracles import Oracle
from tests.scoring import TestScorer, scored_client
from tests.serving import Json, chat, chunks, complete, text_of
from tests.tiny import CHAT_TEMPLATE, EOS, random_head, random_maps, tiny_model, tiny_tokenizer

MAPS, HEAD = random_maps(0), random_head(1)
STEERING: dict[str, list[Json]] = {
    "maps": [{"intervention": "maps", "strength": 0.9}],
    "generated": [{"intervention": "maps", "strength": 0.9, "positions": "generated"}],
    "head": [{"intervention": "head"}],
    "both": [{"intervention": "head"}, {"intervention": "maps", "strength": 0.5}],
}
STACKS: dict[str, oracles.Stack] = {
    "maps": [(MAPS, AffineSettings(0.9))],
    "generated": [(MAPS, AffineSettings(0.9, "generated"))],
    "head": [(HEAD, RewardSettings(0.5, 5))],
    "both": [(HEAD, RewardSettings(0.5, 5)), (MAPS, AffineSettings(0.5))],
}
PROMPT = "Hello, is it"
SAMPLED: Json = {"temperature": 1.0, "seed": 7, "max_tokens": 12}
# All settings that change which tokens are drawn, but not the log-probabilities reported. The bias
# makes the end token likely.
FILTERED: Json = {
    **SAMPLED,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.001,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "logit_bias": {str(EOS): 3, "101": 2},
}


@pytest.fixture
async def client(
    tiny_engine: TorchEngine,
    registry: Registry,
    affine_artifact: WriteArtifact,
    reward_artifact: WriteArtifact,
) -> AsyncIterator[httpx.AsyncClient]:
    registry.add(affine_artifact("maps", 0), "maps")
    registry.add(reward_artifact("head", 1), "head")
    async with scored_client(tiny_engine, registry, TestScorer()) as client:
        yield client


@pytest.fixture
def answers(tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    return answers_of(tiny_engine, monkeypatch)


def answers_of(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Return a dict, filled as they are generated, of each compared request's id and token ids."""
    found: dict[str, list[int]] = {}
    deliver = engine._deliver

    def recording(deliveries: Any) -> None:
        for sequence, output in deliveries:
            if sequence.request.has_follower:
                found.setdefault(sequence.request.request_id, []).extend(output.token_ids)
        deliver(deliveries)

    monkeypatch.setattr(engine, "_deliver", recording)
    return found


def expected_of(tokens: list[int], name: str, text_before: str = PROMPT) -> float:
    """Return an answer's mean log ratio by Hugging Face's model, with and without the edits."""
    oracle = Oracle(tiny_model("llama"))
    prompt = ids_of(text_before)
    text = [*prompt, *tokens]
    rows = slice(len(prompt) - 1, -1)
    steered = oracle.logits(text, len(prompt), STACKS[name])[rows]
    base = oracle.logits(text, len(prompt))[rows]
    return oracles.mean_log_ratio(steered, base, tokens)


def ids_of(text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer()(text)["input_ids"]
    return ids


async def compared(client: httpx.AsyncClient, name: str, **fields: object) -> Any:
    """Ask for a comparison; return the answer's body, or the chunks of its stream."""
    asked = {"prompt": PROMPT, "steering": STEERING[name], "compare": True, **fields}
    response = await complete(client, **asked)
    assert response.status_code == 200, response.text
    return chunks(response.text) if fields.get("stream") else response.json()


@pytest.mark.parametrize("sampling", [{}, SAMPLED, FILTERED], ids=["greedy", "drawn", "filtered"])
@pytest.mark.parametrize("name", STEERING)
async def test_mean_log_ratio_equals_oracle(
    client: httpx.AsyncClient, answers: dict[str, list[int]], name: str, sampling: Json
) -> None:
    body = await compared(client, name, n=3, **sampling)
    expected = [expected_of(tokens, name) for _, tokens in sorted(answers.items())]
    assert len(expected) == 3
    assert body["comparison"]["mean_log_ratio"] == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 0.01


async def test_the_end_token_is_scored_and_no_text_is_tokenized_again(
    client: httpx.AsyncClient, tiny_engine: TorchEngine, answers: dict[str, list[int]]
) -> None:
    body = await compared(client, "maps", n=16, **FILTERED)
    tokens = [answers[key] for key in sorted(answers, key=lambda key: int(key.split("-")[-1]))]
    ended = [place for place, each in enumerate(tokens) if len(each) > 1 and each[-1] == EOS]
    assert ended, "no answer has an end token after others"
    texts = [choice["text"] for choice in body["choices"]]
    other = [
        place for place in ended if tiny_engine.prompts.tokenize(texts[place]) != tokens[place][:-1]
    ]
    assert other, "each text has the token ids that it was made of"
    for place in {ended[0], other[0]}:
        expected = expected_of(tokens[place], "maps")
        assert body["comparison"]["mean_log_ratio"][place] == pytest.approx(expected, abs=1e-4)
        assert body["choices"][place]["finish_reason"] == "stop"


async def test_at_temperature_one_it_estimates_the_divergence(client: httpx.AsyncClient) -> None:
    """The mean over 420 first tokens is within three standard errors of the KL divergence."""
    ratios: list[float] = []
    for seed in range(10):
        fields: Json = {"temperature": 1.0, "seed": 100 * seed, "max_tokens": 1, "n": 42}
        body = await compared(client, "maps", **fields)
        ratios += body["comparison"]["mean_log_ratio"]
    oracle = Oracle(tiny_model("llama"))
    steered, base = (
        oracle.logits(ids_of(PROMPT), len(PROMPT), stack, last=1)[0].double().log_softmax(-1)
        for stack in (STACKS["maps"], ())
    )
    divergence = float((steered.exp() * (steered - base)).sum())
    mean = sum(ratios) / len(ratios)
    error = math.sqrt(sum((each - mean) ** 2 for each in ratios)) / len(ratios)
    assert mean == pytest.approx(divergence, abs=3 * error)
    assert divergence > 5 * error


@pytest.mark.parametrize("logprobs", [None, 2])
async def test_a_stream_tells_it_in_its_last_chunk_and_nothing_else_more(
    client: httpx.AsyncClient, logprobs: int | None
) -> None:
    asked: Json = {**FILTERED, "n": 2, "logprobs": logprobs}
    body = await compared(client, "both", **asked)
    *streamed, last = await compared(client, "both", stream=True, **asked)
    expected = body["comparison"]["mean_log_ratio"]
    assert last["comparison"]["mean_log_ratio"] == pytest.approx(expected, abs=1e-4)
    assert last["choices"] == []
    response = await complete(
        client, prompt=PROMPT, steering=STEERING["both"], stream=True, **asked
    )
    told = [told_of(chunk) for chunk in chunks(response.text)]
    assert sorted(map(told_of, streamed)) == sorted(told)


def told_of(chunk: Any) -> str:
    """Return a chunk as JSON, without id and time, and with only the tokens of its logprobs."""
    choices = [
        {**choice, "logprobs": choice["logprobs"] and choice["logprobs"]["tokens"]}
        for choice in chunk["choices"]
    ]
    return json.dumps({**chunk, "id": "", "created": 0, "choices": choices})


@pytest.mark.parametrize("logprobs", [None, 0, 2])
async def test_log_probabilities_are_shown_to_whom_asked_only(
    client: httpx.AsyncClient, logprobs: int | None
) -> None:
    asked: Json = {"logprobs": logprobs, "echo": True, **SAMPLED}
    body = await compared(client, "maps", **asked)
    fields: Json = {"prompt": PROMPT, **asked}
    steered = (await complete(client, steering=STEERING["maps"], **fields)).json()
    base = (await complete(client, **fields)).json()
    assert told_of(body) == told_of(body | steered)
    assert told_of(body["comparison"]) == told_of(body["comparison"] | {"choices": base["choices"]})
    assert (body["choices"][0]["logprobs"] is None) == (logprobs is None)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_has_it_too(
    chat_engine: TorchEngine,
    registry: Registry,
    reward_artifact: WriteArtifact,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    answers = answers_of(chat_engine, monkeypatch)
    registry.add(reward_artifact("head", 1), "head")
    prompt = tiny_tokenizer(CHAT_TEMPLATE).apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    async with scored_client(chat_engine, registry, TestScorer()) as client:
        response = await chat(client, compare=True, stream=stream, steering=STEERING["head"])
    body: Any = chunks(response.text)[-1] if stream else response.json()
    [tokens] = answers.values()
    assert len(tokens) == 6
    expected = expected_of(tokens, "head", str(prompt))
    assert body["comparison"]["mean_log_ratio"] == pytest.approx([expected], abs=1e-4)
    assert '"logprobs":{' not in response.text


async def test_ratio_is_zero_without_effective_edits(
    client: httpx.AsyncClient, answers: dict[str, list[int]]
) -> None:
    nothing = {"intervention": "maps", "strength": 0}
    for stream in (False, True):
        body = await compared(client, "maps", n=2, steering=nothing, stream=stream, **SAMPLED)
        told = body[-1] if stream else body
        assert told["comparison"]["mean_log_ratio"] == [0.0, 0.0]
    assert [choice["text"] for choice in body[-1]["comparison"]["choices"]] == [
        await text_of(client, prompt=PROMPT, **{**SAMPLED, "seed": seed}) for seed in (7, 8)
    ]
    assert not answers, "a place was held for a request that does not come"


async def test_empty_answer_has_no_ratio(client: httpx.AsyncClient) -> None:
    body = await compared(client, "maps", max_tokens=0, echo=True, prompt=["a", "bcd"])
    assert body["comparison"]["mean_log_ratio"] == [None, None]


async def test_a_prompt_is_read_once_for_the_base_models_answer_and_its_scores(
    client: httpx.AsyncClient, tiny_engine: TorchEngine
) -> None:
    prompt = "A text that is some blocks long, as the answers to long prompts are compared too."
    await compared(client, "maps", prompt=prompt)
    prefixes = tiny_engine._core.store.prefixes
    assert prefixes.hits == len(prompt) // 16 * 16


def progress_of(logprobs: list[float], base: list[float], *edits: Edit) -> Progress:
    request = Request("x", (1,), SamplingSettings(4), edits)
    return Progress(request, [5] * len(logprobs), logprobs, base)


def test_a_token_that_is_impossible_to_a_model_is_bounded() -> None:
    edit = Edit("a", AffineSettings(1.0))
    assert mean_log_ratio(progress_of([-1.0, -2.0], [-2.0, -math.inf], edit)) == 4999.0
    assert mean_log_ratio(progress_of([-math.inf], [-1.0], edit)) == -9998.0
    assert mean_log_ratio(progress_of([-math.inf], [-math.inf], edit)) == 0
    assert mean_log_ratio(progress_of([], [], edit)) is None


async def test_many_are_compared_at_once(client: httpx.AsyncClient) -> None:
    """Each request's ratio is the same as when it is compared alone."""
    alone = [await compared(client, name, **SAMPLED) for name in STEERING]
    together = await asyncio.gather(*(compared(client, name, **SAMPLED) for name in STEERING))
    for one, other in zip(alone, together, strict=True):
        assert other["comparison"]["mean_log_ratio"] == pytest.approx(
            one["comparison"]["mean_log_ratio"], abs=1e-4
        )
