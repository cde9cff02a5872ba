"""Tests the engine thread: calls between two steps, and the errors after it has ended.

All calls run between two steps, but of the pieces of longer work only one does.
"""

import itertools
import threading
from concurrent.futures import Future

import pytest

from server.engine.errors import EngineDeadError, ShuttingDownError
from server.engine.torch.sampling.postprocess import Delivery
from server.engine.torch.thread import EngineThread

SECONDS = 20


class Steps:
    """A fake engine core with endless steps, or none, which records events in their order."""

    def __init__(self, has_work: bool = True) -> None:
        self.has_work = has_work
        self.events: list[str] = []
        self.begin = threading.Event()

    def step(self) -> list[Delivery]:
        self.begin.wait(SECONDS)
        self.events.append("step")
        return []

    def make_pending(self) -> bool:
        return False


def started(steps: Steps) -> EngineThread:
    thread = EngineThread(steps, lambda _: None, lambda: None)
    thread.start()
    return thread


def test_there_is_one_piece_between_two_steps_and_any_number_of_calls() -> None:
    steps = Steps()
    thread = started(steps)
    pieces = [thread.call_piece(lambda: steps.events.append("piece")) for _ in range(5)]
    calls = [thread.call(lambda: steps.events.append("call")) for _ in range(5)]
    steps.begin.set()
    for future in (*pieces, *calls):
        future.result(SECONDS)
    thread.stop()
    events = [event for event in steps.events if event != "call"]
    assert events.count("piece") == 5
    assert ("piece", "piece") not in set(itertools.pairwise(events))
    calling = "".join(event[0] for event in steps.events)
    assert "ccccc" in calling, "a call has waited for a piece"


def test_pieces_are_done_where_there_are_no_steps() -> None:
    thread = started(Steps(has_work=False))
    assert [thread.call_piece(lambda: 7).result(SECONDS) for _ in range(3)] == [7, 7, 7]
    thread.stop()


def test_a_piece_that_is_cancelled_before_its_turn_is_not_done() -> None:
    steps = Steps()
    thread = started(steps)
    first, second = (thread.call_piece(lambda: steps.events.append("piece")) for _ in range(2))
    assert second.cancel()
    steps.begin.set()
    first.result(SECONDS)
    thread.call_piece(lambda: None).result(SECONDS)
    thread.stop()
    assert steps.events.count("piece") == 1


@pytest.mark.parametrize("piece", [True, False], ids=["pieces", "calls"])
def test_whoever_waits_hears_that_the_thread_was_told_to_stop(piece: bool) -> None:
    steps = Steps()
    thread = started(steps)
    call = thread.call_piece if piece else thread.call
    waiting: list[Future[None]] = [call(lambda: None)]
    thread.stop()
    steps.begin.set()
    # The first piece may still run after the current step, so only the last future is checked.
    waiting += [call(lambda: None) for _ in range(2)]
    with pytest.raises(ShuttingDownError):
        waiting[-1].result(SECONDS)
    thread._thread.join(SECONDS)
    with pytest.raises(ShuttingDownError):
        call(lambda: None).result(SECONDS)


@pytest.mark.parametrize("piece", [True, False], ids=["pieces", "calls"])
def test_whoever_waits_hears_that_the_thread_has_died(piece: bool) -> None:
    steps = Steps()
    steps.begin.set()

    def die() -> list[Delivery]:
        raise SystemExit

    steps.step = die  # type: ignore[method-assign]
    thread = started(steps)
    call = thread.call_piece if piece else thread.call
    thread._thread.join(SECONDS)
    with pytest.raises(EngineDeadError):
        call(lambda: None).result(SECONDS)
    assert thread.died
