"""Measures how long clients wait for tokens while others send long prompts.

Some clients send short prompts all the time; every other client is steered. In every other phase,
one more client sends long prompts one after another, every other prompt steered. The waits of
steered and unsteered requests are reported apart.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, Literal, Self, TypeAlias

from pydantic import JsonValue

from server.cli.bench.client import BenchClient, StreamTimes
from server.cli.bench.plan import BenchPlan
from server.measuring.comparison import Percentiles, turns
from server.measuring.table import Table

Phase: TypeAlias = Literal["decodes only", "with long prompts"]
Prompt: TypeAlias = Literal["short", "long"]
Group: TypeAlias = tuple[Phase, Prompt, bool]  # the last is True for steered requests

PHASES: Final[tuple[Phase, ...]] = ("decodes only", "with long prompts")
_LONG_PROMPT_ANSWER: Final = 8  # tokens generated after a long prompt
_REQUESTS: Final = 2  # of each client that sends short prompts, in a phase
_MILLI: Final = 1000


@dataclass(frozen=True, slots=True)
class Waits:
    """The waiting times of one group of requests, in seconds."""

    phase: Phase
    prompt: Prompt
    steered: bool
    first_token: Percentiles
    inter_token: Percentiles | None  # None if every answer came in one event

    @classmethod
    def of(cls, group: Group, streams: Sequence[StreamTimes]) -> Self:
        """Summarize the streams of a group, at least one."""
        gaps = [gap for stream in streams for gap in stream.gaps]
        first = Percentiles.of([stream.first_token for stream in streams])
        return cls(*group, first, Percentiles.of(gaps) if gaps else None)


async def measure_latency(
    client: BenchClient, steering: JsonValue, plan: BenchPlan, advance: Callable[[], None]
) -> list[Waits]:
    """Measure the waits of each group, phases in turns; `advance` is called after each phase.

    Raises:
        BenchError: the server refuses a request, or breaks off a stream.
    """
    seen: defaultdict[Group, list[StreamTimes]] = defaultdict(list)
    for phase, counts in turns(PHASES, plan.rounds):
        for group, stream in await _phase(client, steering, plan, phase):
            if counts:
                seen[group].append(stream)
        advance()
    return [Waits.of(group, streams) for group, streams in sorted(seen.items())]


async def _phase(
    client: BenchClient, steering: JsonValue, plan: BenchPlan, phase: Phase
) -> list[tuple[Group, StreamTimes]]:
    seen: list[tuple[Group, StreamTimes]] = []
    shorts_ended = asyncio.Event()

    async def send(kind: Prompt, steered: bool, prompt_tokens: int, tokens: int) -> None:
        prompt = client.prompt(prompt_tokens)
        stream = await client.stream(prompt, tokens, steering if steered else None)
        seen.append(((phase, kind, steered), stream))

    async def send_short(steered: bool) -> None:
        for _ in range(_REQUESTS):
            await send("short", steered, plan.prompt_tokens, plan.tokens)

    async def send_shorts() -> None:
        await asyncio.gather(*(send_short(number % 2 == 1) for number in range(plan.clients)))
        shorts_ended.set()

    async def send_long() -> None:
        for number in count():
            # There is one steered and one unsteered prompt, even if the short requests end sooner.
            if number >= 2 and shorts_ended.is_set():
                return
            await send("long", number % 2 == 1, plan.long_prompt_tokens, _LONG_PROMPT_ANSWER)

    longs = [send_long()] if phase == "with long prompts" else []
    await asyncio.gather(send_shorts(), *longs)
    return seen


def latency_table(title: str, waits: Sequence[Waits]) -> Table:
    """Return a table of each group's milliseconds to the first token and between tokens."""
    columns = (
        *("requests", "prompt", "steered", "first token p50 / p90 / p99, ms"),
        *("n", "between tokens p50 / p90 / p99, ms", "n"),
    )
    rows = [
        (
            *(each.phase, each.prompt, "yes" if each.steered else "no"),
            *_milliseconds(each.first_token),
            *_milliseconds(each.inter_token),
        )
        for each in waits
    ]
    return Table(title, columns, rows)


def _milliseconds(percentiles: Percentiles | None) -> tuple[str, str]:
    if percentiles is None:
        return "-", "0"
    values = (percentiles.p50, percentiles.p90, percentiles.p99)
    return " / ".join(f"{value * _MILLI:.0f}" for value in values), str(percentiles.count)
