"""Decodes batches in an engine of this process, and times their steps.

`benchmarks.gpu` runs this on a machine without pydantic, so nothing here may import that.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, TypeAlias

import torch

from benchmarks.random_edits import permuted_head, random_head, random_maps
from server.engine.errors import EngineError
from server.engine.request import Edit, Request, SamplingSettings
from server.engine.torch.attention.slab import KVShape
from server.engine.torch.attention.slab_attention import SlabMemory
from server.engine.torch.build import build_core
from server.engine.torch.core import EngineCore
from server.engine.torch.loaded_interventions import Parameters
from server.engine.torch.model.loader import LoadedModel
from server.engine.torch.options import EngineOptions
from server.engine.torch.scheduling.sequence import Sequence as EngineSequence
from steering.affine import AffineMap
from steering.reward import RewardHead
from steering.settings import AffineSettings, RewardSettings
from steering.sites import default_sites, match_sites

ETA: Final = 0.5
ITERATIONS: Final = 5
_POLL_SECONDS: Final = 0.1

Edits: TypeAlias = tuple[Edit, ...]
BatchEdits: TypeAlias = Sequence[Edits]
"""The edits of each sequence of a batch."""


class BenchmarkError(Exception):
    """Something could not be measured; the message is a sentence that says why."""


class BenchEngine:
    """An engine, with the interventions that are measured on it.

    Number 0 of the maps and of the heads is the one that was given; all others are random.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: EngineOptions,
        maps: Mapping[str, AffineMap] | None = None,
        head: RewardHead | None = None,
    ) -> None:
        """`maps` and `head` belong to the model; they are random if they are None."""
        pattern = default_sites(type(loaded.model).__name__)
        self.sites = match_sites(pattern, loaded.description.site_widths)
        self.loaded = loaded
        self.core: EngineCore = build_core(loaded, options)
        self.head = random_head(loaded.description.head_width, 0) if head is None else head
        self.parameters: dict[str, Parameters] = {"argre 0": self.head}  # by digest
        if maps is not None:
            self.parameters["lineas 0"] = maps

    @property
    def dtype(self) -> str:
        """The name of the model's dtype."""
        return str(self.loaded.model.dtype).removeprefix("torch.")

    def lineas(
        self,
        number: int = 0,
        strength: float = 1.0,
        sites: int | None = None,
        gated: bool = False,
    ) -> Edit:
        """Return an edit by one of many distinct affine maps, at the first `sites` default sites.

        Args:
            sites: None takes all default sites.
            gated: whether each map has a gate.
        """
        digest = f"{'gated' if gated else 'lineas'} {number}"
        digest += "" if sites is None else f" at {sites} sites"
        if digest not in self.parameters:
            widths = self.loaded.description.site_widths
            chosen = {site: widths[site] for site in self.sites[:sites]}
            self.parameters[digest] = random_maps(chosen, number, gated)
        return Edit(digest, AffineSettings(strength))

    def argre(self, number: int = 0, eta: float = ETA) -> Edit:
        """Return an edit by one of many reward heads, equal but for the order of their units."""
        digest = f"argre {number}"
        if digest not in self.parameters:
            self.parameters[digest] = permuted_head(self.head, number)
        return Edit(digest, RewardSettings(eta, ITERATIONS))

    def reach_full_speed(self) -> None:
        """Wait until all that makes steps faster has been compiled."""
        while self.core.compiling:
            if not self.core.make_pending():
                time.sleep(_POLL_SECONDS)


class Trial:
    """Sequences that decode together, while those of other trials wait."""

    def __init__(self, engine: BenchEngine, sequences: list[EngineSequence]) -> None:
        self.prompt_steps = 0  # that it took to read all prompts
        self._core = engine.core
        self._sequences = sequences
        self._running: list[EngineSequence] = []  # the sequences, as the scheduler has them
        self._steered_steps = 0  # as the engine counts them: it measures the dose in some

    def read_prompts(self) -> None:
        """Compute steps until every sequence has its first token."""
        waiting = set(self._sequences)
        with self._scheduled():
            while waiting:
                advanced = self._step()
                if not advanced and not self._core.has_work:
                    raise BenchmarkError(f"{len(waiting)} prompts were not read")
                waiting -= set(advanced)
                self.prompt_steps += 1

    def seconds(self, steps: int) -> float:
        """Return the seconds that some steps take, each of which advances all sequences.

        Raises:
            BenchmarkError: a sequence was lost, or did not advance.
        """
        with self._scheduled():
            synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                if (advanced := len(self._step())) != len(self._sequences):
                    raise BenchmarkError(
                        f"a step advanced {advanced} of {len(self._sequences)} sequences"
                    )
            synchronize()
            return time.perf_counter() - began

    def end(self) -> None:
        """Free what the sequences hold."""
        with self._scheduled():
            for sequence in self._sequences:
                self._core.remove(sequence)

    @contextmanager
    def _scheduled(self) -> Iterator[None]:
        scheduler = self._core.scheduler
        scheduler.running, self._core.steered_steps = self._running, self._steered_steps
        try:
            yield
        finally:
            self._running, self._steered_steps = scheduler.running, self._core.steered_steps
            scheduler.running = []

    def _step(self) -> list[EngineSequence]:
        """Compute a step; return the sequences that it advanced."""
        outputs = self._core.step()
        for _, output in outputs:
            if isinstance(output, EngineError):
                raise BenchmarkError(f"a sequence was lost: {output}")
        return [sequence for sequence, _ in outputs]


@contextmanager
def decoding(
    engine: BenchEngine, batch: BatchEdits, prompt_tokens: int, new_tokens: int
) -> Iterator[Trial]:
    """Yield a trial whose sequences have read random prompts, and remove them at the end.

    Raises:
        BenchmarkError: a sequence was lost.
    """
    sampling = SamplingSettings(new_tokens, temperature=0, ignore_eos=True)
    vocabulary = engine.loaded.description.vocab_size
    sequences = [
        EngineSequence.of(
            Request("bench", _random_tokens(row, prompt_tokens, vocabulary), sampling, edits)
        )
        for row, edits in enumerate(batch)
    ]
    store = engine.core.store
    if isinstance(store.memory, SlabMemory):
        # A trial has slabs of its own. Between those of other trials they would not be
        # neighbors, and attention would take more than one call.
        store.memory = SlabMemory(KVShape.of(engine.loaded.model))
    trial = Trial(engine, sequences)
    with torch.inference_mode():
        engine.core.admit(sequences, engine.parameters)
        try:
            trial.read_prompts()
            yield trial
        finally:
            trial.end()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _random_tokens(seed: int, count: int, vocabulary: int) -> tuple[int, ...]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(vocabulary, (count,), generator=random).tolist())
