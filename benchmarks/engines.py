"""Measures steerserve's engine beside others, each in a process of its own, in turns."""

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.progress import Progress
from transformers import AutoTokenizer

from benchmarks.models import default_dtype, model_folder
from benchmarks.options import Options
from benchmarks.processes import ROOT, Answer, Worker
from benchmarks.report import Section
from server.measuring.comparison import Spread, turns
from server.measuring.table import Table

OURS: Final = "steerserve"
GENERATE: Final = "transformers generate, static batch"
CONTINUOUS: Final = "transformers continuous batching"
VLLM: Final = "vLLM"
# GiB for keys and values, which is more than this load fills. By default vLLM takes 92 % of the
# machine's memory, and does not start where others use the rest.
_VLLM_MEMORY: Final = "VLLM_CPU_KVCACHE_SPACE=4"


@dataclass(frozen=True, slots=True)
class EngineSpeed:
    """The speed of one engine at one batch size."""

    engine: str
    batch: int
    tokens_per_second: Spread
    agreement: float  # first new tokens that equal those of `generate`, a median over requests


def measure_engines(options: Options, bar: Progress) -> Section:
    """Measure each engine at each batch size; vLLM is shown as not run if it has no Python.

    Raises:
        BenchmarkError: an engine did not start, or did not do its work.
    """
    folder = model_folder(options.model)
    dtype = default_dtype(folder)
    commands = _commands(folder, dtype, options.vllm_python)
    rounds = options.fewer_rounds
    with ExitStack() as stack:
        logs = Path(tempfile.mkdtemp(prefix="steerserve-benchmarks-"))
        starting = bar.add_task("starting engines", total=len(commands))
        workers = []
        for name, command in commands.items():
            workers.append(stack.enter_context(Worker(name, command, logs)))
            bar.advance(starting)
        task = bar.add_task("engines", total=len(options.batches) * (rounds + 1) * len(workers))
        speeds: list[EngineSpeed] = []
        for batch in options.batches:
            prompts = [_prompts(folder, batch, options, number) for number in range(rounds + 1)]
            speeds += _take_turns(workers, prompts, options.new_tokens, lambda: bar.advance(task))
        versions = {name: text for worker in workers for name, text in worker.info.items()}
    return Section(
        "engines",
        "Engines side by side",
        f"{options.model}, greedy, end-of-text ignored: each request has {options.prompt_tokens} "
        f"prompt tokens of real text and {options.new_tokens} new ones; all of a batch come at "
        f"once. {rounds} rounds, in turns, the other engines stopped meanwhile; other prompts in "
        "each round, the same for all. New tokens over all the time that a batch takes, its "
        "prompts included.",
        dtype,
        [_table(speeds, options.new_tokens)],
        {
            "engines": [asdict(each) for each in speeds],
            "not_run": [] if VLLM in commands else [VLLM],
        },
        versions,
    )


def _commands(folder: Path, dtype: str, vllm_python: Path | None) -> dict[str, list[str]]:
    def worker(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
        return [python, "-m", f"benchmarks.workers.{module}", *arguments, str(folder), dtype]

    commands = {
        OURS: worker("steerserve_worker"),
        GENERATE: worker("transformers_worker", "generate"),
        CONTINUOUS: worker("transformers_worker", "continuous"),
    }
    if vllm_python is not None:
        # Not resolved: a virtual environment's python is a link that must be called by its name.
        command = worker("vllm_worker", python=str(vllm_python.absolute()))
        commands[VLLM] = ["env", _VLLM_MEMORY, *command]
    return commands


def _prompts(folder: Path, batch: int, options: Options, number: int) -> list[list[int]]:
    """Return stretches of real text; those of each round begin at other places."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens: list[int] = tokenizer((ROOT / "LICENSE").read_text())["input_ids"]
    length = options.prompt_tokens
    places = [(number * 997 + row * 61) % (len(tokens) - length) for row in range(batch)]
    return [tokens[place : place + length] for place in places]


def _take_turns(
    workers: Sequence[Worker],
    prompts: Sequence[list[list[int]]],
    new_tokens: int,
    advance: Callable[[], None],
) -> list[EngineSpeed]:
    """Measure one batch size, with the prompts of each round; the first round warms up."""
    answers: dict[str, list[Answer]] = {worker.name: [] for worker in workers}
    for worker, _ in turns(workers, len(prompts) - 1):
        done = answers[worker.name]
        done.append(worker.generate(prompts[len(done)], new_tokens))
        advance()
    batch = len(prompts[0])
    reference = [row for answer in answers[GENERATE][1:] for row in answer.tokens]
    measured = []
    for name, (_, *counted) in answers.items():
        speed = Spread.of([batch * new_tokens / answer.seconds for answer in counted])
        rows = [row for answer in counted for row in answer.tokens]
        agreement = statistics.median(map(_equal_tokens, reference, rows))
        measured.append(EngineSpeed(name, batch, speed, agreement))
    return measured


def _equal_tokens(reference: Sequence[int], tokens: Sequence[int]) -> float:
    """Count the tokens that are equal before the first that is not."""
    pairs = zip(reference, tokens, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(reference))


def _table(speeds: Sequence[EngineSpeed], new_tokens: int) -> Table:
    ours = {each.batch: each.tokens_per_second.median for each in speeds if each.engine == OURS}
    rows = [
        (
            each.engine,
            str(each.batch),
            each.tokens_per_second.shown(1),
            f"{ours[each.batch] / each.tokens_per_second.median:.2f}",
            f"{each.agreement:g}",
        )
        for each in speeds
    ]
    if VLLM not in {each.engine for each in speeds}:
        rows.append((VLLM, "", "not run", "", ""))
    return Table(
        "Targets for ours ÷ the other, of medians: ≥ 1.0 of vLLM, ≥ 2.5 of continuous batching. "
        f"Equal tokens are those of {new_tokens} new ones that equal `generate`'s before the first "
        "that does not (a median over requests): they show that all engines do the same work. In "
        "bfloat16 near ties fall either way.",
        ("engine", "batch", "tok/s [quartiles]", "ours ÷ it", "equal tokens"),
        rows,
    )
