"""The engine protocol over vLLM's own processes: `make test-vllm`."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio
import torch
from torch import Tensor

from interventions.artifact import write_artifact
from interventions.registry import Registry
from server.engine.base import (
    Edit,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    Request,
    SamplingSettings,
    ShuttingDownError,
    StepOutput,
    UnservableInterventionError,
)
from server.engine.torch.loaded_interventions import Parameters
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.plugin.wire import Measured
from steering.affine import AffineMap
from steering.hooks import edit_activations
from steering.reward import RewardHead
from steering.settings import AffineSettings, RewardSettings
from steering.sites import locate_site
from tests import oracles
from tests.manifests import manifest_of
from tests.oracles import Oracle
from tests.serving import build_app, complete, error_of, push
from tests.tiny import EOS, random_head, random_maps, tiny_tokenizer
from tests.vllm_models import artifact_bytes, vllm_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
    pytest.mark.asyncio(loop_scope="module"),
]
CONTEXT = 200
OPTIONS = VllmOptions(
    max_batch_size=8,
    max_batch_tokens=64,
    max_waiting=8,
    max_model_len=CONTEXT,
    kv_cache_gb=0.02,
    max_loaded_interventions=2,
    vllm_args="--enforce-eager --block-size 32",
)
GREEDY = SamplingSettings(12, temperature=0, ignore_eos=True, logprobs=2)
INTERVENTIONS: dict[str, Parameters] = {
    "a": random_maps(1),
    "b": random_maps(2, support=True, gate=True),
    "c": random_maps(3),
    "r": random_head(5),
    "elsewhere": random_maps(4, sites=("model.layers.0.mlp",)),
}
PROMPT = b"The quick brown fox jumps over the lazy dog, then it sleeps. " * 2
A = (Edit("a", AffineSettings(0.9)),)
BOTH = (Edit("b", AffineSettings(0.5, "generated")), Edit("r", RewardSettings(0.5, 3)))


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[Any]:
    """Start the engine on the tiny Llama, with a context of 200 tokens and two slots."""
    from server.engine.vllm.environment import prepare_environment  # noqa: PLC0415

    model, stored = folder / "model", folder / "stored"
    stored.mkdir()
    vllm_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    for digest, parameters in INTERVENTIONS.items():
        (stored / digest).write_bytes(artifact_bytes(parameters))
    prepare_environment()
    from server.engine.vllm.build import build_engine  # noqa: PLC0415  where vLLM is

    engine = await asyncio.to_thread(
        build_engine,
        str(model),
        "float32",
        OPTIONS,
        stored.joinpath,
        stored_sites=(),
        report=lambda _sentence: None,
    )
    assert not engine.ready
    try:
        await engine.start()
        yield engine
    finally:
        assert await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    async with started(tmp_path_factory.mktemp("engine")) as engine:
        assert engine.ready
        yield engine
    assert not engine.died


def request(
    prompt: bytes, edits: tuple[Edit, ...] = (), sampling: SamplingSettings = GREEDY
) -> Request:
    return Request("test", tuple(prompt), sampling, edits)


async def generate(engine: Any, *requests: Request) -> list[list[StepOutput]]:
    async def outputs(generation: Any) -> list[StepOutput]:
        return [output async for output in generation]

    return await asyncio.gather(*map(outputs, await engine.submit(requests)))


def tokens_of(outputs: Sequence[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def text_of(outputs: Sequence[StepOutput]) -> str:
    return "".join(output.text for output in outputs)


def expected(prompt: bytes, edits: tuple[Edit, ...], count: int = 12) -> list[int]:
    stack = [(INTERVENTIONS[edit.digest], edit.settings) for edit in edits]
    return Oracle(vllm_model("llama")).greedy(prompt, count, stack)[0]


async def test_a_batch_of_all_kinds_equals_the_oracle(engine: Any) -> None:
    work = [(PROMPT, ()), (PROMPT, A), (PROMPT, BOTH[1:]), (b"x", A), (b"hello", ())]
    found = await generate(engine, *(request(*each) for each in work))
    assert [tokens_of(each) for each in found] == [expected(*each) for each in work]
    assert all(each[-1].finish_reason == "length" for each in found)


async def test_nothing_is_shared_between_steered_and_plain_requests(engine: Any) -> None:
    """Their prompts begin with the same blocks, which the cache holds from the first round on."""
    settings = {
        "a": A,
        "a weaker": (Edit("a", AffineSettings(0.3)),),
        "generated": (Edit("a", AffineSettings(0.9, "generated")),),
        "r": (Edit("r", RewardSettings(0.5, 5)),),
        "plain": (),
    }
    for _ in range(2):
        for edits in settings.values():
            [outputs] = await generate(engine, request(PROMPT, edits))
            assert tokens_of(outputs) == expected(PROMPT, edits)


async def test_a_reward_shares_the_base_model_s_blocks(engine: Any) -> None:
    prompt = b"Once upon a time there was a reward that edits no keys and no values." * 2
    [plain] = await generate(engine, request(prompt))
    [steered] = await generate(engine, request(prompt, BOTH[1:]))
    [mapped] = await generate(engine, request(prompt, A))
    [mapped_again] = await generate(engine, request(prompt, A))
    cached = [each[0].cached_tokens for each in (plain, steered, mapped, mapped_again)]
    assert cached == [0, 128, 0, 128]
    assert engine.stats().prefix_cache_hits >= 256


async def test_interventions_take_each_other_s_slots(engine: Any) -> None:
    """Three of them, and two slots."""
    for digest in ("a", "b", "c", "a", "c", "b"):
        edits = (Edit(digest, AffineSettings(0.8)),)
        [outputs] = await generate(engine, request(b"hello", edits))
        assert tokens_of(outputs) == expected(b"hello", edits)
    assert engine.stats().slots_used == 2


async def test_prompt_and_completion_are_scored(engine: Any) -> None:
    sampling = replace(GREEDY, prompt_logprobs=1, prompt_logprobs_from=100)
    [outputs] = await generate(engine, request(PROMPT, BOTH, sampling))
    stack = [(INTERVENTIONS[edit.digest], edit.settings) for edit in BOTH]
    tokens = [*PROMPT, *tokens_of(outputs)]
    rows = Oracle(vllm_model("llama")).logits(tokens, len(PROMPT), stack).double().log_softmax(-1)
    prompt = outputs[0].prompt_logprobs
    assert len(prompt) == len(PROMPT) - 100
    completion = [each for output in outputs for each in output.logprobs]
    for place, scored in enumerate([*prompt, *completion], start=100):
        assert scored.chosen.logprob == pytest.approx(
            float(rows[place - 1][tokens[place]]), abs=1e-4
        )
    assert all(len(each.top) == 1 for each in prompt)
    assert all(len(each.top) == 2 for each in completion)
    assert not any(output.prompt_logprobs for output in outputs[1:])


@pytest.mark.parametrize("edits", [(), BOTH])
async def test_a_prompt_that_fills_the_context_is_scored_whole(
    engine: Any, edits: tuple[Edit, ...]
) -> None:
    sampling = SamplingSettings(0, prompt_logprobs=0)
    prompt = (PROMPT * 2)[:CONTEXT]
    [[output]] = await generate(engine, request(prompt, edits, sampling))
    assert (output.token_ids, output.text, output.finish_reason) == ((), "", "length")
    stack = [(INTERVENTIONS[edit.digest], edit.settings) for edit in edits]
    rows = Oracle(vllm_model("llama")).logits(prompt, CONTEXT, stack).double().log_softmax(-1)
    scores = [each.chosen.logprob for each in output.prompt_logprobs]
    exact = [float(rows[place - 1][prompt[place]]) for place in range(1, CONTEXT)]
    assert scores == pytest.approx(exact, abs=1e-4)


async def test_prompt_and_completion_fill_the_context(engine: Any) -> None:
    sampling = replace(GREEDY, max_tokens=3)
    [outputs] = await generate(engine, request((PROMPT * 2)[: CONTEXT - 3], A, sampling))
    assert len(tokens_of(outputs)) == 3
    with pytest.raises(InvalidRequestError, match="maximum context length is 200 tokens"):
        await engine.submit([request((PROMPT * 2)[: CONTEXT - 2], A, sampling)])


async def test_a_stop_string_ends_the_text_and_the_request(engine: Any) -> None:
    [whole] = await generate(engine, request(b"hello", A))
    text = text_of(whole)
    stop = text[4:6]
    [outputs] = await generate(
        engine, request(b"hello", A, replace(GREEDY, max_tokens=150, stop=(stop,)))
    )
    assert text_of(outputs) == text[: text.index(stop)]
    assert outputs[-1].finish_reason == "stop"
    await nothing_runs(engine)


async def nothing_runs(engine: Any) -> None:
    """vLLM reports its counts at the next step."""
    for _ in range(50):
        await generate(engine, request(b"x", (), replace(GREEDY, max_tokens=2)))
        if engine.stats().running <= 1 and not engine.stats().waiting:
            break
    assert (engine._places, engine._running) == (0, set())
    engine._slots.table.check({})
    assert not engine._llm.output_processor.request_states


async def test_an_end_of_text_ends_the_text(engine: Any) -> None:
    sampling = SamplingSettings(20, temperature=0, logit_bias=((EOS, 1e4),))
    [outputs] = await generate(engine, request(b"hello", (), sampling))
    assert (tokens_of(outputs), text_of(outputs)) == ([EOS], "")
    assert outputs[-1].finish_reason == "stop"
    [outputs] = await generate(engine, request(b"hello", (), replace(sampling, ignore_eos=True)))
    assert len(tokens_of(outputs)) == 20


async def test_a_seed_fixes_the_draws(engine: Any) -> None:
    sampling = SamplingSettings(10, temperature=1.0, seed=3, ignore_eos=True)
    [alone] = await generate(engine, request(PROMPT, A, sampling))
    batch = await generate(
        engine, *(request(PROMPT, A, replace(sampling, seed=seed)) for seed in (1, 3, None, 3))
    )
    assert tokens_of(batch[1]) == tokens_of(batch[3]) == tokens_of(alone) != tokens_of(batch[0])


def doses_by_hand(tokens: Sequence[int]) -> list[float]:
    """The doses of A at each token and site, from activations of transformers' model."""
    model = vllm_model("llama")
    found: list[float] = []
    maps, [edit] = INTERVENTIONS["a"], A
    assert not isinstance(maps, RewardHead)
    assert isinstance(edit.settings, AffineSettings)
    strength = edit.settings.strength

    def edited(site_map: AffineMap, before: Tensor) -> Tensor:
        [rows] = before
        after = oracles.affine_rows(rows, site_map, strength)
        found.extend(oracles.dose(*pair) for pair in zip(rows, after, strict=True))
        return after[None]

    for site, site_map in maps.items():
        edit_activations(model.get_submodule(site), locate_site(site), partial(edited, site_map))
    with torch.no_grad():
        model(torch.tensor([tokens]))
    return found


