"""Runs a scorer in a process of its own, so that it can neither slow nor crash the engine."""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from server.toxicity.scorer import ScoringError, check_scores
from server.toxicity.worker_process import WorkerLostError, WorkerProcess

logger = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 60.0
LOAD_SECONDS: Final = 900.0  # a classifier may have to be downloaded
RESTART_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 10.0


class ScorerProcess:
    """A `Scorer` that runs in a worker process, which is replaced after it has died.

    Any thread may call any method; texts are scored for one caller at a time.
    """

    def __init__(
        self,
        spec: str,
        *,
        answer_seconds: float = ANSWER_SECONDS,
        restart_seconds: float = RESTART_SECONDS,
    ) -> None:
        """Start the worker, and return while it loads.

        Args:
            spec: any spec of `parse_spec` but `none`; the worker reports what is wrong with it.
            answer_seconds: the worker is killed if a call of `score` takes more processor time than
                this, or if it takes none for this long.
            restart_seconds: the shortest time between two starts of the worker.

        Raises:
            ScoringError: no process can be started.
        """
        self._spec = spec
        self._answer_seconds = answer_seconds
        self._restart_seconds = restart_seconds
        self._past_seconds = 0.0  # processor time of the workers before the present one
        self._closed = threading.Event()
        self._conversation_lock = threading.Lock()  # held while a thread talks to the worker
        self._replacement_lock = threading.Lock()  # held briefly while a worker is replaced
        # Linux kills a worker when the thread that started it ends, so a lasting thread starts it.
        self._starter = ThreadPoolExecutor(1, "toxicity-starter")
        self._worker = self._start()

    @property
    def pid(self) -> int:
        """The process id of the present worker, which may have ended."""
        return self._worker.pid

    @property
    def processor_seconds(self) -> float:
        """See `Scorer.processor_seconds`. Loading does not count."""
        return self._past_seconds + self._worker.processor_seconds

    def wait_ready(self) -> None:
        """Wait until the scorer is loaded.

        Raises:
            ScoringError: the scorer cannot be loaded, or was closed.
        """
        with self._conversation_lock:
            self._ready_worker()

    def score(self, texts: Sequence[str]) -> list[float]:
        """See `Backend.score`. If the worker has died, another one loads the scorer first.

        Raises:
            ScoringError: the scorer failed; the worker died, or was killed because it hung; or
                this is closed.
        """
        if not texts:
            return []
        with self._conversation_lock:
            reply = self._ask(texts)
        if "error" in reply:
            raise ScoringError(str(reply["error"]))
        return check_scores(reply.get("scores"), len(texts))

    def close(self) -> None:
        """End the worker at once. See `Scorer.close`."""
        self._closed.set()
        with self._replacement_lock:
            self._worker.kill()
            self._starter.shutdown(wait=False)
        # A thread that talks to the worker sees its end and releases the lock.
        if self._conversation_lock.acquire(timeout=_CLOSE_SECONDS):
            try:
                self._worker.close()
            finally:
                self._conversation_lock.release()

    def _ask(self, texts: Sequence[str]) -> dict[str, object]:
        child = self._ready_worker()
        try:
            return child.ask(texts, self._answer_seconds)
        except WorkerLostError as error:
            raise self._scoring_error(child, error) from error

    def _ready_worker(self) -> WorkerProcess:
        if self._closed.is_set():
            raise self._closed_error()
        if self._worker.ended:
            self._replace()
        child = self._worker
        try:
            child.wait_ready(LOAD_SECONDS)
        except WorkerLostError as error:
            raise self._scoring_error(child, error) from error
        return child

    def _scoring_error(self, child: WorkerProcess, error: WorkerLostError) -> ScoringError:
        child.close()
        return self._closed_error() if self._closed.is_set() else ScoringError(str(error))

    def _replace(self) -> None:
        next_start = self._worker.started + self._restart_seconds
        self._closed.wait(max(0.0, next_start - time.monotonic()))
        with self._replacement_lock:
            if self._closed.is_set():
                raise self._closed_error()
            logger.warning("the toxicity scorer's process has ended; starting another")
            self._worker.close()
            self._past_seconds += self._worker.processor_seconds
            self._worker = self._start()

    def _start(self) -> WorkerProcess:
        return self._starter.submit(WorkerProcess, self._spec).result()

    @staticmethod
    def _closed_error() -> ScoringError:
        return ScoringError("the toxicity scorer is closed")
