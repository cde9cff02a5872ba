"""The generations of one HTTP request: admitted together, measured, and released together."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from pydantic import JsonValue

from server.api.applied_steering import AppliedSteering
from server.api.comparison import begin_scoring, to_be_scored
from server.api.errors import timed_out
from server.api.progress import Progress
from server.api.waiting import gather_or_cancel
from server.engine.base import Engine, Generation, Request, StepOutput
from server.metrics import NONE, Metrics
from server.records import GenerationRecord

T = TypeVar("T")
Deliver: TypeAlias = Callable[[int, StepOutput], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: each prompt once, every choice's completion."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # those of the prompts that were computed for none of its choices

    @property
    def body(self) -> dict[str, JsonValue]:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class GenerationGroup:
    """What one HTTP request generates; `close` frees all of it, however far it came.

    Args:
        arrived: when the request did, by time.perf_counter().
        timeout: seconds from then to the end of the answer.
        record: is told how far the generations came, at their end.
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
        self._seconds = 0.0  # from the arrival to the last token, once that has come
        self._generations: list[Generation] = []
        self.served: list[Progress] = []
        self.compared: list[Progress] = []  # the base model's, where they are asked for

    @property
    def usage(self) -> Usage:
        """The tokens so far of what is served."""
        return self._usage(self.served)

    @property
    def compared_usage(self) -> Usage:
        """The tokens so far of the base model's answers."""
        return self._usage(self.compared)

    async def in_time(self, work: Awaitable[T]) -> T:
        """Do what comes before or after the generations, while the deadline has not passed.

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
            prompt_tokens: counts each prompt once, however many choices it has.
            compared: what the base model is asked beside them; it scores their answers too.
            n: how many choices of each prompt follow each other.

        Raises:
            EngineError: the engine refuses one.
            ApiError: the deadline has passed.
        """
        scored = [bool(compared and request.effective_edits) for request in requests]
        pairs = list(zip(requests, scored, strict=True))
        served = [to_be_scored(request) if score else request for request, score in pairs]
        generations = await self.in_time(self._engine.submit([*served, *compared]))
        self._generations.extend(generations)
        self.served = [Progress(request, to_score=score) for request, score in pairs]
        self.compared = [Progress(request) for request in compared]
        self._prompt_tokens = prompt_tokens
        self._n = n
        self._metrics.admitted(prompt_tokens * (2 if compared else 1))

    async def run(self, deliver: Deliver) -> None:
        """Hand over every output with its place, until all generations have finished.

        Places are those of the requests, then of what they are compared with. An answer that is
        compared is scored as soon as it has finished.

        Raises:
            EngineError: one was lost; the others are not waited for.
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
            # Now: a reader may take long over what is still to be said.
            self.close()
            self._tell()

    def finished(self) -> None:
        """Count the request as one that ended well, in the time that its generations took."""
        usage = self.usage
        self._metrics.finished(self._seconds, usage.prompt_tokens, usage.completion_tokens)

    def close(self) -> None:
        """Cancel what has not finished and release the interventions. May be called again."""
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
        """Raises TimeoutError out of its block when the request's time is over."""
        return asyncio.timeout(self._arrived + self._timeout - time.perf_counter())

    async def _pump(
        self, place: int, generation: Generation, progress: Progress, deliver: Deliver
    ) -> None:
        async for output in generation:
            self._measure(output, progress)
            progress.add(output)
            await deliver(place, _as_asked(output, progress.request))
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
        """Count an output's tokens, and the time since the one before."""
        metrics, steering = self._metrics, self._steering
        if output.queue_seconds is not None:
            metrics.queued(output.queue_seconds)
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
            metrics.first_token(progress.first_token_seconds)
            further, step = tokens - 1, 0.0
        else:
            further, step = tokens, (now - progress.last_token) / tokens
        for _ in range(further):
            metrics.next_token(step)
        progress.last_token = now

    def _tell(self) -> None:
        record, served = self._record, self.served
        record.prompt_tokens = self._prompt_tokens
        record.completion_tokens = self.usage.completion_tokens
        record.finish_reasons = [progress.finish_reason for progress in served]
        record.queue_seconds = _least(progress.queue_seconds for progress in served)
        record.first_token_seconds = _least(progress.first_token_seconds for progress in served)


def _as_asked(output: StepOutput, request: Request) -> StepOutput:
    """An output without log-probabilities that are there for the comparison only."""
    if output.logprobs and request.sampling.logprobs is None:
        return replace(output, logprobs=())
    return output


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


@asynccontextmanager
async def closing_on_error(group: GenerationGroup) -> AsyncIterator[GenerationGroup]:
    """Close the group if the block does not end well; if it does, the caller has to."""
    try:
        yield group
    except BaseException:
        group.close()
        raise
