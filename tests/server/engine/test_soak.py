"""Soaks both engines: 2,000 short mixed requests over sockets; a third of the clients leave early.

Complete answers are compared with the oracle: Hugging Face's model, with slow reference edits.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import JsonValue

from interventions.artifact import write_artifact
from server.engine.chat import Conversation
from server.engine.text.vocabulary import Vocabulary
from server.engine.torch.loaded_interventions import Parameters
from steering.settings import AffineSettings, RewardSettings
from tests.both_engines import Subject, each_tight
from tests.live import live
from tests.manifests import manifest_of
from tests.oracles import Stack
from tests.scoring import TestScorer
from tests.serving import build_app, eventually
from tests.tiny import random_head, random_maps, tiny_tokenizer

pytestmark = [pytest.mark.asyncio(loop_scope="session"), each_tight]
REQUESTS = 2_000
CLIENTS = 32
LEAVING = 0.3
PHASE = 100  # number of consecutive requests that draw from the same two kinds of steering, or none
COMPARED = 12  # tokens of an answer that are compared with the oracle; few answers are longer
LONG = 120
# A few long answers outgrow the KV blocks, and there is one slot fewer than interventions: requests
# are preempted, interventions evict each other, and the queue is full at times.
PROMPTS = ("x", "How are you today?", "The quick brown fox jumps over the lazy dog")
MAPS, MORE, GATED = random_maps(1), random_maps(2), random_maps(5, gate=True)
HEAD, OTHER = random_head(3), random_head(4)
STORED: dict[str, Parameters] = {
    "maps": MAPS,
    "more": MORE,
    "gated": GATED,
    "head": HEAD,
    "other": OTHER,
}
STEERING: dict[str, tuple[JsonValue, Stack]] = {
    "none": (None, ()),
    "maps": ({"intervention": "maps"}, [(MAPS, AffineSettings(1.0))]),
    "weaker": (
        {"intervention": "maps", "strength": 0.4, "positions": "generated"},
        [(MAPS, AffineSettings(0.4, "generated"))],
    ),
    "more": (
        {"intervention": "more", "positions": "prompt"},
        [(MORE, AffineSettings(1.0, "prompt"))],
    ),
    "gated": ({"intervention": "gated"}, [(GATED, AffineSettings(1.0))]),
    "head": ({"intervention": "head"}, [(HEAD, RewardSettings(0.5, 5))]),
    "stack": (
        [{"intervention": "other", "iterations": 2}, {"intervention": "maps", "strength": 0.5}],
        [(OTHER, RewardSettings(0.5, 2)), (MAPS, AffineSettings(0.5))],
    ),
}


@dataclass(frozen=True)
class Job:
    """The settings of one request, and the time after which its client leaves."""

    chat: bool
    prompt: str
    steering: str
    tokens: int
    n: int
    stream: bool
    leaves_after: float | None  # seconds
    compare: bool  # whether it also asks for the base model's answer

    @cached_property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @cached_property
    def body(self) -> dict[str, JsonValue]:
        asked: dict[str, JsonValue] = (
            {"messages": [{"role": "user", "content": self.prompt}], "logprobs": True}
            if self.chat
            else {"prompt": self.prompt, "logprobs": 0}
        )
        return {
            "model": "tiny",
            "max_tokens": self.tokens,
            "temperature": 0,
            "n": self.n,
            "stream": self.stream,
            "ignore_eos": True,
            "steering": STEERING[self.steering][0],
            "compare": self.compare,
            **asked,
        }

    @staticmethod
    def random(source: random.Random, number: int) -> "Job":
        leaves = source.random() < LEAVING
        names = list(STEERING)
        phase = number // PHASE % len(names)
        steering = source.choice(["none", names[phase - 1], names[phase]])
        return Job(
            chat=source.random() < 0.4,
            prompt=source.choice(PROMPTS),
            steering=steering,
            tokens=LONG if source.random() < 0.03 else source.randint(1, COMPARED),
            n=source.choice([1, 1, 1, 2]),
            stream=source.random() < 0.5,
            leaves_after=source.choice([0, 0.005, 0.02, 0.1, 0.3]) if leaves else None,
            compare=steering != "none" and source.random() < 0.15,
        )


@dataclass
class Expected:
    """Computes the oracle's greedy tokens once for each prompt and steering."""

    subject: Subject
    vocabulary: Vocabulary = field(
        default_factory=lambda: Vocabulary(tiny_tokenizer().backend_tokenizer)
    )
    made: dict[tuple[bool, str, str], list[str]] = field(default_factory=dict)

    def tokens(self, job: Job) -> list[str]:
        """Return the texts of the first COMPARED tokens, up to the first near tie."""
        key = (job.chat, job.prompt, job.steering)
        if key not in self.made:
            prompt = (
                self.subject.engine.prompts.read_chat(
                    Conversation(({"role": "user", "content": job.prompt},))
                ).tokens
                if job.chat
                else self.subject.engine.prompts.tokenize(job.prompt)
            )
            tokens, logits = self.subject.oracle.greedy(prompt, COMPARED, STEERING[job.steering][1])
            gaps = [float(-row.topk(2).values.diff()) for row in logits]
            clear = next((place for place, gap in enumerate(gaps) if gap < 1e-3), COMPARED)
            self.made[key] = [
                self.vocabulary.with_logprob(token, 0).text for token in tokens[:clear]
            ]
        return self.made[key]


