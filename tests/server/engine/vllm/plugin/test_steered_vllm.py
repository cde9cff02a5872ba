"""The plugin inside vLLM's own runner, on its CPU build: `make test-vllm`."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.torch.loaded_interventions import Parameters
from steering.settings import AffineSettings, RewardSettings
from tests.oracles import Oracle, Stack
from tests.tiny import family_sites, head_width, random_head, random_maps
from tests.vllm_models import (
    FAMILIES,
    load_all,
    recorded_logits,
    steered_vllm,
    steering_args,
    vllm_in_this_process,
    vllm_model,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]
NEW_TOKENS = 12
NOTHING_SHARED: dict[str, Any] = {"enable_prefix_caching": False}
PROMPTS = (
    b"hello world, how are you?",
    b"x",
    b"The quick brown fox jumps over the lazy dog, then it sleeps. " * 2,  # in several chunks
)
STACKS: dict[str, tuple[tuple[str, AffineSettings | RewardSettings], ...]] = {
    "base": (),
    "a": (("a", AffineSettings(1.0)),),
    "a at another strength": (("a", AffineSettings(0.4)),),
    "a on the prompt": (("a", AffineSettings(0.9, "prompt")),),
    "a on what is generated": (("a", AffineSettings(0.9, "generated")),),
    "both parts": (("both parts", AffineSettings(0.9)),),
    "r": (("r", RewardSettings(0.5, 5)),),
    "r with other settings": (("r", RewardSettings(0.2, 2, 0.5)),),
    "three": (
        ("both parts", AffineSettings(0.5)),
        ("r", RewardSettings(0.3, 2)),
        ("a", AffineSettings(0.6)),
    ),
}


def interventions(family: str) -> dict[str, Parameters]:
    sites = family_sites(family)
    return {
        "a": random_maps(1, sites=sites),
        "both parts": random_maps(2, sites=sites[:1], support=True, gate=True),
        "r": random_head(5, head_width(family)),
    }


@pytest.fixture(scope="module", autouse=True)
def _vllm_in_this_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with vllm_in_this_process(tmp_path_factory.mktemp("vllm-cache")):
        yield


class Served:
    """vLLM with the interventions loaded, and what the oracle says of them."""

    def __init__(self, llm: Any, family: str) -> None:
        self.llm = llm
        self.interventions = interventions(family)
        self.slots = load_all(llm, self.interventions)
        self.oracle = Oracle(vllm_model(family))

    def stack(self, edits: str) -> Stack:
        return [(self.interventions[digest], settings) for digest, settings in STACKS[edits]]

    def generate(self, work: Sequence[tuple[bytes, str]], **options: Any) -> list[Any]:
        """vLLM's outputs for prompts with stacks, all in one go."""
        from vllm import SamplingParams  # noqa: PLC0415  only where it is

        options = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, **options}
        seed = options.pop("seed", None)
        parameters = [
            SamplingParams(
                detokenize=False,
                extra_args=steering_args(STACKS[edits], self.slots, seed),
                **options,
            )
            for _, edits in work
        ]
        prompts = [
            {"prompt_token_ids": list(prompt), "cache_salt": edits} for prompt, edits in work
        ]
        outputs: list[Any] = self.llm.generate(prompts, parameters, use_tqdm=False)
        return outputs


def assert_equal_to_oracle(served: Served, prompt: bytes, edits: str, output: Any) -> None:
    """Each token is the oracle's greedy one, or nearly ties with it; all are as probable, the
    prompt's too. The oracle reads the whole text once: a token does not change what precedes it.
    """
    answer = output.outputs[0]
    tokens = [*prompt, *answer.token_ids]
    assert len(tokens) == len(prompt) + NEW_TOKENS
    rows = served.oracle.logits(tokens, len(prompt), served.stack(edits)).double()
    scores = rows.log_softmax(-1)
    for place in range(1, len(tokens)):
        token, row = tokens[place], scores[place - 1]
        generated = place - len(prompt)
        found = answer.logprobs[generated] if generated >= 0 else output.prompt_logprobs[place]
        assert found[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
        if generated >= 0:
            assert float(row.max() - row[token]) <= 1e-4, f"token {generated} of {edits}"


MIX = [(prompt, edits) for prompt in PROMPTS for edits in STACKS]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_mix_equals_the_oracle(family: str, tmp_path: Path) -> None:
    with steered_vllm(family, tmp_path, enable_prefix_caching=False) as llm:
        served = Served(llm, family)
        outputs = served.generate(MIX, logprobs=0, prompt_logprobs=0)
        for (prompt, edits), output in zip(MIX, outputs, strict=True):
            assert_equal_to_oracle(served, prompt, edits, output)


def test_a_tensor_parallel_group_equals_the_oracle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, each with half of the heads, in processes of their own, on a processor each."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with steered_vllm("llama", tmp_path, **NOTHING_SHARED, **options) as llm:
        served = Served(llm, "llama")
        ranks = llm.collective_rpc("steering_sites")
        outputs = served.generate(MIX, logprobs=0, prompt_logprobs=0)
    assert ranks == [list(family_sites("llama"))] * 2
    for (prompt, edits), output in zip(MIX, outputs, strict=True):
        assert_equal_to_oracle(served, prompt, edits, output)


PLAIN = [(prompt, "base") for prompt in PROMPTS]


def plain_logits(llm: Any) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """The tokens and every step's logits of unsteered requests."""
    from vllm import SamplingParams  # noqa: PLC0415  only where it is

    parameters = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        detokenize=False,
        extra_args=steering_args((), ()),
    )
    prompts = [{"prompt_token_ids": list(prompt)} for prompt, _ in PLAIN]
    with recorded_logits(llm) as logits:
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
    return tokens_of(outputs), logits


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected) > NEW_TOKENS
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def vllm_itself(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """What vLLM gives eagerly without the plugin."""
    folder = tmp_path_factory.mktemp("model")
    with steered_vllm("llama", folder, steered=False, **NOTHING_SHARED) as llm:
        return plain_logits(llm)


def test_unsteered_requests_give_what_vllm_gives_to_the_bit(
    vllm_itself: tuple[list[tuple[int, ...]], list[Tensor]], tmp_path: Path
) -> None:
    tokens, logits = vllm_itself
    with steered_vllm("llama", tmp_path, **NOTHING_SHARED) as llm:
        Served(llm, "llama")
        found_tokens, found_logits = plain_logits(llm)
    assert_same_bits(found_logits, logits)
    assert found_tokens == tokens


def test_what_is_loaded_changes_no_bit_of_unsteered_requests_when_compiled(
    vllm_itself: tuple[list[tuple[int, ...]], list[Tensor]], tmp_path: Path
) -> None:
    with steered_vllm("llama", tmp_path, enforce_eager=False, **NOTHING_SHARED) as llm:
        tokens, before = plain_logits(llm)
        served = Served(llm, "llama")
        served.generate(MIX)
        tokens_after, after = plain_logits(llm)
    assert_same_bits(after, before)
    assert tokens == tokens_after == vllm_itself[0]


def tokens_of(outputs: Sequence[Any]) -> list[tuple[int, ...]]:
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def test_a_request_of_another_client_ends_the_engine(tmp_path: Path) -> None:
    """It could be one whose steering got lost on the way."""
    from vllm import SamplingParams  # noqa: PLC0415  only where it is

    with (
        steered_vllm("llama", tmp_path) as llm,
        pytest.raises(Exception, match="does not say how it is steered"),
    ):
        llm.generate(
            [{"prompt_token_ids": [1, 2]}], SamplingParams(detokenize=False), use_tqdm=False
        )
