"""What refines rows by reward heads on a CPU, made at start and held against the equations."""

from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir

from server.engine.torch.ahead import compare, warn_uncompiled
from steering.native import NativeRefinement, build_native
from steering.reward import RewardHead, apply_reward

_WIDTH: Final = 100
_UNITS: Final = 200
_ROWS: Final = 5
_STEPS: Final = 5


def compile_refinement() -> NativeRefinement | None:
    """None, with a warning, where it cannot be made or does not compute rightly."""
    try:
        folder = Path(cache_dir())  # where what torch compiles is loaded from as well
        folder.mkdir(parents=True, exist_ok=True)
        native = build_native(folder)
        _check(native)
    except Exception as error:
        warn_uncompiled("rewards run", "refine.cpp", error)
        return None
    return native


@torch.inference_mode()
def _check(native: NativeRefinement) -> None:
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    head = RewardHead(
        w1=numbers(_UNITS, _WIDTH) / _WIDTH**0.5,
        b1=numbers(_UNITS),
        w2=numbers(_UNITS) / _UNITS**0.5,
        b2=numbers(),
        direction=numbers(_WIDTH),
        positive_reward=numbers(),
    ).to(torch.device("cpu"))
    assert head.prepared is not None
    h, scales, sizes = numbers(_ROWS, _WIDTH), torch.ones(_ROWS, 1), torch.ones(_ROWS, _STEPS)
    refined = native(h, [(head.prepared, _ROWS)], scales, sizes)
    compare(refined, apply_reward(h, head, scales, sizes))
