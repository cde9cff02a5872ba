"""Sequences that decode together in an engine, and how long a step of theirs takes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch

from benchmarks.gpu.model import random_llama, sites_of
from benchmarks.gpu.place import Place
from benchmarks.random_edits import permuted_head, random_head, random_maps
from server.engine.base import Edit, EngineError, Request, SamplingSettings
from server.engine.torch.build import build_core
from server.engine.torch.core import EngineCore
from server.engine.torch.loaded_interventions import Parameters
from server.engine.torch.model.loader import LoadedModel
from server.engine.torch.options import EngineOptions
from server.engine.torch.scheduling.sequence import Sequence as EngineSequence
from steering.settings import AffineSettings, RewardSettings

LINEAS: Final = AffineSettings(1.0)
ARGRE: Final = RewardSettings(eta=0.5, iterations=5, direction_scale=1.0)
_WARM_STEPS: Final = 8
_MOST_STEPS: Final = 4096  # to read the longest batch of prompts

Stack: TypeAlias = tuple[Edit, ...]


class DecodingError(Exception):
    """A sequence was lost, or a step did not advance all of them."""


@dataclass(frozen=True, slots=True)
class Bench:
    """An engine on a random model, with random interventions by digest."""

    loaded: LoadedModel
    core: EngineCore
    parameters: Mapping[str, Parameters]

    @classmethod
    def open(cls, place: Place, cuda_graphs: bool) -> "Bench":
        """An engine with the defaults of `steerserve serve`, for the largest batch."""
        loaded = random_llama(place.config, place.device)
        options = EngineOptions(
            max_batch_size=max(place.batches),
            # Prompts that are known would not be read.
            prefix_cache=False,
            cuda_graphs=cuda_graphs,
        )
        core = build_core(loaded, options)
        sites, head = sites_of(loaded), random_head(loaded, 0)
        parameters: dict[str, Parameters] = {}
        for number in range(place.distinct):
            parameters[f"lineas {number}"] = random_maps(loaded, sites, number)
        for number in range(place.distinct):
            parameters[f"argre {number}"] = permuted_head(head, number)
        return cls(loaded, core, parameters)


def stack(name: str, number: int = 0) -> Stack:
    """The edits of an arm: none, LinEAS, ARGRE, or both."""
    lineas, argre = Edit(f"lineas {number}", LINEAS), Edit(f"argre {number}", ARGRE)
    return {"none": (), "LinEAS": (lineas,), "ARGRE": (argre,), "both": (lineas, argre)}[name]


@contextmanager
def decoding(
    bench: Bench, stacks: Sequence[Stack], place: Place
) -> Iterator[Callable[[int], None]]:
    """Within the context, a sequence with each of some stacks decodes; yields what takes steps.

    Graphs that steps of this kind could use are made before.

    Raises:
        DecodingError: a sequence was lost.
    """
    core = bench.core
    sequences = [
        _sequence(bench, place.prompt_tokens, edits, row) for row, edits in enumerate(stacks)
    ]
    core.admit(sequences, bench.parameters)
    try:
        _read_prompts(core, sequences)
        _take(core, 1)
        while core.make_pending():
            pass
        _take(core, _WARM_STEPS)
        yield lambda steps: _take_all(core, steps, len(sequences))
    finally:
        for sequence in sequences:
            core.remove(sequence)


@torch.inference_mode()
def step_seconds(bench: Bench, stacks: Sequence[Stack], place: Place) -> float:
    """The seconds of a step in which a sequence with each of some stacks decodes.

    Raises:
        DecodingError: a sequence was lost.
    """
    with decoding(bench, stacks, place) as take:
        place.synchronize()
        began = time.perf_counter()
        take(place.steps)
        place.synchronize()
        return (time.perf_counter() - began) / place.steps


@torch.inference_mode()
def first_token_seconds(bench: Bench, edits: Stack, place: Place) -> float:
    """Seconds from the admission of a long prompt to its first token, once all is warm."""
    seconds = 0.0
    for turn in range(2):
        sequence = _sequence(bench, place.long_prompt_tokens, edits, turn)
        place.synchronize()
        began = time.perf_counter()
        bench.core.admit([sequence], bench.parameters)
        _read_prompts(bench.core, [sequence])
        seconds = time.perf_counter() - began
        bench.core.remove(sequence)
    return seconds


def _sequence(bench: Bench, prompt_tokens: int, edits: Stack, seed: int) -> EngineSequence:
    """A request that goes on for as long as the model has positions."""
    random = torch.Generator().manual_seed(seed)
    description, config = bench.loaded.description, bench.loaded.model.config.get_text_config()
    prompt = torch.randint(description.vocab_size, (prompt_tokens,), generator=random).tolist()
    longest: int = config.max_position_embeddings
    sampling = SamplingSettings(longest - prompt_tokens, temperature=0, ignore_eos=True)
    return EngineSequence.of(Request("check", tuple(prompt), sampling, edits))


def _read_prompts(core: EngineCore, sequences: Sequence[EngineSequence]) -> None:
    waiting = set(sequences)
    for _ in range(_MOST_STEPS):
        waiting -= set(_take(core, 1))
        if not waiting:
            return
    raise DecodingError(f"{len(waiting)} prompts were not read in {_MOST_STEPS} steps")


def _take(core: EngineCore, steps: int) -> list[EngineSequence]:
    """Take some steps; the sequences that the last one advanced."""
    advanced: list[EngineSequence] = []
    for _ in range(steps):
        advanced = []
        for sequence, output in core.step():
            if isinstance(output, EngineError):
                raise DecodingError(f"a sequence was lost: {output}")
            advanced.append(sequence)
    return advanced


def _take_all(core: EngineCore, steps: int, sequences: int) -> None:
    """Take some steps, each of which advances all sequences."""
    for _ in range(steps):
        if (advanced := len(_take(core, 1))) != sequences:
            raise DecodingError(f"a step advanced {advanced} of {sequences} sequences")
