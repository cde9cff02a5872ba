"""Measures what the bundled interventions do and cost, beside baselines, and makes docs/results.md.

python -m benchmarks.effect ../shared/data --work DIR
"""

import asyncio
import json
import signal
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.progress import Progress
from transformers import AutoTokenizer

from benchmarks.decoding import BenchmarkError
from benchmarks.effect.arms import BASE_ARM, bundled_goals, choices
from benchmarks.effect.baselines import fit_baselines, offered, upload
from benchmarks.effect.data import Data, read_data
from benchmarks.effect.judge import FIRST_JUDGE, SECOND_JUDGE, SecondJudge
from benchmarks.effect.measuring import HOUSE, choose, measure
from benchmarks.effect.page import Chosen, Measured, effect_section
from benchmarks.models import model_folder
from benchmarks.page import json_text, write_whole
from benchmarks.processes import ROOT
from benchmarks.report import rendered
from benchmarks.running_server import running_server
from server.cli.progress import progress
from server.evaluating import EvaluationError, EvaluationInputError
from server.evaluating.client import EvaluationClient
from server.evaluating.picture import draw
from server.evaluating.scoring import load_scorers, score_texts
from server.evaluating.tradeoff import points

_MODEL: Final = "embedded"
_CONCURRENCY: Final = 16
# Compiled layers would take over after some settings, and round differently.
_SERVER: Final = ("--dtype", "float32", "--toxicity-scorer", "none", "--no-compile-layers")


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with the prompts and texts.")],
    work: Annotated[
        Path,
        typer.Option(
            help="Folder of `python -m benchmarks.bundled_data`'s files. The baselines and the "
            "continuations, which are offensive, are written there."
        ),
    ],
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Most prompts and texts; the figures mean little then."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of results.md, results.png and effect.json; if unset, docs and "
            "benchmarks/results, and with --limit the folder of --work."
        ),
    ] = None,
) -> None:
    """Measure what the bundled interventions do and cost, beside baselines, by two judges."""
    try:
        measured = _measure(read_data(folder, limit), work.resolve())
    except (BenchmarkError, EvaluationError, EvaluationInputError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    pages = out or (work if limit else ROOT / "docs")
    figures = out or (work if limit else ROOT / "benchmarks" / "results")
    _write(measured, work, pages, figures)


def _measure(data: Data, work: Path) -> Measured:
    """Fit, serve and measure everything, the second judge tried first."""
    judge = SecondJudge.prepare()
    baselines = fit_baselines(_MODEL, work)
    with running_server(_MODEL, *_SERVER) as server, progress() as bar:
        for name, path in baselines.items():
            upload(server.url, name, path)
        return asyncio.run(_compare(server.url, data, judge, bar))


async def _compare(url: str, data: Data, judge: SecondJudge, bar: Progress) -> Measured:
    house = partial(score_texts, load_scorers(["embedded"])["embedded"], advance=_ignore)
    tokenizer = AutoTokenizer.from_pretrained(model_folder(_MODEL))
    every = choices()
    candidates = [arm for choice in every for arm in choice.candidates]
    async with EvaluationClient.connect(url, None, "", _CONCURRENCY) as client:
        choosing = await measure(
            client,
            tokenizer,
            [BASE_ARM, *candidates],
            data.choosing,
            {FIRST_JUDGE: house},
            bar,
            fluency=False,
        )
        chosen = [Chosen(choice, choose(choice, choosing)) for choice in every]
        bundled = [goal.arm for goal in bundled_goals(offered(url))]
        held_out = await measure(
            client,
            tokenizer,
            [BASE_ARM, *bundled, *(arm for each in chosen for arm in each.reported)],
            data.held_out,
            {FIRST_JUDGE: house, SECOND_JUDGE: judge.score},
            bar,
            fluency=True,
        )
    return Measured(client.model, data, choosing, chosen, held_out, judge.versions)


def _write(measured: Measured, work: Path, pages: Path, figures: Path) -> None:
    """Print the page, and write it with its picture, the figures and the continuations."""
    text, body = rendered(effect_section(measured))
    print(text)
    candidates = points(measured.held_out.results, HOUSE.decides)
    lines = [
        json.dumps(asdict(each), ensure_ascii=False) for each in measured.held_out.continuations
    ]
    write_whole(work / "continuations.jsonl", "".join(f"{line}\n" for line in lines).encode())
    write_whole(figures / "effect.json", json_text(body).encode())
    write_whole(pages / "results.png", draw(candidates, None, "png"))
    write_whole(pages / "results.md", text.encode())


def _ignore(_: int) -> None:
    """Show no progress: all is scored within a second."""


if __name__ == "__main__":
    # An exception ends the server on its way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    typer.run(main)
