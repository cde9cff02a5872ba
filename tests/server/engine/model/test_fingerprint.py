"""Tests model fingerprints: a hash of the weights and one of the configuration that matters."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from interventions.artifact import read_artifact, read_manifest
from interventions.bundled import bundled_artifacts
from interventions.compatibility import check_shapes
from interventions.layout import shapes_of
from server.engine.model.fingerprint import fingerprint_of
from server.engine.torch.model.loader import load_model


def fingerprint(folder: Path, dtype: str = "float32") -> str:
    return load_model(str(folder), dtype).description.fingerprint


def changed(folder: Path, to: Path, **fields: object) -> Path:
    """Copy a model's folder, and set these fields of its configuration."""
    shutil.copytree(folder, to)
    path = to / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return to


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("llama", {"rms_norm_eps": 1e-5}),
        ("llama", {"hidden_act": "gelu"}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": False}),
        ("gpt2", {"layer_norm_epsilon": 1e-6}),
    ],
)
def test_equal_weights_under_another_configuration_are_another_model(
    family: str, fields: dict[str, object], tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = tiny_folders[family]
    weights, configuration = fingerprint(folder).split("-")
    others = fingerprint(changed(folder, tmp_path / folder.name, **fields)).split("-")
    assert others[0] == weights
    assert others[1] != configuration


@pytest.mark.parametrize(
    "fields",
    [
        {"transformers_version": "5.16.0"},
        {"dtype": "float16"},
        {"torch_dtype": "bfloat16"},
        {"_name_or_path": "/home/somebody/model", "_model_name_or_path": "A name"},
        {"use_cache": False},
        {"architectures": None},
        {"attention_dropout": 0.1, "initializer_range": 0.5},
        {"eos_token_id": [5, 6], "pad_token_id": None},
        {"id2label": {"0": "x"}, "output_attentions": False},
        {"rms_norm_eps": 9.999999974752427e-07},  # 1e-6 as a float32
        {"num_hidden_layers": 2, "hidden_act": "silu"},  # the values that the model has anyway
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_changes_no_computation_does_not_count(
    fields: dict[str, object], tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = tiny_folders["llama"]
    assert fingerprint(changed(folder, tmp_path / folder.name, **fields)) == fingerprint(folder)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_a_model_that_is_saved_again_and_loaded_otherwise_is_the_same(
    family: str, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    loaded = load_model(str(tiny_folders[family]), "bfloat16")
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    found = {
        fingerprint(tmp_path),
        fingerprint(tmp_path, "bfloat16"),
        fingerprint(tmp_path, "auto"),
    }
    assert found == {loaded.description.fingerprint}


def test_a_default_counts_the_same_whether_a_version_knows_the_field_or_not() -> None:
    def made(**fields: object) -> PreTrainedModel:
        config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=8)
        config.__dict__.update(fields)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        return model

    def configuration(model: PreTrainedModel) -> str:
        return fingerprint_of(model).partition("-")[2]

    lacking = made()
    del lacking.config.__dict__["reorder_and_upcast_attn"]
    assert configuration(lacking) == configuration(made())
    assert configuration(made(reorder_and_upcast_attn=True)) != configuration(made())


@pytest.mark.parametrize("path", bundled_artifacts(), ids=lambda path: path.stem)
def test_a_bundled_artifact_names_no_place_on_a_machine(path: Path) -> None:
    for value in read_manifest(path).training.values():
        assert not re.search(r"(^|[\s'\"=])(/|~|\.\.|[A-Za-z]:\\)", str(value)), value


@pytest.mark.embedded
def test_the_bundled_artifacts_are_of_the_embedded_model() -> None:
    """The oldest one's fingerprint lacks the configuration's part, and this gives no warning."""
    description = load_model("embedded", "bfloat16").description
    for path in bundled_artifacts():
        whole = description.fingerprint
        expected = whole.split("-")[0] if path.stem == "detox-lineas" else whole
        assert read_manifest(path).base_model.fingerprint == expected
        artifact = read_artifact(path)
        shapes = shapes_of(artifact.parameters)
        assert check_shapes(artifact.manifest, shapes, description) == ()
