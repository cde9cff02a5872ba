"""The engine's self-test on tiny models of several families, and which fast paths it chose."""

import logging
from typing import Final

import torch

from benchmarks.gpu.forms import form_of, graphs_of
from benchmarks.gpu.model import random_model
from benchmarks.gpu.place import Place
from benchmarks.gpu.rows import Rows
from server.engine.torch.build import build_core
from server.engine.torch.options import EngineOptions
from tests.tiny import tiny_config

_FAMILIES: Final = ("llama", "mistral", "qwen3", "gemma2", "gpt2", "opt-350m")
_OPTIONS: Final = EngineOptions(kv_cache_gb=0.05, max_batch_tokens=64, max_batch_size=8)


class _Warnings(logging.Handler):
    """Keeps what is logged as a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def run(place: Place, rows: Rows) -> None:
    """Build an engine for each family, in half precision and one in float32."""
    dtypes = [(family, torch.bfloat16) for family in _FAMILIES] + [("llama", torch.float32)]
    for family, dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        with rows.attempt(family=family, dtype=name):
            warnings = _Warnings()
            logging.getLogger().addHandler(warnings)
            try:
                core = build_core(random_model(tiny_config(family), place.device, dtype), _OPTIONS)
            finally:
                logging.getLogger().removeHandler(warnings)
            rows.tell(
                family=family,
                dtype=name,
                attention=form_of(core),
                graphs=graphs_of(core),
                warnings="; ".join(warnings.messages),
            )
            if warnings.messages:  # a fast path was turned off
                rows.failures += 1
