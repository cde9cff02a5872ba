"""A fake clock, a fake scorer, and clients of applications that score with it."""

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from interventions.registry import Registry
from server.engine.base import Engine
from server.toxicity.scorer import ScoringError
from tests.serving import build_app


@dataclass
class FakeClock:
    """A clock that returns `now`, which only a test changes."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def score_of(text: str) -> float:
    """Return the score that `TestScorer` gives a text, which depends on all of its bytes."""
    return sum(text.encode()) % 101 / 100


@dataclass
class TestScorer:
    """Scores texts and records them in `texts`.

    `score` waits up to 20 s for `may_go_on`, then raises a ScoringError if `fails` is set, which
    `close` does too.
    """

    __test__ = False

    texts: list[str] = field(default_factory=list)
    fails: bool = False
    processor_seconds: float = 0.0
    may_go_on: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.may_go_on.set()

    def score(self, texts: Sequence[str]) -> list[float]:
        self.may_go_on.wait(20)
        if self.fails:
            raise ScoringError("the scorer fails, as the test wants")
        self.texts += texts
        return [score_of(text) for text in texts]

    def close(self) -> None:
        self.fails = True
        self.may_go_on.set()


@asynccontextmanager
async def scored_client(
    engine: Engine, registry: Registry, scorer: TestScorer, **settings: object
) -> AsyncIterator[httpx.AsyncClient]:
    """Make a client of an application that serves the model "tiny" and scores generated text.

    `settings` are passed to `build_app`.
    """
    app = build_app(engine, registry, scorer, **settings)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        yield client
