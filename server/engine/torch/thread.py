"""The engine thread: steps while there is work, and runs what others ask of it in between.

Everything the core owns (scheduler, bank, hooks, slots) is touched on this thread only, so none
of it needs a lock.
"""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from server.engine.base import EngineDeadError, EngineError, ShuttingDownError
from server.engine.torch.sampling.postprocess import Delivery

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Steps(Protocol):
    """What the thread needs of the core."""

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        ...

    def step(self) -> list[Delivery]:
        """Compute one step."""
        ...

    def make_pending(self) -> bool:
        """Do one piece of work that nobody waits for; False if there is none."""
        ...


class EngineThread:
    """Owns the core while it runs. `deliver` and `ended` are called on the engine thread."""

    def __init__(
        self, core: Steps, deliver: Callable[[list[Delivery]], None], ended: Callable[[], None]
    ) -> None:
        self._core = core
        self._deliver = deliver
        self._tell_end = ended
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pieces: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._died = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes calls."""
        return self._thread.is_alive() and not self._stopping and not self._ended

    @property
    def died(self) -> bool:
        """Whether an exception has ended the thread."""
        return self._died

    @property
    def end(self) -> EngineError:
        """Why the thread takes no more calls, once it takes none."""
        if self._stopping:
            return ShuttingDownError("the server is shutting down")
        return EngineDeadError("the engine has stopped")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function between two steps.

        Returns:
            Its result or exception; if the thread has ended, ShuttingDownError where it was told
            to and EngineDeadError where it was not.
        """
        future, run = self._promised(function)
        self._inbox.put(run)
        if self._ended:
            self._drain()
        return future

    def call_piece(self, function: Callable[[], T]) -> Future[T]:
        """Run one piece of some longer work: between two steps there is only one such piece.

        Returns:
            As `call`.
        """
        future, run = self._promised(function)
        self._pieces.put(run)
        self._inbox.put(_nothing)  # wakes the thread where it has no work
        if self._ended:
            self._drain()
        return future

    def tell(self, function: Callable[[], object]) -> None:
        """Run a function between two steps whose end nobody waits for; what it raises is logged."""
        self.call(function).add_done_callback(log_unread)

    def _promised(self, function: Callable[[], T]) -> tuple[Future[T], Callable[[], None]]:
        """A future, and what makes it the function's result, on the engine thread."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if self._ended:
                future.set_exception(self.end)
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        return future, run

    def stop(self) -> None:
        """Take no more calls, and end after the step that is computed now.

        Does not wait for that step: it may be long, or never end.
        """
        self._stopping = True
        self._inbox.put(_nothing)  # wakes the thread where it has no work

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._receive()
                outputs = self._core.step()
                if outputs:
                    self._deliver(outputs)
                _run_next(self._pieces)
        except BaseException:
            self._died = True
            logger.critical("the engine thread died", exc_info=True)
        finally:
            self._ended = True
            self._drain()
            self._tell_end()

    def _receive(self) -> None:
        """Run what waits in the inbox; if there is no work, do what is pending, or wait."""
        self._drain()
        while not (self._core.has_work or self._stopping):
            if not (_run_next(self._pieces) or self._core.make_pending()):
                self._inbox.get()()
            self._drain()

    def _drain(self) -> None:
        while _run_next(self._inbox):
            pass
        while self._ended and _run_next(self._pieces):  # which tell that it has ended
            pass


def log_unread(future: Future[Any]) -> None:
    """Log the exception of a call that nobody waits for, unless it is one that clients are told."""
    if future.cancelled() or (error := future.exception()) is None:
        return
    if not isinstance(error, EngineError):
        logger.error("a call of the engine failed after its caller had left", exc_info=error)


def _nothing() -> None:
    """Wakes whoever waits for something to run."""


def _run_next(waiting: "queue.SimpleQueue[Callable[[], None]]") -> bool:
    """Run the next function; False if there is none."""
    try:
        run = waiting.get_nowait()
    except queue.Empty:
        return False
    run()
    return True
