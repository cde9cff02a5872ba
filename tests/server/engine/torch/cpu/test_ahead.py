"""Tests that compiling on one thread leaves the modules that other threads run alone."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._inductor.loop_body import InterpreterShim
from torch._inductor.utils import fresh_cache
from torch.fx import _symbolic_trace

from server.engine.torch.cpu.ahead import compile_ahead, prepare_compiler

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def new_compiler() -> Iterator[None]:
    """Make torch's compiler forget what it has compiled, and its empty graph."""
    InterpreterShim._dummy_gm.cache_clear()
    with fresh_cache():
        yield


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Have another thread call a module in the middle of each trace, and return what it got."""
    module, value = nn.Identity(), "value"
    results: list[object] = []
    patch_wrapped_functions = _symbolic_trace._patch_wrapped_functions

    def call() -> None:
        try:
            results.append(module(value))
        except NameError as error:
            results.append(error)

    def call_beside(patcher: _symbolic_trace._Patcher) -> None:
        """Runs when `nn.Module.__call__` has just been replaced."""
        patch_wrapped_functions(patcher)
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    monkeypatch.setattr(_symbolic_trace, "_patch_wrapped_functions", call_beside)
    return results


@pytest.mark.usefixtures("new_compiler")
def test_a_prepared_compiler_leaves_the_modules_of_other_threads_alone(
    called: list[object],
) -> None:
    prepare_compiler()
    called.clear()
    layer = nn.Linear(8, 8)
    with torch.inference_mode():
        compile_ahead(lambda hidden: layer(hidden).relu(), (torch.ones(3, 8),), threads=1)
    assert called
    assert set(called) == {"value"}, called
