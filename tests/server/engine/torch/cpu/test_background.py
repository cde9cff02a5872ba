"""Tests the background thread, which runs functions in the order in which they are given."""

import threading

from server.engine.torch.cpu.background import BackgroundThread


def test_what_is_given_runs_in_order_beside_everything_else() -> None:
    background = BackgroundThread("test")
    assert background.wait(0)
    go, ran = threading.Event(), list[int]()
    background.run(lambda: ran.append(int(go.wait(30))))
    background.run(lambda: ran.append(2))
    assert background.pending == 2
    assert not background.wait(0.01)
    go.set()
    assert background.wait(30)
    assert (ran, background.pending) == ([1, 2], 0)


def test_it_starts_again_when_there_is_something_to_do_again() -> None:
    background = BackgroundThread("test")
    for number in range(3):
        done = threading.Event()
        background.run(done.set)
        assert background.wait(30), number
        assert done.is_set()
