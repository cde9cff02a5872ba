"""The plugin inside vLLM's V2 runner, whose kernels Triton interprets: `make test-vllm`.

What needs a GPU is not shown here: CUDA graphs, copies beside the computation, compiled kernels.
"""

from importlib.util import find_spec

import pytest

from tests.oracles import Oracle
from tests.server.engine.vllm.plugin.test_steered_vllm import (
    Served,
    assert_equal_to_oracle,
    interventions,
)
from tests.vllm_models import vllm_model
from tests.vllm_v2 import AFTER_OVERFLOW, MIX, Seen, seen_in_a_process_of_its_own

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
    pytest.mark.timeout(900),  # the interpreter is slow, and a busy machine slower
]


class Expected(Served):
    """What the oracle says of the interventions that vLLM's process has loaded."""

    def __init__(self) -> None:
        self.interventions = interventions("llama")
        self.oracle = Oracle(vllm_model("llama"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return seen_in_a_process_of_its_own(tmp_path_factory.mktemp("v2"))


def test_any_mix_equals_the_oracle(seen: Seen) -> None:
    """Answers and prompts, in chunks, and after preemptions, which end and begin a request."""
    for (prompt, edits), output in zip(MIX, seen.mix, strict=True):
        assert_equal_to_oracle(Expected(), prompt, edits, output)
    assert seen.preempted


def test_a_seed_gives_the_same_alone_and_in_a_batch(seen: Seen) -> None:
    assert seen.seeded["others"] == seen.seeded["nothing"] != seen.seeded["another seed"]


def test_a_request_that_overflows_is_marked_and_ends_no_other(seen: Seen) -> None:
    """Afterwards, others are given the blocks that it left."""
    broken, other = seen.overflow.values()
    assert broken > 0 == other
    for (prompt, edits), output in zip(AFTER_OVERFLOW, seen.after_overflow, strict=True):
        assert_equal_to_oracle(Expected(), prompt, edits, output)


def test_vllm_s_log_probabilities_have_no_bias(seen: Seen) -> None:
    """One of `log_softmax`, which the plugin replaces in the V1 runner, is about 8e-6."""
    assert max(map(abs, seen.logprob_errors)) < 1e-6


def test_vllm_s_own_requests_are_taken_while_it_warms_up_only(seen: Seen) -> None:
    assert seen.warm_up == "a request does not say how it is steered"


def test_a_request_of_another_client_ends_the_engine(seen: Seen) -> None:
    assert seen.foreign == "a request does not say how it is steered"
