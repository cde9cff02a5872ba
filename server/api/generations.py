"""The generations of one HTTP request: admitted together, measured, and released together."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from pydantic import JsonValue

from server.api.applied_steering import AppliedSteering
from server.api.comparison import begin_scoring, prepare_for_scoring
from server.api.errors import timed_out
from server.api.progress import Progress
from server.api.waiting import gather_or_cancel
from server.engine.base import Engine, Generation
from server.engine.output import StepOutput
from server.engine.request import Request
from server.metrics import NONE, Metrics
from server.records import GenerationRecord

T = TypeVar("T")
Deliver: TypeAlias = Callable[[int, StepOutput], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Usage:
    """The token counts of a request: each prompt is counted once, and every choice's completion."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # prompt tokens that were in the cache for every choice of their prompt

    @property
    def body(self) -> dict[str, JsonValue]:
        """The counts as OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class GenerationGroup:
    """Runs all generations of one HTTP request; `close` cancels and frees them at any time.

    Args:
        arrived: when the request arrived, by time.perf_counter().
        timeout: seconds from the arrival to the deadline.
        record: gets the token counts, times and finish reasons when the generations end.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        steering: AppliedSteering,
        arrived: float,
        timeout: float,
        record: GenerationRecord,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._steering = steering
        self._arrived = arrived
        self._timeout = timeout
        self._n = 1
        self._record = record
        self._prompt_tokens = 0
        self._seconds = 0.0  # from the arrival to the last token of the generation that ended last
        self._generations: list[Generation] = []
        self.served: list[Progress] = []
        self.compared: list[Progress] = []  # the base model's answers, if asked for

    @property
    def usage(self) -> Usage:
        """The token counts so far of the served answers."""
        return self._usage(self.served)

    @property
    def compared_usage(self) -> Usage:
        """The token counts so far of the base model's answers."""
        return self._usage(self.compared)

    async def before_deadline(self, work: Awaitable[T]) -> T:
        """Await work before or after the generations, up to the request's deadline.

        Raises:
            ApiError: the deadline has passed.
        """
        try:
            async with self._deadline():
                return await work
        except TimeoutError:
            raise timed_out(self._timeout) from None

    async def submit(
        self,
        requests: Sequence[Request],
        prompt_tokens: int,
        compared: Sequence[Request] = (),
        n: int = 1,
    ) -> None:
        """Admit all requests, or none.

        Args:
            prompt_tokens: the tokens of all prompts, each prompt counted once for all its choices.
            compared: the same requests to the base model; if given, it also scores the steered
                answers.
            n: the number of choices of each prompt; they follow each other in `requests`.

        Raises:
            EngineError: the engine refuses a request.
            ApiError: the deadline has passed.
        """
        scored = [bool(compared and request.effective_edits) for request in requests]
        pairs = list(zip(requests, scored, strict=True))
        served = [prepare_for_scoring(request) if score else request for request, score in pairs]
        generations = await self.before_deadline(self._engine.submit([*served, *compared]))
        self._generations.extend(generations)
        self.served = [Progress(request, to_score=score) for request, score in pairs]
        self.compared = [Progress(request) for request in compared]
        self._prompt_tokens = prompt_tokens
        self._n = n
        self._metrics.prompt.inc(prompt_tokens * (2 if compared else 1))

    async def run(self, deliver: Deliver) -> None:
        """Pass every output and its index to `deliver`, until all generations have finished.

        Indices count `served`, and go on through `compared`. The base model scores a compared
        answer as soon as the answer has finished.

        Raises:
            EngineError: a generation was lost; the others are cancelled.
            ApiError: the deadline has passed.
        """
        pumps = [
            self._pump(place, generation, progress, deliver)
            for place, (generation, progress) in enumerate(
                zip(self._generations, self._progress, strict=True)
            )
        ]
        try:
            async with self._deadline():
                await gather_or_cancel(pumps)
        except TimeoutError:
            if not all(progress.complete for progress in self._progress):
                raise timed_out(self._timeout) from None
        finally:
            # The engine is freed now, because a slow client may take long to read the rest.
            self.close()
            self._fill_record()

    def finished(self) -> None:
        """Count the request as a success in the metrics, with the time of its generations."""
        usage = self.usage
        self._metrics.finished(self._seconds, usage.prompt_tokens, usage.completion_tokens)

    def close(self) -> None:
        """Cancel unfinished generations and unpin the interventions. May be called again."""
        for generation in self._generations:
            generation.cancel()
        self._steering.release()

    @property
    def _progress(self) -> list[Progress]:
        return [*self.served, *self.compared]

    def _usage(self, progress: Sequence[Progress]) -> Usage:
        tokens = sum(each.tokens for each in progress)
        by_prompt = (progress[at : at + self._n] for at in range(0, len(progress), self._n))
        cached = sum(min(each.cached_tokens for each in choices) for choices in by_prompt)
        return Usage(self._prompt_tokens, tokens, cached)

    def _deadline(self) -> asyncio.Timeout:
        """Return a timeout that raises TimeoutError out of its block at the deadline."""
        return asyncio.timeout(self._arrived + self._timeout - time.perf_counter())

    async def _pump(
        self, place: int, generation: Generation, progress: Progress, deliver: Deliver
    ) -> None:
        async for output in generation:
            self._measure(output, progress)
            progress.add(output)
            await deliver(place, _without_unrequested_logprobs(output, progress.request))
        self._seconds = time.perf_counter() - self._arrived
        if progress.to_score:
            await self._score(generation, progress)

    async def _score(self, generation: Generation, progress: Progress) -> None:
        if progress.tokens:
            scoring = await begin_scoring(generation, progress)
            self._generations.append(scoring)
            async for output in scoring:
                progress.base_logprobs += [each.chosen.logprob for each in output.prompt_logprobs]
        progress.to_score = False

    def _measure(self, output: StepOutput, progress: Progress) -> None:
        """Update the metrics by an output: its tokens, doses, and the time since the last one."""
        metrics, steering = self._metrics, self._steering
        if output.queue_seconds is not None:
            metrics.queue.observe(output.queue_seconds)
        steered = bool(progress.request.edits)
        if output.doses:
            for label, dose in zip(steering.labels, output.doses, strict=True):
                if dose is not None:
                    metrics.dosed(label, dose)
        tokens = len(output.token_ids)
        if tokens == 0:
            return
        now = time.perf_counter()
        kind, label = (steering.kind, steering.label) if steered else (None, NONE)
        metrics.generated(tokens, kind, label)
        if progress.last_token is None:
            progress.first_token_seconds = now - self._arrived
            metrics.first_token.observe(progress.first_token_seconds)
            further, step = tokens - 1, 0.0
        else:
            further, step = tokens, (now - progress.last_token) / tokens
        for _ in range(further):
            metrics.next_token.observe(step)
        progress.last_token = now

    def _fill_record(self) -> None:
        record, served = self._record, self.served
        record.prompt_tokens = self._prompt_tokens
        record.completion_tokens = self.usage.completion_tokens
        record.finish_reasons = [progress.finish_reason for progress in served]
        record.queue_seconds = _minimum(progress.queue_seconds for progress in served)
        record.first_token_seconds = _minimum(progress.first_token_seconds for progress in served)


def _without_unrequested_logprobs(output: StepOutput, request: Request) -> StepOutput:
    """Remove log-probabilities that only the comparison needs from an output."""
    if output.logprobs and request.sampling.logprobs is None:
        return replace(output, logprobs=())
    return output


def _minimum(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
