"""Tests that a model is described without being loaded, as the loaded model is described."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.model import unloaded
from server.engine.model.description import ModelLoadError
from server.engine.model.fingerprint import fingerprint_of
from server.engine.model.unloaded import UnloadedModel, describe_unloaded
from server.engine.torch.model.loader import load_model
from tests.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokenizer

Weights = dict[str, Tensor]


def described(folder: Path | str, dtype: str = "float32") -> UnloadedModel:
    return describe_unloaded(str(folder), dtype, "cpu", lambda _sentence: None)


def equals_the_loaded(folder: Path | str, dtype: str = "float32") -> bool:
    found, loaded = described(folder, dtype), load_model(str(folder), dtype)
    assert found.description == loaded.description
    assert found.eos_tokens == loaded.eos_tokens
    assert found.dtype is loaded.model.dtype
    assert found.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    return True


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where transformers would load the weights."""

    def load(*_: object) -> PreTrainedModel:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(unloaded, "load_weights", load)


def saved(model: PreTrainedModel, folder: Path, max_shard_size: str = "50GB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_described_as_if_it_was_loaded(
    family: str, tiny_folders: Mapping[str, Path]
) -> None:
    assert equals_the_loaded(tiny_folders[family])


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_model_of_several_files_is_described_as_if_it_was_loaded(
    family: str, tmp_path: Path
) -> None:
    config = tiny_config(family)
    config.tie_word_embeddings = True
    folder = saved(tiny_model(family, config=config).bfloat16(), tmp_path / "sharded", "10KB")
    assert len([*folder.glob("model-*.safetensors")]) > 2
    assert equals_the_loaded(folder)


def changed(folder: Path, to: Path, change: Callable[[Weights], object]) -> Path:
    """Copy a model's folder, and change its weights."""
    shutil.copytree(folder, to)
    path = to / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    return to


