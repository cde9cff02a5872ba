"""Measures how long clients wait for tokens under a mixed load, as `steerserve bench` does."""

from dataclasses import asdict

from benchmarks.models import default_dtype, model_folder
from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.running_server import running_server
from server.cli.bench.plan import BenchPlan
from server.cli.bench.run import run


def measure_latency(options: Options) -> Section:
    """Measure `steerserve serve` with its default settings, in a process of its own.

    Raises:
        BenchmarkError: the server did not start.
        BenchError: the server refused a request.
    """
    plan = BenchPlan(
        sections=("latency",),
        batches=options.batches,
        tokens=options.latency_tokens,
        rounds=options.fewer_rounds,
        long_prompt_tokens=options.long_prompt_tokens,
        prompt_tokens=options.prompt_tokens,
    )
    with running_server(options.model) as server:
        report = run(server.url, plan)
    return Section(
        "latency",
        "Waiting for tokens under mixed load",
        f"{options.model}, over HTTP: {plan.clients} clients send prompts of about "
        f"{plan.prompt_tokens} tokens, {plan.tokens} new tokens each, every other client steered. "
        f"In every other phase a prompt of about {plan.long_prompt_tokens} tokens comes as soon as "
        f"the one before it is answered, every other one steered. {plan.rounds} rounds of both "
        "phases. The clients share the machine with the server.",
        default_dtype(model_folder(options.model)),
        report.tables(),
        {"plan": asdict(plan), "latency": report.json()["latency"]},
    )
