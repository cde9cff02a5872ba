"""Chooses the device of a check: a GPU, or the CPU with a tiny model to see that all of it runs."""

import time
from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from benchmarks.gpu.model import SEVEN_BILLION, TINY


@dataclass(frozen=True, slots=True)
class Place:
    """A device, and how much is measured there."""

    device: torch.device
    config: LlamaConfig
    batches: tuple[int, ...]
    distinct: int  # configurations in a batch of as many
    prompt_tokens: int
    long_prompt_tokens: int
    steps: int  # of each arm on the clock
    read_bytes: int  # at once, to measure the memory's bandwidth

    @classmethod
    def of(cls, dry_run: bool) -> "Place":
        """The first GPU, or the CPU for a dry run."""
        if dry_run:
            cpu = torch.device("cpu")
            return cls(cpu, TINY, (1, 4), 4, 8, 40, 3, 1 << 22)
        gpu = torch.device("cuda", 0)
        return cls(gpu, SEVEN_BILLION, (1, 64, 256), 64, 32, 2000, 24, 4 << 30)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def bandwidth(self) -> float:
        """Bytes a second at which the device sums what lies in its memory."""
        reads = 20
        values = torch.ones(self.read_bytes // 4, dtype=torch.float32, device=self.device)
        float(values.sum())
        began = time.perf_counter()
        for _ in range(reads):
            total = values.sum()
        float(total)  # waits for all of them
        return reads * self.read_bytes / (time.perf_counter() - began)
