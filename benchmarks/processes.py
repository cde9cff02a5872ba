"""An engine in a process of its own, which takes no processor time while it is not its turn."""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil

from benchmarks.core import BenchmarkError

ROOT = Path(__file__).parent.parent
START_SECONDS = 600.0  # vLLM compiles at its first start
ANSWER_SECONDS = 600.0
POLL_SECONDS = 1.0  # how often it is seen whether a silent worker lives
LOG_LINES = 5


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker generated, and how long that took inside of it."""

    seconds: float
    tokens: list[list[int]]


class Worker:
    """A worker that speaks benchmarks/workers/protocol.py, stopped (SIGSTOP) between requests.

    Used as a context manager, whose end is the process's.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name = name
        self.info: dict[str, str] = {}
        self._command = list(command)
        self._log = folder / f"{name.replace(' ', '-')}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        try:
            self.info = self._read(START_SECONDS)["info"]
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # of what was not read any more
                    pipe.close()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Answer:
        """Have the worker continue all prompts at once; it runs only meanwhile.

        Raises:
            BenchmarkError: the worker has ended, or has generated less than it should.
        """
        request = {"prompts": [list(prompt) for prompt in prompts], "new_tokens": new_tokens}
        self._signal(signal.SIGCONT)
        try:
            stdin = self._pipe("stdin")
            try:
                stdin.write(json.dumps(request).encode() + b"\n")
                stdin.flush()
            except BrokenPipeError as error:
                raise self._failed("has ended") from error
            answer = self._read(ANSWER_SECONDS)
        finally:
            self._signal(signal.SIGSTOP)
        tokens: list[list[int]] = answer["tokens"]
        if [len(row) for row in tokens] != [new_tokens] * len(prompts):
            raise self._failed(f"did not generate {new_tokens} tokens for each prompt")
        return Answer(answer["seconds"], tokens)

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next answer; whatever else a library prints is passed over."""
        descriptor = self._pipe("stdout").fileno()
        deadline = time.monotonic() + seconds
        while True:
            line, end, rest = self._unread.partition(b"\n")
            if end:
                self._unread = rest
                if line.startswith(b"{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
                continue
            if not select.select([descriptor], [], [], POLL_SECONDS)[0]:
                # A child of a dead worker may keep the pipe open.
                if self._process is None or self._process.poll() is not None:
                    raise self._failed("has ended")
                if time.monotonic() > deadline:
                    raise self._failed(f"does not answer within {seconds:g} s")
                continue
            read = os.read(descriptor, 1 << 16)
            if not read:
                raise self._failed("has ended")
            self._unread += read

    def _pipe(self, name: str) -> IO[bytes]:
        assert self._process is not None
        pipe: IO[bytes] | None = getattr(self._process, name)
        assert pipe is not None
        return pipe

    def _signal(self, number: signal.Signals) -> None:
        """To the process and all that it has started, children that made their own group too."""
        assert self._process is not None
        try:
            parent = psutil.Process(self._process.pid)
            processes = [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def _failed(self, what: str) -> BenchmarkError:
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return BenchmarkError("\n".join([f"{self.name} {what}; see {self._log}:", *lines]))
