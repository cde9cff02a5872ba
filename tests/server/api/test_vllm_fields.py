"""Tests of the request fields that vLLM has beyond OpenAI's, on both endpoints."""

import math
from typing import Any

import httpx
import pytest

from server.api.fields import MAX_LOGPROBS, MAX_STOP_TOKENS
from server.engine.torch.engine import TorchEngine
from tests.serving import Json, chat, chunks, complete, error_of, text_of, user
from tests.tiny import EOS, tiny_tokens

FREE: Json = {"temperature": 1, "seed": 5, "max_tokens": 40}


async def ids_of(client: httpx.AsyncClient, **fields: object) -> list[int]:
    [choice] = (await complete(client, return_token_ids=True, **fields)).json()["choices"]
    ids: list[int] = choice["token_ids"]
    return ids


async def test_a_stop_token_ends_the_answer_as_an_end_token_does(
    client: httpx.AsyncClient, tiny_engine: TorchEngine
) -> None:
    free = await ids_of(client, **FREE, ignore_eos=True)
    stop = free[5]
    first = free.index(stop)
    for fields in ({}, {"ignore_eos": True}):
        body = (
            await complete(
                client, **FREE, **fields, stop_token_ids=[stop, 7], return_token_ids=True
            )
        ).json()
        [choice] = body["choices"]
        assert choice["token_ids"] == free[: first + 1]
        assert choice["finish_reason"] == "stop"
        assert tiny_engine.prompts.detokenize(free[:first]).startswith(choice["text"])
        assert body["usage"]["completion_tokens"] == first + 1


async def test_what_ends_an_answer_is_shown_if_that_is_asked_for(
    client: httpx.AsyncClient,
) -> None:
    bias = {str(token): 50 for token in tiny_tokens("abc")}
    biased: Json = {"logit_bias": bias, **FREE, "ignore_eos": True}
    plain = await text_of(client, **biased)
    assert set(plain) == set("abc")
    stop = plain[3:5]
    before, _, _ = plain.partition(stop)
    assert await text_of(client, **biased, stop=stop) == before
    shown = await text_of(client, **biased, stop=stop, include_stop_str_in_output=True)
    assert shown == before + stop
    [token] = tiny_tokens(plain[0])
    ended: Json = {**biased, "stop_token_ids": [token]}
    assert await text_of(client, **ended) == ""
    assert await text_of(client, **ended, include_stop_str_in_output=True) == plain[0]


async def test_special_tokens_are_shown_if_that_is_asked_for(
    client: httpx.AsyncClient, tiny_engine: TorchEngine
) -> None:
    [letter] = tiny_tokens("a")
    # Both biases outweigh any difference of logits, and the penalty makes the two take turns.
    biased: Json = {"logit_bias": {str(EOS): 99, str(letter): 99}, "frequency_penalty": 2}
    biased |= {"max_tokens": 30, "ignore_eos": True}
    ids = await ids_of(client, **biased)
    assert set(ids) == {letter, EOS}
    assert await text_of(client, **biased) == "a" * ids.count(letter)
    shown = await text_of(client, **biased, skip_special_tokens=False)
    assert shown == tiny_engine.prompts.detokenize(ids)
    assert len(shown) > ids.count(letter)


async def test_no_answer_ends_before_its_least_number_of_tokens(
    client: httpx.AsyncClient,
) -> None:
    biased: Json = {"logit_bias": {str(EOS): 100}, "max_tokens": 9, "temperature": 0}
    assert await ids_of(client, **biased) == [EOS]
    least = await ids_of(client, **biased, min_tokens=4)
    assert (len(least), least.index(EOS)) == (5, 4)
    assert EOS not in await ids_of(client, **biased, min_tokens=9)
    [letter] = tiny_tokens("a")
    letters: Json = {"logit_bias": {str(letter): 100}, "max_tokens": 9, "temperature": 0}
    assert await text_of(client, **letters, stop="a") == ""
    assert await text_of(client, **letters, stop="a", min_tokens=3) == "aaa"
    for ask in (complete, chat):
        refused = error_of(await ask(client, max_tokens=3, min_tokens=4))
        assert refused["param"] in {"min_tokens", "messages"}


