"""Runs the engine's self-test on tiny models of several families, and tells the fast paths."""

import logging
from typing import Final

import torch

from benchmarks.gpu.engine import attention_of, graphs_of
from benchmarks.gpu.model import random_model
from benchmarks.gpu.page import Page
from benchmarks.gpu.place import Place
from server.engine.torch.build import build_core
from server.engine.torch.options import EngineOptions
from tests.tiny import tiny_config

_FAMILIES: Final = ("llama", "mistral", "qwen3", "gemma2", "gpt2", "opt-350m")
_OPTIONS: Final = EngineOptions(kv_cache_gb=0.05, max_batch_tokens=64, max_batch_size=8)


class _Warnings(logging.Handler):
    """Keeps all warnings that are logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def run(place: Place, page: Page) -> None:
    """Build an engine for each family, in half precision and one in float32."""
    dtypes = [(family, torch.bfloat16) for family in _FAMILIES] + [("llama", torch.float32)]
    for family, dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        with page.attempt(family=family, dtype=name):
            warnings = _Warnings()
            logging.getLogger().addHandler(warnings)
            try:
                core = build_core(random_model(tiny_config(family), place.device, dtype), _OPTIONS)
            finally:
                logging.getLogger().removeHandler(warnings)
            page.tell(
                family=family,
                dtype=name,
                attention=attention_of(core),
                graphs=graphs_of(core),
                warnings="; ".join(warnings.messages),
            )
            if warnings.messages:  # a fast path was turned off
                page.failures += 1
