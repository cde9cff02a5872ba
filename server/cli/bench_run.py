"""Runs the measurements of `steerserve bench`, and holds their results."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Final

from pydantic import JsonValue
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from server.cli.bench_client import BenchClient, BenchError, Listed
from server.cli.bench_latency import PHASES, MixedLoad, Waits, measure_latency
from server.cli.bench_load import (
    Arm,
    Load,
    Measured,
    distinct_arms,
    measure,
    steering_arms,
)
from server.cli.bench_tables import Rows, as_json, latency_rows, throughput_rows

SECTIONS: Final = ("steering", "distinct", "latency")
LONG_PROMPT_TOKENS: Final = 1000
_MAX_CLIENTS: Final = 8  # most clients that decode while long prompts come
_PROMPT_TOKENS: Final = 32
_SAMPLE_WORDS: Final = 40  # words of the prompt from which words per token are estimated


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """The sections to measure, and the amount of work in them."""

    sections: tuple[str, ...]
    batches: tuple[int, ...]
    tokens: int
    rounds: int
    long_prompt_tokens: int
    prompt_tokens: int = _PROMPT_TOKENS

    @property
    def clients(self) -> int:
        """The number of clients that decode while long prompts come, steered and unsteered."""
        return max(2, min(_MAX_CLIENTS, max(self.batches)))


@dataclass(frozen=True, slots=True)
class Report:
    """The results. A section that was not asked for is empty."""

    model: str
    plan: BenchPlan
    steering: Sequence[Measured] = ()
    distinct: Sequence[Measured] = ()
    latency_steering: JsonValue = None
    latency: Sequence[Waits] = ()

    def tables(self) -> list[Rows]:
        """Return a table for each section that is not empty."""
        tables = []
        if self.steering:
            title = "Steered ÷ unsteered throughput"
            tables.append(throughput_rows(title, "unsteered", self.steering))
        if self.distinct:
            title = "Distinct ÷ equal configurations"
            tables.append(throughput_rows(title, "equal", self.distinct))
        if self.latency:
            title = f"Latency under mixed load, steered by {label(self.latency_steering)}"
            tables.append(latency_rows(title, self.latency))
        return tables

    def json(self) -> dict[str, JsonValue]:
        """Return the results as JSON, for machines."""
        return {
            "model": self.model,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "plan": asdict(self.plan),
            "steering": as_json(self.steering),
            "distinct": as_json(self.distinct),
            "latency": {"steering": self.latency_steering, "waits": as_json(self.latency)},
        }


def run(client: BenchClient, wanted: Sequence[JsonValue] | None, plan: BenchPlan) -> Report:
    """Run all planned measurements, with a progress bar on stderr.

    Args:
        wanted: the steerings to measure; None takes the interventions that the server lists.

    Raises:
        BenchError: the server cannot be reached, or refuses a request.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    problems: list[BenchError] = []
    with Progress(*columns, console=Console(stderr=True)) as bar:
        try:
            return asyncio.run(_run(client, wanted, plan, bar))
        except* BenchError as group:  # every request that runs at once may fail
            problems += _leaves(group)
    raise problems[0]


async def _run(
    client: BenchClient, wanted: Sequence[JsonValue] | None, plan: BenchPlan, bar: Progress
) -> Report:
    async with client:
        context = await client.find_model()
        listed = await client.interventions()
        steerings = _labelled(_default_steerings(listed) if wanted is None else wanted)
        per_token = _SAMPLE_WORDS / await client.count_tokens(client.prompt(_SAMPLE_WORDS))
        words = max(1, round(plan.prompt_tokens * per_token))
        load = Load(plan.tokens, words, plan.rounds)
        report = Report(client.model, plan)
        if "steering" in plan.sections:
            arms = steering_arms(steerings, plan.batches)
            report = replace(
                report, steering=await _throughput(client, arms, load, bar, "steering")
            )
        if "distinct" in plan.sections:
            arms = distinct_arms(listed, max(plan.batches))
            report = replace(
                report, distinct=await _throughput(client, arms, load, bar, "distinct")
            )
        if "latency" in plan.sections:
            # The number of tokens is estimated, and must not exceed the model's context.
            long_tokens = min(plan.long_prompt_tokens, int(0.8 * context))
            mixed = MixedLoad(
                clients=plan.clients,
                tokens=plan.tokens,
                prompt_words=words,
                long_prompt_words=max(1, round(long_tokens * per_token)),
                rounds=plan.rounds,
            )
            task = bar.add_task("latency", total=(plan.rounds + 1) * len(PHASES))
            chosen = list(steerings.values())[-1]  # by default the stack, which costs most
            waits = await measure_latency(client, chosen, mixed, lambda: bar.advance(task))
            report = replace(report, latency=waits, latency_steering=chosen)
        return report


async def _throughput(
    client: BenchClient, arms: Sequence[Arm], load: Load, bar: Progress, name: str
) -> list[Measured]:
    total = (load.rounds + 1) * sum(arm.bursts for arm in arms)
    task = bar.add_task(name, total=total)
    return await measure(client, arms, load, lambda: bar.advance(task))


def label(steering: JsonValue) -> str:
    """Describe a steering in few words: the names, each with the settings that were given."""
    if isinstance(steering, list):
        return " + ".join(label(item) for item in steering)
    if not isinstance(steering, dict):
        return json.dumps(steering)
    settings = [f"{key} {value}" for key, value in steering.items() if key != "intervention"]
    return " ".join([str(steering.get("intervention")), *settings])


def _default_steerings(listed: Sequence[Listed]) -> list[JsonValue]:
    """Return each intervention alone, and a stack of the first of each kind, affine first."""
    if not listed:
        raise BenchError(
            "The server lists no intervention that it can apply: push one, or give --steering"
        )
    alone: list[JsonValue] = [{"intervention": each.name} for each in listed]
    first: dict[str, JsonValue] = {}
    for each in listed:
        first.setdefault(each.kind, {"intervention": each.name})
    stack: JsonValue = [first[kind] for kind in sorted(first)]
    return [*alone, stack] if len(first) > 1 else alone


def _labelled(steerings: Sequence[JsonValue]) -> Mapping[str, JsonValue]:
    return {label(steering): steering for steering in steerings}


def _leaves(group: BaseExceptionGroup[BenchError]) -> list[BenchError]:
    leaves: list[BenchError] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
