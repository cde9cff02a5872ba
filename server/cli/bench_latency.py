"""Measures how long clients wait for tokens while others send long prompts.

Some clients send short prompts all the time; every other client is steered. In every other phase,
one more client sends long prompts one after another, every other prompt steered. The waits of
steered and unsteered requests are reported apart.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from pydantic import JsonValue

from server.cli.bench_client import BenchClient, Stream
from server.cli.bench_stats import Percentiles

Phase: TypeAlias = Literal["decodes only", "with long prompts"]
Prompt: TypeAlias = Literal["short", "long"]
PHASES: Final[tuple[Phase, ...]] = ("decodes only", "with long prompts")
LONG_PROMPT_TOKENS_OUT: Final = 8
TURNS: Final = 2  # requests of each short client in a phase


@dataclass(frozen=True, slots=True)
class MixedLoad:
    """The amount of work of one measurement."""

    clients: int  # clients that send short prompts at once
    tokens: int  # tokens that each of their requests generates
    prompt_words: int
    long_prompt_words: int
    rounds: int  # how often both phases are measured


@dataclass(frozen=True, slots=True)
class Waits:
    """The waiting times of one group of requests, in seconds."""

    phase: Phase
    prompt: Prompt
    steered: bool
    first_token: Percentiles
    inter_token: Percentiles | None  # None if every answer came in one piece


@dataclass(frozen=True, slots=True)
class _Seen:
    phase: Phase
    prompt: Prompt
    steered: bool
    stream: Stream


async def measure_latency(
    client: BenchClient, steering: JsonValue, load: MixedLoad, advance: Callable[[], None]
) -> list[Waits]:
    """Measure the waits of each group, phases interleaved; `advance` is called after each phase.

    Raises:
        BenchError: the server refuses a request, or breaks off a stream.
    """
    seen: list[_Seen] = []
    for number in range(load.rounds + 1):
        for phase in PHASES:
            streams = await _phase(client, steering, load, phase)
            advance()
            if number:  # the first round warms up
                seen += streams
    return _grouped(seen)


def _grouped(seen: Sequence[_Seen]) -> list[Waits]:
    groups: dict[tuple[Phase, Prompt, bool], list[Stream]] = {}
    for each in seen:
        groups.setdefault((each.phase, each.prompt, each.steered), []).append(each.stream)
    return [_waits(*group, streams) for group, streams in sorted(groups.items())]


def _waits(phase: Phase, prompt: Prompt, steered: bool, streams: Sequence[Stream]) -> Waits:
    first = Percentiles.of([stream.first_token_seconds for stream in streams])
    gaps = [gap for stream in streams for gap in stream.gaps]
    return Waits(phase, prompt, steered, first, Percentiles.of(gaps) if gaps else None)


async def _phase(
    client: BenchClient, steering: JsonValue, load: MixedLoad, phase: Phase
) -> list[_Seen]:
    seen: list[_Seen] = []

    async def short(steered: bool) -> None:
        for _ in range(TURNS):
            prompt = client.prompt(load.prompt_words)
            stream = await client.stream(prompt, load.tokens, steering if steered else None)
            seen.append(_Seen(phase, "short", steered, stream))

    async def long(over: asyncio.Event) -> None:
        steered = False
        # At least one steered and one unsteered prompt, even if the short requests end sooner.
        while not (over.is_set() and len({each.steered for each in seen_long()}) == 2):
            prompt = client.prompt(load.long_prompt_words)
            wanted = steering if steered else None
            stream = await client.stream(prompt, LONG_PROMPT_TOKENS_OUT, wanted)
            seen.append(_Seen(phase, "long", steered, stream))
            steered = not steered

    def seen_long() -> list[_Seen]:
        return [each for each in seen if each.prompt == "long"]

    over = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        if phase == "with long prompts":
            group.create_task(long(over))
        async with asyncio.TaskGroup() as shorts:
            for number in range(load.clients):
                shorts.create_task(short(number % 2 == 1))
        over.set()
    return seen
