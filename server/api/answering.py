"""Turns a checked request into its answer, whole or streamed, alike for every endpoint."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeVar

from pydantic import JsonValue
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.assessment import Assessment, check_assessment_available, check_comparison_steered
from server.api.context import ServerContext
from server.api.errors import ApiError, invalid, shutting_down
from server.api.fields import GenerationFields, StreamOptions
from server.api.frames import Choice, Frame, FrameHead, Wording
from server.api.generations import GenerationGroup
from server.api.models import split_model
from server.api.observe import record_of
from server.api.streaming import CompletionStream
from server.api.structure import Structure
from server.api.waiting import unless_client_leaves
from server.engine.errors import InvalidRequestError
from server.engine.grammar import CompiledGrammar
from server.engine.output import StepOutput
from server.engine.request import Edit, SamplingSettings
from server.engine.request import Request as EngineRequest
from server.records import GenerationRecord, MessageRecord

T = TypeVar("T")
LONG_TEXT: Final = 10_000  # characters; a prompt of this length or more is tokenized in a thread


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """The plan of one choice: its prompt, its sampling, and the object that formats the answer."""

    prompt: tuple[int, ...]
    sampling: SamplingSettings
    choice: Choice


@dataclass(frozen=True, slots=True)
class Exchange:
    """Produces the answer to a request whose steering is resolved."""

    _http: Request
    _context: ServerContext
    _params: GenerationFields
    _frame: Frame
    _edits: tuple[Edit, ...]
    _group: GenerationGroup
    _assessment: Assessment
    _record: GenerationRecord

    async def read_prompt(self, characters: int, read: Callable[[], T]) -> T:
        """Call `read`, which makes token ids; in a thread if the prompt is long.

        On the event loop, a long prompt would keep all other requests waiting.

        Raises:
            InvalidRequestError: the engine cannot take the prompt.
            ApiError: the deadline has passed.
            ClientGoneError: the client has closed the connection.
        """
        return read() if characters < LONG_TEXT else await self._in_thread(read)

    async def read_grammar(
        self, structure: Callable[[], Structure | None] | None
    ) -> CompiledGrammar | None:
        """Have the engine compile the structure of the answer, in a thread.

        Args:
            structure: makes the structure, in the thread; None if the answer is free.

        Raises:
            ApiError: what is asked for is no structure, or the deadline has passed.
            InvalidRequestError: it cannot be compiled, or not within the engine's limits.
            ClientGoneError: the client has closed the connection.
        """
        if structure is None:
            return None
        return await self._in_thread(partial(self._compile, structure))

    def _compile(self, make: Callable[[], Structure | None]) -> CompiledGrammar | None:
        structure = make()
        if structure is None:
            return None
        try:
            return self._context.engine.compile_grammar(
                structure.lark, structure.field, of_schemas=structure.of_schemas
            )
        except InvalidRequestError as error:
            raise structure.blame(error) from error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        # Cancelling stops a call that still waits for a thread; one that runs keeps its thread.
        loop = asyncio.get_running_loop()
        working = loop.run_in_executor(self._context.prompt_threads, work)
        return await unless_client_leaves(self._http.receive, self._group.before_deadline(working))

    def record_prompts(self, messages: Iterable[tuple[str, str]]) -> None:
        """Keep the prompts' roles and texts for the log, if `log_content` is set."""
        if self._context.settings.log_content:
            self._record.prompts = [MessageRecord(role, text) for role, text in messages]

    async def answer(self, plans: Sequence[ChoicePlan], prompt_tokens: int) -> Response:
        """Generate every choice; `prompt_tokens` counts each prompt once.

        Raises:
            EngineError: the engine refuses a choice, or loses one before the answer begins.
            ApiError: the deadline has passed, or a score that was asked for is unavailable.
            ClientGoneError: the client has closed the connection.
        """
        self._record.choices = len(plans)
        self._record.sampling = plans[0].sampling
        compare, receive = self._params.compare, self._http.receive
        if self._edits:
            plans = [replace(plan, sampling=_with_seed(plan.sampling)) for plan in plans]
        requests = [self._request(index, plan, self._edits) for index, plan in enumerate(plans)]
        compared = [self._request(index, plan, ()) for index, plan in enumerate(plans) if compare]
        submission = self._group.submit(requests, prompt_tokens, compared, self._params.n)
        await unless_client_leaves(receive, submission)
        choices = [plan.choice for plan in plans]
        base_choices = [choice.empty_copy() for choice in choices if compare]
        if self._params.stream:
            return CompletionStream(
                self._group,
                self._frame,
                choices,
                base_choices,
                conclude=lambda: self._conclude(base_choices),
            )
        body = await unless_client_leaves(receive, self._collect(choices, base_choices))
        self._group.close()
        return JSONResponse(body)

    def _request(self, index: int, plan: ChoicePlan, edits: tuple[Edit, ...]) -> EngineRequest:
        return EngineRequest(
            f"{self._record.response_id}-{index}", plan.prompt, plan.sampling, edits
        )

    async def _collect(
        self, choices: Sequence[Choice], base_choices: Sequence[Choice]
    ) -> dict[str, JsonValue]:
        gathered = [*choices, *base_choices]

        async def deliver(place: int, output: StepOutput) -> None:
            gathered[place].add(output)

        await self._group.run(deliver)
        further = await self._conclude(base_choices)
        bodies = [choice.body() for choice in choices]
        return self._frame.answer(bodies, self._group.usage, {**choices[0].shared(), **further})

    async def _conclude(self, base_choices: Sequence[Choice]) -> Mapping[str, JsonValue]:
        if self._context.settings.log_content:
            self._record.completions = [progress.text for progress in self._group.served]
        further = await self._group.before_deadline(
            self._assessment.conclude(self._group, base_choices, self._frame)
        )
        self._group.finished()
        return further


