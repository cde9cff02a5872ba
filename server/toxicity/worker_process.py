"""Starts a worker process, and talks to it over its pipes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from server.toxicity.scorer import ScoringError
from server.toxicity.watchdog import Watchdog, processor_seconds
from server.variables import WORKER_PARENT, WORKER_SPEC

_END_SECONDS: Final = 5.0
_PACKAGES: Final = Path(__file__).parents[2]
_ENVIRONMENT: Final = {
    **dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
    ),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class WorkerLostError(ScoringError):
    """The worker has ended, was killed, or broke the protocol; the caller has to close it."""


class WorkerProcess:
    """One worker process. While a thread talks to it, other threads may only call `kill`."""

    def __init__(self, spec: str) -> None:
        """Start the worker, and return while it loads.

        On Linux the worker is killed when the thread that starts it ends.

        Raises:
            ScoringError: no process can be started.
        """
        self.started = time.monotonic()
        self.processor_seconds = 0.0
        """Processor time that its answers have taken, in seconds."""
        self._ready = False
        self._closed = False
        # -P: a file in the working directory must not replace a module.
        command = [sys.executable, "-P", "-m", "server.toxicity.worker"]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=_environment(spec),
                start_new_session=True,  # Ctrl-C reaches the server only
            )
        except OSError as error:
            raise ScoringError(
                f"the toxicity scorer's process cannot be started: {error}"
            ) from error
        self.pid = self._process.pid

    @property
    def ended(self) -> bool:
        """True if the worker has ended or was closed."""
        return self._closed or self._process.poll() is not None

    def wait_ready(self, seconds: float) -> None:
        """Wait until the worker has loaded its scorer; return at once if it has already.

        Raises:
            WorkerLostError: the worker cannot load its scorer, and says why; or it hangs, see
                `Watchdog`.
        """
        if self._ready:
            return
        reply = self._converse(b"", seconds)
        if "error" in reply:
            raise WorkerLostError(str(reply["error"]))
        self._ready = True

    def ask(self, texts: Sequence[str], seconds: float) -> dict[str, object]:
        """Send texts to the worker and return its answer, as the worker writes it.

        Raises:
            WorkerLostError: the worker has ended, or hung and was killed, see `Watchdog`.
        """
        before = processor_seconds(self.pid)
        try:
            return self._converse(json.dumps(list(texts)).encode() + b"\n", seconds)
        finally:  # a dead worker that was not waited for still has its times
            self.processor_seconds += max(0.0, processor_seconds(self.pid) - before)

    def kill(self) -> None:
        """Kill the worker; a thread that waits for its answer gets a WorkerLostError."""
        self._process.kill()

    def close(self) -> None:
        """Kill the worker, wait for its end, and close the pipes."""
        self._closed = True
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # the kernel still holds it
            self._process.wait(_END_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # the worker did not read the last line
                pipe.close()

    def _converse(self, line: bytes, seconds: float) -> dict[str, object]:
        # A hung worker may not even read its input; then only its death unblocks this thread.
        with Watchdog(self._process, seconds) as watchdog:
            answer = self._exchange(line)
        if answer.endswith(b"\n"):
            return _parse(answer)
        if watchdog.killed_after is not None:
            raise WorkerLostError(
                f"the toxicity scorer has not answered in {watchdog.killed_after:.3g} s and was "
                "ended"
            )
        raise WorkerLostError("the toxicity scorer's process has died")

    def _exchange(self, line: bytes) -> bytes:
        """Send a line; return the worker's line, or less than one if the worker has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(line)
            stdin.flush()
            return stdout.readline()
        except OSError:
            return b""


def _parse(line: bytes) -> dict[str, object]:
    try:
        reply = json.loads(line)
    except ValueError as error:
        raise WorkerLostError("the toxicity scorer's process has not answered in JSON") from error
    if not isinstance(reply, dict):
        raise WorkerLostError("the toxicity scorer's process has not answered with an object")
    return reply


def _environment(spec: str) -> dict[str, str]:
    """Return the worker's environment: its scorer, one thread, and the path of this package."""
    packages = (str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        **_ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(packages),
        WORKER_SPEC.name: spec,
        WORKER_PARENT.name: str(os.getpid()),
    }
