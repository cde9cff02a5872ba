"""Tests that models are loaded and described, and that unservable ones are refused."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    T5Config,
)

from server.engine.model.description import ModelLoadError, resolve_dtype
from server.engine.torch.model.loader import load_model
from tests.tiny import VOCABULARY, WIDTH, tiny_tokenizer


def test_a_model_is_described_in_numbers(tiny_folders: Mapping[str, Path]) -> None:
    description = load_model(str(tiny_folders["llama"]), "float32").description
    assert description.id == "tiny-llama"
    assert description.architecture == "LlamaForCausalLM"
    assert (description.hidden_size, description.head_width) == (WIDTH, WIDTH)
    assert (description.num_layers, description.vocab_size) == (2, VOCABULARY)


def test_the_fingerprint_is_of_the_weights_and_not_of_their_dtype(
    tiny_folders: Mapping[str, Path],
) -> None:
    prints = {
        (family, dtype): load_model(str(tiny_folders[family]), dtype).description.fingerprint
        for family in ("llama", "qwen3")
        for dtype in ("float32", "bfloat16")
    }
    assert prints["llama", "float32"] == prints["llama", "bfloat16"]
    assert prints["llama", "float32"] != prints["qwen3", "float32"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (T5Config(), "encoder-decoder"),
        (MambaConfig(), "AttentionInterface|layers of type|cannot"),
        (BertConfig(), "cannot|AttentionInterface"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_architecture_that_cannot_be_served_is_refused_with_a_reason(
    tmp_path: Path, config: PreTrainedConfig, says: str
) -> None:
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=says):
        load_model(str(tmp_path), "float32")


def test_layers_that_are_no_attention_are_refused(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "layer_types": ["linear_attention", "full_attention"]}))
    with pytest.raises(ModelLoadError, match="linear_attention"):
        load_model(str(tmp_path), "float32")


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="cannot load"):
        load_model(str(tmp_path / "nothing"))


def test_dtype_auto_takes_bfloat16_only_where_the_cpu_accelerates_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LlamaConfig()
    for capabilities, expected in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert resolve_dtype("auto", "cpu", config) is expected
    assert resolve_dtype("float16", "cpu", config) is torch.float16
    with pytest.raises(ModelLoadError, match="int8"):
        resolve_dtype("int8", "cpu", config)


def _copy_of(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    return copy


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def test_a_model_that_lacks_weights_is_refused(
    tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """transformers alone would initialise missing weights at random."""
    folder = _copy_of(tiny_folders["llama"], tmp_path)
    _rewrite(folder, lambda weights: weights.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(ModelLoadError, match=r"lacks 1 .*layers\.1\.self_attn\.q_proj"):
        load_model(str(folder), "float32")


def test_weights_of_another_shape_are_refused(
    tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = _copy_of(tiny_folders["llama"], tmp_path)
    _rewrite(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(ModelLoadError, match="cannot load"):
        load_model(str(folder), "float32")


def test_a_file_that_was_cut_off_is_refused(
    tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = _copy_of(tiny_folders["llama"], tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match="cannot load"):
        load_model(str(folder), "float32")
