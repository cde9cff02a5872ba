"""How a worker talks to the benchmark: one JSON object a line, on stdin and stdout.

Imports the standard library only, as one worker runs in another virtual environment.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and how many new tokens each gets -> the new tokens of each."""


def claim_stdout() -> TextIO:
    """A stream to the benchmark, while all that others print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def serve(generate: Generate, info: Mapping[str, str], answers: TextIO) -> None:
    """Say that the engine is ready, then answer until stdin ends.

    Args:
        info: versions and settings, for the page.
    """
    _write(answers, {"info": dict(info)})
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        tokens = generate(request["prompts"], request["new_tokens"])
        seconds = time.perf_counter() - began
        _write(answers, {"seconds": seconds, "tokens": tokens})


def _write(answers: TextIO, answer: Mapping[str, object]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
