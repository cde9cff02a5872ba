"""The torch engine as the API sees it: one thread computes, and asyncio receives its outputs."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

import torch

from server.engine.errors import EngineError, QueueFullError
from server.engine.generation import DeliveredGeneration
from server.engine.grammar import CompiledGrammar
from server.engine.output import EngineStats
from server.engine.request import Request
from server.engine.request_checks import check_requests
from server.engine.text.grammar_compiler import GrammarCompiler
from server.engine.text.prompts import Prompts
from server.engine.torch.build import build_core, context_length
from server.engine.torch.core import ParametersMissingError
from server.engine.torch.loaded_interventions import Parameters
from server.engine.torch.model.loader import LoadedModel
from server.engine.torch.options import EngineOptions
from server.engine.torch.reads import SharedReads
from server.engine.torch.sampling.postprocess import Delivery
from server.engine.torch.scheduling.sequence import Sequence as EngineSequence
from server.engine.torch.thread import EngineThread, log_unread
from steering.bank import Bank
from steering.reward import RewardHead

T = TypeVar("T")
LAST_STEP_SECONDS: Final = 5.0  # how long `close` waits for the step that is running

logger = logging.getLogger(__name__)


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
        self.model = loaded.description
        self._core = build_core(loaded, options)
        self.max_model_len = context_length(loaded, options, self._core.scheduler.pool)
        self.prompts = Prompts(loaded.tokenizer, self.max_model_len, options.templates)
        self._grammars = GrammarCompiler(
            loaded.tokenizer, loaded.description.vocab_size, loaded.eos_tokens
        )
        self._thread = EngineThread(self._core, self._hand_over, self._hand_over_end)
        self._thread_ended = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._admissions: set[asyncio.Task[list[DeliveredGeneration]]] = set()
        self._generations: dict[EngineSequence, DeliveredGeneration] = {}
        self._reads = SharedReads(
            partial(_read_and_prepare, source, self._core.interventions.bank, loaded.model.device)
        )
        self._admitting = 0  # queue places of requests that are not in the scheduler's queue yet

    @property
    def ready(self) -> bool:
        """True while the engine thread runs and takes calls."""
        return self._thread.alive

    @property
    def died(self) -> bool:
        """True once an exception has ended the engine thread."""
        return self._thread.died

    def compile_grammar(
        self, lark: str, field: str, *, of_schemas: bool = False
    ) -> CompiledGrammar:
        """Compile a grammar for answers; see server.engine.base.Engine.compile_grammar."""
        return self._grammars.compile(lark, field, of_schemas=of_schemas)

    def stats(self) -> EngineStats:
        """Return the gauges and counters for the metrics page."""
        scheduler = self._core.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_cache_usage=scheduler.pool.usage,
            slots_used=self._core.interventions.slots.used,
            preemptions=scheduler.preemptions,
            prefix_cache_queries=self._core.store.prefixes.queries,
            prefix_cache_hits=self._core.store.prefixes.hits,
            compiling=self._core.compiling,
            measured_step_seconds=self._core.measured_seconds,
            measured_edit_seconds=self._core.edit_seconds,
        )

    async def start(self) -> None:
        """Start the engine thread. The self-test has passed: the constructor ran it."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> bool:
        """Stop after the current step; see server.engine.base.Engine.close."""
        self._thread.stop()
        # Requests fail before the step has ended, so that clients learn of it without waiting.
        self._end_admissions()
        self._fail_all()
        if not await self._wait_for_end():
            logger.critical("the engine is stuck in a step, for over %g s now", LAST_STEP_SECONDS)
            return False
        self._core.clear()  # its thread has ended
        return True

    async def submit(self, requests: Sequence[Request]) -> list[DeliveredGeneration]:
        """Admit requests, all or none; see server.engine.base.Engine.submit."""
        self._check(requests)
        # Requests whose interventions are being read are not in the scheduler's queue yet. They are
        # bounded here, by the number that may run or wait; the scheduler chooses which start.
        places = sum(request.queue_places for request in requests)
        if self._admitting and self._admitting + places > self._core.scheduler.capacity:
            raise QueueFullError(f"{self._admitting} requests are being admitted; try again later")
        return await self._run_admission(requests)

    async def _follow(self, leader: EngineSequence, request: Request) -> DeliveredGeneration:
        self._check([request])
        (generation,) = await self._run_admission([request], leader)
        return generation

    async def _run_admission(
        self, requests: Sequence[Request], leader: EngineSequence | None = None
    ) -> list[DeliveredGeneration]:
        # A separate task, so that the engine's end can cancel it as well as the client's.
        admission = asyncio.create_task(self._admit(requests, leader))
        self._admissions.add(admission)
        admission.add_done_callback(self._admissions.discard)
        try:
            return await admission
        except asyncio.CancelledError:
            if not _is_cancelled():
                raise self._thread.end_error from None
            # The admission may have succeeded before the cancellation reached it.
            admission.add_done_callback(_cancel_admitted)
            raise

    def _check(self, requests: Sequence[Request]) -> None:
        if not self.ready:
            raise self._thread.end_error
        slots = self._core.interventions.slots.capacity
        check_requests(requests, self.max_model_len, self.model.vocab_size, slots)

    async def _admit(
        self, requests: Sequence[Request], leader: EngineSequence | None
    ) -> list[DeliveredGeneration]:
        sequences = [EngineSequence.of(request) for request in requests]
        # Registered before the engine thread has the sequences, so that no output is lost.
        generations = [
            DeliveredGeneration(
                partial(self._cancel, each), partial(self._follow, each), each.request
            )
            for each in sequences
        ]
        self._generations.update(zip(sequences, generations, strict=True))
        places = sum(request.queue_places for request in requests) if leader is None else 0
        self._admitting += places
        try:
            await self._queue(sequences, leader)
        except BaseException:
            # If the client has left, the engine thread may still be about to queue them.
            for sequence in sequences:
                self._cancel(sequence)
            raise
        finally:
            self._admitting -= places
        return generations

    async def _queue(
        self, sequences: Sequence[EngineSequence], leader: EngineSequence | None
    ) -> None:
        """Have the engine thread queue the sequences; read the interventions that it lacks."""
        parameters: dict[str, Parameters] = {}
        with self._reads.keeping({digest for each in sequences for digest in each.digests}):
            while True:
                try:
                    admit = partial(self._core.admit, sequences, parameters, leader)
                    return await _wait_for_call(self._thread.call(admit))
                except ParametersMissingError as missing:
                    # All are kept for the next attempt, because an intervention that was loaded
                    # may have been evicted by then.
                    for digest in missing.digests:
                        parameters[digest] = await self._reads.read(digest)
                        await self._prepare(parameters[digest])

    async def _prepare(self, parameters: Parameters) -> None:
        """Have the engine thread prepare an intervention, piece by piece between steps."""
        prepare = partial(self._core.prepare, parameters)
        while not await _wait_for_call(self._thread.call_piece(prepare)):
            pass

    def _cancel(self, sequence: EngineSequence) -> None:
        self._generations.pop(sequence, None)
        self._thread.tell(partial(self._core.cancel, sequence))

    def _hand_over(self, deliveries: list[Delivery]) -> None:
        """Pass a step's outputs to the event loop in one call. Runs on the engine thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._deliver, deliveries)

    def _hand_over_end(self) -> None:
        """Tell the event loop that the engine thread ends. Runs last on the engine thread."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end)

    def _deliver(self, deliveries: list[Delivery]) -> None:
        for sequence, output in deliveries:
            if (generation := self._generations.get(sequence)) is not None:
                generation.deliver(output)
                if generation.ended:
                    del self._generations[sequence]

    def _end(self) -> None:
        self._thread_ended.set()
        self._end_admissions()
        self._fail_all()

    def _end_admissions(self) -> None:
        for admission in tuple(self._admissions):
            admission.cancel()

    async def _wait_for_end(self) -> bool:
        if self._loop is None:  # it was never started
            return True
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_STEP_SECONDS):
                await self._thread_ended.wait()
        return self._thread_ended.is_set()

    def _fail_all(self) -> None:
        while self._generations:
            _, generation = self._generations.popitem()
            generation.deliver(self._thread.end_error)


async def _wait_for_call(future: Future[T]) -> T:
    """Wait for a call on the engine thread. If cancelled, leave the call's errors to the log."""
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        future.add_done_callback(log_unread)
        raise


def _cancel_admitted(admission: asyncio.Task[list[DeliveredGeneration]]) -> None:
    if admission.cancelled():
        return
    if (error := admission.exception()) is None:
        for generation in admission.result():
            generation.cancel()
    elif not isinstance(error, EngineError):
        logger.error("an admission failed after its client had left", exc_info=error)


def _is_cancelled() -> bool:
    """Return whether the running task itself was cancelled, and not what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _read_and_prepare(
    source: Callable[[str], Parameters], bank: Bank, device: torch.device, digest: str
) -> Parameters:
    """Read an intervention, and prepare its reward head here to spare the engine thread."""
    parameters = source(digest)
    return bank.prepare(parameters, device) if isinstance(parameters, RewardHead) else parameters
