"""What makes the engine fast on one kind of device, built apart from the others.

The modules that implement it import private parts of torch, a compiler, or CUDA; only the one for
the device at hand is imported.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from transformers import PreTrainedModel

from server.engine.torch.attention.plan import KVPlan
from server.engine.torch.interventions import LoadedInterventions
from server.engine.torch.model.loader import LoadedModel
from server.engine.torch.options import EngineOptions
from server.engine.torch.step.runner import Runner
from steering.hooks import SteeringHooks

_MODULES: Final[Mapping[str, str]] = {
    "cpu": "server.engine.torch.cpu.paths",
    "cuda": "server.engine.torch.cuda.paths",
}


@dataclass(frozen=True, slots=True)
class Parts:
    """An engine's parts that a faster runner is made of."""

    loaded: LoadedModel
    hooks: SteeringHooks
    eager: Runner  # the model as it is
    kv: KVPlan
    interventions: LoadedInterventions
    context_length: int  # the longest prompt and completion, in tokens


class DevicePaths(Protocol):
    """A module that makes the engine fast on one kind of device."""

    def prepare(self, model: PreTrainedModel, options: EngineOptions) -> None:
        """Change a model, before the engine attends for it and edits it."""
        ...

    def faster_runner(self, parts: Parts, options: EngineOptions) -> Runner:
        """A runner that makes what it can ahead of the steps, or `parts.eager`."""
        ...


def paths_of(device: torch.device) -> DevicePaths:
    """The module for a kind of device, imported now."""
    paths: DevicePaths = importlib.import_module(_MODULES[device.type])
    return paths