async def test_a_prompt_is_truncated_to_its_last_tokens(
    client: httpx.AsyncClient, tiny_engine: TorchEngine
) -> None:
    expected = await text_of(client, prompt="world")
    assert await text_of(client, prompt="Hello world", truncate_prompt_tokens=5) == expected
    ids = tiny_engine.prompts.tokenize("Hello world")
    assert await text_of(client, prompt=[ids, ids], truncate_prompt_tokens=5) == expected
    echoed = await text_of(client, prompt="Hello world", truncate_prompt_tokens=5, echo=True)
    assert echoed == "world" + expected
    long = "x" * (tiny_engine.max_model_len + 5)
    room = tiny_engine.max_model_len - 6
    assert (await complete(client, prompt=long)).status_code == 400
    body = (await complete(client, prompt=long, truncate_prompt_tokens=-1)).json()
    assert body["usage"]["prompt_tokens"] == room


async def test_token_ids_of_prompt_and_answer(
    chat_client: httpx.AsyncClient, chat_engine: TorchEngine
) -> None:
    fields: Json = {"return_token_ids": True, "n": 2, "temperature": 1, "seed": 1, "max_tokens": 8}
    prompt = chat_engine.prompts.tokenize("Hello")
    whole = (await complete(chat_client, **fields)).json()
    assert [choice["prompt_token_ids"] for choice in whole["choices"]] == [prompt, prompt]
    streamed: dict[int, list[int]] = {0: [], 1: []}
    prompts = []
    chunk: Any
    for chunk in chunks((await complete(chat_client, **fields, stream=True)).text):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["token_ids"]
            prompts += [choice["prompt_token_ids"]] if "prompt_token_ids" in choice else []
    assert prompts == [prompt, prompt]
    assert [*streamed.values()] == [choice["token_ids"] for choice in whole["choices"]]

    rendered = chat_engine.prompts.tokenize("<user>Hello<assistant>")
    body = (await chat(chat_client, **fields)).json()
    assert body["prompt_token_ids"] == rendered
    streamed = {0: [], 1: []}
    prompts = []
    for chunk in chunks((await chat(chat_client, **fields, stream=True)).text):
        prompts += [chunk["prompt_token_ids"]] if "prompt_token_ids" in chunk else []
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice.get("token_ids", [])
    assert prompts == [rendered]
    assert [*streamed.values()] == [choice["token_ids"] for choice in body["choices"]]
    plain = (await chat(chat_client)).json()
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]


