"""Tiny random models and interventions, made on the spot."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from interventions.manifest import AffineManifest, BaseModelReference, Manifest, RewardManifest
from interventions.model import ModelDescription
from steering.affine import AffineMap
from steering.reward import RewardHead

VOCABULARY = 259  # 256 bytes and three special tokens
EOS = 256
WIDTH = 32
LAYERS = 2
SITES = tuple(f"model.layers.{layer}.post_attention_layernorm" for layer in range(LAYERS))


def tiny_config(family: str) -> PreTrainedConfig:
    """A family's configuration, each with something of its own: grouping, windows, head sizes."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 257,
        "eos_token_id": EOS,
        "pad_token_id": 258,
        "tie_word_embeddings": False,
    }
    match family:
        case "llama":
            return LlamaConfig(**common, num_key_value_heads=2)
        case "mistral":  # the windows are shorter than the prompts of the tests
            return MistralConfig(**common, num_key_value_heads=2, sliding_window=7)
        case "qwen2":
            window: dict[str, Any] = {
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 1,
            }
            common["tie_word_embeddings"] = True
            return Qwen2Config(**common, num_key_value_heads=1, **window)
        case "qwen3":
            return Qwen3Config(**common, num_key_value_heads=4, head_dim=16)
    raise ValueError(family)


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a family, float32, whose logits lie far apart."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        tiny_config(family)
    )
    with torch.no_grad():
        # Random weights of the usual size give nearly equal logits; larger ones make every edit
        # and every mistake visible in the tokens.
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.mul_(6)
    module: nn.Module = model
    module.eval()
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )


def save_tiny(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """A folder that `load_model` takes."""
    tiny_model(family, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_maps(
    seed: int, width: int = WIDTH, sites: tuple[str, ...] = SITES, support: bool = False
) -> dict[str, AffineMap]:
    """Maps far enough from the identity to change greedy tokens."""
    random = torch.Generator().manual_seed(seed)
    maps = {}
    for site in sites:
        weight = 1 + 0.5 * torch.randn(width, generator=random)
        bias = 0.5 * torch.randn(width, generator=random)
        bound = 0.5 + torch.rand(width, generator=random)
        maps[site] = (
            AffineMap(weight, bias, low=-bound, high=bound) if support else AffineMap(weight, bias)
        )
    return maps


def random_head(seed: int, width: int = WIDTH, units: int = 24) -> RewardHead:
    """A head whose gradient and direction both move the logits."""
    random = torch.Generator().manual_seed(seed)
    return RewardHead(
        w1=torch.randn(units, width, generator=random) / width**0.5,
        b1=0.1 * torch.randn(units, generator=random),
        w2=torch.randn(units, generator=random) / units**0.5,
        b2=torch.zeros(()),
        direction=0.3 * torch.randn(width, generator=random),
        positive_reward=torch.tensor(1.0),
    )


def manifest_of(
    parameters: dict[str, AffineMap] | RewardHead,
    model: ModelDescription,
    name: str,
    limits: dict[str, tuple[float, float]] | None = None,
) -> Manifest:
    """A manifest that fits the parameters and the model; `limits` replace the default ones."""
    common = {
        "format": "steerserve/1",
        "name": name,
        "description": "random, for tests",
        "created": datetime(2026, 11, 21, tzinfo=UTC),
        "license": "Apache-2.0",
        "base_model": BaseModelReference(
            id=model.id,
            architecture=model.architecture,
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            vocab_size=model.vocab_size,
            fingerprint=model.fingerprint,
        ),
        "limits": limits or {},
    }
    if isinstance(parameters, RewardHead):
        defaults: dict[str, float] = {"eta": 0.5, "iterations": 5}
        return RewardManifest.model_validate(
            {**common, "kind": "reward", "method": "argre", "defaults": defaults}
        )
    return AffineManifest.model_validate(
        {**common, "kind": "affine", "method": "lineas", "defaults": {"strength": 1.0}}
    )