async def test_nothing_leaks_and_every_completed_answer_is_the_oracles(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject.engine, "close", stay_open)  # other tests share it
    registry = subject.registry
    for name, parameters in STORED.items():
        path = tmp_path / f"{name}.safetensors"
        write_artifact(path, manifest_of(parameters, subject.engine.model, name), parameters)
        registry.add(path, name)
    before = subject.engine.stats().preemptions
    source = random.Random(20261122)
    jobs = [Job.random(source, number) for number in range(REQUESTS)]
    expected = Expected(subject)
    outcomes: Counter[str] = Counter()
    # All expected tokens are computed now, so that this takes no time from requests with a limit.
    for job in jobs:
        expected.tokens(job)
        expected.tokens(replace(job, steering="none"))
    queue = iter(jobs)
    app = build_app(subject.engine, registry, TestScorer(), baseline_sample_rate=1)
    async with live(app) as server:

        async def client_of(queue: Iterable[Job]) -> None:
            limits = httpx.Limits(max_keepalive_connections=1)
            async with httpx.AsyncClient(
                base_url=server.url, limits=limits, timeout=60
            ) as connection:
                for job in queue:
                    outcomes[await run(connection, job, expected)] += 1

        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(client_of(queue))
        # Baselines (unsteered answers, generated in the background to be scored) rarely find room
        # under load, so one more request follows it.
        await client_of([Job(False, "x", "maps", 3, 1, False, None, False)])
        await eventually(lambda: not app.state.context.scoring.depth)
        await subject.settle()
        page = app.state.context.metrics.render().decode()
    assert outcomes.total() == REQUESTS + 1
    assert outcomes["left"] > 0.2 * REQUESTS
    assert outcomes["refused, then completed"] > 0, "nobody met a full queue or bank"
    assert subject.engine.stats().preemptions > before, "nobody was preempted"
    assert not registry._stored._pins, "artifacts are held for nobody"
    for outcome in ("completed", "dropped"):
        assert f'baselines_total{{outcome="{outcome}"}} 0.0' not in page
    assert "toxicity_dropped_total 0.0" in page


async def stay_open() -> bool:
    """Stand in for the engine's end, when the server ends."""
    return True


async def run(connection: httpx.AsyncClient, job: Job, expected: Expected) -> str:
    """Send a request until it is admitted, and check its answer, unless its client leaves before.

    Returns:
        The outcome, as a name to count.
    """
    outcome = "completed"
    while True:
        try:
            async with asyncio.timeout(job.leaves_after):
                answers = await ask(connection, job)
        except TimeoutError:
            return "left"
        if answers is not None:
            break
        outcome = "refused, then completed"
        await asyncio.sleep(0.1)
    # The steered choices come first, then the base model's.
    jobs = [job] * job.n + [replace(job, steering="none")] * (job.n if job.compare else 0)
    for tokens, told in zip(answers, jobs, strict=True):
        clear = expected.tokens(told)[: job.tokens]
        assert len(tokens) == job.tokens
        assert tokens[: len(clear)] == clear, told
    return outcome


async def ask(connection: httpx.AsyncClient, job: Job) -> list[list[str]] | None:
    """Return the tokens of each choice, or None if the server is too busy."""
    answers: list[list[str]] = [[] for _ in range(job.n * (1 + job.compare))]
    async with connection.stream("POST", job.path, json=job.body) as response:
        if response.status_code in (429, 503):
            assert response.headers["retry-after"]
            return None
        assert response.status_code == 200, await response.aread()
        if not job.stream:
            take(json.loads(await response.aread()), job, answers)
            return answers
        last = ""
        async for line in response.aiter_lines():
            if line:
                last = line.removeprefix("data: ")
                if last != "[DONE]":
                    take(json.loads(last), job, answers)
        assert last == "[DONE]"
    return answers


def take(body: Any, job: Job, answers: list[list[str]]) -> None:
    """Add the tokens of a response or chunk to `answers`: its choices, then the base model's."""
    assert "error" not in body, body
    compared: list[Any] = []
    if comparison := body.get("comparison"):
        compared = comparison["choices"]
        assert len(comparison["mean_log_ratio"]) == job.n
        assert all(abs(ratio) < 100 for ratio in comparison["mean_log_ratio"])
    for place, choice in enumerate((*body["choices"], *compared)):
        base = place >= len(body["choices"])
        logprobs = choice["logprobs"]
        if logprobs is not None:
            tokens = (
                [token["token"] for token in logprobs["content"]]
                if job.chat
                else logprobs["tokens"]
            )
            answers[choice["index"] + job.n * base] += tokens
