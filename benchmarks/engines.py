"""(c) Our engine beside the others, each in a process of its own, in turns."""

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import JsonValue
from rich.progress import Progress, TaskID
from transformers import AutoTokenizer

from benchmarks.models import default_dtype, model_folder
from benchmarks.options import Options
from benchmarks.processes import ROOT, Worker
from benchmarks.report import Section
from server.cli.bench_stats import Spread
from server.cli.bench_tables import Rows

OURS = "steerserve"
GENERATE = "transformers generate, static batch"
CONTINUOUS = "transformers continuous batching"
VLLM = "vLLM"
# GiB for keys and values: more than this load fills. By default it takes 92 % of the machine's
# memory, and does not start where others have some.
VLLM_MEMORY = "VLLM_CPU_KVCACHE_SPACE=4"
PEERS = (GENERATE, CONTINUOUS, VLLM)


@dataclass(frozen=True, slots=True)
class EngineMeasured:
    """One engine at one batch. `agreement` is how many new tokens equal `generate`'s, a median."""

    engine: str
    batch: int
    tokens_per_second: Spread
    agreement: float


def measure_engines(options: Options, bar: Progress) -> Section:
    """Each engine at each batch; those that were not told how to start are shown as not run.

    Raises:
        BenchmarkError: an engine did not start, or did not do its work.
    """
    folder = model_folder(options.model)
    dtype = default_dtype(folder)
    commands = _commands(folder, dtype, options.vllm_python)
    turns = options.fewer_rounds
    with ExitStack() as stack:
        logs = Path(tempfile.mkdtemp(prefix="steerserve-benchmarks-"))
        starting = bar.add_task("starting engines", total=len(commands))
        workers = []
        for name, command in commands.items():
            workers.append(stack.enter_context(Worker(name, command, logs)))
            bar.advance(starting)
        task = bar.add_task("engines", total=len(options.batches) * (turns + 1) * len(workers))
        outcome = []
        for batch in options.batches:
            prompts = [_prompts(folder, batch, options, turn) for turn in range(turns + 1)]
            outcome += _take_turns(workers, prompts, options.new_tokens, bar, task)
        versions = {name: text for worker in workers for name, text in worker.info.items()}
    return Section(
        "engines",
        "Engines side by side",
        f"{options.model}, greedy, end-of-text ignored: each request has {options.prompt_tokens} "
        f"prompt tokens of real text and {options.new_tokens} new ones; all of a batch come at "
        f"once. {turns} turns each, in turns, the others stopped meanwhile; other prompts in each "
        "turn, the same for all. New tokens over all the time that a batch takes, its prompts "
        "included.",
        dtype,
        [_speeds(outcome, options), _ratios(outcome, options), _agreements(outcome, options)],
        {"engines": [asdict(each) for each in outcome], "not_run": _not_run(options)},
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
        commands[VLLM] = ["env", VLLM_MEMORY, *command]
    return commands


def _prompts(folder: Path, batch: int, options: Options, turn: int) -> list[list[int]]:
    """Stretches of real text from places that no other prompt begins at."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens: list[int] = tokenizer((ROOT / "LICENSE").read_text())["input_ids"]
    length = options.prompt_tokens
    places = [(turn * 997 + row * 61) % (len(tokens) - length) for row in range(batch)]
    return [tokens[place : place + length] for place in places]


def _take_turns(
    workers: Sequence[Worker],
    prompts: Sequence[list[list[int]]],
    new_tokens: int,
    bar: Progress,
    task: TaskID,
) -> list[EngineMeasured]:
    """One batch size; the first of the prompts warms up."""
    speeds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    agreements: dict[str, list[float]] = {worker.name: [] for worker in workers}
    batch = len(prompts[0])
    for turn, texts in enumerate(prompts):
        answers = {}
        for worker in workers[:: 1 if turn % 2 else -1]:
            answers[worker.name] = worker.generate(texts, new_tokens)
            bar.advance(task)
        if not turn:
            continue
        reference = answers[GENERATE].tokens
        for name, answer in answers.items():
            speeds[name].append(batch * new_tokens / answer.seconds)
            agreements[name] += map(_equal_tokens, reference, answer.tokens)
    return [
        EngineMeasured(name, batch, Spread.of(values), statistics.median(agreements[name]))
        for name, values in speeds.items()
    ]


def _equal_tokens(reference: Sequence[int], tokens: Sequence[int]) -> float:
    """How many tokens are equal before the first that is not."""
    pairs = zip(reference, tokens, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(reference))


def _speeds(outcome: Sequence[EngineMeasured], options: Options) -> Rows:
    def cell(each: EngineMeasured) -> str:
        return each.tokens_per_second.shown(1)

    cells = _cells(outcome, options, (OURS, *PEERS), cell)
    return Rows("New tokens a second [quartiles], by batch.", _columns(options), cells)


def _ratios(outcome: Sequence[EngineMeasured], options: Options) -> Rows:
    ours = {each.batch: each for each in outcome if each.engine == OURS}

    def cell(each: EngineMeasured) -> str:
        return f"{ours[each.batch].tokens_per_second.median / each.tokens_per_second.median:.2f}"

    return Rows(
        "Ours ÷ the other, by batch, of medians. Targets: ≥ 1.0 of vLLM, ≥ 2.5 of continuous "
        "batching.",
        _columns(options),
        _cells(outcome, options, PEERS, cell),
    )


def _agreements(outcome: Sequence[EngineMeasured], options: Options) -> Rows:
    def cell(each: EngineMeasured) -> str:
        return f"{each.agreement:g}"

    return Rows(
        f"Of {options.new_tokens} new tokens, how many equal `generate`'s before the first that "
        "does not (a median over requests): that all engines do the same work. In bfloat16 near "
        "ties fall either way.",
        _columns(options),
        _cells(outcome, options, (OURS, *PEERS), cell),
    )


def _columns(options: Options) -> tuple[str, ...]:
    return ("engine", *(str(batch) for batch in options.batches))


def _cells(
    outcome: Sequence[EngineMeasured],
    options: Options,
    engines: Sequence[str],
    cell: Callable[[EngineMeasured], str],
) -> tuple[tuple[str, ...], ...]:
    by_place = {(each.engine, each.batch): cell(each) for each in outcome}
    return tuple(
        (name, *(by_place.get((name, batch), "not run") for batch in options.batches))
        for name in engines
    )


def _not_run(options: Options) -> JsonValue:
    return [] if options.vllm_python is not None else [VLLM]
