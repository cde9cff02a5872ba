"""Tests of `/tokenize`, `/detokenize` and `/tokenizer_info`."""

import httpx
import pytest

from server.api import answering
from server.engine.torch.engine import TorchEngine
from tests.conftest import MakeClient
from tests.serving import Json, error_of, user
from tests.tiny import CHAT_TEMPLATE, EOS


async def test_a_text_becomes_tokens_and_text_again(
    chat_client: httpx.AsyncClient, chat_engine: TorchEngine
) -> None:
    asked: Json = {"model": "tiny", "prompt": "h\u00e9!", "return_token_strs": True}
    body = (await chat_client.post("/tokenize", json=asked)).json()
    tokens = chat_engine.prompts.tokenize("h\u00e9!")
    assert body == {
        "count": len(tokens),
        "max_model_len": chat_engine.max_model_len,
        "tokens": tokens,
        "token_strs": ["h", "\u00c3", "\u00a9", "!"],
    }
    plain = await chat_client.post("/tokenize", json={"prompt": "", "add_special_tokens": False})
    assert (plain.json()["tokens"], plain.json()["token_strs"]) == ([], None)
    text = await chat_client.post("/detokenize", json={"model": "tiny", "tokens": [*tokens, EOS]})
    assert text.json() == {"prompt": "h\u00e9!" + chat_engine.prompts.detokenize([EOS])}


async def test_a_conversation_becomes_tokens(
    chat_client: httpx.AsyncClient, chat_engine: TorchEngine
) -> None:
    for fields, text in (
        ({}, "<user>Hello<assistant>"),
        ({"add_generation_prompt": False}, "<user>Hello"),
    ):
        body = {"messages": [user("Hello")], **fields}
        tokens = (await chat_client.post("/tokenize", json=body)).json()["tokens"]
        assert tokens == chat_engine.prompts.tokenize(text)


async def test_a_client_can_format_conversations_itself(chat_client: httpx.AsyncClient) -> None:
    info = (await chat_client.get("/tokenizer_info")).json()
    assert info["chat_template"] == CHAT_TEMPLATE
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == ("<eos>", "<bos>", "<pad>")
    assert info["unk_token"] is None


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, ""),
        ("/tokenize", {"prompt": "x", "messages": [user()]}, 400, ""),
        ("/tokenize", {"messages": [user()], "add_special_tokens": True}, 400, ""),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "more": 1}, 400, "more"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "x" * 1_000_000}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [259]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
    ],
)
async def test_a_wrong_request_is_refused_by_its_field(
    chat_client: httpx.AsyncClient, path: str, body: Json, status: int, param: str
) -> None:
    response = await chat_client.post(path, json=body)
    assert (response.status_code, error_of(response)["param"] or "") == (status, param)


async def test_they_need_the_api_key(make_client: MakeClient) -> None:
    client = make_client(api_key="k")
    for ask in (
        client.post("/tokenize", json={"prompt": "x"}),
        client.post("/detokenize", json={"tokens": [1]}),
        client.get("/tokenizer_info"),
    ):
        assert (await ask).status_code == 401
    headers = {"Authorization": "Bearer k"}
    answer = await client.post("/tokenize", json={"prompt": "x"}, headers=headers)
    assert answer.json()["count"] == 1


async def test_a_long_text_is_read_in_a_thread(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client()
    short = (await client.post("/tokenize", json={"prompt": "x" * 300})).json()
    monkeypatch.setattr("server.api.tokenization.LONG_TEXT", 300)
    assert (await client.post("/tokenize", json={"prompt": "x" * 300})).json() == short
    assert answering.LONG_TEXT > 300
