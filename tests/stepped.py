"""Runs requests on an engine's core step by step, in the test's own thread."""

from dataclasses import replace

from server.engine.output import StepOutput
from server.engine.request import Edit, Request
from server.engine.torch.core import EngineCore
from server.engine.torch.scheduling.sequence import Sequence
from tests.steered import GREEDY, NEW_TOKENS, interventions_of


def sequence(prompt: bytes, edits: tuple[Edit, ...] = (), tokens: int = NEW_TOKENS) -> Sequence:
    """Return the sequence of a request that decodes greedily."""
    sampling = replace(GREEDY, max_tokens=tokens)
    return Sequence.of(Request("test", tuple(prompt), sampling, edits))


def finish(
    core: EngineCore, sequences: list[Sequence], family: str = "llama"
) -> list[list[StepOutput]]:
    """Admit sequences together, run them to their ends, and return the outputs of each."""
    core.admit(sequences, interventions_of(family))
    outputs: dict[Sequence, list[StepOutput]] = {each: [] for each in sequences}
    while core.has_work:
        for owner, output in core.step():
            assert isinstance(output, StepOutput), output
            outputs[owner].append(output)
    return [outputs[each] for each in sequences]
