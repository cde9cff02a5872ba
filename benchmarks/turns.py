"""Arms of a comparison that decode in one engine, in turns of one step."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch

from benchmarks.core import Bench, BenchmarkError
from server.engine.base import Edit, EngineError, Request, SamplingSettings
from server.engine.torch.sequence import Sequence as EngineSequence
from server.engine.torch.slab import SlabShape
from server.engine.torch.slab_attention import SlabMemory

_READ_AT_LEAST: Final = 256  # tokens of prompts in a step, until all are read

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
    steered_steps: int = 0  # as the engine counts them: it measures the dose in some


@torch.inference_mode()
def take_turns(
    bench: Bench, arms: Mapping[str, Rows], turns: Turns, advance: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds a step of each arm, in each round; reading the prompts is not counted.

    The arms take a step each, another one first each time, so that whatever else happens on the
    machine happens to all of them. `advance` is called after each round.

    Raises:
        BenchmarkError: a sequence ended before its last step.
    """
    begun = {name: _begin(bench, rows, turns) for name, rows in arms.items()}
    names = list(begun)
    outcome: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(turns.rounds + 1):
        seconds = dict.fromkeys(arms, 0.0)
        for step in range(turns.steps):
            first = step % len(names)
            for name in (*names[first:], *names[:first]):
                seconds[name] += _step_seconds(bench, begun[name])
        if number:
            for name, total in seconds.items():
                outcome[name].append(total / turns.steps)
        advance()
    for arm in begun.values():
        bench.core.scheduler.running = arm.sequences
        for sequence in tuple(arm.sequences):
            bench.core.remove(sequence)
    return outcome


def _begin(bench: Bench, rows: Rows, turns: Turns) -> _Arm:
    """Admit an arm, and read its prompts."""
    # More tokens than are measured, as those that were read first decode while the others'
    # prompts are read, and none may end on the clock.
    reading = 2 + len(rows) * turns.prompt_tokens // _READ_AT_LEAST
    sampling = SamplingSettings(turns.tokens + reading, temperature=0, ignore_eos=True)
    vocabulary = bench.loaded.description.vocab_size
    sequences = [
        EngineSequence.of(
            Request("bench", _tokens(row, turns.prompt_tokens, vocabulary), sampling, edits)
        )
        for row, edits in enumerate(rows)
    ]
    scheduler, store = bench.core.scheduler, bench.core.store
    if isinstance(store.memory, SlabMemory):
        # Of its own, or slabs of one arm would lie between those of another, and no longer be
        # attended to in one call.
        store.memory = SlabMemory(SlabShape.of(bench.loaded.model))
    bench.core.admit(sequences, bench.parameters)
    while scheduler.waiting or any(sequence.pending != 1 for sequence in sequences):
        _step(bench)
    arm = _Arm(scheduler.running)
    scheduler.running = []
    return arm


def _step_seconds(bench: Bench, arm: _Arm) -> float:
    core = bench.core
    core.scheduler.running, core.steered_steps = arm.sequences, arm.steered_steps
    _synchronize()
    began = time.perf_counter()
    advanced = _step(bench)
    _synchronize()
    seconds = time.perf_counter() - began
    if advanced != len(arm.sequences):
        raise BenchmarkError("a step did not advance every sequence")
    core.scheduler.running, arm.steered_steps = [], core.steered_steps
    return seconds


def _step(bench: Bench) -> int:
    """Let the engine take a step; how many sequences it advanced."""
    deliveries = bench.core.step()
    for _, output in deliveries:
        if isinstance(output, EngineError):
            raise BenchmarkError(f"a sequence was lost: {output}")
    return len(deliveries)


def _tokens(seed: int, count: int, vocabulary: int) -> tuple[int, ...]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(vocabulary, (count,), generator=random).tolist())


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
