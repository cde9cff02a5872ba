import os
from unittest.mock import patch

import pytest

from server.engine.vllm.environment import prepare_environment
from server.engine.vllm.plugin.wire import Runner


@pytest.mark.parametrize(("runner", "given"), [("v1", "0"), ("v2", "1")])
def test_vllm_is_told_which_runner_to_use(runner: Runner, given: str) -> None:
    """Also where the operator's own environment chooses another."""
    with patch.dict(os.environ, VLLM_USE_V2_MODEL_RUNNER="x"):
        prepare_environment(runner)
        assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == given
