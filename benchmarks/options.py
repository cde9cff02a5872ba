"""Defines the options of the benchmarks: how much is measured, and with what."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.turns import Turns


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command, and the amount of work in each section."""

    model: str
    device: str
    rounds: int  # that count; one more warms up
    vllm_python: Path | None
    batches: tuple[int, ...] = (1, 8, 32)
    steps: int = 16  # of each trial in a round; the engine measures the dose in one of 16
    prompt_tokens: int = 32
    new_tokens: int = 128  # of each request to the engines that are compared
    tokens_inside_vllm: int = 32  # new ones of each request
    distinct: int = 32
    head_counts: tuple[int, ...] = (1, 8, 32)
    growth_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contexts: tuple[int, ...] = (32, 256, 1024)
    loaded: tuple[int, ...] = (1, 16, 64)
    registered: tuple[int, ...] = (1, 100, 1000)
    latency_tokens: int = 64
    long_prompt_tokens: int = 1000

    @property
    def fewer_rounds(self) -> int:
        """The rounds of sections that take long."""
        return max(1, self.rounds // 3)

    @property
    def turns(self) -> Turns:
        """The length of comparisons in the engine."""
        return Turns(self.rounds, self.steps, self.prompt_tokens)

    @property
    def conditions(self) -> str:
        """The sentence at the head of a page that says what was measured in the engine."""
        return (
            f"Decode steps in the engine on {self.model}, {self.prompt_tokens} prompt tokens and "
            f"{self.turns.tokens} generated ones in each sequence. What is compared takes a step "
            f"in turns; the time of {self.steps} steps is one value, {self.rounds} values each."
        )

    @classmethod
    def quick(cls, model: str, device: str, vllm_python: Path | None) -> "Options":
        """Return options that show that everything runs; the figures mean nothing."""
        return cls(
            model,
            device,
            rounds=1,
            vllm_python=vllm_python,
            batches=(1, 2),
            steps=2,
            prompt_tokens=4,
            new_tokens=8,
            tokens_inside_vllm=8,
            distinct=4,
            head_counts=(1, 4),
            growth_batches=(1, 2),
            contexts=(4, 32),
            loaded=(1, 4),
            registered=(1, 10),
            latency_tokens=8,
            long_prompt_tokens=100,
        )
