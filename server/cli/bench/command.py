"""The options of `steerserve bench`, and what it prints."""

import json
import sys
from typing import Annotated

import typer
from pydantic import JsonValue

from server.cli.bench.client import BenchError
from server.cli.bench.plan import LONG_PROMPT_TOKENS, SECTIONS, BenchPlan
from server.cli.bench.run import run
from server.cli.registry_client import DEFAULT_URL, ApiKey, AsJson, Url
from server.cli.shown_command import shown_command
from server.strict_json import parse_json


def bench(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    model: Annotated[
        str, typer.Option(help="Model to measure; the first one served if unset.")
    ] = "",
    steering: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JSON",
            help="Steering to measure, as in a request's body; may be repeated. If unset: each "
            "listed intervention, and the first of each kind stacked.",
        ),
    ] = None,
    only: Annotated[
        str, typer.Option(help="Sections to run, separated by commas.", show_default=True)
    ] = ",".join(SECTIONS),
    batches: Annotated[
        str,
        typer.Option(
            help="Requests at once, separated by commas; the section distinct uses the largest."
        ),
    ] = "1,8,32",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that each request generates.")] = 64,
    rounds: Annotated[
        int, typer.Option(min=1, help="Measurements of each pair, after one to warm up.")
    ] = 5,
    long_prompt: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens of the long prompts; fewer if the model's context is shorter."
        ),
    ] = LONG_PROMPT_TOKENS,
    as_json_: AsJson = False,
) -> None:
    """Measure what steering costs on a running server, side by side.

    Steered and unsteered requests alternate, so that a change in the machine's speed favours
    neither; medians are compared, and quartiles are shown. steering: the throughput of each
    steering against none. distinct: the throughput of requests with distinct settings against equal
    ones. latency: how long clients wait for tokens while others send long prompts. Nothing else
    should use the server meanwhile.
    """
    plan = BenchPlan(_sections(only), _batches(batches), tokens, rounds, long_prompt)
    steerings = None if steering is None else [_parsed(text) for text in steering]
    try:
        report = run(url, plan, api_key, model, steerings)
    except BenchError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json_:
        shown = {"url": url, "command": shown_command(sys.argv[1:]), **report.json()}
        typer.echo(json.dumps(shown, indent=2, ensure_ascii=False))
        return
    for table in report.tables():
        typer.echo(table.page())


def _parsed(text: str) -> JsonValue:
    try:
        steering = parse_json(text)
    except ValueError as error:
        raise typer.BadParameter(f"--steering is not JSON: {error}") from error
    if not isinstance(steering, dict | list) or not steering:
        raise typer.BadParameter('--steering is an object as {"intervention": NAME}, or a list')
    return steering


def _sections(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := [name for name in chosen if name not in SECTIONS]:
        raise typer.BadParameter(f"--only knows {', '.join(SECTIONS)}, not {unknown[0]!r}")
    return chosen


def _batches(text: str) -> tuple[int, ...]:
    try:
        batches = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter("--batches are numbers, as 1,8,32") from error
    if min(batches) < 1:
        raise typer.BadParameter("--batches start at 1")
    return batches
