"""An engine in a process of its own, which takes no processor time while it is not its turn."""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Final, Self

import psutil

from benchmarks.decoding import BenchmarkError
from benchmarks.workers.protocol import CONNECTION

ROOT: Final = Path(__file__).parent.parent
_START_SECONDS: Final = 600.0  # vLLM compiles at its first start
_ANSWER_SECONDS: Final = 600.0
_LOG_LINES: Final = 5


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens that a worker generated, and the seconds that it measured itself."""

    seconds: float
    tokens: list[list[int]]


class Worker:
    """A process that runs `benchmarks.workers.protocol.serve`, stopped between requests.

    The process starts with the context manager and is killed at its end.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        """`folder` is for the log of all that the process prints."""
        self.name = name
        self.info: dict[str, str] = {}
        self._command = list(command)
        self._log = folder / f"{name.replace(' ', '-')}.log"

    def __enter__(self) -> Self:
        self._connection, theirs = Pipe()
        with self._log.open("wb") as log, theirs:
            self._process = psutil.Popen(
                self._command,
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", CONNECTION: str(theirs.fileno())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._ended = os.pidfd_open(self._process.pid)
        try:
            self.info = self._receive(_START_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        os.close(self._ended)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Answer:
        """Have the worker continue all prompts at once; it runs only meanwhile.

        Raises:
            BenchmarkError: the worker has ended, or has generated less than it should.
        """
        self._signal(signal.SIGCONT)
        try:
            with suppress(BrokenPipeError):  # `_receive` tells why
                self._connection.send((prompts, new_tokens))
            answer = Answer(*self._receive(_ANSWER_SECONDS))
        finally:
            self._signal(signal.SIGSTOP)
        if [len(row) for row in answer.tokens] != [new_tokens] * len(prompts):
            raise self._failed(f"did not generate {new_tokens} tokens for each prompt")
        return answer

    def _receive(self, seconds: float) -> Any:
        # A child of a dead worker may keep the connection open, so the process is watched, too.
        ready = wait([self._connection, self._ended], seconds)
        if self._connection in ready:
            with suppress(EOFError):
                return self._connection.recv()
        raise self._failed("has ended" if ready else f"does not answer within {seconds:g} s")

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and to all that it has started, in any process group."""
        with suppress(psutil.NoSuchProcess):
            for process in [*self._process.children(recursive=True), self._process]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def _failed(self, what: str) -> BenchmarkError:
        lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return BenchmarkError("\n".join([f"{self.name} {what}; see {self._log}:", *lines]))