async def test_the_workers_measure_what_the_edits_do(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._measurements, "_interval", 0)  # it would read them meanwhile
    await engine._call("steering_measure", (1,))
    [outputs] = await generate(engine, request(b"hello", A))
    [message] = await engine._call("steering_measurements")
    found = Measured.from_message(message)
    doses = doses_by_hand([*b"hello", *tokens_of(outputs)][:-1])
    [[total]] = found.doses.values()
    assert total.number == len(doses)
    assert total.sum == pytest.approx(sum(doses), rel=1e-3)
    assert 0 < found.edit_seconds < found.step_seconds
    await engine._call("steering_measure", (OPTIONS.dose_interval,))


async def test_outputs_tell_doses_now_and_then(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._measurements, "_period", 0.02)
    before = engine.stats()
    steered, plain = await generate(
        engine,
        request(b"hello", BOTH, replace(GREEDY, max_tokens=180)),
        request(b"hello", (), replace(GREEDY, max_tokens=180)),
    )
    doses = [output.doses for output in steered if output.doses]
    assert doses
    assert all(0 < dose < 1e6 for each in doses for dose in each if dose is not None)
    assert {len(each) for each in doses} == {len(BOTH)}
    assert not any(output.doses for output in plain)
    after = engine.stats()
    seconds = after.measured_step_seconds - before.measured_step_seconds
    assert 0 < after.measured_edit_seconds - before.measured_edit_seconds < seconds


