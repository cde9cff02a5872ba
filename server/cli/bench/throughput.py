"""Measures the throughput of steering against none, and of distinct configurations against equal.

A burst is a number of requests that are sent at once. The bursts of one comparison follow each
other, in the opposite order every other round, so that a drift of the machine's speed favors none.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pydantic import JsonValue

from server.cli.bench.client import BenchClient, ListedIntervention
from server.cli.bench.plan import BenchPlan
from server.measuring.comparison import Throughput, turns

Burst: TypeAlias = Sequence[JsonValue]
"""The `steering` of each request that is sent."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A burst that is compared with the mean of the bursts `bases`."""

    label: str
    bases: Sequence[Burst]
    burst: Burst

    @property
    def bursts(self) -> Sequence[Burst]:
        """The bursts of one round, the bases first."""
        return [*self.bases, self.burst]


def steering_trials(steerings: Mapping[str, JsonValue], batches: Sequence[int]) -> list[Trial]:
    """Return the trials that compare each steering with none, at each batch size."""
    return [
        Trial(label, [[None] * batch], [steering] * batch)
        for batch in batches
        for label, steering in steerings.items()
    ]


def distinct_trials(listed: Sequence[ListedIntervention], batch: int) -> list[Trial]:
    """Return the trials that compare distinct configurations with equal ones.

    For each intervention, every request has another value of one setting. If there are several
    interventions, one more trial mixes them.
    """
    equal: list[Burst] = [[{"intervention": each.name}] * batch for each in listed]
    trials = []
    for each, base in zip(listed, equal, strict=True):
        step = (each.high - each.low) / batch
        values = [each.low + step * (row + 1) for row in range(batch)]
        burst: Burst = [
            # A setting of 0 would be served as if unsteered.
            {"intervention": each.name, each.setting: value or step / 2}
            for value in values
        ]
        trials.append(Trial(f"{each.name}: {batch} values of {each.setting}", [base], burst))
    if len(listed) > 1:
        mixed: Burst = [{"intervention": listed[row % len(listed)].name} for row in range(batch)]
        trials.append(Trial(f"{len(listed)} interventions mixed", equal, mixed))
    return trials


async def measure_throughput(
    client: BenchClient, trials: Sequence[Trial], plan: BenchPlan, advance: Callable[[], None]
) -> list[Throughput]:
    """Measure every trial beside its bases; `advance` is called after each burst.

    Raises:
        BenchError: the server refuses a request, generates fewer tokens, or does not steer.
    """
    places = [(trial, burst) for trial in range(len(trials)) for burst in trials[trial].bursts]
    seconds: list[list[float]] = [[] for _ in places]
    for place, counts in turns(range(len(places)), plan.rounds):
        taken = await _burst(client, places[place][1], plan)
        advance()
        if counts:
            seconds[place].append(taken)
    measured = []
    for number, trial in enumerate(trials):
        *bases, other = (
            values for (each, _), values in zip(places, seconds, strict=True) if each == number
        )
        base = [sum(values) / len(values) for values in zip(*bases, strict=True)]
        batch = len(trial.burst)
        measured.append(Throughput.of(trial.label, batch, batch * plan.tokens, base, other))
    return measured


async def _burst(client: BenchClient, burst: Burst, plan: BenchPlan) -> float:
    """Send a burst; return the seconds from its first request to its last answer."""
    prompts = [client.prompt(plan.prompt_tokens) for _ in burst]
    began = time.perf_counter()
    requests = zip(prompts, burst, strict=True)
    await asyncio.gather(*(client.complete(prompt, plan.tokens, each) for prompt, each in requests))
    return time.perf_counter() - began
