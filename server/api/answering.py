"""From a checked request to its answer, whole or streamed: the same for every endpoint."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from pydantic import JsonValue
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.assessment import Assessment, check_compared, check_wanted
from server.api.context import ServerContext
from server.api.errors import ApiError, invalid, shutting_down
from server.api.fields import GenerationFields, StreamOptions
from server.api.frames import Choice, Frame, Wording
from server.api.generations import GenerationGroup, closing_on_error
from server.api.model_names import split_model
from server.api.observe import record_of
from server.api.streaming import CompletionStream
from server.api.waiting import unless_client_leaves
from server.engine.base import Edit, SamplingSettings, StepOutput
from server.engine.base import Request as EngineRequest
from server.records import GenerationRecord, MessageRecord

T = TypeVar("T")
LONG_TEXT: Final = 10_000  # characters from which tokenizing is worth a thread


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """One choice: what it goes on from, how it is drawn, and how it is told."""

    prompt: tuple[int, ...]
    sampling: SamplingSettings
    choice: Choice


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request whose steering is applied, on its way to its answer."""

    _http: Request
    _context: ServerContext
    _wanted: GenerationFields
    _frame: Frame
    _edits: tuple[Edit, ...]
    _group: GenerationGroup
    _assessment: Assessment
    _record: GenerationRecord

    async def read_prompt(self, characters: int, read: Callable[[], T]) -> T:
        """Have token ids made; in a thread where that takes so long that others would wait.

        Raises:
            InvalidRequestError: the engine cannot take the prompt.
            ApiError: the deadline has passed.
            ClientGoneError: nobody waits for the answer any more.
        """
        if characters < LONG_TEXT:
            return read()
        # Cancelled in the queue it is never begun; once begun it keeps its thread to its end.
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(self._context.prompt_threads, read)
        return await unless_client_leaves(self._http.receive, self._group.in_time(reading))

    def note_prompts(self, messages: Iterable[tuple[str, str]]) -> None:
        """Keep what was asked, roles and texts, for the log; only where the operator wants it."""
        if self._context.settings.log_content:
            self._record.prompts = [MessageRecord(role, text) for role, text in messages]

    async def answer(self, plans: Sequence[ChoicePlan], prompt_tokens: int) -> Response:
        """Generate every choice; `prompt_tokens` counts each prompt once.

        Raises:
            EngineError: the engine refuses one, or lost one before the answer began.
            ApiError: the deadline has passed, or a score that was asked for cannot be had.
            ClientGoneError: nobody waits for the answer any more.
        """
        self._record.choices = len(plans)
        self._record.sampling = plans[0].sampling
        compare, receive = self._wanted.compare, self._http.receive
        if self._edits:
            plans = [replace(plan, sampling=_seeded(plan.sampling)) for plan in plans]
        requests = [self._request(index, plan, self._edits) for index, plan in enumerate(plans)]
        compared = [self._request(index, plan, ()) for index, plan in enumerate(plans) if compare]
        submission = self._group.submit(requests, prompt_tokens, compared, self._wanted.n)
        await unless_client_leaves(receive, submission)
        choices = [plan.choice for plan in plans]
        base_choices = [choice.anew() for choice in choices if compare]
        if self._wanted.stream:
            return CompletionStream(
                self._group,
                self._frame,
                choices,
                base_choices,
                options=self._wanted.stream_options or StreamOptions(),
                conclude=lambda: self._conclude(base_choices),
            )
        body = await unless_client_leaves(receive, self._collect(choices, base_choices))
        self._group.close()
        return JSONResponse(body)

    def _request(self, index: int, plan: ChoicePlan, edits: tuple[Edit, ...]) -> EngineRequest:
        return EngineRequest(f"{self._frame.id}-{index}", plan.prompt, plan.sampling, edits)

    async def _collect(
        self, choices: Sequence[Choice], base_choices: Sequence[Choice]
    ) -> dict[str, JsonValue]:
        gathered = [*choices, *base_choices]

        async def deliver(place: int, output: StepOutput) -> None:
            gathered[place].add(output)

        await self._group.run(deliver)
        further = await self._conclude(base_choices)
        bodies = [choice.body() for choice in choices]
        return self._frame.answer(bodies, self._group.usage, further)

    async def _conclude(self, base_choices: Sequence[Choice]) -> Mapping[str, JsonValue]:
        if self._context.settings.log_content:
            self._record.completions = [progress.text for progress in self._group.served]
        further = await self._group.in_time(self._assessment.conclude(self._group, base_choices))
        self._group.finished()
        return further


def _seeded(sampling: SamplingSettings) -> SamplingSettings:
    """With a seed in any case: where the base model is asked too, it is to draw the same."""
    return sampling if sampling.seed is not None else replace(sampling, seed=random.getrandbits(63))


@asynccontextmanager
async def answering(
    http: Request,
    context: ServerContext,
    wanted: GenerationFields,
    wording: Wording,
    arrived: float,
) -> AsyncIterator[Exchange]:
    """Apply a request's steering; should the block fail, everything is released.

    Args:
        arrived: when the request came, by time.perf_counter().

    Raises:
        ApiError: the model is not served, or the steering cannot be applied.
    """
    _, suffix = split_model(wanted.model, context.settings.served_names)
    steering = context.steering.apply(suffix, wanted.steering, given=wanted.steering_given)
    whole = record_of(http)
    record = whole.generation = GenerationRecord(
        wording.operation,
        response_id=f"{wording.id_prefix}-{whole.request_id}",
        model=wanted.model,
        served_model=context.settings.served_names[0],
        stream=wanted.stream,
        interventions=steering.interventions,
    )
    timeout = context.settings.request_timeout
    group = GenerationGroup(context.engine, context.metrics, steering, arrived, timeout, record)
    async with closing_on_error(group):
        check_compared(wanted, steering)
        frame = Frame(
            id=record.response_id,
            created=int(time.time()),
            model=wanted.model,
            fingerprint=context.engine.model.short_fingerprint,
            steering=steering.echo,
            wording=wording,
        )
        assessment = Assessment(context, wanted, steering)
        with steering.blamed():
            yield Exchange(http, context, wanted, frame, steering.edits, group, assessment, record)


def check_request(wanted: GenerationFields, prompts: int, context: ServerContext) -> None:
    """What the fields say together, and what the server allows now.

    Raises:
        ApiError: the first thing that is wrong.
    """
    if context.lifecycle.stopping:  # since the request's first bytes came
        raise shutting_down()
    if not context.engine.ready:
        raise ApiError(503, "The model is not ready to serve.", code="not_ready")
    if wanted.stream_options is not None and not wanted.stream:
        raise invalid("'stream_options' is only allowed when 'stream' is true.", "stream_options")
    check_wanted(wanted, context)
    limit = context.settings.max_completions_per_request
    if prompts * wanted.n * (3 if wanted.compare else 1) > limit:
        # The base model's answer to each, and its reading of the steered one.
        more = ", and twice as many to compare with," if wanted.compare else ""
        raise invalid(
            f"{prompts} prompt{'s' * (prompts > 1)} times n = {wanted.n}{more} are more than the "
            f"{limit} completions that one request may ask for.",
            _at_fault(prompts, wanted, limit),
            "too_many_completions",
        )


def _at_fault(prompts: int, wanted: GenerationFields, limit: int) -> str:
    if prompts > limit:
        return "prompt"
    return "n" if prompts * wanted.n > limit else "compare"