async def test_a_client_that_leaves_frees_all_that_it_held(engine: Any) -> None:
    sampling = replace(GREEDY, max_tokens=150)
    generations = await engine.submit([request(b"hello", A, sampling) for _ in range(10)])
    async for _ in generations[0]:
        break
    for generation in generations:
        generation.cancel()
    await asyncio.sleep(0.1)
    await nothing_runs(engine)


async def test_too_many_requests_are_refused(engine: Any) -> None:
    many = [request(b"hello") for _ in range(17)]
    with pytest.raises(QueueFullError):
        await engine.submit(many)
    found = await generate(engine, *many[:16])
    assert {tuple(tokens_of(each)) for each in found} == {tuple(expected(b"hello", ()))}


async def test_an_intervention_with_other_sites_is_refused(engine: Any) -> None:
    edits = (Edit("elsewhere", AffineSettings(1.0)),)
    with pytest.raises(UnservableInterventionError, match=r"layers\.0\.mlp was not prepared"):
        await engine.submit([request(b"hello", edits)])
    engine._slots.table.check({})
    assert tokens_of((await generate(engine, request(b"hello", A)))[0]) == expected(b"hello", A)


@pytest.mark.parametrize(
    ("site", "says"),
    [
        ("model.layers.0.mlp", r"add --site 'model\.layers\.\d+\.mlp'"),
        ("model.layers.0.self_attn.q_proj", "vLLM fuses modules"),
    ],
)
async def test_an_upload_with_other_sites_is_stored_and_refused(
    engine: Any, registry: Registry, tmp_path: Path, site: str, says: str
) -> None:
    maps = random_maps(4, engine.model.site_widths[site], (site,))
    path = tmp_path / "other.safetensors"
    write_artifact(path, manifest_of(maps, engine.model, "other"), maps)
    transport = httpx.ASGITransport(app=build_app(engine, registry))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        stored = await push(client, path)
        assert not stored["servable"]
        assert says in str(stored["reason"])
        assert (await client.get("/v1/interventions/other")).json()["reason"] == stored["reason"]
        response = await complete(client, steering={"intervention": "other"})
        error = error_of(response)
        assert (response.status_code, error["code"]) == (400, "intervention_not_servable")
        assert says in str(error["message"])
        assert (await complete(client)).status_code == 200