def configured(folder: Path, to: Path, **fields: object) -> Path:
    """Copy a model's folder, and set fields of its configuration."""
    shutil.copytree(folder, to)
    path = to / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return to


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_files_of_a_model_without_lm_head_lack_a_prefix(
    family: str, prefix: str, tmp_path: Path
) -> None:
    config = tiny_config(family)
    config.tie_word_embeddings = True
    folder = saved(tiny_model(family, config=config), tmp_path / "whole")

    def strip(weights: Weights) -> None:
        for name in list(weights):
            weights[name.removeprefix(prefix)] = weights.pop(name)

    assert equals_the_loaded(changed(folder, tmp_path / "base", strip))


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("both", [False, True])
def test_tied_weights_may_be_stored_under_either_name_or_both(
    both: bool, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    def rename(weights: Weights) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        if not both:
            del weights["model.embed_tokens.weight"]

    folder = changed(tiny_folders["qwen2"], tmp_path / "tied", rename)
    original = described(tiny_folders["qwen2"]).description
    assert described(folder).description.fingerprint == original.fingerprint
    assert equals_the_loaded(folder)


@pytest.mark.usefixtures("never_loaded")
def test_weights_that_the_model_has_no_use_for_do_not_count(
    tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = changed(tiny_folders["llama"], tmp_path / "more", lambda weights: weights.update(more))
    assert described(folder).description.fingerprint == (
        described(tiny_folders["llama"]).description.fingerprint
    )
    assert equals_the_loaded(folder)


def only_pickled(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    torch.save(weights, to / "pytorch_model.bin")
    (to / "model.safetensors").unlink()
    return to


def tied_and_different(folder: Path, to: Path) -> Path:
    def add(weights: Weights) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1

    return changed(folder, to, add)


@pytest.mark.parametrize(
    ("change", "says"),
    [(only_pickled, "has no safetensors files"), (tied_and_different, "differ, though")],
)
def test_a_model_is_loaded_once_where_its_files_do_not_tell_the_weights_apart(
    change: Callable[[Path, Path], Path],
    says: str,
    tiny_folders: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    folder = change(tiny_folders["qwen2"], tmp_path / "other")
    said: list[str] = []
    found = describe_unloaded(str(folder), "bfloat16", "cpu", said.append)
    assert found.description == load_model(str(folder), "bfloat16").description
    assert says in said[-1]
    assert "loads the model once" in said[-1]


def test_a_model_that_transformers_renames_is_loaded_once(
    tiny_folders: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(weights: Weights) -> None:
        weights["model.final.weight"] = weights.pop("model.norm.weight")

    folder = changed(tiny_folders["llama"], tmp_path / "renamed", rename)
    given = tiny_model("llama", seed=1)
    monkeypatch.setattr(unloaded, "load_weights", lambda *_: given)
    assert described(folder).description.fingerprint == fingerprint_of(given)


@pytest.mark.usefixtures("never_loaded")
def test_a_model_that_lacks_weights_is_refused(
    tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    folder = changed(tiny_folders["llama"], tmp_path / "less", lambda weights: weights.pop(name))
    with pytest.raises(ModelLoadError, match=r"lacks 1 .*layers\.1\.self_attn\.q_proj"):
        described(folder)


@pytest.mark.usefixtures("never_loaded")
def test_weights_of_another_shape_are_refused(
    tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    other = {"model.norm.weight": torch.ones(7)}
    folder = changed(tiny_folders["llama"], tmp_path / "x", lambda weights: weights.update(other))
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight has shape \(7,\)"):
        described(folder)


def test_broken_files_are_one_sentence(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    sharded = saved(tiny_model("llama"), tmp_path / "sharded", "10KB")
    shard = sorted(sharded.glob("model-*.safetensors"))[1].name
    index = "model.safetensors.index.json"
    weights = (tiny_folders["llama"] / "model.safetensors").read_bytes()
    broken: list[tuple[Path, str, bytes | None]] = [
        (tiny_folders["llama"], "model.safetensors", weights[:-1000]),
        (tiny_folders["llama"], "model.safetensors", weights[:4]),
        (tiny_folders["llama"], "model.safetensors", b""),
        (tiny_folders["llama"], "model.safetensors", None),
        (tiny_folders["llama"], "config.json", b"{"),
        (tiny_folders["llama"], "config.json", b"[]"),
        (tiny_folders["llama"], "config.json", None),
        (tiny_folders["llama"], "tokenizer.json", b"{"),
        (sharded, shard, None),
        (sharded, shard, b"x"),
        (sharded, index, b"{"),
        (sharded, index, b"[]"),
        (sharded, index, b"\xff"),
        (sharded, index, b"{}"),
        (sharded, index, b'{"weight_map": 1}'),
        (sharded, index, b'{"weight_map": {"a": 1}}'),
        (sharded, index, b'{"weight_map": {}}'),
        (sharded, index, None),
    ]
    for place, (folder, name, content) in enumerate(broken):
        copy = tmp_path / str(place)
        shutil.copytree(folder, copy)
        (copy / name).unlink()
        if content is not None:
            (copy / name).write_bytes(content)
        with pytest.raises(ModelLoadError, match=r"cannot load|lacks"):
            described(copy)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "x"},
        {"hidden_size": -1},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"hidden_act": "none"},
        {"rope_parameters": 1},
        {"rope_parameters": {"rope_type": "none"}},
        {"vocab_size": 0},
        {"num_hidden_layers": 3},
        {"model_type": "none"},
        {"layer_types": ["linear_attention", "full_attention"]},
    ],
    ids=str,
)
def test_a_configuration_that_no_model_can_have_is_one_sentence(
    fields: dict[str, object], tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = configured(tiny_folders["llama"], tmp_path / "changed", **fields)
    for describe in (described, load_model):
        with pytest.raises(ModelLoadError):
            describe(str(folder), "float32")


def test_the_end_of_a_text_is_that_of_the_generation_configuration(
    tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = configured(tiny_folders["llama"], tmp_path / "model", eos_token_id=7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert described(folder).eos_tokens == {5, 6}
    assert equals_the_loaded(folder)
    (folder / "generation_config.json").unlink()
    assert described(folder).eos_tokens == {7}
    assert equals_the_loaded(folder)
    folder = configured(folder, tmp_path / "without", eos_token_id=None)
    assert equals_the_loaded(folder)


@pytest.mark.usefixtures("never_loaded")
def test_a_quantized_model_is_identified_by_its_files(
    tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """vLLM reads weights that transformers cannot, or not without a GPU."""

    def quantize(weights: Weights) -> None:
        name = "model.layers.0.mlp.up_proj"
        weights[f"{name}.qweight"] = (100 * weights.pop(f"{name}.weight")).to(torch.int32)
        weights[f"{name}.scales"] = torch.full((8,), 0.01)

    settings = {"quant_method": "gptq", "bits": 4}
    plain = configured(tiny_folders["llama"], tmp_path / "plain", quantization_config=settings)
    folder = changed(plain, tmp_path / "first", quantize)
    first = described(folder).description
    scales = "model.layers.0.mlp.up_proj.scales"
    folder = changed(folder, tmp_path / "other", lambda weights: weights[scales].mul_(2))
    assert first.fingerprint != described(folder).description.fingerprint
    assert first.site_widths == described(tiny_folders["llama"]).description.site_widths


@pytest.mark.usefixtures("never_loaded")
def test_a_model_of_the_hub_is_read_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--somebody--Tiny"
    saved(tiny_model("llama"), cached / "snapshots" / "1", "10KB")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    assert equals_the_loaded("somebody/Tiny")
    for shard in sorted((cached / "snapshots" / "1").glob("model-*.safetensors"))[1:]:
        shard.unlink()
    with pytest.raises(ModelLoadError, match=r"cannot load 'somebody/Tiny'"):
        described("somebody/Tiny")
    with pytest.raises(ModelLoadError, match=r"cannot load 'somebody/other'"):
        described("somebody/other")


@pytest.mark.embedded
def test_the_embedded_model_is_described_as_if_it_was_loaded() -> None:
    assert equals_the_loaded("embedded", "bfloat16")
