"""The engine of a check: a random Llama that decodes, steered or not."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from benchmarks.decoding import BatchEdits, BenchEngine, Edits, Trial, decoding, synchronize
from benchmarks.gpu.model import random_llama
from benchmarks.gpu.place import Place
from server.engine.torch.core import EngineCore
from server.engine.torch.cuda.graphs import GraphRunner
from server.engine.torch.options import EngineOptions

_WARM_STEPS: Final = 8


def options_of(place: Place, cuda_graphs: bool) -> EngineOptions:
    """Return the defaults of `steerserve serve`, for the largest batch.

    A prompt that the prefix cache has would not be read.
    """
    return EngineOptions(
        max_batch_size=max(place.batches), prefix_cache=False, cuda_graphs=cuda_graphs
    )


def open_engine(place: Place, cuda_graphs: bool) -> BenchEngine:
    """Return an engine that runs a random model, with random interventions."""
    loaded = random_llama(place.config, place.device)
    return BenchEngine(loaded, options_of(place, cuda_graphs))


def steerings(engine: BenchEngine, number: int = 0) -> dict[str, Edits]:
    """Return the edits that are compared, by name; each number has distinct ones."""
    lineas, argre = engine.lineas(number), engine.argre(number)
    return {"none": (), "LinEAS": (lineas,), "ARGRE": (argre,), "both": (lineas, argre)}


@contextmanager
def begin(engine: BenchEngine, batch: BatchEdits, place: Place) -> Iterator[Trial]:
    """Yield a trial that has taken some steps, once the graphs that it can use are made.

    Raises:
        BenchmarkError: a sequence was lost.
    """
    with _decoding(engine, batch, place, place.prompt_tokens) as trial:
        trial.seconds(1)
        while engine.core.make_pending():
            pass
        trial.seconds(_WARM_STEPS)
        yield trial


def first_token_seconds(engine: BenchEngine, edits: Edits, place: Place) -> float:
    """Return the seconds from the admission of a long prompt to its first token, the second time.

    Raises:
        BenchmarkError: the sequence was lost.
    """
    seconds = 0.0
    for _ in range(2):
        synchronize()
        began = time.perf_counter()
        with _decoding(engine, [edits], place, place.long_prompt_tokens):
            seconds = time.perf_counter() - began
    return seconds


def _decoding(
    engine: BenchEngine, batch: BatchEdits, place: Place, prompt_tokens: int
) -> AbstractContextManager[Trial]:
    # The sequences go on for as long as the model has positions.
    longest = place.config.max_position_embeddings - prompt_tokens
    return decoding(engine, batch, prompt_tokens, longest)


def attention_of(core: EngineCore) -> str:
    """Return the form of the memory that keys and values are kept in: slab or paged."""
    return type(core.store.memory).__name__.removesuffix("Memory").lower()


def graphs_of(core: EngineCore) -> int | None:
    """Return the number of an engine's graphs, or None if it uses none."""
    runner = core._runner
    return runner.graphs if isinstance(runner, GraphRunner) else None
