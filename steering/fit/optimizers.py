"""The optimizers of a LinEAS fit, and their state as named tensors, to be saved and restored."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from steering.fit.lineas_settings import LineasSettings, OptimizerName

_STEPS: Final = "step"  # () float32, the steps that an optimizer has done with a parameter
_ADAM: Final = ("exp_avg", "exp_avg_sq", _STEPS)

# An optimizer's tensors for each parameter, by torch's names. Others have the parameter's shape.
_PARTS: Final[Mapping[OptimizerName, tuple[str, ...]]] = {"sgd": (), "adam": _ADAM, "adamw": _ADAM}


def make_optimizer(
    settings: LineasSettings, maps: list[Tensor], gates: list[Tensor]
) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name, for the parameters of maps and of gates."""
    groups: list[dict[str, object]] = [{"params": maps}]
    if gates:
        # A gate that decays goes to 1/2 everywhere, and not to the identity.
        groups.append({"params": gates, "weight_decay": 0.0})
    match settings.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=settings.learning_rate)
        case "adam":
            return torch.optim.Adam(groups, lr=settings.learning_rate)
        case "adamw":
            return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.decay)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the optimizer's tensors as `<parameter's name>.<part>`; none before its first step."""
    return {
        f"{name}.{part}": value
        for name, parameter in parameters.items()
        for part, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def optimizer_shapes(
    parameters: Mapping[str, Tensor], optimizer: OptimizerName
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what `optimizer_state` gives after a step."""
    return {
        f"{name}.{part}": () if part == _STEPS else tuple(parameter.shape)
        for name, parameter in parameters.items()
        for part in _PARTS[optimizer]
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    kind: OptimizerName,
) -> None:
    """Set the optimizer's tensors to those of `state`, which must have all of them.

    Args:
        optimizer: one that was made for these parameters.
        parameters: name -> parameter, in the optimizer's order.
        state: what `optimizer_state` gave, and possibly more.
        kind: the optimizer's name.
    """
    # Through `load_state_dict`, which puts each tensor on the device that the optimizer wants.
    optimizer.load_state_dict(
        {
            "state": {
                index: {part: state[f"{name}.{part}"].clone() for part in _PARTS[kind]}
                for index, name in enumerate(parameters)
            },
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
