"""Runs clients that ask for steered completions again and again, and check every answer."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

PROMPTS = ("Once", "The driver", "x")
TOKENS = 16
PAUSE_SECONDS = 0.1  # pause after each answer, which leaves a starting server some processor time


@dataclass(frozen=True)
class Outcome:
    """The result of one request; times are seconds of time.monotonic()."""

    streamed: bool
    begun: float
    ended: float
    problem: str | None = None  # what was wrong; None if the complete steered answer came

    def running_at(self, moment: float) -> bool:
        """Return whether the request was running at a moment."""
        return self.begun <= moment <= self.ended


@dataclass(frozen=True)
class Questions:
    """The expected answers."""

    digest: str  # the digest of the intervention named `maps`
    expected: Mapping[str, str]  # the steered text, by prompt


@dataclass(frozen=True)
class Load:
    """Requests to a server, and their outcomes."""

    url: str
    questions: Questions
    outcomes: list[Outcome] = field(default_factory=list)

    def problems(self) -> list[Outcome]:
        """Return the requests that did not get the expected answer."""
        return [outcome for outcome in self.outcomes if outcome.problem is not None]

    def wait_for(self, further: int, seconds: float = 60) -> None:
        """Wait until `further` more requests have ended."""
        deadline, count = time.monotonic() + seconds, len(self.outcomes) + further
        while len(self.outcomes) < count:
            assert time.monotonic() < deadline, f"{len(self.outcomes)} of {count} requests"
            time.sleep(0.02)

    def run(self, stopped: threading.Event, number: int) -> None:
        """Send one request after the other until stopped; every second one asks for a stream."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not stopped.is_set():
                number += 1
                prompt, streamed = PROMPTS[number % len(PROMPTS)], number % 2 == 0
                begun = time.monotonic()
                try:
                    problem = self._judge(client, prompt, streamed)
                except httpx.TransportError as error:
                    problem = repr(error)
                self.outcomes.append(Outcome(streamed, begun, time.monotonic(), problem))
                stopped.wait(PAUSE_SECONDS)

    def _judge(self, client: httpx.Client, prompt: str, streamed: bool) -> str | None:
        answer = client.post("/v1/completions", json=body(prompt, stream=streamed))
        if answer.status_code != 200:
            return f"{answer.status_code}: {answer.text}"
        text, steering = _read_stream(answer.text) if streamed else _read(answer.json())
        if [item["digest"] for item in steering] != [self.questions.digest]:
            return f"not steered: {answer.text}"
        expected = self.questions.expected[prompt]
        return None if text == expected else f"{text!r} for {expected!r}"


def body(prompt: str, *, stream: bool = False, steered: bool = True) -> dict[str, object]:
    """Return the body of a greedy request, whose answer is always the same."""
    return {
        "model": "tiny-llama",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        "steering": {"intervention": "maps"} if steered else None,
    }


def text_at(url: str, prompt: str, *, steered: bool = True) -> str:
    """Return a server's text for a prompt, asked outside the load."""
    answer = httpx.post(f"{url}/v1/completions", json=body(prompt, steered=steered), timeout=60)
    text, steering = _read(answer.raise_for_status().json())
    assert bool(steering) == steered
    return text


@contextmanager
def under_load(load: Load, clients: int) -> Iterator[Load]:
    """Run `clients` clients at once; at the end, wait for each one's last answer."""
    stopped = threading.Event()
    threads = [
        threading.Thread(target=load.run, args=(stopped, 5 * number)) for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def _read(answer: Any) -> tuple[str, list[dict[str, str]]]:
    return answer["choices"][0]["text"], answer["steering"]


def _read_stream(text: str) -> tuple[str, list[dict[str, str]]]:
    """Return the joined text of a stream and its last chunk's steering.

    A stream without its end marker gives an error as its text, and no steering.
    """
    events = [event.removeprefix("data: ") for event in text.split("\n\n")]
    *chunks, done, nothing = events
    if (done, nothing) != ("[DONE]", "") or "[DONE]" in chunks:
        return f"no whole stream: {text}", []
    read = [json.loads(chunk) for chunk in chunks]
    texts = [choice["text"] for chunk in read for choice in chunk.get("choices", ())]
    return "".join(texts), read[-1]["steering"]
