"""Tests models over several devices: maps, slabs and heads are on the device of their layer.

On a machine without a GPU, `meta` stands in for a second device: it checks placement, because it
refuses tensors of other devices, but it computes no values.
"""

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model

from server.engine.output import StepOutput
from server.engine.request import Edit, Request, SamplingSettings
from server.engine.torch.attention.slab import KVShape
from server.engine.torch.attention.slab_attention import SlabMemory
from server.engine.torch.attention.transformers_hook import use_engine_attention
from server.engine.torch.build import build_core
from server.engine.torch.model.devices import is_offloaded, keep_rows_on_host, layer_devices
from server.engine.torch.model.loader import LoadedModel, load_model
from server.engine.torch.options import EngineOptions
from server.engine.torch.scheduling.scheduler import Chunk
from server.engine.torch.scheduling.sequence import Sequence
from server.engine.torch.step.batch import build_batch
from server.engine.torch.step.runner import Runner
from steering.bank import Bank
from steering.hooks import SteeringHooks
from steering.settings import AffineSettings, RewardSettings, SlottedEdit
from tests.conftest import TINY_OPTIONS, LoadTiny
from tests.steered import GREEDY, PROMPTS, STACKS, interventions_of, tokens_of
from tests.tiny import SITES, VOCABULARY, save_tiny

EDITS = (
    Edit("a", AffineSettings(0.6)),
    Edit("supported", AffineSettings(0.7)),
    Edit("r", RewardSettings(0.5, 2)),
)


def split_over(loaded: LoadedModel, second: str) -> None:
    """Put the second layer and all later modules on another device, by accelerate."""
    places = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": second,
        "model.norm": second,
        "lm_head": second,
    }
    dispatch_model(loaded.model, places, main_device="cpu", force_hooks=True)
    keep_rows_on_host(loaded.model)


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
def test_hooks_bank_and_slabs_follow_their_layers_device(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_tiny()
    use_engine_attention(loaded.model)
    split_over(loaded, "meta")
    # accelerate would bring the logits back to the first device, but `meta` has no numbers.
    monkeypatch.setattr(loaded.model._hf_hook, "io_same_device", False)
    hooks = SteeringHooks(loaded.model, loaded.lm_head)
    bank = Bank(len(EDITS), torch.device("cpu"))
    for slot, edit in enumerate(EDITS, start=1):
        bank.put(slot, interventions_of()[edit.digest])
    for site in SITES:
        hooks.install(site)
    edits = tuple(SlottedEdit(slot, edit.settings) for slot, edit in enumerate(EDITS, start=1))
    shape = KVShape.of(loaded.model)
    memory = SlabMemory(shape)
    slabs = {}
    for prompt in PROMPTS[:2]:
        sequence = Sequence.of(Request("test", tuple(prompt), GREEDY))
        sequence.edits = edits
        slabs[sequence] = memory.lane()
        slabs[sequence].reserve(len(prompt))
    chunks = [Chunk(sequence, 0, sequence.prompt_length) for sequence in slabs]
    batch = build_batch(chunks, slabs, memory, torch.device("cpu"))
    logits = Runner(loaded.model, hooks).run(batch, bank)
    assert (logits.shape, logits.device.type) == ((2, VOCABULARY), "meta")
    assert [device.type for device in shape.devices] == ["cpu", "meta"]
    stacks = [bank._sites[site] for site in SITES]
    assert [stack.table.delta.device.type for stack in stacks] == ["cpu", "meta"]
    assert [low.device.type for stack in stacks if (low := stack.table.low) is not None] == [
        "cpu",
        "meta",
    ]
    [head] = bank._heads.values()
    assert head.w1.device.type == "meta"


def test_a_dispatched_model_gives_what_it_gives_undispatched(load_tiny: LoadTiny) -> None:
    """Both "devices" are the CPU, so that there are values to compare."""

    def tokens(loaded: LoadedModel) -> list[list[int]]:
        core = build_core(loaded, TINY_OPTIONS)
        requests = [
            Request("test", tuple(prompt), GREEDY, edits)
            for prompt, edits in zip(PROMPTS, (EDITS, (), STACKS["r"], STACKS["a"]), strict=True)
        ]
        sequences = [Sequence.of(request) for request in requests]
        core.admit(sequences, interventions_of())
        outputs: dict[Sequence, list[StepOutput]] = {sequence: [] for sequence in sequences}
        while core.has_work:
            for sequence, output in core.step():
                assert isinstance(output, StepOutput)
                outputs[sequence].append(output)
        return [tokens_of(each) for each in outputs.values()]

    split = load_tiny()
    split_over(split, "cpu")
    assert tokens(split) == tokens(load_tiny())


def test_a_model_is_loaded_over_all_devices(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny-llama")
    loaded = load_model(str(folder), "float32", device_map="auto")
    assert not is_offloaded(loaded.model)
    assert layer_devices(loaded.model, 2) == (torch.device("cpu"),) * 2
    core = build_core(loaded, EngineOptions(kv_cache_gb=0.01))
    sampling = SamplingSettings(3, temperature=0, ignore_eos=True)
    core.admit([Sequence.of(Request("test", (1, 2, 3), sampling))], {})
    assert sum(len(core.step()) for _ in range(3)) == 3


@pytest.mark.parametrize(
    ("places", "offloaded"),
    [
        ({"": 0}, False),
        ({"model": 0, "lm_head": 1}, False),
        ({"": "cpu"}, False),
        ({"model": 0, "lm_head": "cpu"}, True),
        ({"model": "cpu", "lm_head": "disk"}, True),
    ],
)
def test_what_did_not_fit_is_found(
    load_tiny: LoadTiny,
    monkeypatch: pytest.MonkeyPatch,
    places: dict[str, object],
    offloaded: bool,
) -> None:
    model = load_tiny().model
    monkeypatch.setattr(model, "hf_device_map", places, raising=False)
    assert is_offloaded(model) is offloaded


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_what_one_gives(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny-llama")
    loaded = load_model(str(folder), "float32", "cuda", device_map="auto")
    build_core(loaded, TINY_OPTIONS)  # its self-test compares with transformers' own attention
    assert len({device.index for device in layer_devices(loaded.model, 2)}) == 2
