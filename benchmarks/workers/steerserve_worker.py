"""Runs steerserve's engine as a worker, with asyncio and detokenization, as the server uses it."""

import asyncio
import sys
import time

from benchmarks.workers.protocol import serve
from server.engine.generation import DeliveredGeneration
from server.engine.request import Request, SamplingSettings
from server.engine.torch.engine import TorchEngine
from server.engine.torch.model.loader import load_model
from server.engine.torch.options import EngineOptions
from server.own_thread import in_own_thread


async def generate(
    engine: TorchEngine, prompts: list[list[int]], new_tokens: int
) -> list[list[int]]:
    """Send one greedy request for each prompt, all at once, and ignore end-of-text tokens."""
    sampling = SamplingSettings(new_tokens, temperature=0, ignore_eos=True)
    requests = [Request("bench", tuple(prompt), sampling) for prompt in prompts]
    generations = await engine.submit(requests)
    return await asyncio.gather(*(_tokens(generation) for generation in generations))


async def _tokens(generation: DeliveredGeneration) -> list[int]:
    return [token async for output in generation for token in output.token_ids]


def main(folder: str, dtype: str) -> None:
    """Load a folder, then answer."""
    with asyncio.Runner() as runner:
        options = EngineOptions(compile_layers=True)
        # The server makes its engine in a thread of its own, too.
        engine = in_own_thread(
            lambda: TorchEngine(load_model(folder, dtype), lambda _: {}, options)
        ).result()
        runner.run(engine.start())
        while engine.stats().compiling:
            time.sleep(0.1)
        serve(lambda prompts, tokens: runner.run(generate(engine, prompts, tokens)), {})
        runner.run(engine.close())


if __name__ == "__main__":
    main(*sys.argv[1:])
