"""Tests of `in_own_thread`, which runs a function on a new thread."""

import threading

import pytest

from server.own_thread import in_own_thread


def test_the_result_comes_from_another_thread_which_ends() -> None:
    thread = in_own_thread(threading.current_thread).result(30)
    assert thread is not threading.current_thread()
    thread.join(30)
    assert not thread.is_alive()


def test_exception_reaches_the_future() -> None:
    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        in_own_thread(fails).result(30)
