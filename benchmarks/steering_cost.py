"""What steering costs: steered over unsteered decode speed, side by side, in one run.

Rounds of each variant are interleaved (A B C A B C ...) and the medians of each variant's steps are
compared, so that a machine that slows down slows down all of them.

    python -m benchmarks.steering_cost --out benchmarks/results/steering_cost.md
"""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.report import write_report
from interventions.artifact import read_artifact
from interventions.bundled import bundled_artifacts
from server.engine.base import Edit, Request, SamplingSettings
from server.engine.torch.build import EngineOptions, build_core
from server.engine.torch.core import EngineCore
from server.engine.torch.interventions import Parameters
from server.engine.torch.loader import load_model
from server.engine.torch.sequence import Sequence
from steering.settings import AffineSettings, RewardSettings

BATCHES = (1, 8, 32)
PROMPT_TOKENS = 32
LINEAS = AffineSettings(1.0)
ARGRE = RewardSettings(eta=0.5, iterations=5, direction_scale=1.0)

Stacks = Mapping[str, tuple[Edit, ...]]


def load() -> tuple[EngineCore, Mapping[str, Parameters], Stacks, str]:
    """The engine on the embedded model, the interventions, the stacks to compare, the dtype."""
    loaded = load_model("embedded")
    core = build_core(loaded, EngineOptions())
    artifacts = [read_artifact(path) for path in bundled_artifacts()]
    digests = {artifact.manifest.kind: artifact.digest for artifact in artifacts}
    lineas = Edit(digests["affine"], LINEAS)
    argre = Edit(digests["reward"], ARGRE)
    stacks = {
        "unsteered": (),
        "LinEAS": (lineas,),
        "ARGRE, 5 iterations": (argre,),
        "both": (lineas, argre),
    }
    parameters = {artifact.digest: artifact.parameters for artifact in artifacts}
    return core, parameters, stacks, str(loaded.model.dtype).removeprefix("torch.")


def decode_steps(
    core: EngineCore,
    parameters: Mapping[str, Parameters],
    edits: tuple[Edit, ...],
    batch: int,
    steps: int,
) -> list[float]:
    """Seconds of each decode step of a full batch, end-of-text ignored."""
    sampling = SamplingSettings(steps + 1, temperature=0, ignore_eos=True)
    prompts = [tuple(range(100 + row, 100 + row + PROMPT_TOKENS)) for row in range(batch)]
    sequences = [Sequence.of(Request("bench", prompt, sampling, edits)) for prompt in prompts]
    core.admit(sequences, parameters)
    while any(sequence.pending != 1 for sequence in sequences):
        core.step()
    seconds = []
    while core.has_work:
        start = time.perf_counter()
        advanced = len(core.step())
        if advanced == batch:
            seconds.append(time.perf_counter() - start)
    return seconds


def measure(
    core: EngineCore,
    parameters: Mapping[str, Parameters],
    stacks: Stacks,
    rounds: int,
    steps: int,
) -> dict[int, dict[str, float]]:
    """Median seconds of a decode step, by batch and stack."""
    medians: dict[int, dict[str, float]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(BATCHES) * rounds * len(stacks))
        for batch in BATCHES:
            seconds: dict[str, list[float]] = {name: [] for name in stacks}
            for round_number in range(rounds + 1):
                for name, edits in stacks.items():
                    measured = decode_steps(
                        core, parameters, edits, batch, steps if round_number else 4
                    )
                    if round_number:  # the first round warms up
                        seconds[name] += measured
                        progress.advance(task)
            medians[batch] = {name: statistics.median(values) for name, values in seconds.items()}
    return medians


def table(medians: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Markdown: tokens a second unsteered, then each stack as a share of it."""
    names = list(next(iter(medians.values())))
    lines = [
        "| batch | " + " | ".join(f"{name}, tokens/s | ÷ unsteered" for name in names) + " |",
        "|" + "---:|" * (1 + 2 * len(names)),
    ]
    for batch, row in medians.items():
        base = row["unsteered"]
        cells = (f"{batch / row[name]:.1f} | {base / row[name]:.3f}" for name in names)
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    return lines


def main(
    out: Annotated[Path | None, typer.Option(help="Write the Markdown here too.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of a round.")] = 32,
) -> None:
    """Measure what the bundled interventions cost on the embedded model."""
    core, parameters, stacks, dtype = load()
    with torch.inference_mode():
        medians = measure(core, parameters, stacks, rounds, steps)
    write_report(
        "What steering costs",
        "benchmarks.steering_cost",
        f"SmolLM2-135M, {dtype}, {PROMPT_TOKENS} prompt tokens, {rounds} interleaved rounds of "
        f"{steps} decode steps, medians.",
        table(medians),
        out,
    )


if __name__ == "__main__":
    typer.run(main)
