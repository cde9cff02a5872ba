"""Arms of a comparison that decode in one engine, in turns of one step."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import torch

from benchmarks.core import Bench, BenchmarkError, at_full_speed
from server.engine.base import Edit, EngineError, Request, SamplingSettings
from server.engine.torch.attention.slab import KVShape
from server.engine.torch.attention.slab_attention import SlabMemory
from server.engine.torch.scheduling.sequence import Sequence as EngineSequence

Edits: TypeAlias = tuple[Edit, ...]
Rows: TypeAlias = Sequence[Edits]
"""What steers each of an arm's sequences."""


@dataclass(frozen=True, slots=True)
class Turns:
    """How long a comparison is. A round is of `steps` steps of every arm."""

    rounds: int
    steps: int
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        """What each sequence generates on the clock; the first round warms up."""
        return (self.rounds + 1) * self.steps


@dataclass(slots=True)
class _Arm:
    """Sequences that decode together, while those of other arms stand still."""

    sequences: list[EngineSequence]
    running: list[EngineSequence]  # the same, as the scheduler has them
    steered_steps: int = 0  # as the engine counts them: it measures the dose in some


@torch.inference_mode()
def take_turns(
    bench: Bench, arms: Mapping[str, Rows], turns: Turns, advance: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds a step of each arm, in each round; reading the prompts is not counted.

    The arms take a step each, in another order each time, so that whatever else happens on the
    machine happens to all of them. `advance` is called after each round.

    Raises:
        BenchmarkError: the arms do not fit into memory together, or a step did not advance all
            of an arm's sequences.
    """
    sequences = {name: _sequences(bench, rows, turns) for name, rows in arms.items()}
    _check_room(bench, list(chain.from_iterable(sequences.values())))
    begun = [(name, _begin(bench, each)) for name, each in sequences.items()]
    at_full_speed(bench.core)  # what the arms have asked for is compiled now
    outcome: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(turns.rounds + 1):
        seconds = dict.fromkeys(arms, 0.0)
        for step in range(turns.steps):
            first = step % len(begun)
            order = [*begun[first:], *begun[:first]]
            for name, arm in reversed(order) if step % 2 else order:
                seconds[name] += _step_seconds(bench, arm)
        if number:
            for name, total in seconds.items():
                outcome[name].append(total / turns.steps)
        advance()
    for _, arm in begun:
        bench.core.scheduler.running = arm.running
        for sequence in arm.sequences:
            bench.core.remove(sequence)
    return outcome


def _sequences(bench: Bench, rows: Rows, turns: Turns) -> list[EngineSequence]:
    # One token is generated as the prompt is read, and none of those on the clock is the last.
    sampling = SamplingSettings(turns.tokens + 2, temperature=0, ignore_eos=True)
    vocabulary = bench.loaded.description.vocab_size
    prompts = [_tokens(row, turns.prompt_tokens, vocabulary) for row in range(len(rows))]
    return [
        EngineSequence.of(Request("bench", prompt, sampling, edits))
        for prompt, edits in zip(prompts, rows, strict=True)
    ]


def _check_room(bench: Bench, sequences: Sequence[EngineSequence]) -> None:
    pool = bench.core.scheduler.pool
    needed = sum(pool.blocks_for(sequence.max_length) for sequence in sequences)
    if needed + len(sequences) > pool.free_blocks:  # as the scheduler keeps a spare one for each
        raise BenchmarkError(
            f"the keys and values of all arms need {needed + len(sequences)} blocks, of which "
            f"{pool.free_blocks} are free: measure fewer rounds"
        )


def _begin(bench: Bench, sequences: list[EngineSequence]) -> _Arm:
    """Admit an arm, and read its prompts, all in one step: its sequences stay of one length."""
    scheduler, store = bench.core.scheduler, bench.core.store
    if isinstance(store.memory, SlabMemory):
        # Of its own, or slabs of one arm would lie between those of another, and no longer be
        # attended to in one call.
        store.memory = SlabMemory(KVShape.of(bench.loaded.model))
    bench.core.admit(sequences, bench.parameters)
    _step(bench, len(sequences))
    arm = _Arm(sequences, scheduler.running)
    scheduler.running = []
    return arm


def _step_seconds(bench: Bench, arm: _Arm) -> float:
    core = bench.core
    core.scheduler.running, core.steered_steps = arm.running, arm.steered_steps
    _synchronize()
    began = time.perf_counter()
    _step(bench, len(arm.sequences))
    _synchronize()
    seconds = time.perf_counter() - began
    core.scheduler.running, arm.steered_steps = [], core.steered_steps
    return seconds


def _step(bench: Bench, sequences: int) -> None:
    """Let the engine take a step that advances so many."""
    deliveries = bench.core.step()
    for _, output in deliveries:
        if isinstance(output, EngineError):
            raise BenchmarkError(f"a sequence was lost: {output}")
    if len(deliveries) != sequences:
        raise BenchmarkError(f"a step advanced {len(deliveries)} of {sequences} sequences")


def _tokens(seed: int, count: int, vocabulary: int) -> tuple[int, ...]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(vocabulary, (count,), generator=random).tolist())


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
