"""The generations of one HTTP request: admitted together, measured, and released together."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from server.api.errors import timed_out
from server.api.steering import AppliedSteering
from server.api.waiting import gather_or_cancel
from server.engine.base import Engine, Generation, Request, StepOutput
from server.metrics import Metrics

T = TypeVar("T")
Deliver: TypeAlias = Callable[[int, StepOutput], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: each prompt once, every choice's completion."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def body(self) -> dict[str, int]:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class GenerationGroup:
    """What one HTTP request generates; `close` frees all of it, however far it came.

    Args:
        arrived: when the request did, by time.perf_counter().
        timeout: seconds from then to the last token.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        steering: AppliedSteering,
        arrived: float,
        timeout: float,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._steering = steering
        self._arrived = arrived
        self._timeout = timeout
        self._prompt_tokens = 0
        self._generations: list[Generation] = []
        self._finished = 0
        self._generated_tokens = 0

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage(self._prompt_tokens, self._generated_tokens)

    async def in_time(self, work: Awaitable[T]) -> T:
        """Do what must come before the generations, while the deadline has not passed.

        Raises:
            ApiError: the deadline has passed.
        """
        async with self._deadline():
            return await work

    async def submit(self, requests: Sequence[Request], prompt_tokens: int) -> None:
        """Admit all requests, or none.

        `prompt_tokens` counts each prompt once, however many choices it has.

        Raises:
            EngineError: the engine refuses one.
            ApiError: the deadline has passed.
        """
        self._generations.extend(await self.in_time(self._engine.submit(requests)))
        self._prompt_tokens = prompt_tokens
        self._metrics.admitted(prompt_tokens)

    async def run(self, deliver: Deliver) -> None:
        """Hand over every output with its choice's index, until all choices have finished.

        Raises:
            EngineError: a choice was lost; the others are not waited for.
            ApiError: the deadline has passed.
        """
        pumps = [
            self._pump(index, generation, deliver)
            for index, generation in enumerate(self._generations)
        ]
        try:
            async with self._deadline():
                await gather_or_cancel(pumps)
        finally:
            # Now: a reader may take long over what is still to be said.
            self.close()
        usage = self.usage
        seconds = time.perf_counter() - self._arrived
        self._metrics.finished(seconds, usage.prompt_tokens, usage.completion_tokens)

    def close(self) -> None:
        """Cancel what has not finished and release the interventions. May be called again."""
        for generation in self._generations:
            generation.cancel()
        self._steering.release()

    async def _pump(self, index: int, generation: Generation, deliver: Deliver) -> None:
        last: float | None = None
        async for output in generation:
            if output.queue_seconds is not None:
                self._metrics.queued(output.queue_seconds)
            last = self._measure(output, last)
            await deliver(index, output)
        self._finished += 1

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        """Cancel the block when the request's time is over."""
        left = self._arrived + self._timeout - time.perf_counter()
        try:
            async with asyncio.timeout(left):
                yield
        except TimeoutError:
            if not self._complete:
                raise timed_out(self._timeout) from None

    @property
    def _complete(self) -> bool:
        return bool(self._generations) and self._finished == len(self._generations)

    def _measure(self, output: StepOutput, last: float | None) -> float | None:
        """Count an output's tokens; returns when the choice's last token came."""
        tokens = len(output.token_ids)
        if tokens == 0:
            return last
        now = time.perf_counter()
        self._generated_tokens += tokens
        self._metrics.generated(tokens, self._steering.kind, self._steering.label)
        if last is None:
            self._metrics.first_token(now - self._arrived)
            further, step = tokens - 1, 0.0
        else:
            further, step = tokens, (now - last) / tokens
        for _ in range(further):
            self._metrics.next_token(step)
        return now


@asynccontextmanager
async def closing_on_error(group: GenerationGroup) -> AsyncIterator[GenerationGroup]:
    """Close the group if the block does not end well; if it does, the caller has to."""
    try:
        yield group
    except BaseException:
        group.close()
        raise
