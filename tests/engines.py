"""Checks that an engine has given back all that its requests held."""

import asyncio
from typing import Final

from server.engine.torch.engine import TorchEngine

_COMPILE_SECONDS: Final = 120.0


def idle(engine: TorchEngine) -> bool:
    """Return whether no request runs, waits or holds KV blocks, slots or a place in the queue."""
    stats = engine.stats()
    return (
        (stats.running, stats.waiting, stats.kv_cache_usage) == (0, 0, 0)
        and engine._core.interventions.slots._pins.total() == 0
        and not engine._core.scheduler.leaders
        and not engine._core.store.lanes
        and not engine._generations
    )


async def close_checked(engine: TorchEngine) -> None:
    """Close an engine; check its invariants before and after, and that it is idle at the end."""
    core = engine._core
    if engine.ready:
        await asyncio.wrap_future(engine._thread.call(core.check))
    await engine.close()
    core.check()
    assert idle(engine)
    if (layers := core._runner.compiled) is not None:
        # torch's compiler serves one thread at a time, and the next test may need it, so wait for
        # this engine's graphs.
        assert await asyncio.to_thread(layers.wait, _COMPILE_SECONDS), "it compiles without end"
