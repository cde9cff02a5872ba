"""Chooses the device of a check: a GPU, or the CPU with a tiny model to see that all of it runs."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from benchmarks.bandwidth import read_bandwidth
from benchmarks.gpu.model import SEVEN_BILLION, TINY


@dataclass(frozen=True, slots=True)
class Place:
    """A device, and how much is measured there."""

    device: torch.device
    config: LlamaConfig
    batches: tuple[int, ...]
    distinct: int  # configurations in a batch of at least as many
    prompt_tokens: int
    long_prompt_tokens: int
    steps: int  # of each trial that are timed
    read_bytes: int  # for the memory's bandwidth

    @classmethod
    def of(cls, dry_run: bool) -> "Place":
        """Return the first GPU, or the CPU for a dry run."""
        if dry_run:
            cpu = torch.device("cpu")
            return cls(cpu, TINY, (1, 4), 4, 8, 40, 3, 1 << 22)
        gpu = torch.device("cuda", 0)
        return cls(gpu, SEVEN_BILLION, (1, 64, 256), 64, 32, 2000, 24, 4 << 30)

    def bandwidth(self) -> float:
        """Return the bytes per second at which the device reads its memory."""
        return read_bandwidth(self.device, self.read_bytes)
