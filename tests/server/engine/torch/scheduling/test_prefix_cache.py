"""Tests the prefix cache: its blocks' keys, which blocks it keeps and finds, and its evictions.

A block is the keys and values of 16 tokens. Its cache key covers its tokens, all tokens before, and
the affine edits that touched them; reward edits leave keys and values alone.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from server.engine.errors import EngineError
from server.engine.output import StepOutput
from server.engine.request import Edit, Request, SamplingSettings
from server.engine.torch.attention.slab import KVShape, Slab, SlabPool
from server.engine.torch.build import build_core
from server.engine.torch.core import EngineCore
from server.engine.torch.options import EngineOptions
from server.engine.torch.scheduling.block_keys import KeyChain
from server.engine.torch.scheduling.block_pool import BlockPool
from server.engine.torch.scheduling.prefix_cache import PrefixCache
from server.engine.torch.scheduling.sequence import Sequence
from server.engine.torch.step.batch import Batch
from steering.bank import Bank
from steering.dose import DoseMeter
from steering.route import Span, build_route
from steering.settings import AffineSettings, Positions, RewardSettings, SlottedEdit
from tests.conftest import LoadTiny
from tests.steered import (
    GREEDY,
    STACKS,
    assert_equal_to_oracle,
    interventions_of,
)

SIZE = 16
POSITIONS: tuple[Positions, ...] = ("all", "prompt", "generated")
TEXT = tuple(b"The quick brown fox jumps over the lazy dog, then it sleeps, and dreams.")
SHAPE = KVShape(1, 2, torch.float32, (torch.device("cpu"),) * 2)
BLOCK = SIZE * 256  # bytes of a block: the tiny Llama's keys and values take 256 bytes a token
OPTIONS = EngineOptions(
    kv_cache_gb=40 * BLOCK / 1e9, max_batch_size=8, max_batch_tokens=64, check_invariants=True
)


def affine(digest: str, strength: float = 1.0, positions: Positions = "all") -> Edit:
    return Edit(digest, AffineSettings(strength, positions))


def keys(tokens: tuple[int, ...], prompt_length: int, *edits: Edit) -> list[bytes]:
    return list(KeyChain(prompt_length, edits).first_keys(len(tokens) // SIZE, SIZE, tokens))


edits_of_a_request = st.lists(
    st.builds(
        affine,
        st.sampled_from("ab"),
        st.sampled_from([0.5, 1.0]),
        st.sampled_from(POSITIONS),
    )
    | st.just(Edit("r", RewardSettings(0.5, 5))),
    max_size=3,
)


def per_token(prompt_length: int, count: int, edits: list[Edit]) -> list[list[tuple[int, float]]]:
    """Return each token's slots and strengths, in order, by the engine's own route."""
    slotted = tuple(SlottedEdit(ord(edit.digest), edit.settings) for edit in edits)
    span = Span(0, count, prompt_length, range(count), slotted)
    affine = build_route([span], torch.device("cpu")).affine
    if affine is None:
        return [[] for _ in range(count)]
    return [
        [
            (int(slot), float(strength))
            for slot, strength in zip(slots, strengths, strict=True)
            if slot
        ]
        for slots, strengths in zip(affine.slots.T, affine.strength.T, strict=True)
    ]


@given(
    mine=edits_of_a_request,
    others=edits_of_a_request,
    my_prompt=st.integers(1, 40),
    their_prompt=st.integers(1, 40),
)
@hypothesis_settings(max_examples=500)
def test_equal_keys_mean_that_every_token_so_far_is_edited_alike(
    mine: list[Edit], others: list[Edit], my_prompt: int, their_prompt: int
) -> None:
    count = 48
    tokens = TEXT[:count]
    pairs = zip(keys(tokens, my_prompt, *mine), keys(tokens, their_prompt, *others), strict=True)
    my_tokens = per_token(my_prompt, count, mine)
    their_tokens = per_token(their_prompt, count, others)
    for place, (my_key, their_key) in enumerate(pairs):
        end = (place + 1) * SIZE
        if my_key == their_key:
            assert my_tokens[:end] == their_tokens[:end]
        elif len(mine) < 2 and len(others) < 2:
            assert my_tokens[:end] != their_tokens[:end], "what is the same is not shared"


def test_a_key_tells_its_tokens_and_all_before_them() -> None:
    text = TEXT[:32]
    assert keys(text, 5) == keys(text, 30)
    assert keys((*text[:31], 0), 5)[0] == keys(text, 5)[0]
    assert keys((*text[:31], 0), 5)[1] != keys(text, 5)[1]
    assert not {*keys((0, *text[1:]), 5)} & {*keys(text, 5)}
    assert keys(text[:16] * 2, 5)[0] != keys(text[:16] * 2, 5)[1]


def test_a_reward_shares_with_the_base_and_an_edit_of_what_is_generated_with_the_prompt() -> None:
    base = keys(TEXT[:48], 20)
    assert keys(TEXT[:48], 20, Edit("r", RewardSettings(0.5, 5))) == base
    generated = keys(TEXT[:48], 20, affine("a", positions="generated"))
    assert [one == other for one, other in zip(generated, base, strict=True)] == [
        *(True, False, False)
    ]
    on_prompt = keys(TEXT[:48], 20, affine("a", positions="prompt"))
    everywhere = keys(TEXT[:48], 20, affine("a"))
    assert [one == other for one, other in zip(on_prompt, everywhere, strict=True)] == [
        *(True, False, False)
    ]


def sequence(tokens: int = 40, computed: int | None = None, scored: bool = False) -> Sequence:
    sampling = SamplingSettings(8, prompt_logprobs=0 if scored else None)
    made = Sequence.of(Request("x", TEXT[:tokens], sampling))
    made.finite_tokens = tokens if computed is None else computed
    return made


def layers(slab: Slab) -> list[torch.Tensor]:
    return [slab.layer(number) for number in range(len(SHAPE.devices))]


def slab(value: float = 0.0) -> Slab:
    made = Slab(SlabPool(SHAPE))
    made.reserve(len(TEXT))
    for number, layer in enumerate(layers(made)):
        layer[:] = value + number + torch.arange(layer.shape[2])[:, None]
    return made


def test_what_is_saved_is_found_and_copied() -> None:
    cache = PrefixCache[list[torch.Tensor]](BlockPool(10, SIZE), enabled=True)
    source, copy = slab(), slab(-1000)
    cache.save(sequence(40), source)
    source.layer(0)[:] = -1
    reader = sequence(48)
    reader.computed_tokens = cache.find(reader)
    assert reader.computed_tokens == 32
    cache.load(reader, copy)
    for mine, wanted in zip(layers(copy), layers(slab()), strict=True):
        assert torch.equal(mine[:, :, :32], wanted[:, :, :32])
        assert (mine[:, :, 32:] < 0).all()
    copy.layer(0)[:] = -1
    again = slab(-100)
    cache.load(reader, again)
    assert torch.equal(again.layer(0)[:, :, :32], slab().layer(0)[:, :, :32])
    assert (cache.queries, cache.hits) == (2 * 48, 2 * 32)


@pytest.mark.parametrize(
    ("tokens", "found"), [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (48, 32)]
)
def test_the_last_token_is_always_computed(tokens: int, found: int) -> None:
    cache = PrefixCache[list[torch.Tensor]](BlockPool(10, SIZE), enabled=True)
    cache.save(sequence(40), slab())
    assert cache.find(sequence(tokens)) == found


def test_only_full_blocks_with_finite_logits_are_kept() -> None:
    cache = PrefixCache[list[torch.Tensor]](BlockPool(10, SIZE), enabled=True)
    cache.save(sequence(40, computed=31), slab())
    assert len(cache) == 1
    assert cache.find(sequence(40)) == 16


def test_prompt_logprobs_bypass_the_cache() -> None:
    cache = PrefixCache[list[torch.Tensor]](BlockPool(10, SIZE), enabled=True)
    cache.save(sequence(), slab())
    reader = sequence(scored=True)
    assert cache.find(reader) == 0
    cache.load(reader, slab())
    assert cache.queries == 0


def test_a_sequence_that_had_yielded_is_not_counted_again() -> None:
    cache = PrefixCache[list[torch.Tensor]](BlockPool(10, SIZE), enabled=True)
    reader = sequence()
    reader.preemptions = 1
    cache.load(reader, slab())
    assert cache.queries == 0


def test_cached_blocks_give_way_the_least_recently_used_first() -> None:
    pool = BlockPool(4, SIZE)
    cache = PrefixCache[list[torch.Tensor]](pool, enabled=True)
    first, second = sequence(32), sequence(48)
    second.tokens[0] += 1
    cache.save(first, slab())
    cache.save(second, slab())  # evicts the second block of `first`
    assert (len(cache), pool.free_blocks, pool.usage) == (4, 4, 0)
    assert (cache.find(sequence(48)), cache.find(second)) == (16, 32)
    assert pool.allocate("somebody", 2 * SIZE), "cached blocks are free"
    cache.trim()
    cache.check()
    assert (cache.find(sequence(48)), cache.find(second)) == (0, 32)
    cache.save(first, slab())
    assert (cache.find(sequence(48)), cache.find(second)) == (32, 0)
    assert pool.allocate("somebody", 4 * SIZE)
    cache.trim()
    cache.save(first, slab())
    assert len(cache) == 0


def test_where_it_is_switched_off_nothing_is_kept() -> None:
    cache = PrefixCache[list[torch.Tensor]](BlockPool(4, SIZE), enabled=False)
    cache.save(sequence(), slab())
    cache.load(sequence(), slab())
    assert (len(cache), cache.queries, cache.find(sequence())) == (0, 0, 0)


def submit(core: EngineCore, prompt: tuple[int, ...], *edits: Edit, tokens: int = 16) -> Sequence:
    sampling = SamplingSettings(tokens, temperature=0, ignore_eos=True, logprobs=3)
    made = Sequence.of(Request("x", prompt, sampling, edits))
    core.admit([made], interventions_of())
    return made


def finish(core: EngineCore) -> dict[Sequence, list[StepOutput | EngineError]]:
    outputs: dict[Sequence, list[StepOutput | EngineError]] = {}
    while core.has_work:
        for each, output in core.step():
            outputs.setdefault(each, []).append(output)
    return outputs


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_what_is_found_gives_what_the_oracle_gives(load_tiny: LoadTiny, family: str) -> None:
    core = build_core(load_tiny(family), OPTIONS)
    for name in ("base", "a", "a support", "a on the prompt", "a on what is generated", "four"):
        before = core.store.prefixes.hits
        for _ in range(2):
            made = Sequence.of(Request("x", TEXT[:50], GREEDY, STACKS[name]))
            core.admit([made], interventions_of(family))
            outputs = [each for each in finish(core)[made] if isinstance(each, StepOutput)]
            assert_equal_to_oracle(outputs, family, list(TEXT[:50]), STACKS[name])
        assert core.store.prefixes.hits - before >= 48, name


def test_the_next_turn_finds_prompt_and_answer(load_tiny: LoadTiny) -> None:
    core = build_core(load_tiny(), OPTIONS)
    first = submit(core, TEXT[:20], tokens=30)
    finish(core)
    submit(core, (*first.tokens, *b" And?"))
    finish(core)
    assert core.store.prefixes.hits == 48


def test_prompts_are_shared_while_the_first_request_decodes(load_tiny: LoadTiny) -> None:
    core = build_core(load_tiny(), OPTIONS)
    first = submit(core, TEXT[:40], tokens=100)
    core.step()
    submit(core, TEXT[:40], Edit("r", RewardSettings(0.5, 5)), tokens=2)
    core.step()
    assert core.store.prefixes.hits == 32
    assert first in core.scheduler.running


def test_preempted_sequences_find_cached_blocks(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(kv_cache_gb=16 * BLOCK / 1e9, max_batch_size=4, check_invariants=True)
    core = build_core(load_tiny(), options)
    for start in range(3):
        submit(core, TEXT[start : start + 50], tokens=60)
    load, found = core.store.prefixes.load, []

    def recording(sequence: Sequence, lane: Slab) -> None:
        load(sequence, lane)
        if sequence.preemptions:
            found.append(sequence.computed_tokens)

    monkeypatch.setattr(core.store.prefixes, "load", recording)
    finish(core)
    assert len(found) == core.scheduler.preemptions > 0
    assert max(found) > 16
    assert (core.store.prefixes.queries, core.store.prefixes.hits) == (150, 0), (
        "they were counted twice"
    )


def test_cancelling_keeps_full_blocks(load_tiny: LoadTiny) -> None:
    core = build_core(load_tiny(), OPTIONS)
    leaving = submit(core, TEXT[:20], tokens=100)
    for _ in range(30):
        core.step()
    core.remove(leaving)
    core.check()
    assert len(core.store.prefixes) == 3  # full blocks of 20 + 29 tokens


def test_a_prompt_that_is_not_whole_is_not_kept(load_tiny: LoadTiny) -> None:
    """No logits of the prompt have shown yet that its keys and values are finite."""
    core = build_core(load_tiny(), OPTIONS)
    leaving = submit(core, TEXT * 2)
    core.step()
    assert leaving.computed_tokens == 64
    core.remove(leaving)
    assert len(core.store.prefixes) == 0


def test_a_step_that_fails_keeps_nothing_of_its_sequences(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = build_core(load_tiny(), OPTIONS)
    failing = submit(core, TEXT[:15], tokens=100)
    for _ in range(10):
        core.step()
    run = core._runner.run

    def broken(batch: Batch, bank: Bank, meter: DoseMeter | None = None) -> torch.Tensor:
        run(batch, bank, meter)
        for lane in core.store.lanes.values():
            assert isinstance(lane, Slab)
            for layer in range(2):
                lane.layer(layer).fill_(torch.nan)
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(core._runner, "run", broken)
    [(lost, error)] = core.step()
    assert (lost, type(error).__name__) == (failing, "StepFailedError")
    assert len(core.store.prefixes) == 0


@pytest.mark.parametrize("after", [0, 3])
def test_nonfinite_logits_cache_nothing(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    core = build_core(load_tiny(), OPTIONS)
    lost = submit(core, TEXT[:31], tokens=100)
    for _ in range(after):
        core.step()
    kept = len(core.store.prefixes)
    run = core._runner.run

    def overflowing(batch: Batch, bank: Bank, meter: DoseMeter | None = None) -> torch.Tensor:
        return run(batch, bank, meter) * torch.inf

    monkeypatch.setattr(core._runner, "run", overflowing)
    [(sequence, error)] = core.step()
    assert sequence is lost
    assert isinstance(error, EngineError)
    assert len(core.store.prefixes) == kept == (1 if after else 0)
