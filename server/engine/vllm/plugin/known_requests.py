"""Remembers how each request in a worker is steered, and where in it a step is."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from server.engine.vllm.plugin.steered_model import SteeredModel, SteeringError
from server.engine.vllm.plugin.wire import Json, Steering
from steering.route import Route, Span, build_route
from steering.settings import SlottedEdit


@dataclass(frozen=True, slots=True)
class StepPart:
    """One request's consecutive tokens in a step, as vLLM counts them."""

    request_id: str
    start: int  # the first token's position in the request
    count: int
    prompt_length: int


@dataclass(slots=True)
class _Known:
    """A request, and its edits as they were when slots were last filled."""

    steering: Steering
    edits: tuple[SlottedEdit, ...]
    loads: int


@dataclass(slots=True)
class KnownRequests:
    """The requests that a worker has been given and that have not ended, preempted ones too."""

    model: SteeredModel
    _known: dict[str, _Known] = field(default_factory=dict)
    _step: tuple[StepPart, ...] = ()  # the parts of the step that is being computed

    def admit(self, request_id: str, extra_args: Mapping[str, Json] | None) -> None:
        """Take a request.

        Raises:
            WireError: it does not say how it is steered.
            SteeringError: a slot does not hold what the request was promised.
        """
        steering = Steering.from_extra_args(extra_args)
        edits = self.model.slotted(steering.edits)
        self._known[request_id] = _Known(steering, edits, self.model.loads)

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended. Harmless if it is unknown."""
        self._known.pop(request_id, None)

    def edits(self, request_id: str) -> tuple[SlottedEdit, ...]:
        """Return a request's edits, in the order in which they apply.

        Raises:
            SteeringError: a slot does not hold what the request was promised any more.
        """
        known = self._known[request_id]
        if known.loads != self.model.loads:
            known.edits = self.model.slotted(known.steering.edits)
            known.loads = self.model.loads
        return known.edits

    def begin_step(self, parts: Sequence[StepPart]) -> None:
        """Write the route of a step. Each part has one logits row, in the order of the parts."""
        self._step = tuple(parts)
        self.model.begin_step(
            [
                Span(
                    start=part.start,
                    count=part.count,
                    prompt_length=part.prompt_length,
                    rows=range(row, row + 1),
                    edits=self.edits(part.request_id),
                )
                for row, part in enumerate(self._step)
            ],
            [self._known[part.request_id].steering.name for part in self._step],
        )

    @contextmanager
    def scoring_tokens(self) -> Iterator[None]:
        """Within the context, logits rows are all tokens of the step, in chunks, in their order.

        Raises:
            SteeringError: at the end, if there were some rows, but not as many as tokens.
        """
        tokens = _ScoredTokens(
            [(part.count, self.edits(part.request_id)) for part in self._step],
        )
        with self.model.rows_by(tokens):
            yield
        tokens.check_complete()

    def generators(self, device: torch.device) -> Iterator[tuple[int, torch.Generator]]:
        """Yield the rows of the step whose request has a seed, each with its random numbers.

        A generator depends on the seed and on the position of the token that is drawn only, so
        that chunks, preemptions and other requests do not change what a seed gives.
        """
        for row, part in enumerate(self._step):
            seed = self._known[part.request_id].steering.seed
            if seed is not None:
                generator = torch.Generator(device)
                generator.manual_seed(_mixed(seed, part.start + part.count))
                yield row, generator


class _ScoredTokens:
    """Returns the routes of consecutive chunks of a step's tokens, each with a logits row."""

    def __init__(self, parts: Sequence[tuple[int, tuple[SlottedEdit, ...]]]) -> None:
        """`parts` has each request's number of tokens and its edits, in the order of the step."""
        self._parts = parts
        self._total = sum(count for count, _ in parts)
        self._done = 0

    def __call__(self, rows: int) -> tuple[Route, None]:
        """Return the next chunk's route, without a meter.

        Raises:
            SteeringError: the step does not have as many tokens.
        """
        first, self._done = self._done, self._done + rows
        if self._done > self._total:
            raise SteeringError(
                f"logits are computed of {self._done} tokens, where a step has {self._total}"
            )
        return build_route(list(self._spans(first, self._done)), torch.device("cpu")), None

    def _spans(self, first: int, end: int) -> Iterator[Span]:
        start = 0
        for count, edits in self._parts:
            own = range(max(start, first) - first, min(start + count, end) - first)
            start += count
            if own:
                yield Span(start=0, count=0, prompt_length=0, rows=own, edits=edits)

    def check_complete(self) -> None:
        """Raise SteeringError if rows of a part of the tokens were computed: of which, is unknown.

        vLLM computes none if no request wants its prompt scored.
        """
        if self._done not in (0, self._total):
            raise SteeringError(
                f"logits were computed of {self._done} tokens, where a step has {self._total}"
            )


def _mixed(seed: int, position: int) -> int:
    """Return 63 bits that depend on both numbers."""
    data = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(data, "big") >> 1
