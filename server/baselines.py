"""Generates unsteered answers to a sample of the steered requests, to measure the difference."""

import asyncio
import random
from dataclasses import replace
from typing import Final

from server.engine.base import Engine
from server.engine.errors import EngineError
from server.engine.request import Request
from server.metrics import Metrics
from server.toxicity.queue import ScoringQueue

MAX_AT_ONCE: Final = 4
MAX_WAITING: Final = 64


class BaselineSampler:
    """Has the base model answer some steered requests too, if the engine has room for it.

    The answers are scored for the metrics and shown to nobody. To be used on the event loop.
    """

    def __init__(
        self,
        engine: Engine,
        scoring: ScoringQueue | None,
        metrics: Metrics,
        rate: float,
        timeout: float,
    ) -> None:
        """`rate` is the share of steered requests, 0 to 1; `timeout` is in seconds, for each."""
        self._engine = engine
        self._scoring = scoring
        self._metrics = metrics
        self._rate = rate
        self._timeout = timeout
        self._random = random.Random()
        self._turn = asyncio.Semaphore(MAX_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def offer(self, request: Request, intervention: str) -> None:
        """Answer a finished request again without its edits, if it is drawn for the sample."""
        if self._scoring is None or self._random.random() >= self._rate:
            return
        if len(self._tasks) >= MAX_AT_ONCE + MAX_WAITING:
            self._metrics.baselines.labels("dropped").inc()
            return
        task = asyncio.create_task(self._answer(request, intervention, self._scoring))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel the answers that run or wait, and wait for their end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer(self, request: Request, intervention: str, scoring: ScoringQueue) -> None:
        try:
            async with self._turn, asyncio.timeout(self._timeout):
                text = await self._generate(request)
        except (EngineError, TimeoutError):  # clients' requests come first
            self._metrics.baselines.labels("dropped").inc()
            return
        self._metrics.baselines.labels("completed").inc()
        scoring.offer(text, intervention, "baseline")

    async def _generate(self, request: Request) -> str:
        # Prompt, seed and sampling are those of the steered request; only its edits are left out.
        sampling = replace(request.sampling, logprobs=None, prompt_logprobs=None)
        base = Request(f"{request.request_id}-base", request.prompt, sampling, background=True)
        (generation,) = await self._engine.submit([base])
        try:
            return "".join([output.text async for output in generation])
        finally:
            generation.cancel()
