"""`steerserve evaluate`: its options, and the order in which things are checked and measured."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import JsonValue

from server.cli.progress import progress
from server.cli.registry_client import DEFAULT_URL, ApiKey, Url
from server.cli.shown_command import shown_command
from server.evaluating import EvaluationError, EvaluationInputError
from server.evaluating.client import EvaluationClient
from server.evaluating.inputs import Files, Inputs, Judging, read_inputs
from server.evaluating.outputs import STDOUT, Outputs, json_text
from server.evaluating.plan import PRESETS, PresetName
from server.evaluating.questions import ChoiceFormat
from server.evaluating.report import tables
from server.evaluating.run import Outcome
from server.evaluating.run import evaluate as measure
from server.evaluating.settings import compared
from server.evaluating.verdict import Verdict
from server.version import installed_version

_INTERRUPTED: Final = 130  # exit status after SIGINT, by the shells' convention
_FROM_PRESET: Final = "if unset, as the preset says."


def evaluate(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    model: Annotated[
        str, typer.Option(help="Model to measure; the first one served if unset.")
    ] = "",
    preset: Annotated[
        PresetName, typer.Option(help="Protocol: how continuations are sampled and judged.")
    ] = "house",
    prompts: Annotated[
        Path | None,
        typer.Option(help='Prompts to continue: JSON lines {"prompt"} (*.jsonl), or one a line.'),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help='Texts for perplexity: JSON lines {"prompt", "gold"} or {"text"} (*.jsonl), or '
            "one a line."
        ),
    ] = None,
    questions: Annotated[
        list[Path] | None,
        typer.Option(
            help='Multiple choice: JSON {"question", "choices", "answer"}, or a table as '
            "TruthfulQA.csv; may be repeated."
        ),
    ] = None,
    limit_prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts to use, from the first on.")
    ] = None,
    limit_texts: Annotated[
        int | None, typer.Option(min=1, help="Texts to use, from the first on.")
    ] = None,
    limit_questions: Annotated[
        int | None, typer.Option(min=1, help="Questions of each file to use, from the first on.")
    ] = None,
    steering: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JSON|NAME",
            help="Steering to compare with the base model, as in a request's body, or a name; may "
            "be repeated.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:SETTING=VALUES",
            help="Values of one setting to compare, as detox:strength=0,0.5,1; may be repeated.",
        ),
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="Toxicity scorer: embedded, hf:MODEL, http:URL or python:MODULE:FUNCTION; may be "
            "repeated, and the first one chooses the best trade-off.  [default: embedded]"
        ),
    ] = None,
    max_perplexity_increase: Annotated[
        float, typer.Option(min=0, help="Largest accepted cost of the best trade-off, in percent.")
    ] = 5.0,
    tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens of each continuation; {_FROM_PRESET}")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help=f"0 is greedy; {_FROM_PRESET}")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help=f"Nucleus of the sampling; {_FROM_PRESET}")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.01, max=100, help=f"1 is none; {_FROM_PRESET}")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the continuations and of the intervals.")
    ] = 0,
    gold_only: Annotated[
        bool | None,
        typer.Option(
            "--gold-only/--whole-text",
            help=f"Tokens that perplexity counts: of the gold, or of prompt and gold; "
            f"{_FROM_PRESET}",
        ),
    ] = None,
    fluency: Annotated[
        bool,
        typer.Option(help="Whether to score the continuations under the unsteered model."),
    ] = True,
    choices: Annotated[
        ChoiceFormat,
        typer.Option(help="What is scored of each choice: its text, or its letter in a list."),
    ] = "text",
    length_normalized: Annotated[
        bool, typer.Option(help="Compare choices by their log-likelihood per character.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests at once.")] = 16,
    json_: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="File for the report; - prints it instead."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Picture of toxicity against perplexity, *.svg or *.png."),
    ] = None,
    continuations: Annotated[
        Path | None,
        typer.Option(help="File for all continuations with their scores, as JSON lines."),
    ] = None,
    write_artifact: Annotated[
        Path | None,
        typer.Option(
            help="Copy of the best intervention, with the best settings as its defaults, to write."
        ),
    ] = None,
) -> None:
    """Measure what steering takes away and what it costs, on a running server.

    The base model and each steering continue the same prompts with the same seeds, and read the
    same texts and questions. Intervals are of 95 %, by a paired bootstrap. Everything goes through
    the public API, so that every engine is measured alike.
    """
    with _errors_explained():
        protocol = PRESETS[preset]
        sampling = replace(
            protocol.sampling,
            samples=samples,
            seed=seed,
            **_given(
                max_tokens=tokens,
                temperature=temperature,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
            ),
        )
        judging = Judging(
            scorer or ["embedded"],
            protocol.gold_only if gold_only is None else gold_only,
            fluency,
            choices,
            length_normalized,
        )
        outputs = Outputs(json_, picture, continuations, write_artifact)
        outputs.check(
            [path for path in (prompts, text, *(questions or ())) if path is not None],
            trade_off=prompts is not None and (text is not None or fluency),
        )
        settings = compared(steering or (), sweep or ())
        limits = (limit_prompts, limit_texts, limit_questions)
        inputs = read_inputs(Files(prompts, text, questions or (), *limits), sampling, judging)

        async def measure_and_write() -> None:
            async with EvaluationClient.connect(url, api_key, model, concurrency) as client:
                with progress() as bar:
                    outcome = await measure(client, settings, inputs, bar)
                verdict = Verdict.of(outcome.results, protocol.decides, max_perplexity_increase)
                report = _report(url, preset, inputs, outcome, verdict)
                _print(json_text(report) if json_ == STDOUT else _page(outcome, verdict, samples))
                outputs.write(report, verdict, outcome.continuations)
                await outputs.write_artifact(verdict, client.artifact)

        asyncio.run(measure_and_write())


def _given(**options: float | None) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _report(
    url: str, preset: PresetName, inputs: Inputs, outcome: Outcome, verdict: Verdict
) -> JsonValue:
    return {
        "url": url,
        "model": outcome.model,
        "command": shown_command(sys.argv[1:]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "steerserve": installed_version(),
        "preset": preset,
        "sampling": asdict(inputs.task.sampling),
        "judging": asdict(inputs.judging),
        "files": [asdict(file) for file in inputs.files],
        "settings": [result.json() for result in outcome.results],
        "best": verdict.json(),
    }


def _page(outcome: Outcome, verdict: Verdict, samples: int) -> str:
    parts = [table.page() for table in tables(outcome.results, samples)]
    return "\n".join([*parts, *verdict.sentences()]) + "\n"


def _print(text: str) -> None:
    typer.echo(text, nl=False)


@contextmanager
def _errors_explained() -> Iterator[None]:
    """Print an error as one sentence on stderr; exit with 2 if files or options are wrong.

    Ctrl-C exits with 130, as shells do.
    """
    try:
        yield
    except (EvaluationError, EvaluationInputError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, EvaluationInputError) else 1) from error
    except KeyboardInterrupt as interrupt:
        typer.echo("Interrupted: the evaluation is not finished.", err=True)
        raise typer.Exit(_INTERRUPTED) from interrupt