def _with_seed(sampling: SamplingSettings) -> SamplingSettings:
    """Add a seed if there is none, so that the base model can draw with the same seed."""
    return sampling if sampling.seed is not None else replace(sampling, seed=random.getrandbits(63))


@asynccontextmanager
async def answering(
    http: Request,
    context: ServerContext,
    params: GenerationFields,
    wording: Wording,
    arrived: float,
) -> AsyncIterator[Exchange]:
    """Apply a request's steering; release everything if the block raises.

    Args:
        arrived: when the request arrived, by time.perf_counter().

    Raises:
        ApiError: the model is not served, or the steering cannot be applied.
    """
    _, suffix = split_model(params.model, context.settings.served_names)
    steering = context.steering.apply(suffix, params.steering, given=params.steering_given)
    whole = record_of(http)
    record = whole.generation = GenerationRecord(
        wording.operation,
        response_id=f"{wording.id_prefix}-{whole.request_id}",
        model=params.model,
        served_model=context.settings.served_names[0],
        stream=params.stream,
        interventions=steering.interventions,
    )
    timeout = context.settings.request_timeout
    group = GenerationGroup(context.engine, context.metrics, steering, arrived, timeout, record)
    with ExitStack() as failing:
        failing.callback(group.close)
        check_comparison_steered(params, steering)
        head = FrameHead(
            id=record.response_id,
            created=int(time.time()),
            model=params.model,
            fingerprint=context.engine.model.short_fingerprint,
            steering=steering.echo,
            options=params.stream_options or StreamOptions(),
        )
        frame = wording.frame(head)
        assessment = Assessment(context, params, steering)
        with steering.default_failures_as_503():
            yield Exchange(http, context, params, frame, steering.edits, group, assessment, record)
        failing.pop_all()


def check_request(params: GenerationFields, prompts: int, context: ServerContext) -> None:
    """Raise an ApiError if fields contradict each other, or the server cannot take the request."""
    if context.lifecycle.stopping:  # it may have begun to stop while the body came
        raise shutting_down()
    if not context.engine.ready:
        raise ApiError(503, "The model is not ready to serve.", code="not_ready")
    if params.stream_options is not None and not params.stream:
        raise invalid("'stream_options' is only allowed when 'stream' is true.", "stream_options")
    if params.prompt_logprobs is not None and params.stream:
        raise invalid("'prompt_logprobs' is not allowed when 'stream' is true.", "prompt_logprobs")
    check_assessment_available(params, context)
    limit = context.settings.max_completions_per_request
    if prompts * params.n * (3 if params.compare else 1) > limit:
        # Per choice, a comparison adds the base model's answer and its scoring of the steered one.
        more = ", and twice as many to compare with," if params.compare else ""
        raise invalid(
            f"{prompts} prompt{'s' * (prompts > 1)} times n = {params.n}{more} are more than the "
            f"{limit} completions that one request may ask for.",
            _faulty_field(prompts, params, limit),
            "too_many_completions",
        )


def _faulty_field(prompts: int, params: GenerationFields, limit: int) -> str:
    if prompts > limit:
        return "prompt"
    return "n" if prompts * params.n > limit else "compare"
