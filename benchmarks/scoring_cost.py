"""Measures what scoring toxicity costs: generation with it beside generation without it.

One server runs for each scorer, and clients load the servers in turns. Beside the embedded scorer
stands a classifier of BERT-base's size, with random weights: the heaviest that anybody would run
on the same CPU. It must fall behind rather than slow the engine.

    python -m benchmarks.scoring_cost --out benchmarks/results/scoring_cost.md
"""

import asyncio
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Annotated, Final

import psutil
import typer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.models import default_dtype, model_folder
from benchmarks.report import Section, write_section
from benchmarks.running_server import RunningServer, running_server
from server.cli.bench.client import BenchClient
from server.cli.progress import progress
from server.measuring.comparison import Throughput, turns
from server.measuring.table import Table, throughput_table

PROMPT_TOKENS: Final = 32
TOKENS: Final = (16, 24, 32, 40)  # completions end at different times
_UNSCORED: Final = "no scoring"


def save_classifier(folder: Path) -> str:
    """Save a classifier of BERT-base's size with random weights; return its `--toxicity-scorer`."""
    config = BertConfig(vocab_size=2048, id2label={0: "neutral", 1: "toxic"}, pad_token_id=0)
    classifier = BertForSequenceClassification(config)  # type: ignore[no-untyped-call]
    classifier.save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{number}": number for number in range(2, 2048)}
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")),
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=512,
    )
    tokenizer.save_pretrained(folder)
    return f"hf:{folder}"


def scorer_seconds(server: RunningServer) -> float:
    """Return the processor time that a server's scoring worker has taken, 0 if it has none."""
    times = [
        process.cpu_times()
        for process in server.process.children(recursive=True)
        if "server.toxicity.worker" in process.cmdline()
    ]
    return float(sum(each.user + each.system for each in times))


async def run_round(client: BenchClient, clients: int, requests: int) -> float:
    """Have each client send requests one after another; return the seconds until all have ended."""

    async def send(number: int) -> None:
        for turn in range(requests):
            tokens = TOKENS[(number + turn) % len(TOKENS)]
            await client.complete(client.prompt(PROMPT_TOKENS), tokens, None)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(send(number))
    return time.perf_counter() - began


async def measure(
    servers: Mapping[str, RunningServer], clients: int, requests: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of each server's rounds, and its scorer's share of the processors."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    taken: defaultdict[str, float] = defaultdict(float)
    async with AsyncExitStack() as stack:
        connected = {
            name: await stack.enter_async_context(BenchClient.connect(server.url, None, ""))
            for name, server in servers.items()
        }
        bar = stack.enter_context(progress())
        task = bar.add_task("scoring", total=(rounds + 1) * len(servers))
        for name, counts in turns(list(servers), rounds):
            before = scorer_seconds(servers[name])
            passed = await run_round(connected[name], clients, requests)
            if counts:
                seconds[name].append(passed)
                taken[name] += scorer_seconds(servers[name]) - before
            else:
                servers[name].wait_for_zero("engine_compiling")
            servers[name].wait_for_zero("toxicity_queue_depth")
            bar.advance(task)
    cores = psutil.cpu_count() or 1
    return seconds, {name: taken[name] / sum(seconds[name]) / cores for name in servers}


def main(
    out: Annotated[Path | None, typer.Option(help="The Markdown page to write.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients of each server.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a client in a round.")] = 2,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds after one to warm up.")] = 24,
) -> None:
    """Measure what scoring costs the embedded model's generation."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scorers = {
            _UNSCORED: "none",
            "embedded": "embedded",
            "classifier of BERT-base's size, same CPU": save_classifier(Path(folder)),
        }
        servers = {
            name: stack.enter_context(
                running_server("embedded", "--toxicity-scorer", scorer, "--kv-cache-gb", "1")
            )
            for name, scorer in scorers.items()
        }
        seconds, shares = asyncio.run(measure(servers, clients, requests, rounds))
        scored = {
            name: server.metric("toxicity_scoring_seconds_count")
            for name, server in servers.items()
        }
    tokens = sum(
        TOKENS[(number + turn) % len(TOKENS)]
        for number in range(clients)
        for turn in range(requests)
    )
    measured = [
        Throughput.of(name, clients, tokens, seconds[_UNSCORED], values)
        for name, values in seconds.items()
    ]
    cells = [(name, f"{shares[name]:.2%}", f"{scored[name]:.0f}") for name in scorers]
    section = Section(
        out.stem if out else "scoring_cost",
        "What scoring toxicity costs",
        f"SmolLM2-135M over HTTP: {clients} clients, each {requests} completions of "
        f"{min(TOKENS)} to {max(TOKENS)} tokens a round, {rounds} rounds in turns.",
        default_dtype(model_folder("embedded")),
        [
            throughput_table("Scored ÷ not scored.", "not scored", measured),
            Table(
                "What the scorer's process takes of all processors, and all that it has scored.",
                ("scorer", "of the processors", "completions scored"),
                cells,
            ),
        ],
        {},
    )
    write_section(section, out.parent if out else None)


if __name__ == "__main__":
    typer.run(main)
