"""Measures how fast a device reads its memory."""

import statistics
import time

import torch

_REPEATS = 9
_SUMS = 4  # that are waited for together


def read_bandwidth(device: str | torch.device, size: int = 512 << 20) -> float:
    """Return bytes per second, a median, from sums over `size` bytes, more than caches hold."""
    values = torch.ones(size // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        for _ in range(_SUMS):
            total = values.sum()
        total.item()  # waits for the device
        seconds.append((time.perf_counter() - began) / _SUMS)
    return size / statistics.median(seconds)
