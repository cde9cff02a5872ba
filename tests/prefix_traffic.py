"""Sends either engine requests whose prompts begin alike and that are steered differently.

Keys and values that one request took from another's cached blocks would show in its answer.
"""

import asyncio
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from server.engine.errors import BankFullError, NoBackgroundRoomError, QueueFullError
from server.engine.output import StepOutput
from server.engine.request import Edit
from steering.settings import AffineSettings
from tests.both_engines import BOTH_STACKS, INTERVENTIONS, Subject, finished, request
from tests.oracles import Stack
from tests.steered import GREEDY, assert_greedy, tokens_of

ROUND = 48
MIXES: Mapping[str, tuple[Edit, ...]] = {
    **BOTH_STACKS,
    "a everywhere": (Edit("a", AffineSettings(0.9)),),
    "a more weakly on the prompt": (Edit("a", AffineSettings(0.5, "prompt")),),
    # Stacks in two orders use "supported", because "b" edits only a site after the last layer's
    # keys and values, so that cached blocks would not show the order.
    "a, then support": (Edit("a", AffineSettings(0.5)), Edit("supported", AffineSettings(0.7))),
    "support, then a": (Edit("supported", AffineSettings(0.7)), Edit("a", AffineSettings(0.5))),
}
# Rounds favour these groups in turn; mixes of one group have nearly equal keys.
KIN = (
    ("base", "r", "wide", "r with other settings"),
    ("a on the prompt", "a everywhere", "a on what is generated", "a more weakly on the prompt"),
    ("a, then support", "support, then a", "a"),
    ("a", "a at another strength", "b", "a support", "a and r"),
)
SHARED = b"You are a helpful assistant. Answer in one sentence, and be polite. Thank you. " * 2
LENGTHS = (15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 95, 96, 97, 127, 128, 129)


def stack_of(edits: tuple[Edit, ...]) -> Stack:
    """Return the edits in the form that the oracle takes."""
    return [(INTERVENTIONS[edit.digest], edit.settings) for edit in edits]


async def contaminate(subject: Subject, rounds: int, seed: int) -> None:
    """Serve rounds of requests, and compare each answer with the oracle's.

    Some clients leave early. Prompts of a round may continue answers of the round before.
    """
    source = random.Random(seed)
    texts = [SHARED]
    for number in range(rounds):
        favoured = KIN[number % len(KIN)]
        work = []
        for _ in range(ROUND):
            text = source.choice(texts if source.random() < 0.4 else [SHARED])
            prompt = text[: source.choice(LENGTHS)]
            mix = source.choice(favoured if source.random() < 0.8 else list(MIXES))
            work.append((prompt, mix, source.choice((1, 2, 9))))
        async with asyncio.TaskGroup() as clients:
            answers = [clients.create_task(_answer(subject, *each)) for each in work]
            for _ in range(4):
                clients.create_task(_leave(subject, source.choice(work)))
        found = [answer.result() for answer in answers]
        for outputs, (prompt, mix, count) in zip(found, work, strict=True):
            stack = stack_of(MIXES[mix])
            assert_greedy(outputs, subject.oracle, prompt, stack, count)
        texts = [
            bytes((*prompt, *tokens_of(outputs), *SHARED))
            for outputs, (prompt, _, _) in zip(found, work, strict=True)
            if max(tokens_of(outputs)) < 256  # special tokens are no bytes
        ]


async def _answer(subject: Subject, prompt: bytes, mix: str, count: int) -> list[StepOutput]:
    sampling = replace(GREEDY, max_tokens=count)
    return await subject.answer(request(prompt, MIXES[mix], sampling))


async def _leave(subject: Subject, work: tuple[bytes, str, int]) -> None:
    """Begin a request in the background, and cancel it after a moment."""
    prompt, mix, _ = work
    background = replace(request(prompt, MIXES[mix]), background=True)
    with suppress(TimeoutError, BankFullError, NoBackgroundRoomError, QueueFullError):
        async with asyncio.timeout(0.05):
            [generation] = await subject.submit(background)
            try:
                await finished(generation)
            finally:
                generation.cancel()
