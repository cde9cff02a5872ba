"""Tells which fast paths an engine uses."""

from server.engine.torch.core import EngineCore
from server.engine.torch.cuda.graphs import GraphRunner


def form_of(core: EngineCore) -> str:
    """Name the memory that keys and values are kept in: slab or paged."""
    return type(core.store.memory).__name__.removesuffix("Memory").lower()


def graphs_of(core: EngineCore) -> int | None:
    """Count the graphs of an engine; None where steps run as they are."""
    runner = core._runner
    return runner.graphs if isinstance(runner, GraphRunner) else None
