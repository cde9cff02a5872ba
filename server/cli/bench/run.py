"""Runs the measurements of `steerserve bench`, and holds their results."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from pydantic import JsonValue
from rich.progress import Progress

from server.cli.bench.client import BenchClient, BenchError, ListedIntervention
from server.cli.bench.latency import PHASES, Waits, latency_table, measure_latency
from server.cli.bench.plan import BenchPlan
from server.cli.bench.throughput import (
    Trial,
    distinct_trials,
    measure_throughput,
    steering_trials,
)
from server.cli.progress import progress
from server.measuring.comparison import Throughput
from server.measuring.table import Table, throughput_table


@dataclass(slots=True)
class Report:
    """The results. A section that was not asked for is empty."""

    model: str
    plan: BenchPlan
    steering: Sequence[Throughput] = ()
    distinct: Sequence[Throughput] = ()
    latency_steering: JsonValue = None
    latency: Sequence[Waits] = ()

    def tables(self) -> list[Table]:
        """Return a table for each section that is not empty."""
        tables = []
        if self.steering:
            title = "Steered ÷ unsteered throughput"
            tables.append(throughput_table(title, "unsteered", self.steering))
        if self.distinct:
            title = "Distinct ÷ equal configurations"
            tables.append(throughput_table(title, "equal", self.distinct))
        if self.latency:
            title = f"Latency under mixed load, steered by {label(self.latency_steering)}"
            tables.append(latency_table(title, self.latency))
        return tables

    def json(self) -> dict[str, JsonValue]:
        """Return the results as JSON: seconds, and tokens/s."""
        return {
            "model": self.model,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "plan": asdict(self.plan),
            "steering": [asdict(each) for each in self.steering],
            "distinct": [asdict(each) for each in self.distinct],
            "latency": {
                "steering": self.latency_steering,
                "waits": [asdict(each) for each in self.latency],
            },
        }


def run(
    url: str,
    plan: BenchPlan,
    api_key: str | None = None,
    model: str = "",
    steerings: Sequence[JsonValue] | None = None,
) -> Report:
    """Run all planned measurements of a server, with a progress bar on stderr.

    Args:
        model: the name of the model to ask for; empty takes the first one that is served.
        steerings: the steerings to measure; None takes the interventions that the server lists.

    Raises:
        BenchError: the server cannot be reached, or refuses a request.
    """
    with progress() as bar:
        return asyncio.run(_run(url, plan, api_key, model, steerings, bar))


async def _run(
    url: str,
    plan: BenchPlan,
    api_key: str | None,
    model: str,
    steerings: Sequence[JsonValue] | None,
    bar: Progress,
) -> Report:
    async def throughput(name: str, trials: Sequence[Trial]) -> list[Throughput]:
        bursts = sum(len(trial.bursts) for trial in trials)
        task = bar.add_task(name, total=(plan.rounds + 1) * bursts)
        return await measure_throughput(client, trials, plan, lambda: bar.advance(task))

    async with BenchClient.connect(url, api_key, model) as client:
        listed = await client.interventions()
        chosen = _default_steerings(listed) if steerings is None else steerings
        report = Report(client.model, plan)
        if "steering" in plan.sections:
            labelled = {label(steering): steering for steering in chosen}
            trials = steering_trials(labelled, plan.batches)
            report.steering = await throughput("steering", trials)
        if "distinct" in plan.sections:
            trials = distinct_trials(listed, max(plan.batches))
            report.distinct = await throughput("distinct", trials)
        if "latency" in plan.sections:
            task = bar.add_task("latency", total=(plan.rounds + 1) * len(PHASES))
            steering = report.latency_steering = chosen[-1]  # by default the stack, the slowest
            report.latency = await measure_latency(
                client, steering, plan, lambda: bar.advance(task)
            )
        return report


def label(steering: JsonValue) -> str:
    """Describe a steering in few words: the names, each with the settings that were given."""
    if isinstance(steering, list):
        return " + ".join(label(item) for item in steering)
    if not isinstance(steering, dict):
        return json.dumps(steering)
    settings = [f"{key} {value}" for key, value in steering.items() if key != "intervention"]
    return " ".join([str(steering.get("intervention")), *settings])


def _default_steerings(listed: Sequence[ListedIntervention]) -> list[JsonValue]:
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
