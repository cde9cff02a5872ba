"""Hugging Face transformers as a worker: `generate` on a static batch, or continuous batching."""

import sys
from collections.abc import Mapping
from typing import Protocol, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.workers.protocol import Generate, claim_stdout, serve

# Of the machine's memory, for keys and values: more than this load fills. By default it takes 90 %,
# writes zeros into all of it, and is killed where others have some.
MEMORY_SHARE = 0.2


class Output(Protocol):
    """One request's, of continuous batching."""

    generated_tokens: list[int]


class Model(Protocol):
    """What transformers' models have and its types do not tell."""

    device: torch.device
    generation_config: GenerationConfig

    def generate(
        self, inputs: Tensor, *, attention_mask: Tensor, generation_config: GenerationConfig
    ) -> Tensor:
        """Prompts and completions: (rows, tokens)."""
        ...

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
        *,
        persistent_manager: bool,
    ) -> Mapping[str, Output]:
        """By request, in the order of the prompts."""
        ...

    def destroy_cached_continuous_batching_manager(self) -> None:
        """Let go of the manager that `persistent_manager` has kept."""
        ...


def static_batch(model: Model) -> Generate:
    """`generate` on prompts of equal lengths, as one tensor."""

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


def continuous_batching(model: Model) -> Generate:
    """`generate_batch` with its default settings, but for the size of its cache.

    Its manager, with the cache, is kept from call to call for as long as the batch stays the same
    size, so that only the first call pays for it: better than the default, which makes another one
    each time.
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
            ContinuousBatchingConfig(max_memory_percent=MEMORY_SHARE),
            persistent_manager=True,
        )
        return [list(output.generated_tokens) for output in outputs.values()]

    return generate


MODES = {"generate": static_batch, "continuous": continuous_batching}


def load(folder: str, dtype: str) -> Model:
    """A model that no token ends the answers of."""
    model = cast(Model, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    model.generation_config.eos_token_id = None
    return model  # in evaluation mode, as `from_pretrained` leaves it


def main(mode: str, folder: str, dtype: str) -> None:
    """Load a folder, then answer."""
    answers = claim_stdout()
    generate = MODES[mode](load(folder, dtype))
    serve(generate, {"transformers": transformers.__version__}, answers)


def _greedy(new_tokens: int) -> GenerationConfig:
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
