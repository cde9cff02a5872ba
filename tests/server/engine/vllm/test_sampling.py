"""What vLLM is told of a request: `make test-vllm`."""

from importlib.util import find_spec

import pytest

from server.engine.request import Request, SamplingSettings
from server.engine.vllm.plugin.wire import Runner, Steering

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]


@pytest.mark.parametrize(
    ("runner", "vllm_seed", "plugin_seed"), [("v1", None, 2**63 - 1), ("v2", 2**63 - 1, None)]
)
def test_a_seed_is_told_to_what_draws_by_it(
    runner: Runner, vllm_seed: int | None, plugin_seed: int | None
) -> None:
    from server.engine.vllm.sampling import sampling_params  # noqa: PLC0415  where vLLM is

    request = Request("r", (1, 2), SamplingSettings(3, seed=2**63 - 1))
    parameters = sampling_params(request, (), frozenset(), "r-0", runner)
    assert parameters.seed == vllm_seed
    assert Steering.from_extra_args(parameters.extra_args).seed == plugin_seed
