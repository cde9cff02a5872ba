"""Tests on the loaded model, before anything is served, that the engine computes correctly.

Two things are checked with the model itself: that the engine's attention gives what
transformers' own gives, and that an edit at each hooked site, and before `lm_head`, reaches the
logits. An engine that would compute wrongly, or steer nothing, refuses to serve.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.model.description import ModelLoadError
from server.engine.probes import probe_head, probe_map
from server.engine.request import Request, SamplingSettings
from server.engine.torch.attention.backend import KVMemory, Lane
from server.engine.torch.scheduling.scheduler import Chunk
from server.engine.torch.scheduling.sequence import Sequence as EngineSequence
from server.engine.torch.step.batch import build_batch
from server.engine.torch.step.decoder import DecoderLayers, RecordedStep
from server.engine.torch.step.runner import Runner
from steering.bank import Bank
from steering.settings import AffineSettings, RewardSettings, SlottedEdit

_PROBE_TOKENS = 2  # one token attends to itself alone, so edits of queries and keys do nothing
_UNEDITED = 2  # unedited sequences in each batch of probes
_CHUNKS = (7, 1, 16)  # tokens of each prefill chunk in `check_forward`
# When layers are compiled, any size of an input that equals this is taken for the number of tokens.
# So it must differ from every size in a model.
_RECORDED_TOKENS = 13
# Relative difference of logits, in the norm.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def reference_logits(model: PreTrainedModel) -> Tensor:
    """Return transformers' logits after the probe prompt: (vocabulary,) float32.

    Call it before the engine changes anything in the model.
    """
    tokens = torch.tensor([_probe_prompt(model, sum(_CHUNKS))], device=model.device)
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
    return logits[0, -1].float()


def check_forward(
    model: PreTrainedModel, runner: Runner, memory: KVMemory, expected: Tensor
) -> None:
    """Compare the engine's forward pass, prefilling in chunks, with `reference_logits`.

    Raises:
        ModelLoadError: they differ, or the model does not run with the engine's attention.
    """
    length = sum(_CHUNKS)
    sequence = _sequence(_probe_prompt(model, length), ())
    bank = Bank(1, model.device)
    start = 0
    try:
        with _lanes(memory, [sequence], length) as lanes:
            for count in _CHUNKS:
                batch = build_batch([Chunk(sequence, start, count)], lanes, memory, model.device)
                logits = runner.run(batch, bank)
                windows = batch.attention.windows
                start += count
    except Exception as error:
        raise ModelLoadError(
            f"{type(model).__name__} does not run with the engine's attention: {error}"
        ) from error
    if _has_windows(model) and windows == {None}:
        raise ModelLoadError(
            f"{type(model).__name__} has sliding windows but does not tell the attention of them, "
            "so long prompts would be computed wrongly"
        )
    difference = float((logits[-1] - expected).norm() / expected.norm())
    if not difference < _TOLERANCE[model.dtype]:
        raise ModelLoadError(
            f"{type(model).__name__} gives other logits with the engine's attention than with "
            f"transformers' own (relative difference {difference:.2g}), so it is not served"
        )


def record_layers(
    model: PreTrainedModel, layers: DecoderLayers, runner: Runner, memory: KVMemory
) -> list[RecordedStep]:
    """Record the layers' inputs and outputs in a prefill of several tokens, and in a decode step.

    The recorded steps keep a lane of `memory` in use.
    """
    sequence = _sequence(_probe_prompt(model, _RECORDED_TOKENS + 1), ())
    lane = memory.lane()
    lane.reserve(_RECORDED_TOKENS + 1)
    lanes = {sequence: lane}
    bank = Bank(1, model.device)
    recorded = []
    for start, count in ((0, _RECORDED_TOKENS), (_RECORDED_TOKENS, 1)):
        batch = build_batch([Chunk(sequence, start, count)], lanes, memory, model.device)
        with layers.recording(count, batch.attention) as step:
            runner.run(batch, bank)
        recorded.append(step)
    return recorded


def _has_windows(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return "sliding_attention" in layer_types
    return getattr(config, "sliding_window", None) is not None


def check_lm_head(model: PreTrainedModel, runner: Runner, memory: KVMemory, width: int) -> None:
    """Raise ModelLoadError unless a reward edit before `lm_head` reaches the logits."""
    bank = Bank(1, model.device)
    bank.put(1, probe_head(width))
    edit = SlottedEdit(1, RewardSettings(eta=1.0, iterations=1, direction_scale=1.0))
    if not _reach_logits(model, runner, memory, bank, [edit])[0]:
        raise ModelLoadError("an edit before lm_head does not reach the logits")


def sites_per_batch(memory: KVMemory) -> int:
    """Return how many sites one batch of `dead_sites` can probe."""
    return memory.probe_lanes - _UNEDITED


def dead_sites(
    model: PreTrainedModel,
    runner: Runner,
    memory: KVMemory,
    sites: frozenset[str],
    widths: Mapping[str, int],
) -> frozenset[str]:
    """Return the hooked sites at which an edit does not reach the logits.

    A batch has one sequence for each of its sites, and a map edits that sequence at that site only.
    """
    ordered = sorted(sites)
    dead: set[str] = set()
    at_once = sites_per_batch(memory)
    for first in range(0, len(ordered), at_once):
        group = ordered[first : first + at_once]
        bank = Bank(len(group), model.device)
        for slot, site in enumerate(group, start=1):
            bank.put(slot, {site: probe_map(widths[site])})
        edits = [SlottedEdit(slot, AffineSettings(1.0)) for slot in range(1, len(group) + 1)]
        reached = _reach_logits(model, runner, memory, bank, edits)
        dead.update(site for site, alive in zip(group, reached, strict=True) if not alive)
    return frozenset(dead)


def _reach_logits(
    model: PreTrainedModel,
    runner: Runner,
    memory: KVMemory,
    bank: Bank,
    edits: Sequence[SlottedEdit],
) -> list[bool]:
    """Return for each edit whether it gives a sequence other logits than an unedited one has."""
    prompt = _probe_prompt(model, _PROBE_TOKENS)
    # There is an unedited sequence at each end: their difference shows how much logits depend on a
    # row's place in the batch.
    stacks: list[tuple[SlottedEdit, ...]] = [(), *((edit,) for edit in edits), ()]
    sequences = [_sequence(prompt, stack) for stack in stacks]
    chunks = [Chunk(sequence, 0, _PROBE_TOKENS) for sequence in sequences]
    with _lanes(memory, sequences, _PROBE_TOKENS) as lanes:
        logits = runner.run(build_batch(chunks, lanes, memory, model.device), bank)
    differences = (logits - logits[0]).abs().amax(dim=-1)
    threshold = 4 * differences[-1] + 1e-3 * logits[0].std()
    return (differences[1:-1] > threshold).tolist()


def _probe_prompt(model: PreTrainedModel, length: int) -> tuple[int, ...]:
    """Return distinct tokens, spread over the vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    return tuple((place + 1) * (vocabulary // (length + 2)) % vocabulary for place in range(length))


@contextmanager
def _lanes(
    memory: KVMemory, sequences: Sequence[EngineSequence], tokens: int
) -> Iterator[Mapping[EngineSequence, Lane]]:
    """Within the context, give each sequence a lane with room for `tokens` tokens."""
    lanes = {sequence: memory.lane() for sequence in sequences}
    try:
        for lane in lanes.values():
            lane.reserve(tokens)
        yield lanes
    finally:
        for lane in lanes.values():
            lane.free()


def _sequence(prompt: tuple[int, ...], edits: tuple[SlottedEdit, ...]) -> EngineSequence:
    sequence = EngineSequence.of(Request("self-test", prompt, SamplingSettings(max_tokens=1)))
    sequence.edits = edits
    return sequence
