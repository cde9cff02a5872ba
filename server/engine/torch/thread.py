"""The engine thread: computes steps while there is work, and runs others' calls in between.

Everything the core owns (scheduler, bank, hooks, slots) is touched on this thread only, so none
of it needs a lock.
"""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from server.engine.errors import EngineDeadError, EngineError, ShuttingDownError
from server.engine.torch.sampling.postprocess import Delivery

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Steps(Protocol):
    """The part of the core that the thread calls."""

    @property
    def has_work(self) -> bool:
        """True if the next step has anything to compute."""
        ...

    def step(self) -> list[Delivery]:
        """Compute one step."""
        ...

    def make_pending(self) -> bool:
        """Do one piece of work that no request waits for. Return False if there is none."""
        ...


class EngineThread:
    """Owns the core while it runs. `deliver` and `ended` are called on the engine thread."""

    def __init__(
        self, core: Steps, deliver: Callable[[list[Delivery]], None], ended: Callable[[], None]
    ) -> None:
        self._core = core
        self._deliver = deliver
        self._report_end = ended
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pieces: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self.died = False  # true once an exception has ended the thread
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """True while the thread runs and takes calls."""
        return self._thread.is_alive() and not self._stopping and not self._ended

    @property
    def end_error(self) -> EngineError:
        """The error that says why the thread takes no more calls. Valid only once it takes none."""
        if self._stopping:
            return ShuttingDownError("the server is shutting down")
        return EngineDeadError("the engine has stopped")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function between two steps.

        Returns:
            A future of its result or exception. If the thread has ended, the exception is
            ShuttingDownError after `stop`, and EngineDeadError otherwise.
        """
        future, run = self._promised(function)
        self._inbox.put(run)
        if self._ended:
            self._drain()
        return future

    def call_piece(self, function: Callable[[], T]) -> Future[T]:
        """Run one piece of some longer work. Only one such piece runs between two steps.

        Returns:
            A future like that of `call`.
        """
        future, run = self._promised(function)
        self._pieces.put(run)
        self._inbox.put(_nothing)  # wakes the thread if it waits for work
        if self._ended:
            self._drain()
        return future

    def tell(self, function: Callable[[], object]) -> None:
        """Run a function between two steps without waiting for it. Unexpected errors are logged."""
        self.call(function).add_done_callback(log_unread)

    def _promised(self, function: Callable[[], T]) -> tuple[Future[T], Callable[[], None]]:
        """Return a future, and the call that runs `function` and settles the future."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if self._ended:
                future.set_exception(self.end_error)
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        return future, run

    def stop(self) -> None:
        """Make the thread take no more calls, and end after the current step.

        Does not wait for that step: it may be long, or never end.
        """
        self._stopping = True
        self._inbox.put(_nothing)  # wakes the thread if it waits for work

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._receive()
                outputs = self._core.step()
                if outputs:
                    self._deliver(outputs)
                _run_next(self._pieces)
        except BaseException:
            self.died = True
            logger.critical("the engine thread died", exc_info=True)
        finally:
            self._ended = True
            self._drain()
            self._report_end()

    def _receive(self) -> None:
        """Run the inbox's calls. While there is no work, run pieces or pending work, or wait."""
        self._drain()
        while not (self._core.has_work or self._stopping):
            if not (_run_next(self._pieces) or self._core.make_pending()):
                self._inbox.get()()
            self._drain()

    def _drain(self) -> None:
        while _run_next(self._inbox):
            pass
        while self._ended and _run_next(self._pieces):  # each future gets `end_error`
            pass


def log_unread(future: Future[Any]) -> None:
    """Log the exception of a call that nobody waits for, unless it is meant for a client."""
    if future.cancelled() or (error := future.exception()) is None:
        return
    if not isinstance(error, EngineError):
        logger.error("a call of the engine failed after its caller had left", exc_info=error)


def _nothing() -> None:
    """Do nothing: as an entry in the inbox, this only wakes the thread."""


def _run_next(waiting: "queue.SimpleQueue[Callable[[], None]]") -> bool:
    """Run the next function. Return False if there is none."""
    try:
        run = waiting.get_nowait()
    except queue.Empty:
        return False
    run()
    return True
