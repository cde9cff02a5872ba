"""The torch engine as the API sees it: one thread computes, asyncio receives once a step."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from interventions.model import ModelDescription
from server.engine.base import (
    Edit,
    EngineDeadError,
    EngineStats,
    InvalidRequestError,
    Request,
    UnservableInterventionError,
)
from server.engine.torch.build import EngineOptions, build_core, context_length
from server.engine.torch.core import Delivery
from server.engine.torch.generation import TorchGeneration
from server.engine.torch.interventions import Parameters
from server.engine.torch.loader import LoadedModel
from server.engine.torch.scheduler import Sequence as EngineSequence
from server.engine.torch.thread import EngineThread
from steering.settings import SlottedEdit

T = TypeVar("T")


class TorchEngine:
    """Implements server.engine.base.Engine.

    `source` reads an intervention's parameters by digest; it is called off the engine thread and
    off the event loop.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        source: Callable[[str], Parameters],
        options: EngineOptions,
    ) -> None:
        self._loaded = loaded
        self._tokenizer = loaded.tokenizer.backend_tokenizer
        self._source = source
        self._core = build_core(loaded, options)
        self._max_model_len = context_length(loaded, options, self._core.scheduler.pool)
        self._thread = EngineThread(self._core, self._hand_over, self._hand_over_death)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._generations: dict[EngineSequence, TorchGeneration] = {}
        self._loading = asyncio.Lock()

    @property
    def model(self) -> ModelDescription:
        """What the loaded model is."""
        return self._loaded.description

    @property
    def max_model_len(self) -> int:
        """The longest prompt and completion together, in tokens."""
        return self._max_model_len

    @property
    def ready(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.alive

    def tokenize(self, text: str) -> list[int]:
        """The prompt's token ids, with the special tokens that the tokenizer adds."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def stats(self) -> EngineStats:
        """Gauges for the metrics page."""
        scheduler = self._core.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_cache_usage=scheduler.pool.usage,
            slots_used=self._core.interventions.slots.used,
        )

    async def start(self) -> None:
        """Start the engine thread. The model's self-test was passed when the engine was built."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Stop after the current step; what still runs is lost with EngineDeadError."""
        await asyncio.to_thread(self._thread.stop)
        self._fail_all()

    async def submit(self, request: Request) -> TorchGeneration:
        """Admit a request; see server.engine.base.Engine.submit."""
        self._check(request)
        # Shielded: a client that leaves in the middle of an admission must not leave a pin behind.
        admission = asyncio.ensure_future(self._admit(request))
        try:
            return await asyncio.shield(admission)
        except asyncio.CancelledError:
            admission.add_done_callback(_cancel_admitted)
            raise

    def _check(self, request: Request) -> None:
        if not self.ready:
            raise EngineDeadError("the engine is not running")
        length, limit = len(request.prompt), self._max_model_len
        if length == 0:
            raise InvalidRequestError("the prompt is empty", "prompt")
        if length + 1 > limit:
            raise InvalidRequestError(
                f"the prompt has {length} tokens; this model's context is {limit}, "
                "which must hold the prompt and at least one new token",
                "prompt",
                "context_length_exceeded",
            )
        if length + request.sampling.max_tokens > limit:
            raise InvalidRequestError(
                f"the prompt's {length} tokens and max_tokens {request.sampling.max_tokens} "
                f"together exceed this model's context of {limit}",
                "max_tokens",
                "context_length_exceeded",
            )
        vocabulary = self.model.vocab_size
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise InvalidRequestError(f"token ids must be in 0..{vocabulary - 1}", "prompt")

    async def _admit(self, request: Request) -> TorchGeneration:
        # Settings that do nothing are no edits: the answer is bit for bit the base model's.
        edits = [edit for edit in request.edits if not edit.settings.does_nothing]
        with ExitStack() as undo:
            slotted = []
            for edit in edits:
                slot = await self._pin(edit)
                undo.callback(self._unpin, edit.digest)
                slotted.append(SlottedEdit(slot, edit.settings))
            digests = tuple(edit.digest for edit in edits)
            sequence = EngineSequence(request, tuple(slotted), list(request.prompt), digests)
            generation = TorchGeneration(partial(self._cancel, sequence))
            self._generations[sequence] = generation
            undo.callback(self._generations.pop, sequence, None)
            await self._on_thread(partial(self._core.add, sequence))
            undo.pop_all()  # from here on the sequence's end lets go of everything
        return generation

    async def _on_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._thread.call(function))

    def _unpin(self, digest: str) -> None:
        self._thread.call(partial(self._core.interventions.unpin, digest))

    async def _pin(self, edit: Edit) -> int:
        """The slot of an edit's intervention, loaded if need be, and pinned."""
        interventions = self._core.interventions
        pin = partial(interventions.pin, edit.digest)
        slot = await self._on_thread(pin)
        if slot is not None:
            return slot
        async with self._loading:  # so that two requests do not load the same one
            slot = await self._on_thread(pin)
            if slot is not None:
                return slot
            try:
                parameters = await asyncio.to_thread(self._source, edit.digest)
            except (OSError, ValueError) as error:
                raise UnservableInterventionError(
                    f"the intervention cannot be read: {error}"
                ) from error
            install = partial(interventions.install, edit.digest, parameters)
            return await self._on_thread(install)

    def _cancel(self, sequence: EngineSequence) -> None:
        self._generations.pop(sequence, None)
        self._thread.call(partial(self._core.remove, sequence))

    def _hand_over(self, deliveries: list[Delivery]) -> None:
        """On the engine thread: pass a step's outputs to the event loop, in one call."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._deliver, deliveries)

    def _hand_over_death(self) -> None:
        """On the engine thread, at its end."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._fail_all)

    def _deliver(self, deliveries: list[Delivery]) -> None:
        for sequence, output in deliveries:
            if (generation := self._generations.get(sequence)) is not None:
                generation.deliver(output)
                if generation.ended:
                    del self._generations[sequence]

    def _fail_all(self) -> None:
        while self._generations:
            _, generation = self._generations.popitem()
            generation.deliver(EngineDeadError("the engine has stopped"))


def _cancel_admitted(admission: asyncio.Task[TorchGeneration]) -> None:
    if not admission.cancelled() and admission.exception() is None:
        admission.result().cancel()
