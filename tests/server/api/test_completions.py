"""Tests of `POST /v1/completions` on the real engine: OpenAI's shapes, sampling, echo, logprobs."""

import asyncio

import httpx
import pytest
from openai import AsyncOpenAI

from interventions.registry import Registry
from server.engine.errors import QueueFullError
from server.engine.output import StepOutput
from server.engine.request import Edit, Request, SamplingSettings
from server.engine.torch.engine import TorchEngine
from steering.settings import AffineSettings
from tests.conftest import WriteArtifact
from tests.live import live
from tests.serving import (
    SAMPLING,
    SAMPLING_FIELDS,
    Connection,
    Json,
    Script,
    ScriptedGeneration,
    build_app,
    chunks,
    complete,
    error_of,
    eventually,
    logprobs_of,
    metric,
    push,
    text_of,
    usage,
)


async def test_the_answer_has_openais_shape(client: httpx.AsyncClient) -> None:
    body = (await complete(client, ignore_eos=True)).json()
    assert body["id"].startswith("cmpl-")
    assert isinstance(body["created"], int)
    assert (body["object"], body["model"], body["steering"]) == ("text_completion", "tiny", [])
    assert body["usage"] == usage(prompt=5, completion=6)
    [choice] = body["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert choice["text"]


async def test_the_openai_client_steers(
    tiny_engine: TorchEngine,
    registry: Registry,
    affine_artifact: WriteArtifact,
) -> None:
    entry = registry.add(affine_artifact("maps"))
    async with (
        live(build_app(tiny_engine, registry, api_key="k")) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as openai,
    ):
        base = await openai.completions.create(
            model="tiny", prompt="Hello", max_tokens=8, temperature=0
        )
        steered = await openai.completions.create(
            model="tiny",
            prompt="Hello",
            max_tokens=8,
            temperature=0,
            extra_body={"steering": {"intervention": "maps"}},
        )
        stream = await openai.completions.create(
            model="tiny+maps", prompt="Hello", max_tokens=8, temperature=0, stream=True
        )
        streamed = [chunk async for chunk in stream]
    assert base.choices[0].text != steered.choices[0].text
    assert steered.model_extra is not None
    assert steered.model_extra["steering"][0]["digest"] == entry.digest
    assert "".join(chunk.choices[0].text for chunk in streamed) == steered.choices[0].text
    assert streamed[-1].model_extra is not None
    assert streamed[-1].model_extra["steering"][0]["source"] == "model"


async def test_prompts_as_text_and_as_token_ids(
    client: httpx.AsyncClient, tiny_engine: TorchEngine
) -> None:
    hello, bye = tiny_engine.prompts.tokenize("Hello"), tiny_engine.prompts.tokenize("Bye!")
    expected = [await text_of(client, prompt=prompt) for prompt in ("Hello", "Bye!")]
    assert expected[0] != expected[1]
    for prompts in (["Hello", "Bye!"], [hello, bye]):
        body = (await complete(client, prompt=prompts)).json()
        assert [choice["text"] for choice in body["choices"]] == expected
        assert [choice["index"] for choice in body["choices"]] == [0, 1]
        assert body["usage"]["prompt_tokens"] == len(hello) + len(bye)
    assert await text_of(client, prompt=hello) == expected[0]


async def test_choices_draw_by_seeds_that_follow_each_other(client: httpx.AsyncClient) -> None:
    def sampled(**fields: object) -> dict[str, object]:
        return {"temperature": 1.5, "max_tokens": 12, **fields}

    both = (await complete(client, **sampled(n=2, seed=7))).json()["choices"]
    assert both[0]["text"] != both[1]["text"]
    for index, choice in enumerate(both):
        alone = await text_of(client, **sampled(seed=7 + index))
        assert alone == choice["text"]
    two_prompts = (await complete(client, **sampled(prompt=["Hello"] * 2, seed=7))).json()
    assert [choice["text"] for choice in two_prompts["choices"]] == [
        choice["text"] for choice in both
    ]


async def test_usage_counts_a_prompt_once_and_every_choice(client: httpx.AsyncClient) -> None:
    body = (await complete(client, prompt=["Hello", "Bye!"], n=3, ignore_eos=True)).json()
    assert len(body["choices"]) == 6
    assert body["usage"] == usage(prompt=9, completion=36)


@pytest.mark.parametrize("stream", [False, True])
async def test_usage_says_how_much_of_a_prompt_was_cached(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact, stream: bool
) -> None:
    await push(client, affine_artifact("maps"))

    async def cached(**fields: object) -> Json:
        if stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        response = await complete(client, prompt=[65] * 40, **fields)
        body = chunks(response.text)[-1] if stream else response.json()
        details: Json = body["usage"]["prompt_tokens_details"]  # type: ignore[index]
        return details

    steering = {"intervention": "maps"}
    assert await cached() == {"cached_tokens": 0}
    assert await cached() == {"cached_tokens": 32}
    assert await cached(n=2) == {"cached_tokens": 32}
    assert await cached(echo=True, logprobs=1) == {"cached_tokens": 0}  # the cache is bypassed
    assert await cached(steering=steering) == {"cached_tokens": 0}
    assert await cached(steering=steering) == {"cached_tokens": 32}


async def test_logprobs(client: httpx.AsyncClient) -> None:
    choice = (await complete(client, logprobs=3)).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(values) for values in logprobs.values()} == {6}
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        # Decoding is greedy, so the sampled token has the best logprob. `top` is keyed by text:
        # tokens of equal text share a key, so it may have fewer than 3.
        assert value == top[token] == max(top.values()) < 0
        assert len(top) <= 3


