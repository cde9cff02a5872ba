"""Tests of the returned text and the tokens listed with it: offsets, stop strings, end tokens."""

import httpx
import pytest

from server.engine.torch.engine import TorchEngine
from tests.serving import Json, chat, chunks, complete
from tests.tiny import EOS, tiny_tokenizer

SPECIAL = EOS + 1  # a special token that does not end the text
SPECIAL_NAME = str(tiny_tokenizer().convert_ids_to_tokens(SPECIAL))
FIELDS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def tokens_of(text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer()(text)["input_ids"]
    return ids


def only(*tokens: int) -> Json:
    """Return a logit bias with which the model draws only these tokens."""
    return {"logit_bias": {str(token): 100 for token in tokens}}


async def choice_of(client: httpx.AsyncClient, **fields: object) -> Json:
    """Return a completion's choice; assert that streaming gives the same one."""
    response = await complete(client, **fields)
    assert response.status_code == 200, response.text
    choice: Json = response.json()["choices"][0]
    stream = chunks((await complete(client, **fields, stream=True)).text)
    pieces = [chunk["choices"][0] for chunk in stream]  # type: ignore[index]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    assert pieces[-1]["finish_reason"] == choice["finish_reason"]
    returned = 0
    for field in FIELDS:
        values = [value for piece in pieces for value in piece["logprobs"][field]]
        expected = choice["logprobs"][field]  # type: ignore[index]
        if field in ("tokens", "text_offset"):
            assert values == expected
        assert len(values) == len(expected)
    for piece in pieces[:-1]:
        # A token is listed with its text or later, never before it.
        returned += len(piece["text"])
        assert all(offset < returned for offset in piece["logprobs"]["text_offset"])
    return choice


def listed(choice: Json) -> list[tuple[str, int]]:
    """Return the listed tokens of a choice, each with its text offset."""
    logprobs: Json = choice["logprobs"]  # type: ignore[assignment]
    tokens: list[str] = logprobs["tokens"]  # type: ignore[assignment]
    offsets: list[int] = logprobs["text_offset"]  # type: ignore[assignment]
    return list(zip(tokens, offsets, strict=True))


@pytest.mark.parametrize("as_ids", [False, True])
async def test_offsets_in_an_echo_count_characters_of_the_text(
    client: httpx.AsyncClient, as_ids: bool
) -> None:
    text = "Hi \U0001f600\U0001f600 ok"
    prompt = tokens_of(text) if as_ids else text
    z = tokens_of("z")[0]
    choice = await choice_of(client, prompt=prompt, echo=True, logprobs=0, max_tokens=2, **only(z))
    assert choice["text"] == text + "zz"
    offsets = [offset for _, offset in listed(choice)]
    assert offsets == [0, 1, 2, *[3] * 4, *[4] * 4, 5, 6, 7, 8, 9]


async def test_offsets_of_a_completion_without_an_echo(client: httpx.AsyncClient) -> None:
    [f0, *_] = tokens_of("\U0001f600")
    choice = await choice_of(client, logprobs=0, max_tokens=3, **only(f0))
    # Byte F0 begins a character, so each one shows that the byte before it was none. What the
    # third begins may still be completed, so no replacement character stands for it.
    assert choice["text"] == "\ufffd\ufffd"
    assert [offset for _, offset in listed(choice)] == [0, 1, 2]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("seed", range(4))
async def test_every_token_is_where_its_offset_says(client: httpx.AsyncClient, seed: int) -> None:
    fields: Json = {"temperature": 2.0, "seed": seed, "max_tokens": 60, "ignore_eos": True}
    choice = await choice_of(client, logprobs=1, echo=seed % 2 == 0, **fields)
    text = str(choice["text"])
    for token, offset in listed(choice):
        if token.isascii() and not token.startswith("<"):
            assert text[offset:].startswith(token)
        assert offset <= len(text)


async def test_an_echo_joins_with_a_completion_that_ends_its_character(
    client: httpx.AsyncClient,
) -> None:
    *begun, last = tokens_of("a\u20ac")
    fields: Json = {"prompt": begun, "echo": True, "logprobs": 0}
    ended = await choice_of(client, **fields, max_tokens=1, **only(last))
    assert ended["text"] == "a\u20ac"
    assert [offset for _, offset in listed(ended)] == [0, 1, 1, 1]
    assert (await choice_of(client, **fields, max_tokens=0))["text"] == "a"
    z = tokens_of("z")[0]
    other = await choice_of(client, **fields, max_tokens=1, **only(z))
    assert other["text"] == "az"
    assert [offset for _, offset in listed(other)] == [0, 1, 1, 1]
    without = await choice_of(client, **{**fields, "echo": False}, max_tokens=1, **only(last))
    assert (without["text"], listed(without)[0][1]) == ("\u20ac", 0)


async def test_a_completion_that_ends_within_a_character(client: httpx.AsyncClient) -> None:
    [f0, *_] = tokens_of("\U0001f600")
    choice = await choice_of(client, logprobs=0, max_tokens=1, **only(f0))
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    assert len(listed(choice)) == 1, "the token is the completion's, though it is no character"
    replacements = await choice_of(
        client, prompt="\ufffd", echo=True, logprobs=0, max_tokens=1, **only(f0)
    )
    assert replacements["text"] == "\ufffd", "a real one was lost"


async def test_the_end_token_is_counted_and_not_listed(client: httpx.AsyncClient) -> None:
    choice = await choice_of(client, logprobs=1, **only(EOS))
    assert (choice["text"], choice["finish_reason"], listed(choice)) == ("", "stop", [])
    body = (await complete(client, logprobs=1, **only(EOS))).json()
    assert body["usage"]["completion_tokens"] == 1
    ignored = await choice_of(client, logprobs=1, ignore_eos=True, **only(EOS))
    assert (ignored["text"], ignored["finish_reason"]) == ("", "length")
    assert len(listed(ignored)) == 6, "it ended nothing"


async def test_the_end_token_of_a_chat_is_counted_and_not_listed(
    chat_client: httpx.AsyncClient,
) -> None:
    fields: Json = {"logprobs": True, "top_logprobs": 1, **only(EOS)}
    body = (await chat(chat_client, **fields)).json()
    [choice] = body["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"]["content"] == []
    assert body["usage"]["completion_tokens"] == 1
    stream = chunks((await chat(chat_client, **fields, stream=True)).text)
    pieces = [chunk["choices"][0] for chunk in stream]  # type: ignore[index]
    assert not any(piece["logprobs"] for piece in pieces)
    assert pieces[-1]["finish_reason"] == "stop"


async def test_the_tokens_of_a_stop_string_are_not_listed(client: httpx.AsyncClient) -> None:
    z = tokens_of("z")[0]
    stopped = await choice_of(client, logprobs=0, stop="zz", max_tokens=6, **only(z))
    assert (stopped["text"], stopped["finish_reason"], listed(stopped)) == ("", "stop", [])
    # Tokens that may begin a stop string are listed once it is known that they do not.
    limited = await choice_of(client, logprobs=0, stop="zzzz", max_tokens=3, **only(z))
    assert (limited["text"], limited["finish_reason"]) == ("zzz", "length")
    assert listed(limited) == [("z", 0), ("z", 1), ("z", 2)]


async def test_a_chat_lists_the_tokens_of_its_content(
    chat_client: httpx.AsyncClient, chat_engine: TorchEngine
) -> None:
    plain = (await chat(chat_client, max_tokens=12)).json()["choices"][0]["message"]["content"]
    stop = next(letter for letter in plain[3:] if letter.isascii())
    fields: Json = {"max_tokens": 12, "logprobs": True, "stop": stop}
    choice = (await chat(chat_client, **fields)).json()["choices"][0]
    content = choice["message"]["content"]
    assert content == plain.partition(stop)[0]
    joined = bytes(byte for token in choice["logprobs"]["content"] for byte in token["bytes"])
    assert joined.decode(errors="replace") == content
    stream = chunks((await chat(chat_client, **fields, stream=True)).text)
    pieces = [chunk["choices"][0] for chunk in stream]  # type: ignore[index]
    streamed = [
        token for piece in pieces for token in (piece["logprobs"] or {"content": []})["content"]
    ]
    assert [token["bytes"] for token in streamed] == [
        token["bytes"] for token in choice["logprobs"]["content"]
    ]
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == content


@pytest.mark.parametrize(
    "stop", [SPECIAL_NAME, SPECIAL_NAME * 2, [SPECIAL_NAME + "never", SPECIAL_NAME[-3:]]]
)
async def test_a_special_token_stops(client: httpx.AsyncClient, stop: object) -> None:
    choice = await choice_of(client, logprobs=0, stop=stop, **only(SPECIAL))
    assert (choice["text"], choice["finish_reason"], listed(choice)) == ("", "stop", [])


async def test_special_tokens_that_do_not_stop_are_not_shown(client: httpx.AsyncClient) -> None:
    choice = await choice_of(client, logprobs=0, stop=SPECIAL_NAME + "z", **only(SPECIAL))
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    assert listed(choice) == [(SPECIAL_NAME, 0)] * 6


async def test_a_chat_stops_at_a_special_token(chat_client: httpx.AsyncClient) -> None:
    body = (await chat(chat_client, stop=[SPECIAL_NAME], **only(SPECIAL))).json()
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["message"]["content"] == ""
    assert body["usage"]["completion_tokens"] == 1
