"""What an engine holds, and that in the end it holds nothing."""

import asyncio
from typing import Final

from server.engine.torch.engine import TorchEngine

_COMPILE_SECONDS: Final = 120.0


def idle(engine: TorchEngine) -> bool:
    """Nothing runs, waits, or holds memory, slots or places in the queue."""
    stats = engine.stats()
    return (
        (stats.running, stats.waiting, stats.kv_cache_usage) == (0, 0, 0)
        and engine._core.interventions.slots.pins == 0
        and not engine._core.scheduler.leaders
        and not engine._core.store.lanes
        and not engine._generations
    )


async def close_checked(engine: TorchEngine) -> None:
    """Close an engine whose books must add up, whatever a test has done to it."""
    core = engine._core
    if engine.ready:
        await asyncio.wrap_future(engine._thread.call(core.check))
    await engine.close()
    core.check()
    assert idle(engine)
    if (layers := core._runner.compiled) is not None:
        # torch's compiler serves one thread at a time, and the next test may want it.
        assert await asyncio.to_thread(layers.wait, _COMPILE_SECONDS), "it compiles without end"
