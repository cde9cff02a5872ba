"""Sends sample traffic to a running server, so that its dashboards have something to show.

    python docker/traffic.py --url http://127.0.0.1:8000 --seconds 120 --rate 2

The requests are completions and chats, streamed or not, with rude and mild prompts. Some are
unsteered; the others use each servable intervention at full and at reduced strength, or a stack of
two. A few requests are faulty, and a few clients disconnect in the middle of a stream.

If the server has an API key, set STEERSERVE_API_KEY. The script needs no package but httpx. After
--seconds it prints how many requests got which status, and exits with 1 if none got a 200.
"""

import argparse
import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import httpx

Json: TypeAlias = dict[str, Any]
Steering: TypeAlias = Json | list[Json] | None

RUDE = (
    "My neighbour is such a",
    "The driver shouted: you damn",
    "He slammed the door and yelled: shut up, you stupid",
    "The review was short: this crap is the worst",
    "What the hell is wrong with you? You are a complete",
    "She muttered: bloody idiot, get your",
    "Only a moron would believe that. Go to hell, you",
    "I hate this damn printer, it is a piece of",
    "The angry coach called his players a bunch of lazy",
    "Everybody knows that the new boss is a pathetic",
)
MILD = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "To bake a good loaf of bread, you first",
    "The river rises in the mountains and",
    "Dear colleagues, thank you for",
    "A good way to learn a language is",
)
CHATS = (
    "Write one sentence about my rude neighbour.",
    "Insult me like a pirate would.",
    "What would an angry driver shout at a slow cyclist?",
    "How do I apologise to a friend?",
    "Name three uses of a paper clip.",
)
RUDE_SHARE = 0.75
CHAT_SHARE = 0.3
STREAM_SHARE = 0.5
PLAIN_SHARE = 0.25
FAULTY_SHARE = 0.04
LEAVING_SHARE = 0.04
READ_BEFORE_LEAVING = 3  # events of the stream
MOST_AT_ONCE = 64  # bounds the clients that wait for a server slower than --rate
TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class Wanted:
    """A request to send; with `leaves`, its client disconnects after a few events of the stream."""

    path: str
    body: Json
    leaves: bool = False


class Mixture:
    """Draws random requests for a server with the given model and interventions."""

    def __init__(self, model: str, interventions: Mapping[str, str], seed: int) -> None:
        """Prepare the draws; `interventions` maps each name to its kind, affine or reward."""
        self._model = model
        self._steerings = steerings(interventions)
        self._random = random.Random(seed)

    def draw(self) -> Wanted:
        """Draw the next request."""
        draw = self._random.random
        if draw() < FAULTY_SHARE:
            return self._faulty()
        leaves = draw() < LEAVING_SHARE
        body: Json = {
            "model": self._model,
            "max_tokens": self._random.randint(12, 48),
            "seed": self._random.randrange(2**31),
            "stream": leaves or draw() < STREAM_SHARE,
        }
        if draw() >= PLAIN_SHARE and self._steerings:
            body["steering"] = self._random.choice(self._steerings)
        if draw() < CHAT_SHARE:
            body["messages"] = [{"role": "user", "content": self._random.choice(CHATS)}]
            return Wanted("/v1/chat/completions", body, leaves)
        body["prompt"] = self._random.choice(RUDE if draw() < RUDE_SHARE else MILD)
        return Wanted("/v1/completions", body, leaves)

    def _faulty(self) -> Wanted:
        body: Json = {"model": self._model, "prompt": MILD[0], "max_tokens": 8}
        faults: tuple[Json, ...] = (
            {"steering": {"intervention": "there-is-none-of-this-name"}},
            {"temperature": -1},
            {"max_tokns": 8},
        )
        return Wanted("/v1/completions", body | self._random.choice(faults))


def steerings(interventions: Mapping[str, str]) -> tuple[Steering, ...]:
    """Return each intervention at its default and at a weaker setting, and one stack.

    The stack holds the first intervention of each kind, and is left out if there is only one kind.
    """
    weaker: dict[str, Json] = {"affine": {"strength": 0.5}, "reward": {"iterations": 2}}
    singles = [
        {"intervention": name, **settings}
        for name, kind in interventions.items()
        for settings in ({}, weaker.get(kind, {}))
    ]
    firsts: dict[str, str] = {}
    for name, kind in interventions.items():
        firsts.setdefault(kind, name)
    stack = [{"intervention": firsts[kind]} for kind in sorted(firsts)]
    return (*singles, *([stack] if len(stack) > 1 else []))


async def send(client: httpx.AsyncClient, wanted: Wanted) -> str:
    """Send one request; returns its status, "left", or the name of a connection's error."""
    try:
        async with client.stream("POST", wanted.path, json=wanted.body) as answer:
            events = 0
            async for _ in answer.aiter_lines():
                events += 1
                if wanted.leaves and events >= READ_BEFORE_LEAVING:
                    return "left"
            return str(answer.status_code)
    except httpx.TransportError as error:
        return type(error).__name__


async def run(url: str, seconds: float, rate: float, seed: int) -> Counter[str]:
    """Send `rate` requests a second, however slow the answers are, and count the outcomes.

    Raises:
        httpx.HTTPError: the server does not list its model or its interventions.
    """
    key = os.environ.get("STEERSERVE_API_KEY", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    counted: Counter[str] = Counter()
    running: set[asyncio.Task[None]] = set()

    # Ignores HTTP_PROXY and the like: the server is on this machine or in its network.
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=TIMEOUT_SECONDS, trust_env=False
    ) as client:
        models = (await client.get("/v1/models")).raise_for_status().json()["data"]
        found = (await client.get("/v1/interventions")).raise_for_status().json()["data"]
        servable = {item["name"]: item["kind"] for item in found if item["servable"]}
        # The list begins with the model's own name; entries `model+intervention` follow.
        mixture = Mixture(models[0]["id"], servable, seed)

        async def one(wanted: Wanted) -> None:
            counted[await send(client, wanted)] += 1

        began = time.monotonic()
        due = began
        while due < began + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += 1 / rate
            if len(running) >= MOST_AT_ONCE:
                counted["not sent"] += 1
                continue
            task = asyncio.create_task(one(mixture.draw()))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
    return counted


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random requests")
    given = parser.parse_args()
    try:
        counted = asyncio.run(run(given.url, given.seconds, given.rate, given.seed))
    except httpx.HTTPError as error:
        sys.stderr.write(f"traffic: {given.url} does not say what it serves: {error}\n")
        return 1
    shown = ", ".join(f"{word}: {number}" for word, number in sorted(counted.items()))
    sys.stdout.write(f"traffic: {shown}\n")
    return 0 if counted["200"] else 1


if __name__ == "__main__":
    sys.exit(main())
