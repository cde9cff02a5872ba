"""Our engine as a worker: all of it, as the server uses it, with asyncio and detokenisation."""

import asyncio
import sys

from benchmarks.core import at_full_speed
from benchmarks.workers.protocol import claim_stdout, serve
from server.engine.base import Request, SamplingSettings
from server.engine.torch.engine import TorchEngine
from server.engine.torch.generation import TorchGeneration
from server.engine.torch.model.loader import load_model
from server.engine.torch.options import EngineOptions
from server.own_thread import in_own_thread


async def generate(
    engine: TorchEngine, prompts: list[list[int]], new_tokens: int
) -> list[list[int]]:
    """One request for each prompt, all at once; greedy, end-of-text ignored."""
    sampling = SamplingSettings(new_tokens, temperature=0, ignore_eos=True)
    requests = [Request("bench", tuple(prompt), sampling) for prompt in prompts]
    generations = await engine.submit(requests)
    return await asyncio.gather(*(_tokens(generation) for generation in generations))


async def _tokens(generation: TorchGeneration) -> list[int]:
    return [token async for output in generation for token in output.token_ids]


def main(folder: str, dtype: str) -> None:
    """Load a folder, then answer."""
    answers = claim_stdout()
    with asyncio.Runner() as runner:
        options = EngineOptions(compile_layers=True)
        # As the server does.
        engine = in_own_thread(
            lambda: TorchEngine(load_model(folder, dtype), lambda _: {}, options)
        ).result()
        runner.run(engine.start())
        at_full_speed(engine._core)
        serve(
            lambda prompts, new_tokens: runner.run(generate(engine, prompts, new_tokens)),
            {},
            answers,
        )
        runner.run(engine.close())


if __name__ == "__main__":
    main(*sys.argv[1:])