async def test_logprobs_zero_gives_the_sampled_token_only(client: httpx.AsyncClient) -> None:
    logprobs = (await complete(client, logprobs=0)).json()["choices"][0]["logprobs"]
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top == {token: value}


async def test_a_sampled_token_is_among_its_logprobs(client: httpx.AsyncClient) -> None:
    body = (await complete(client, logprobs=1, temperature=2.0, seed=1, max_tokens=30)).json()
    logprobs = body["choices"][0]["logprobs"]
    tops = logprobs["top_logprobs"]
    assert any(len(top) == 2 for top in tops)
    assert all(token in top for token, top in zip(logprobs["tokens"], tops, strict=True))


async def test_stop_ends_the_text_before_it(client: httpx.AsyncClient) -> None:
    plain = await text_of(client, max_tokens=12, logit_bias={}, temperature=1, top_k=1)
    stop = next(letter for letter in plain[1:] if letter != "\ufffd")
    body = (await complete(client, max_tokens=12, stop=["never there", stop])).json()
    [choice] = body["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == plain[: plain.index(stop)]
    assert await text_of(client, max_tokens=12, stop=stop) == choice["text"]


async def test_top_k_one_is_greedy_and_null_means_not_given(client: httpx.AsyncClient) -> None:
    greedy = await text_of(client)
    assert await text_of(client, temperature=2, top_k=1) == greedy
    assert await text_of(client, temperature=2, top_p=1e-6) == greedy
    assert await text_of(client, temperature=2, top_p=0) == greedy
    assert await text_of(client, temperature=2, top_p=0, top_k=5, min_p=0.1) == greedy
    nothing = dict.fromkeys(
        (
            *("top_p", "n", "best_of", "stop", "seed", "logprobs", "stream", "user", "suffix"),
            *("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "echo"),
        )
    )
    assert await text_of(client, **nothing, logit_bias={}, top_k=-1) == greedy
    assert await text_of(client, logprobs=False, echo=False, logit_bias=None) == greedy


async def test_sampling_reaches_the_engine(
    client: httpx.AsyncClient, tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script([_ended(), _ended()])
    monkeypatch.setattr(tiny_engine, "submit", script.submit)
    assert (await complete(client, **SAMPLING_FIELDS)).status_code == 200
    assert (await complete(client)).status_code == 200
    chosen, default = (request.sampling for request in script.submitted)
    assert chosen == SAMPLING
    assert default == SamplingSettings(max_tokens=6, temperature=0)


WRONG_SAMPLING: tuple[tuple[str, object], ...] = (
    *(("min_p", value) for value in (-0.1, 1.1, "0.1", True)),
    *(("repetition_penalty", value) for value in (0, 0.009, 100.1, -1, 10**400)),
    *(("presence_penalty", value) for value in (-2.1, 2.1, "1", False)),
    *(("frequency_penalty", value) for value in (-2.1, 2.1, [1])),
    *(("logit_bias", value) for value in (5, [], "5", [[5, 1]])),
    *(("logit_bias", {key: 1}) for key in ("", "a", "-1", "+1", "1.0", "01", " 1", "\u0661")),
    ("logit_bias", {"9" * 11: 1}),
    *(("logit_bias", {"5": value}) for value in (100.1, -101, None, "1", True, 10**400)),
    ("logit_bias", {str(token): 1 for token in range(301)}),
)


async def test_sampling_ranges_are_inclusive(
    client: httpx.AsyncClient, tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: tuple[Json, ...] = (
        {"min_p": 0, "repetition_penalty": 0.01, "presence_penalty": -2, "frequency_penalty": -2},
        {"min_p": 1, "repetition_penalty": 100, "presence_penalty": 2, "frequency_penalty": 2},
        {"logit_bias": {str(token): token - 100 for token in range(201)}},
        {"logit_bias": dict.fromkeys(map(str, range(300)), 0)},
    )
    monkeypatch.setattr(tiny_engine, "submit", Script([_ended() for _ in ends]).submit)
    for fields in ends:
        assert (await complete(client, **fields)).status_code == 200


@pytest.mark.parametrize(
    "field",
    ["min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"],
)
async def test_wrong_sampling_is_named(client: httpx.AsyncClient, field: str) -> None:
    for name, value in WRONG_SAMPLING:
        if name == field:
            response = await complete(client, **{field: value})
            error = error_of(response)
            assert (response.status_code, error["param"]) == (400, field), value
            assert len(str(error["message"])) < 300


@pytest.mark.parametrize(
    ("bias", "says"),
    [
        ({"5": 1, "zzz": 1}, "'zzz' is none"),
        ({"5": 1, "z" * 5000: 1}, "zzzz' is none"),
        ({"5": 1, "6": 101}, "that of token 6 is none"),
        ({"5": 1, "259": 1}, "Token ids must be in 0..258; 259 is not."),
    ],
)
async def test_which_bias_is_wrong_is_said(
    client: httpx.AsyncClient, bias: Json, says: str
) -> None:
    error = error_of(await complete(client, logit_bias=bias))
    assert error["param"] == "logit_bias"
    assert says in str(error["message"])
    assert len(str(error["message"])) < 300


async def test_a_seed_of_minus_one_is_none(
    client: httpx.AsyncClient, tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: tuple[tuple[Json, int | None], ...] = (
        ({"seed": -1}, None),
        ({"seed": -2}, -2),
        ({"seed": 0}, 0),
    )
    script = Script([_ended() for _ in seeds])
    monkeypatch.setattr(tiny_engine, "submit", script.submit)
    for fields, _ in seeds:
        assert (await complete(client, **fields)).status_code == 200
    assert [each.sampling.seed for each in script.submitted] == [
        None if seed is None else seed % 2**63 for _, seed in seeds
    ]


async def test_a_bias_forces_a_token_that_the_model_has(
    client: httpx.AsyncClient, tiny_engine: TorchEngine
) -> None:
    [token] = tiny_engine.prompts.tokenize("z")
    assert await text_of(client, logit_bias={str(token): 100}) == "zzzzzz"
    error = error_of(await complete(client, logit_bias={"259": 1}))
    assert error["param"] == "logit_bias"


async def test_echo_gives_the_prompt_as_it_was_given(
    client: httpx.AsyncClient, tiny_engine: TorchEngine
) -> None:
    for prompt in ("Hello", "h\u00e9!", tiny_engine.prompts.tokenize("h\u00e9!")):
        text = prompt if isinstance(prompt, str) else "h\u00e9!"
        body = (await complete(client, prompt=prompt, echo=True, n=2)).json()
        completion = await text_of(client, prompt=prompt)
        assert [choice["text"] for choice in body["choices"]] == [text + completion] * 2
        assert [choice["logprobs"] for choice in body["choices"]] == [None] * 2
        assert body["usage"] == (await complete(client, prompt=prompt, n=2)).json()["usage"]
    assert await text_of(client, prompt="Hello", echo=True, logprobs=False) == (
        "Hello" + await text_of(client)
    )


async def test_echo_of_a_long_prompt_and_of_unknown_tokens(client: httpx.AsyncClient) -> None:
    for prompt in ("x" * 20_000, [5] * 20_000, [[5], [259]], [2**31 - 1]):
        response = await complete(client, prompt=prompt, echo=True)
        assert response.status_code == 400
        assert error_of(response)["param"] == "prompt"


async def test_echo_with_logprobs_covers_prompt_and_completion(
    client: httpx.AsyncClient, tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = (
        logprobs_of("i", -1.0, {"o": -0.5}),
        logprobs_of("<0xC3>", -9.0, {"!": -0.25}),
        logprobs_of("<0xA9>", -8.0, {}),
    )
    outputs = (
        StepOutput((1,), "a", (logprobs_of("a", -2.0, {"a": -2.0}),), prompt),
        StepOutput((2,), "b", (logprobs_of("b", -3.0, {"c": -1.0}, 1),), finish_reason="length"),
    )
    script = Script([ScriptedGeneration(outputs)])
    monkeypatch.setattr(tiny_engine, "submit", script.submit)
    [choice] = (await complete(client, prompt="Hi\u00e9", echo=True, logprobs=1)).json()["choices"]
    assert choice["text"] == "Hi\u00e9ab"
    assert choice["logprobs"] == {
        "tokens": ["H", "i", "<0xC3>", "<0xA9>", "a", "b"],
        "token_logprobs": [None, -1.0, -9.0, -8.0, -2.0, -3.0],
        "top_logprobs": [
            None,
            {"o": -0.5, "i": -1.0},
            {"!": -0.25, "<0xC3>": -9.0},
            {"<0xA9>": -8.0},
            {"a": -2.0},
            {"c": -1.0, "b": -3.0},
        ],
        "text_offset": [0, 1, 2, 2, 3, 4],
    }
    sampling = script.submitted[0].sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (1, 1)


@pytest.mark.parametrize(
    ("fields", "logprobs", "prompt_logprobs"),
    [
        ({"echo": True}, None, None),
        ({"echo": True, "logprobs": False}, None, None),
        ({"echo": True, "logprobs": 0}, 0, 0),
        ({"echo": True, "logprobs": 5}, 5, 5),
        ({"echo": False, "logprobs": 5}, 5, None),
        ({"logprobs": 2}, 2, None),
    ],
)
async def test_which_logprobs_are_asked_for(
    client: httpx.AsyncClient,
    tiny_engine: TorchEngine,
    monkeypatch: pytest.MonkeyPatch,
    fields: Json,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> None:
    scores = () if prompt_logprobs is None else (logprobs_of("i", -1.0, {}),) * 4
    output = StepOutput((1,), "one", prompt_logprobs=scores, finish_reason="stop")
    script = Script([ScriptedGeneration((output,))])
    monkeypatch.setattr(tiny_engine, "submit", script.submit)
    assert (await complete(client, **fields)).status_code == 200
    sampling = script.submitted[0].sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (logprobs, prompt_logprobs)


async def test_max_tokens_0_needs_echo(
    client: httpx.AsyncClient, tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fields in ({}, {"echo": False}, {"logprobs": 1}):
        error = error_of(await complete(client, max_tokens=0, **fields))
        assert error["param"] == "max_tokens"
        assert "'echo'" in str(error["message"])
    output = StepOutput(
        (), "", prompt_logprobs=(logprobs_of("i", -1.0, {}),), finish_reason="length"
    )
    script = Script([ScriptedGeneration((output,)), ScriptedGeneration((output,))])
    monkeypatch.setattr(tiny_engine, "submit", script.submit)
    reading: Json = {"prompt": "Hi", "max_tokens": 0, "echo": True, "logprobs": 0}
    body = (await complete(client, **reading)).json()
    [chunk] = chunks((await complete(client, **reading, stream=True)).text)
    for [choice] in (body["choices"], chunk["choices"]):  # type: ignore[misc]
        assert choice["text"] == "Hi"
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"]["token_logprobs"] == [None, -1.0]
    assert body["usage"] == usage(prompt=2, completion=0)
    assert script.submitted[0].sampling.max_tokens == 0


@pytest.mark.parametrize("steered", [False, True])
async def test_prompt_logprobs_equal_generated_logprobs(
    client: httpx.AsyncClient,
    tiny_engine: TorchEngine,
    affine_artifact: WriteArtifact,
    steered: bool,
) -> None:
    """Prompt logprobs, as lm-evaluation-harness asks for them, equal those of the generation."""
    digest = (await push(client, affine_artifact("maps")))["digest"]
    context = tuple(tiny_engine.prompts.tokenize("Hello"))
    request = Request(
        "written",
        context,
        SamplingSettings(max_tokens=6, temperature=0, logprobs=1, ignore_eos=True),
        (Edit(str(digest), AffineSettings(1.0)),) if steered else (),
    )
    [generation] = await tiny_engine.submit([request])
    written = [output async for output in generation]
    tokens = [*context, *(token for output in written for token in output.token_ids)]
    expected = [token.chosen.logprob for output in written for token in output.logprobs]
    fields: Json = {"logprobs": 1, "echo": True, "seed": 1234, "prompt": [tokens]}
    if steered:
        fields["steering"] = {"intervention": "maps"}
    for max_tokens in (0, 1):
        [choice] = (await complete(client, max_tokens=max_tokens, **fields)).json()["choices"]
        assert choice["text"].startswith(tiny_engine.prompts.describe_prompt(tokens).text)
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(tokens) + max_tokens}
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        continuation = logprobs["token_logprobs"][len(context) : len(tokens)]
        assert continuation == pytest.approx(expected, abs=1e-4)
        tops = logprobs["top_logprobs"][len(context) : len(tokens)]
        assert continuation == [max(top.values()) for top in tops]  # the continuation was greedy


async def test_max_tokens_is_16_by_default(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": "Hello", "ignore_eos": True, "max_tokens": None}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("length", "max_tokens", "param"),
    [(511, 1, None), (512, 1, "prompt"), (600, 1, "prompt"), (500, 13, "max_tokens")],
)
async def test_the_context_bounds_prompt_and_completion(
    client: httpx.AsyncClient, length: int, max_tokens: int, param: str | None
) -> None:
    response = await complete(client, prompt="x" * length, max_tokens=max_tokens)
    if param is None:
        assert response.status_code == 200
        return
    error = error_of(response)
    assert response.status_code == 400
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert "512 tokens" in str(error["message"])


async def test_too_many_completions(client: httpx.AsyncClient) -> None:
    for fields, param in (
        ({"prompt": ["x"] * 2, "n": 65}, "n"),
        ({"prompt": ["x"] * 129}, "prompt"),
    ):
        error = error_of(await complete(client, **fields))
        assert (error["code"], error["param"]) == ("too_many_completions", param)


async def test_a_token_id_that_the_model_does_not_have(client: httpx.AsyncClient) -> None:
    response = await complete(client, prompt=[[1, 2], [3, 259]])
    assert response.status_code == 400
    assert error_of(response)["param"] == "prompt"
    assert await text_of(client)  # the server goes on


async def test_a_refusal_leaves_no_pin(
    tiny_engine: TorchEngine,
    registry: Registry,
    affine_artifact: WriteArtifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = registry.add(affine_artifact("maps"))
    script = Script([QueueFullError("full")])
    monkeypatch.setattr(tiny_engine, "submit", script.submit)
    app = build_app(tiny_engine, registry)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://localhost"
    ) as client:
        response = await complete(client, n=3, steering={"intervention": "maps"})
    assert response.status_code == 429
    registry.delete("maps")
    assert not registry.path(entry.digest).exists()  # no pin is left


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_generations(
    tiny_engine: TorchEngine,
    registry: Registry,
    affine_artifact: WriteArtifact,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    entry = registry.add(affine_artifact("maps"))
    generations = [ScriptedGeneration(), ScriptedGeneration()]
    script = Script([*generations])
    monkeypatch.setattr(tiny_engine, "submit", script.submit)
    app = build_app(tiny_engine, registry)
    connection = Connection(
        {
            "model": "tiny",
            "prompt": "Hello",
            "n": 2,
            "stream": stream,
            "steering": {"intervention": "maps"},
        }
    )
    running = asyncio.create_task(connection.run(app))
    await eventually(lambda: len(script.submitted) == 2)
    registry.delete("maps")
    assert registry.path(entry.digest).exists()  # pinned while the request runs
    connection.leave.set()
    async with asyncio.timeout(10):
        await running
    assert all(generation.cancelled for generation in generations)
    # The last unpin does not wait for the disk, so the file may go a little later.
    await eventually(lambda: not registry.path(entry.digest).exists())
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://localhost"
    ) as client:
        cancelled = 'requests_total{endpoint="/v1/completions",outcome="cancelled"}'
        assert await metric(client, cancelled) == 1


async def test_a_client_that_leaves_frees_the_real_engine(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    app = build_app(tiny_engine, registry)
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 500, "ignore_eos": True, "n": 8}
    connection = Connection({**body, "stream": True})
    running = asyncio.create_task(connection.run(app))
    await eventually(lambda: len(connection.sent) > 3)
    assert tiny_engine.stats().running == 8
    connection.leave.set()
    await running
    await eventually(lambda: tiny_engine.stats().running == 0)
    assert len(connection.sent) < 8 * 500
    assert tiny_engine.stats().kv_cache_usage == 0


async def test_many_mixed_streams_each_get_what_they_get_alone(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact, reward_artifact: WriteArtifact
) -> None:
    await push(client, affine_artifact("maps"))
    await push(client, reward_artifact("head"))
    steerings: list[object] = [
        None,
        {"intervention": "maps", "strength": 0.5},
        {"intervention": "head"},
        [{"intervention": "maps"}, {"intervention": "head", "iterations": 2}],
    ]
    alone = [await text_of(client, steering=steering, max_tokens=12) for steering in steerings]
    assert len(set(alone)) == 4
    mixed = await asyncio.gather(
        *(text_of(client, steering=steering, max_tokens=12) for steering in steerings * 8)
    )
    assert mixed == alone * 8


def _ended() -> ScriptedGeneration:
    return ScriptedGeneration((StepOutput((1,), "one", finish_reason="stop"),))


async def test_a_large_request_does_not_stop_the_streams_of_others(
    client: httpx.AsyncClient,
) -> None:
    """Bodies with thousands of prompts or members are refused without a look at each of them."""
    many_prompts = await complete(client, prompt=[[1]] * 30_000)
    assert error_of(many_prompts)["param"] == "prompt"
    for field in ("stream_options", "logit_bias", "steering"):
        many_members = await complete(client, **{field: {str(n): 1 for n in range(1001)}})
        assert "more than 1000 members" in str(error_of(many_members)["message"])
