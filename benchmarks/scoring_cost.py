"""What scoring toxicity costs: generation speed with it over without it, side by side, in one run.

Clients send request after request; each finished completion is offered to the scoring queue, as the
server does. Rounds of each variant are interleaved (A B C A B C ...), and medians are compared.
Beside the embedded scorer stands a classifier as large as BERT-base, with random weights, as the
heaviest that anybody would run on the same CPU: it must fall behind rather than slow the engine.

    python -m benchmarks.scoring_cost --out benchmarks/results/scoring_cost.md
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.report import write_report
from interventions.registry import Registry
from server.config import Settings
from server.engine.base import Request, SamplingSettings
from server.engine.torch.engine import TorchEngine
from server.engine.torch.model.loader import load_model
from server.engine.torch.options import EngineOptions
from server.metrics import Metrics
from server.toxicity.pace import Pace
from server.toxicity.process import ScorerProcess
from server.toxicity.queue import ScoringQueue

PROMPT_TOKENS = 32
TOKENS = (16, 24, 32, 40)  # completions end at different times
QUEUE = 256
SHARE = Settings.model_fields["toxicity_share"].default
SETTLE_SECONDS = 30.0


class Scored:
    """A scoring variant: its process, its queue and what it counts."""

    def __init__(self, engine: TorchEngine, registry: Registry, spec: str | None) -> None:
        self._process = None if spec is None else ScorerProcess(spec)
        self.metrics = Metrics(engine, registry, "bench")
        self.queue: ScoringQueue | None = None
        if self._process is not None:
            pace = Pace(SHARE, lambda: engine.stats().running > 0)
            self.queue = ScoringQueue(self._process, self.metrics, QUEUE, pace)

    def start(self) -> None:
        if self._process is not None and self.queue is not None:
            self._process.wait_ready()
            self.queue.start()

    @property
    def cpu_seconds(self) -> float:
        """Processor time that the scorer's process has taken."""
        if self._process is None:
            return 0.0
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    async def settle(self) -> None:
        """Wait until nothing is left to score, outside of what is timed."""
        end = time.monotonic() + SETTLE_SECONDS
        while self.queue is not None and self.queue.depth and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        if self.queue is not None:
            await self.queue.close()

    @property
    def scored(self) -> int:
        """Completions that have a score."""
        lines = self.metrics.render().decode().splitlines()
        name = "steerserve_toxicity_scoring_seconds_count "
        return next(int(float(line.removeprefix(name))) for line in lines if line.startswith(name))


def save_classifier(folder: Path) -> str:
    """A classifier of BERT-base's size with random weights; its spec."""
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


async def generate(engine: TorchEngine, prompt: tuple[int, ...], tokens: int) -> str:
    """One completion's text; end-of-text ignored."""
    sampling = SamplingSettings(tokens, temperature=0, ignore_eos=True)
    (generation,) = await engine.submit([Request("bench", prompt, sampling)])
    return "".join([output.text async for output in generation])


async def run_round(
    engine: TorchEngine, queue: ScoringQueue | None, clients: int, requests: int
) -> float:
    """Tokens a second over all clients."""

    async def client(number: int) -> int:
        total = 0
        for turn in range(requests):
            first = 100 + 50 * number + turn
            tokens = TOKENS[(number + turn) % len(TOKENS)]
            text = await generate(engine, tuple(range(first, first + PROMPT_TOKENS)), tokens)
            if queue is not None:
                queue.offer(text, "none", "served")
            total += tokens
        return total

    began = time.perf_counter()
    totals = await asyncio.gather(*(client(number) for number in range(clients)))
    return sum(totals) / (time.perf_counter() - began)


async def measure(
    specs: Mapping[str, str | None], clients: int, requests: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, int], str]:
    """By variant: tokens a second of each round, the scorer's share of the machine's processors
    during the rounds, completions scored; and the model's dtype."""
    loaded = load_model("embedded")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        registry = stack.enter_context(Registry(Path(folder)))
        engine = TorchEngine(loaded, lambda _: {}, EngineOptions(compile_layers=True))
        await engine.start()
        variants = {name: Scored(engine, registry, spec) for name, spec in specs.items()}
        for variant in variants.values():
            variant.start()
        speeds: dict[str, list[float]] = {name: [] for name in variants}
        taken = dict.fromkeys(variants, 0.0)
        seconds = dict.fromkeys(variants, 0.0)
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("measuring", total=rounds * len(variants))
            await run_round(engine, None, clients, 1)  # warms up
            for number in range(rounds):
                # Every other round in the opposite order: a machine that drifts favours nobody.
                for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
                    before, began = variants[name].cpu_seconds, time.perf_counter()
                    speed = await run_round(engine, variants[name].queue, clients, requests)
                    seconds[name] += time.perf_counter() - began
                    taken[name] += variants[name].cpu_seconds - before
                    speeds[name].append(speed)
                    await variants[name].settle()
                    progress.advance(task)
        scored = {name: variant.scored for name, variant in variants.items()}
        cores = psutil.cpu_count() or 1
        shares = {name: taken[name] / seconds[name] / cores for name in variants}
        for variant in variants.values():
            await variant.close()
        await engine.close()
    return speeds, shares, scored, str(loaded.model.dtype).removeprefix("torch.")


def table(
    speeds: Mapping[str, list[float]],
    shares: Mapping[str, float],
    scored: Mapping[str, int],
) -> list[str]:
    """Markdown: each variant's tokens a second, and its rounds as a share of those without.

    Beside the median ratio stands its standard error, by the spread of the rounds (1.25 that of
    the mean): the machine drifts.
    """
    base = speeds["no scoring"]
    lines = [
        "| scorer | tokens/s | ÷ no scoring | standard error | of the processors | scored |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, values in speeds.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5
        lines.append(
            f"| {name} | {statistics.median(values):.1f} | {statistics.median(ratios):.3f} "
            f"| {error:.3f} | {shares[name]:.2%} | {scored[name]} |"
        )
    return lines


def main(
    out: Annotated[Path | None, typer.Option(help="Write the Markdown here too.")] = None,
    clients: Annotated[int, typer.Option(min=1)] = 16,
    requests: Annotated[int, typer.Option(min=1, help="Of each client in a round.")] = 2,
    rounds: Annotated[int, typer.Option(min=2)] = 24,
) -> None:
    """Measure what scoring costs the embedded model's generation."""
    with tempfile.TemporaryDirectory() as folder:
        specs = {
            "no scoring": None,
            "embedded": "embedded",
            "classifier of BERT-base's size, same CPU": save_classifier(Path(folder)),
        }
        speeds, shares, scored, dtype = asyncio.run(measure(specs, clients, requests, rounds))
    write_report(
        "What scoring toxicity costs",
        "benchmarks.scoring_cost",
        f"SmolLM2-135M, {dtype}: {clients} clients, each {requests} completions of {min(TOKENS)} "
        f"to {max(TOKENS)} tokens a round, {rounds} interleaved rounds (so "
        f"{clients * requests * rounds} completions each); medians of the rounds, and "
        "of their ratios to the round without scoring beside them.",
        table(speeds, shares, scored),
        out,
    )


if __name__ == "__main__":
    typer.run(main)
