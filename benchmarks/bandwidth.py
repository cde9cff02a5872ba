"""How fast this machine reads memory."""

import statistics
import time

import torch

BYTES = 512 * 1024 * 1024
REPEATS = 9


def read_bandwidth(device: str) -> float:
    """Bytes a second, by a sum over far more than the caches hold; a median."""
    values = torch.ones(BYTES // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        values.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return BYTES / statistics.median(seconds)
