"""Makes tiny random models, tokenizers and interventions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from steering.affine import AffineMap, Gate
from steering.reward import RewardHead
from steering.sites import default_sites, match_sites

VOCABULARY = 259  # 256 bytes and three special tokens
EOS = 256
WIDTH = 32
LAYERS = 2
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3"),
    *("gemma2", "gpt2", "opt", "opt-350m"),
)
CHAT_TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('Users speak first.') }}{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SITES = tuple(f"model.layers.{layer}.post_attention_layernorm" for layer in range(LAYERS))


def tiny_config(family: str) -> PreTrainedConfig:
    """Return a family's configuration; they differ in KV heads, windows, head sizes and more."""
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
        case "mistral":  # a window that is shorter than the prompts of the tests
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
        case "phi3":  # one matrix for queries, keys and values; rotary embedding in half a head
            rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            return Phi3Config(
                **common, num_key_value_heads=2, sliding_window=11, rope_parameters=rope
            )
        case "gemma2":  # windows in every other layer; a soft cap low enough to change the scores
            return Gemma2Config(
                **common,
                num_key_value_heads=2,
                head_dim=16,
                query_pre_attn_scalar=8,
                sliding_window=6,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=30.0,
            )
        case "gpt2":
            del common["intermediate_size"]
            return GPT2Config(**common, scale_attn_by_inverse_layer_idx=True)
        case "opt":
            del common["intermediate_size"]
            return OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=WIDTH)
        case "opt-350m":  # layer norms after attention and MLP; lm_head narrower than hidden_size
            del common["intermediate_size"]
            return OPTConfig(
                **common, ffn_dim=48, word_embed_proj_dim=20, do_layer_norm_before=False
            )
    raise ValueError(family)


def tiny_model(
    family: str, seed: int = 0, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """Return a random float32 model of a family, whose logits lie far apart."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config or tiny_config(family),
        # Of transformers' attention implementations, "sdpa" leaves out Gemma 2's soft cap.
        attn_implementation="eager" if family == "gemma2" else "sdpa",
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


def family_sites(family: str) -> tuple[str, ...]:
    """Return the default sites of a family's tiny model."""
    model = tiny_model(family)
    pattern = default_sites(type(model).__name__)
    return match_sites(pattern, (path for path, _ in model.named_modules()))


def head_width(family: str) -> int:
    """Return the input width of a family's lm_head."""
    lm_head: object = tiny_model(family).get_output_embeddings()  # type: ignore[no-untyped-call]
    assert isinstance(lm_head, nn.Linear)
    return lm_head.in_features


def head_outputs_width(family: str) -> int:
    """Return the width of the concatenated outputs of a family's attention heads."""
    config = tiny_config(family)
    width: int = config.num_attention_heads * getattr(config, "head_dim", 0)
    return width or WIDTH


def tiny_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte, and no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        bos_token="<bos>",
        pad_token="<pad>",
        chat_template=chat_template,
    )


def tiny_tokens(text: str) -> list[int]:
    """Return the tokens of a text, one for each byte of its UTF-8."""
    tokens: list[int] = tiny_tokenizer().encode(text, add_special_tokens=False)
    return tokens


def save_tiny(
    folder: Path, family: str = "llama", seed: int = 0, chat_template: str | None = None
) -> Path:
    """Save a tiny model and its tokenizer in a folder, and return the folder."""
    tiny_model(family, seed).save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder


def save_families(root: Path, families: Iterable[str] = FAMILIES) -> dict[str, Path]:
    """Save a tiny random model of each family, and return the folders by family."""
    return {family: save_tiny(root / f"tiny-{family}", family) for family in families}


def random_maps(
    seed: int,
    width: int = WIDTH,
    sites: tuple[str, ...] = SITES,
    support: bool = False,
    gate: bool = False,
) -> dict[str, AffineMap]:
    """Return random maps by site, far enough from the identity to change greedy tokens."""
    random = torch.Generator().manual_seed(seed)
    maps = {}
    for site in sites:
        weight = 1 + 0.5 * torch.randn(width, generator=random)
        bias = 0.5 * torch.randn(width, generator=random)
        bound = 0.5 + torch.rand(width, generator=random)
        maps[site] = AffineMap(
            weight,
            bias,
            low=-bound if support else None,
            high=bound if support else None,
            gate=random_gate(random, width) if gate else None,
        )
    return maps


def random_gate(random: torch.Generator, width: int = WIDTH) -> Gate:
    """Return a random gate that is open to some tokens and closed to others."""
    return Gate(
        weight=2 * torch.randn(width, generator=random) / width**0.5,
        bias=1 + torch.randn((), generator=random),
    )


def random_head(seed: int, width: int = WIDTH, units: int = 24) -> RewardHead:
    """Return a random head whose gradient and direction both change the logits."""
    random = torch.Generator().manual_seed(seed)
    return RewardHead(
        w1=torch.randn(units, width, generator=random) / width**0.5,
        b1=0.1 * torch.randn(units, generator=random),
        w2=torch.randn(units, generator=random) / units**0.5,
        b2=torch.zeros(()),
        direction=0.3 * torch.randn(width, generator=random),
        positive_reward=torch.tensor(1.0),
    )