async def test_tokens_are_named_by_their_ids_if_that_is_asked_for(
    chat_client: httpx.AsyncClient,
) -> None:
    fields: Json = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    body = (await complete(chat_client, **fields, logprobs=2, echo=True)).json()
    [choice] = body["choices"]
    names = [f"token_id:{token}" for token in choice["prompt_token_ids"] + choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == names
    for name, top in zip(names[1:], choice["logprobs"]["top_logprobs"][1:], strict=True):
        assert name in top
        assert all(each.startswith("token_id:") for each in top)
    [choice] = (await chat(chat_client, **fields, logprobs=True, top_logprobs=2)).json()["choices"]
    named = [each["token"] for each in choice["logprobs"]["content"]]
    assert named == [f"token_id:{token}" for token in choice["token_ids"]]


async def test_the_prompts_tokens_are_scored_by_their_ids(chat_client: httpx.AsyncClient) -> None:
    echo = (await complete(chat_client, echo=True, logprobs=3, max_tokens=0)).json()
    expected = echo["choices"][0]["logprobs"]
    [choice] = (await complete(chat_client, prompt_logprobs=3, max_tokens=0)).json()["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert len(others) == len(expected["tokens"]) - 1
    for place, by_id in enumerate(others, start=1):
        chosen = next(iter(by_id.values()))
        assert chosen["decoded_token"] == expected["tokens"][place]
        assert chosen["logprob"] == pytest.approx(expected["token_logprobs"][place])
        ranks = sorted(each["rank"] for each in by_id.values())
        assert ranks == [1, 2, 3, *([chosen["rank"]] * (chosen["rank"] > 3))]
        by_rank = sorted(by_id.values(), key=lambda each: each["rank"])
        assert [each["logprob"] for each in by_rank] == sorted(
            (each["logprob"] for each in by_id.values()), reverse=True
        )
    assert choice["logprobs"] is None
    body = (await chat(chat_client, prompt_logprobs=0)).json()
    assert [len(each) for each in body["prompt_logprobs"][1:]] == [1] * len("user>Hello<assistant>")
    both = (await complete(chat_client, prompt_logprobs=5, echo=True, logprobs=1)).json()
    tops = both["choices"][0]["logprobs"]["top_logprobs"][1:]
    assert max(map(len, tops)) <= 2
    refused = await complete(chat_client, prompt_logprobs=1, stream=True)
    assert error_of(refused)["param"] == "prompt_logprobs"


async def test_up_to_20_alternatives(chat_client: httpx.AsyncClient) -> None:
    body = (await complete(chat_client, logprobs=MAX_LOGPROBS)).json()
    tops = body["choices"][0]["logprobs"]["top_logprobs"]
    assert all(MAX_LOGPROBS <= len(top) <= MAX_LOGPROBS + 1 for top in tops)
    assert all(math.exp(value) <= 1 for top in tops for value in top.values())


WRONG: tuple[tuple[Json, str], ...] = (
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stop_token_ids": [259]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * (MAX_STOP_TOKENS + 1)}, "stop_token_ids"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"prompt_logprobs": MAX_LOGPROBS + 1}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"skip_special_tokens": "no"}, "skip_special_tokens"),
)


@pytest.mark.parametrize(("fields", "param"), WRONG)
async def test_a_wrong_value_is_a_400_that_names_the_field(
    chat_client: httpx.AsyncClient, fields: Json, param: str
) -> None:
    for ask in (complete, chat):
        response = await ask(chat_client, **fields)
        assert (response.status_code, error_of(response)["param"]) == (400, param)


async def test_the_last_message_is_continued(chat_client: httpx.AsyncClient) -> None:
    messages = [user("Hi"), {"role": "assistant", "content": "Well, I"}]
    continued = (await chat(chat_client, messages=messages, continue_final_message=True)).json()
    expected = await text_of(chat_client, prompt="<user>Hi<assistant>Well, I")
    assert continued["choices"][0]["message"]["content"] == expected
    bare = (await chat(chat_client, add_generation_prompt=False)).json()
    assert bare["choices"][0]["message"]["content"] == await text_of(
        chat_client, prompt="<user>Hello"
    )
    for fields in (
        {"continue_final_message": True},
        {"continue_final_message": True, "messages": messages, "add_generation_prompt": True},
    ):
        response = await chat(chat_client, **fields)
        assert error_of(response)["param"] == "continue_final_message"


async def test_a_templates_variables_may_be_set(
    chat_client: httpx.AsyncClient, chat_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fields, param in (
        ({"chat_template_kwargs": {"mood": "x"}}, "chat_template_kwargs.mood"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ):
        error = error_of(await chat(chat_client, **fields))
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")
    plain = (await chat(chat_client)).json()["choices"]
    assert (await chat(chat_client, reasoning_effort="none")).json()["choices"] == plain

    template = (
        "{% generation %}{% endgeneration %}"
        "<{{ mood }}{{ reasoning_effort }}>{{ messages[-1].content }}"
    )
    prompts = chat_engine.prompts
    monkeypatch.setattr(prompts._source, "chat_template", template)
    asked: Json = {"chat_template_kwargs": {"mood": "glad"}, "reasoning_effort": "low"}
    body = (await chat(chat_client, **asked, return_token_ids=True)).json()
    assert prompts.detokenize(body["prompt_token_ids"]) == "<gladlow>Hello"
