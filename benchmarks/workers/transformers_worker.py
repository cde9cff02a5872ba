"""Runs Hugging Face transformers as a worker: `generate` on a static batch, or its batching."""

import sys
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.workers.protocol import Generate, serve

# The share of the machine's memory for keys and values, which is more than this load fills. By
# default they take 90 %, filled with zeros, and the process is killed where others use the rest.
_MEMORY_SHARE = 0.2


def static_batch(model: Any) -> Generate:
    """Return a function that calls `generate` on prompts of equal lengths, as one tensor."""

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        input_ids = torch.tensor(prompts, device=model.device)
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=_greedy(new_tokens),
        )
        tokens: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
        return tokens

    return generate


def continuous_batching(model: Any) -> Generate:
    """Return a function that calls `generate_batch` with its defaults, but for its cache's size.

    The manager and its cache are kept from call to call while the batch size stays the same, so
    that only the first call pays for them. By default every call makes another manager.
    """
    batch = 0

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        nonlocal batch
        if len(prompts) != batch:
            model.destroy_cached_continuous_batching_manager()
            batch = len(prompts)
        outputs = model.generate_batch(
            prompts,
            _greedy(new_tokens),
            ContinuousBatchingConfig(max_memory_percent=_MEMORY_SHARE),
            persistent_manager=True,
        )
        return [list(output.generated_tokens) for output in outputs.values()]

    return generate


MODES = {"generate": static_batch, "continuous": continuous_batching}


def load(folder: str, dtype: str) -> Any:
    """Load a model whose answers no token ends. Its types do not declare what is used here."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model  # in evaluation mode, as `from_pretrained` leaves it


def main(mode: str, folder: str, dtype: str) -> None:
    """Load a folder, then answer."""
    serve(MODES[mode](load(folder, dtype)), {"transformers": transformers.__version__})


def _greedy(new_tokens: int) -> GenerationConfig:
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
