"""Sets what vLLM reads from the environment. Import no vLLM before."""

import os
from typing import Final

from server.engine.vllm.plugin.orphans import SERVER_VARIABLE
from server.engine.vllm.plugin.wire import Runner

_FIXED: Final = {
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # see `arguments`
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",  # so that a row without numbers ends its own request only
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",  # other plugins could change the models that ours steers
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_DEFAULTS: Final = {"VLLM_LOGGING_LEVEL": "WARNING"}


def prepare_environment(runner: Runner = "v1") -> None:
    """Set the variables, for this process and for those that vLLM starts.

    Args:
        runner: which of vLLM's two model runners it is to use.
    """
    os.environ |= _FIXED
    os.environ[SERVER_VARIABLE] = str(os.getpid())
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "v2"))
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
