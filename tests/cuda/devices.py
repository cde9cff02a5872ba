"""The device of the GPU tests (a GPU, or the CPU in a dry run), and helpers that they share."""

from typing import Final, Protocol

import pytest
import torch

from server import variables
from server.engine.torch.core import EngineCore
from server.engine.torch.cuda.graphs import GraphRunner
from server.engine.torch.model.loader import LoadedModel
from server.engine.torch.options import EngineOptions

GPU: Final = torch.cuda.is_available()
DRY_RUN: Final = not GPU and variables.DRY_RUN.read() == "1"
DEVICE: Final = torch.device("cuda", 0) if GPU else torch.device("cpu")
MARKS: Final = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (GPU or DRY_RUN), reason="needs a GPU"),
    # torch warns so in set_sync_debug_mode, and pytest turns warnings into errors.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

# With attention="pages", an engine on which pages do not work raises an error that says why.
OPTIONS = EngineOptions(
    *(20, 64), kv_cache_gb=0.05, attention="pages", prefill_tokens=64, check_invariants=True
)


class LoadOnDevice(Protocol):
    """Loads a tiny model of a family onto the device."""

    def __call__(self, family: str = "llama", dtype: str = "bfloat16") -> LoadedModel: ...


def refuse_waits(refuse: bool) -> None:
    """Make torch raise where the host would wait for the GPU, or let it wait again."""
    if GPU:
        torch.cuda.set_sync_debug_mode("error" if refuse else "default")


def graphs_of(core: EngineCore) -> GraphRunner:
    """Return the runner of an engine, which must have made graphs and given up none."""
    runner = core._runner
    assert isinstance(runner, GraphRunner), "no graphs were made; the log says why"
    assert runner.graphs > 0
    assert_none_given_up(runner)
    return runner


def assert_none_given_up(runner: GraphRunner) -> None:
    """Assert that no graph was given up after a failed capture."""
    assert None not in runner._graphs.values()


def make_all(core: EngineCore) -> None:
    """Make all pending graphs, as an idle engine does."""
    while core.make_pending():
        pass
    assert core.compiling == 0
    assert_none_given_up(graphs_of(core))


class Replays:
    """Counts the steps that any engine replays from a graph."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        tail = GraphRunner._logits_after_decoder

        def counting(runner: GraphRunner, *arguments: object) -> torch.Tensor:
            self.count += 1
            return tail(runner, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(GraphRunner, "_logits_after_decoder", counting)
