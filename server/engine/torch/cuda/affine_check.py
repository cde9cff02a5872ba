"""Compares the affine edits' GPU kernel with plain arithmetic before the kernel is used."""

import importlib
from typing import Final

import torch
from torch import Tensor

from server.engine.torch.model.fallback import fall_back
from steering.affine import AffineMap, Gate, edit_stacks
from steering.kernels.affine_edit import EditStacks, use_kernel_on_gpus
from steering.site_maps import SiteMaps

_KERNEL: Final = "steering.kernels.affine_triton"  # by name: Triton is not installed everywhere
_TOKENS: Final = 5
_DEPTH: Final = 2
# The largest relative difference, in the norm, of a token's edit. Kernel and reference both compute
# in float32 and round once.
_TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class WrongEditError(ArithmeticError):
    """The kernel's edits of a site's tokens differ from plain arithmetic."""


def use_affine_kernel(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Make the kernel edit sites on GPUs; if it fails its check, warn and return False.

    Args:
        width: the width of a site.
        dtype: the dtype of activations.

    Raises:
        ModelLoadError: the device has failed, and computes nothing any more.
    """
    try:
        kernel: EditStacks = importlib.import_module(_KERNEL).edit_stacks_triton
        _check(kernel, width, dtype, device)
    except Exception as error:
        fall_back(
            error,
            device,
            "the kernel of edits",
            "affine edits run without a kernel, which is slower",
        )
        return False
    use_kernel_on_gpus(kernel)
    return True


@torch.inference_mode()
def _check(kernel: EditStacks, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise WrongEditError unless the kernel equals plain arithmetic for maps of every sort."""
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    bound = torch.ones(width)
    gate = Gate(numbers(width) / width**0.5, numbers())
    maps = SiteMaps(4, width, device)
    maps.put(1, AffineMap(numbers(width), numbers(width)))
    maps.put(2, AffineMap(numbers(width), numbers(width), gate=gate))
    maps.put(3, AffineMap(numbers(width), numbers(width), low=-bound, high=bound, gate=gate))
    slots = torch.tensor([[0, 1, 2, 3, 0], [0, 2, 0, 1, 3]], device=device)
    strength = numbers(_DEPTH, _TOKENS).to(device)
    activations = numbers(_TOKENS, width).to(device, dtype)
    doses, due_doses = torch.zeros(2, 2, _DEPTH, _TOKENS, device=device)
    got = kernel(activations, slots, strength, maps.table, doses)
    due = edit_stacks(activations, slots, strength, maps.table, due_doses)
    if not torch.equal(got[0], activations[0]):
        raise WrongEditError("a token without an edit was changed")
    edit = (due - activations).float().norm(dim=1)[1:]
    worst = float(((got - due).float().norm(dim=1)[1:] / edit).max())
    if not worst < _TOLERANCE[dtype]:  # true for NaN, too
        raise WrongEditError(f"a token's edit is off by {worst:.2g}")
    if not torch.allclose(doses, due_doses, rtol=1e-3):
        raise WrongEditError("doses are off")
