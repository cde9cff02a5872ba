"""What an engine holds, and that in the end it holds nothing."""

import asyncio

from server.engine.torch.engine import TorchEngine


def idle(engine: TorchEngine) -> bool:
    """Nothing runs, waits, or holds memory or slots."""
    stats = engine.stats()
    return (
        (stats.running, stats.waiting, stats.kv_cache_usage) == (0, 0, 0)
        and engine._core.interventions.slots.pins == 0
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
