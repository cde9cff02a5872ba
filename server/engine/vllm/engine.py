"""The engine on vLLM as the API sees it: vLLM's `AsyncLLM` in this process, workers in others."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

from interventions.model import ModelDescription
from server.config import ConfigurationError
from server.engine.errors import (
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    NoBackgroundRoomError,
    QueueFullError,
    ShuttingDownError,
    StepFailedError,
)
from server.engine.generation import DeliveredGeneration
from server.engine.grammar import CompiledGrammar
from server.engine.output import EngineStats
from server.engine.request import Request
from server.engine.request_checks import check_requests
from server.engine.text.prompts import Prompts
from server.engine.text.vocabulary import Vocabulary
from server.engine.vllm.answer import Answer
from server.engine.vllm.arguments import vllm_config
from server.engine.vllm.measurements import Measurements
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.plugin.wire import LoadedEdit
from server.engine.vllm.sampling import engine_input, sampling_params
from server.engine.vllm.self_test import SelfTest
from server.engine.vllm.served_model import ServedModel
from server.engine.vllm.slots import WorkerSlots
from server.engine.vllm.stats import CountsLogger, SchedulerCounts

LAST_STEP_SECONDS: Final = 5.0  # how long vLLM's processes may take to end before they are killed
_KILLED_SECONDS: Final = 5.0  # how long they may take to be gone then
_BACKGROUND: Final = 1  # vLLM serves requests of priority 0 first, and takes K/V from others

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Running:
    """A request from its admission to its end, and the queue places that it takes."""

    request: Request
    edits: tuple[LoadedEdit, ...] = ()
    own_places: int = 0
    followers_places: int = 0
    generation: DeliveredGeneration = field(init=False)
    task: "asyncio.Task[None]" = field(init=False)


class VllmEngine:
    """Implements server.engine.base.Engine."""

    def __init__(
        self,
        served: ServedModel,
        path: Callable[[str], Path],
        options: VllmOptions,
    ) -> None:
        """Start vLLM, which takes a minute or more. Call it in a thread without an event loop.

        Args:
            served: the model.
            path: returns the file of an artifact that is stored and checked.
            options: the operator's.

        Raises:
            ConfigurationError: vLLM refuses an option, steering does not work with it, or one of
                vLLM's processes fails.
        """
        self._served = served
        self._options = options
        self.prompts = Prompts(served.tokenizer, served.max_model_len, options.templates)
        self._vocabulary = Vocabulary(served.tokenizer.backend_tokenizer)
        self._counts = SchedulerCounts()
        self._llm = self._started_vllm()
        self._slots = WorkerSlots(served.layout.slots, self._call, path)
        self._measurements = Measurements(self._call, options.dose_interval)
        self._running: set[_Running] = set()
        self._places = 0  # queue places that are taken
        self._kept_places = 0  # those of them that are kept for followers
        self._names = itertools.count()
        self._started = False
        self._closing = False
        self._died = False

    def _started_vllm(self) -> AsyncLLM:
        config = vllm_config(self._served, self._options)
        try:
            return AsyncLLM.from_vllm_config(
                config,
                stat_loggers=[lambda _config, _index: CountsLogger(self._counts)],
                disable_log_stats=True,
            )
        except RuntimeError as error:
            raise ConfigurationError(
                f"vLLM did not start; what its processes wrote says why: {error}"
            ) from error

    @property
    def model(self) -> ModelDescription:
        """The description of the served model."""
        return self._served.description

    @property
    def dtype(self) -> str:
        """The name of the model's dtype."""
        return self._served.dtype

    @property
    def max_model_len(self) -> int:
        """The largest number of tokens that a prompt and its completion may have together."""
        return self._served.max_model_len

    @property
    def ready(self) -> bool:
        """True while vLLM runs and takes requests."""
        return self._started and not self._closing and not self.died

    @property
    def died(self) -> bool:
        """True once vLLM has ended by itself."""
        if not self._closing:
            self._died = self._died or self._llm.errored
        return self._died

    def compile_grammar(
        self, lark: str, field: str, *, of_schemas: bool = False
    ) -> CompiledGrammar:
        """Refuse a grammar: vLLM's log-probabilities would be those of the masked logits."""
        raise InvalidRequestError(
            f"The engine on vLLM does not support '{field}' yet; the embedded engine does.",
            field,
            "unsupported_parameter",
        )

    def stats(self) -> EngineStats:
        """Return the gauges and counters for the metrics page."""
        if not self._running:
            self._counts.rest()
        background = sum(running.request.background for running in self._running)
        counts = self._counts.stats(self._slots.table.used, background)
        return self._measurements.with_times(counts)

    async def start(self) -> None:
        """Run the self-test. vLLM itself was started by the constructor.

        Raises:
            ConfigurationError: an edit at a site, or before `lm_head`, does not reach the logits,
                or vLLM ends meanwhile.
        """
        test = SelfTest(self._llm, self._call, self._served.layout, self.model)
        try:
            await test.run()
        except VllmDeadError as error:
            raise ConfigurationError(
                "vLLM ended while its edits were tested; what its processes wrote says why"
            ) from error
        await self._measurements.start()
        self._started = True

    async def submit(self, requests: Sequence[Request]) -> list[DeliveredGeneration]:
        """Admit requests, all or none; see server.engine.base.Engine.submit."""
        self._check(requests)
        places = sum(request.queue_places for request in requests)
        kept = sum(request.has_follower for request in requests)
        self._check_queue(places)
        self._make_background_room(requests)
        self._places += places
        self._kept_places += kept
        try:
            admitted = await self._pinned(requests)
        except BaseException:
            self._places -= places
            self._kept_places -= kept
            raise
        for running in admitted:
            running.own_places = int(not running.request.background)
            running.followers_places = int(running.request.has_follower)
        return [self._begin(running) for running in admitted]

    def _check_queue(self, places: int) -> None:
        """Raise QueueFullError unless so many places are free.

        A queue where no others wait takes any number, since a client may ask for more at once than
        the queue holds.
        """
        waiting = self._places - self._kept_places - self._options.max_batch_size
        if waiting > 0 and waiting + self._kept_places + places > self._options.max_waiting:
            raise QueueFullError(f"{waiting} requests are waiting already; try again later")

    def _check(self, requests: Sequence[Request]) -> None:
        if not self.ready:
            raise self._end()
        served = self._served
        check_requests(
            requests, served.max_model_len, served.description.vocab_size, served.layout.slots
        )

    def _make_background_room(self, requests: Sequence[Request]) -> None:
        """Refuse background work without room, or end as much as requests need the room of."""
        going_on = [each for each in self._running if not each.task.cancelling()]
        background = [each for each in going_on if each.request.background]
        free = self._options.max_batch_size - len(going_on)
        wanted = len(requests)
        if any(request.background for request in requests) and free < wanted:
            raise NoBackgroundRoomError("there is no room for background work now")
        for running in background[: max(0, wanted - free)]:
            running.generation.deliver(
                NoBackgroundRoomError("background work was ended, as requests want its room")
            )
            running.task.cancel()

    async def _pinned(self, requests: Sequence[Request]) -> list[_Running]:
        """Load and pin the interventions of all requests, or of none."""
        admitted = []
        async with AsyncExitStack() as held:
            for request in requests:
                slots: dict[str, int] = {}
                for digest in _digests(request):
                    slots[digest] = await self._slots.pin(digest)
                    held.callback(self._slots.unpin, digest)
                edits = (
                    LoadedEdit(slots[edit.digest], edit.digest, edit.settings)
                    for edit in request.effective_edits
                )
                admitted.append(_Running(request, tuple(edits)))
            if not self.ready:  # it may have ended meanwhile
                raise self._end()
            held.pop_all()
        return admitted

    def _begin(self, running: _Running) -> DeliveredGeneration:
        running.generation = DeliveredGeneration(
            partial(self._cancel, running), partial(self._follow, running), running.request
        )
        self._running.add(running)
        running.task = asyncio.create_task(self._run(running))
        running.task.add_done_callback(partial(self._free, running))
        return running.generation

    async def _run(self, running: _Running) -> None:
        """Pass a request's outputs on, until the last one or a stop string, which aborts it."""
        try:
            await self._generate(running)
        except EngineError as error:
            running.generation.deliver(error)
        except VLLMValidationError as error:
            field_name = error.parameter or "prompt"
            running.generation.deliver(InvalidRequestError(str(error), field_name))
        except Exception:
            if self.died or self._closing:
                running.generation.deliver(self._end())
            else:
                logger.exception("a request failed in vLLM")
                running.generation.deliver(
                    StepFailedError("the engine failed while computing this request")
                )

    async def _generate(self, running: _Running) -> None:
        request, eos_tokens = running.request, self._served.eos_tokens
        answer = Answer(request, self._vocabulary, eos_tokens)
        # Each of a request's choices has a name of its own.
        name = f"{request.request_id}-{next(self._names)}"
        outputs = self._llm.generate(
            engine_input(request),
            sampling_params(request, running.edits, eos_tokens, name, self._options.runner),
            name,
            priority=_BACKGROUND if request.background else 0,
        )
        measurements = self._measurements
        try:
            with measurements.of_request(name, is_steered=bool(running.edits)):
                async with aclosing(outputs):
                    async for output in outputs:
                        for step in answer.read(output):
                            running.generation.deliver(measurements.with_doses(name, step))
                        if answer.finished:
                            return
        finally:
            # vLLM may have taken the request just when it was cancelled, and then closing `outputs`
            # does not abort it. Aborting a request that has ended does no harm.
            await self._abort(name)

    async def _abort(self, name: str) -> None:
        """Have vLLM forget a request, even if this task is cancelled meanwhile.

        Its slots are free once the task ends; vLLM would find other interventions in them.
        """
        aborting = asyncio.create_task(self._llm.abort(name))
        while not aborting.done():
            with suppress(asyncio.CancelledError):
                await asyncio.shield(aborting)

    def _free(self, running: _Running, _task: "asyncio.Task[None]") -> None:
        """Free what a request holds, but for the place of its follower. vLLM has been told."""
        self._running.discard(running)
        for digest in _digests(running.request):
            self._slots.unpin(digest)
        self._places -= running.own_places
        running.own_places = 0

    def _cancel(self, running: _Running) -> None:
        self._places -= running.followers_places
        self._kept_places -= running.followers_places
        running.followers_places = 0
        running.task.cancel()

    async def _follow(self, leader: _Running, request: Request) -> DeliveredGeneration:
        self._check([request])
        [running] = await self._pinned([request])
        running.own_places, leader.followers_places = leader.followers_places, 0
        self._kept_places -= running.own_places
        return self._begin(running)

    async def close(self) -> bool:
        """Stop vLLM; see server.engine.base.Engine.close."""
        died = self.died
        self._closing, self._died = True, died
        tasks = [running.task for running in self._running]
        for running in tuple(self._running):
            running.generation.deliver(self._end())
            running.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._measurements.close()
        if self._llm.output_handler is not None:  # it would log the end as a failure
            self._llm.output_handler.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_STEP_SECONDS + _KILLED_SECONDS):
                await asyncio.to_thread(self._llm.shutdown, LAST_STEP_SECONDS)
                return True
        logger.critical("the processes of vLLM cannot be ended")
        return False

    async def _call(self, method: str, arguments: tuple[Any, ...] = ()) -> list[Any]:
        """Call a method of every worker; return what each returns."""
        results: list[Any] = await self._llm.collective_rpc(method, args=arguments)
        return results

    def _end(self) -> EngineError:
        if self._closing and not self._died:
            return ShuttingDownError("the server is shutting down")
        return EngineDeadError("the engine has stopped")


def _digests(request: Request) -> list[str]:
    """Return the interventions that a request pins, each once, in the order of its edits."""
    return list(dict.fromkeys(edit.digest for edit in request.effective_edits))
