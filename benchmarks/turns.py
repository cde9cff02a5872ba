"""Trials that decode in one engine, in turns of one step."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.decoding import BatchEdits, BenchEngine, BenchmarkError, decoding


@dataclass(frozen=True, slots=True)
class Turns:
    """The length of a comparison. A round has `steps` steps of every trial."""

    rounds: int
    steps: int
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        """The number of tokens that each sequence generates in turns; the first round warms up."""
        return (self.rounds + 1) * self.steps


def take_turns(
    engine: BenchEngine, trials: Mapping[str, BatchEdits], turns: Turns, advance: Callable[[], None]
) -> dict[str, list[float]]:
    """Measure the seconds of a step of each trial in each round; prompts are not counted.

    The trials take a step each, in another order each time, so that whatever else happens on the
    machine happens to all of them. `advance` is called after each round.

    Raises:
        BenchmarkError: the trials do not fit into memory together, the prompts of one do not fit
            into a step, or a step did not advance all of a trial's sequences.
    """
    # One token is generated as the prompt is read, and the last token of `turns` is not the last.
    new_tokens = turns.tokens + 2
    _check_room(engine, sum(map(len, trials.values())), turns.prompt_tokens + new_tokens)
    outcome: dict[str, list[float]] = {name: [] for name in trials}
    with ExitStack() as stack:
        begun = []
        for name, batch in trials.items():
            trial = stack.enter_context(decoding(engine, batch, turns.prompt_tokens, new_tokens))
            if trial.prompt_steps > 1:  # the sequences have different lengths
                raise BenchmarkError(f"reading the prompts took {trial.prompt_steps} steps, not 1")
            begun.append((name, trial))
        engine.reach_full_speed()  # what the first steps have asked for is compiled now
        for number in range(turns.rounds + 1):
            seconds = dict.fromkeys(trials, 0.0)
            for step in range(turns.steps):
                first = step % len(begun)
                order = [*begun[first:], *begun[:first]]
                for name, trial in reversed(order) if step % 2 else order:
                    seconds[name] += trial.seconds(1)
            if number:
                for name, total in seconds.items():
                    outcome[name].append(total / turns.steps)
            advance()
    return outcome


def _check_room(engine: BenchEngine, sequences: int, tokens: int) -> None:
    pool = engine.core.scheduler.pool
    # The scheduler keeps a spare block for each sequence.
    needed = sequences * (pool.blocks_for(tokens) + 1)
    if needed > pool.free_blocks:
        raise BenchmarkError(
            f"the keys and values of all trials need {needed} blocks, of which "
            f"{pool.free_blocks} are free: measure fewer rounds"
        )
