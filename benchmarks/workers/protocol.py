"""Defines how a worker answers the benchmark.

Imports the standard library only, as one worker runs in a virtual environment without steerserve.
"""

import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Takes prompts and the number of new tokens for each; returns the new tokens of each."""

CONNECTION = "BENCHMARK_CONNECTION"
"""The environment variable with the file descriptor of the connection to the benchmark."""


def serve(generate: Generate, info: Mapping[str, str]) -> None:
    """Say that the engine is ready, then answer until the benchmark closes the connection.

    Args:
        info: versions and settings, for the page.
    """
    connection = Connection(int(os.environ[CONNECTION]))
    connection.send(dict(info))
    while True:
        try:
            prompts, new_tokens = connection.recv()
        except EOFError:
            return
        began = time.perf_counter()
        tokens = generate(prompts, new_tokens)
        connection.send((time.perf_counter() - began, tokens))
