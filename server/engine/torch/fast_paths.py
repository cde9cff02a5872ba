"""Defines and imports the module that makes the engine fast on one kind of device.

These modules import private parts of torch, a compiler, or CUDA, so only the one for the model's
device is imported.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from transformers import PreTrainedModel

from server.engine.torch.attention.plan import KVPlan
from server.engine.torch.loaded_interventions import LoadedInterventions
from server.engine.torch.model.loader import LoadedModel
from server.engine.torch.options import EngineOptions
from server.engine.torch.step.runner import Runner
from steering.hooks import SteeringHooks

_MODULES: Final[Mapping[str, str]] = {
    "cpu": "server.engine.torch.cpu.fast_path",
    "cuda": "server.engine.torch.cuda.fast_path",
}


@dataclass(frozen=True, slots=True)
class EngineParts:
    """The parts of an engine from which a faster runner is built."""

    loaded: LoadedModel
    hooks: SteeringHooks
    eager_runner: Runner  # runs the model's own modules, uncompiled and without graphs
    kv: KVPlan
    interventions: LoadedInterventions
    context_length: int  # tokens that a prompt and its completion may have together


class FastPath(Protocol):
    """A module that makes the engine fast on one kind of device."""

    def prepare(self, model: PreTrainedModel, options: EngineOptions) -> None:
        """Change the model in place, before the engine installs its attention and its hooks."""
        ...

    def faster_runner(self, parts: EngineParts, options: EngineOptions) -> Runner:
        """Return a runner that prepares work ahead of the steps; else `parts.eager_runner`."""
        ...


def fast_path_of(device: torch.device) -> FastPath:
    """Import and return the module for a kind of device."""
    fast_path: FastPath = importlib.import_module(_MODULES[device.type])
    return fast_path