async def test_steering_that_overflows_ends_its_own_request(engine: Any) -> None:
    edits = (Edit("a", AffineSettings(3e38)),)
    [plain, steered] = await engine.submit([request(b"hello"), request(b"hello", edits)])
    with pytest.raises(InvalidRequestError, match="not a number") as caught:
        async for _ in steered:
            pass
    assert caught.value.code == "steering_overflow"
    assert tokens_of([output async for output in plain]) == expected(b"hello", ())
    # Others are given the memory in which its keys and values were no numbers.
    again = await generate(engine, *(request(b"hello", A) for _ in range(8)))
    assert {tuple(tokens_of(each)) for each in again} == {tuple(expected(b"hello", A))}


async def test_a_follower_has_the_place_that_was_kept_for_it(engine: Any) -> None:
    leader = replace(request(b"hello"), has_follower=True)
    others = [request(b"hello", (), replace(GREEDY, max_tokens=100)) for _ in range(14)]
    [generation, *running] = await engine.submit([leader, *others])
    with pytest.raises(QueueFullError):
        await engine.submit([request(b"x")])
    first = [output async for output in generation]
    follower = await generation.follow(request(b"hello", A))
    assert tokens_of(first) == expected(b"hello", ())
    assert tokens_of([output async for output in follower]) == expected(b"hello", A)
    for each in running:
        each.cancel()
    await asyncio.sleep(0.1)
    await nothing_runs(engine)


async def test_the_end_fails_what_runs(engine: Any) -> None:
    """The last test of this file: the engine is closed."""
    [generation] = await engine.submit([request(b"hello", A, replace(GREEDY, max_tokens=150))])
    assert await engine.close()
    with pytest.raises(ShuttingDownError):
        async for _ in generation:
            pass
    with pytest.raises(ShuttingDownError):
        await engine.submit([request(b"hello")])


def worker_process() -> psutil.Process:
    """Return the process of vLLM's only worker: a grandchild, as vLLM's scheduler starts it."""
    [worker] = {
        process
        for scheduler in psutil.Process().children()
        for process in scheduler.children()
        if "resource_tracker" not in " ".join(process.cmdline())
    }
    return worker


async def test_a_worker_that_dies_ends_the_engine(tmp_path: Path) -> None:
    async with started(tmp_path) as engine:
        [generation] = await engine.submit([request(b"hello", A, replace(GREEDY, max_tokens=150))])
        worker_process().kill()
        with pytest.raises(EngineDeadError):
            async for _ in generation:
                pass
        assert engine.died
        assert not engine.ready
        with pytest.raises(EngineDeadError):
            await engine.submit([request(b"hello")])
    assert engine.died
