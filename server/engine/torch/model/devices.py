"""Tells where a model's parts are: on one device, or spread over several by accelerate."""

from itertools import chain

import psutil
import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn
from transformers import PreTrainedModel


def is_offloaded(model: PreTrainedModel) -> bool:
    """Return whether part of a model did not fit on the devices that it was spread over."""
    places = set(getattr(model, "hf_device_map", {}).values())  # empty on a single device
    return "disk" in places or ("cpu" in places and len(places) > 1)


def is_spread(model: PreTrainedModel) -> bool:
    """Return whether a model was placed on more than one device."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def keep_rows_on_host(model: PreTrainedModel) -> None:
    """Keep accelerate from moving `logits_to_keep` to the first device: it indexes on the last."""
    hook = getattr(model, "_hf_hook", None)  # None if one device holds the whole model
    if isinstance(hook, AlignDevicesHook):
        skipped = [hook.skip_keys] if isinstance(hook.skip_keys, str) else hook.skip_keys or []
        hook.skip_keys = [*skipped, "logits_to_keep"]


def layer_devices(model: PreTrainedModel, layers: int) -> tuple[torch.device, ...]:
    """Return the device of each layer's attention, found by the attention modules' `layer_idx`."""
    devices: dict[int, torch.device] = {}
    modules: nn.Module = model
    for module in modules.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int):
            tensors = chain(module.parameters(), module.buffers())  # packed weights are buffers
            devices[layer] = next(tensors).device
    return tuple(devices[layer] for layer in range(layers))


def has_failed(device: torch.device) -> bool:
    """Return whether a GPU has failed and computes nothing more for this process. Waits for it.

    An exception alone does not tell, because torch raises the same one for errors that pass.
    """
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; on the CPU, those that can be had without swapping."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)
