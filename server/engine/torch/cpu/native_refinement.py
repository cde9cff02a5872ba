"""Builds the C++ code that refines rows by reward heads on a CPU, and checks it, at start."""

from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir

from server.engine.torch.cpu.ahead import compare, warn_uncompiled
from steering.native import NativeRefinement, build_native
from steering.reward import RewardHead, apply_reward


def make_native_refinement() -> NativeRefinement | None:
    """Build and check the native refinement. Return None, with a warning, if either fails."""
    try:
        native = build_native(Path(cache_dir()))  # torch loads its own compiled code from there too
        for width, units, rows in ((96, 64, 1), (100, 200, 40)):
            _check(native, width, units, rows)
    except Exception as error:
        warn_uncompiled("rewards run", "refine.cpp", error)
        return None
    return native


@torch.inference_mode()
def _check(native: NativeRefinement, width: int, units: int, rows: int) -> None:
    """Raise CompiledWronglyError unless a head's rows become what `apply_reward` makes of them."""
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    head = RewardHead(
        w1=numbers(units, width) / width**0.5,
        b1=numbers(units),
        w2=numbers(units) / units**0.5,
        b2=numbers(),
        direction=numbers(width),
        positive_reward=numbers(),
    ).prepare()
    assert head.prepared is not None
    h, scales, sizes = numbers(rows, width), torch.ones(rows, 1), torch.full((rows, 5), 0.5)
    refined = native(h, [(head.prepared, rows)], scales, sizes)
    compare(refined, apply_reward(h, head, scales, sizes))
