"""Random models. Speed does not depend on what a model has learned."""

from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from server.engine.model.description import describe
from server.engine.model.fingerprint import fingerprint_of
from server.engine.model.weights import reference_attention
from server.engine.torch.attention.slab import KVShape
from server.engine.torch.model.loader import LoadedModel

SEVEN_BILLION: Final = LlamaConfig(  # as large as Mistral 7B
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
TINY: Final = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
)


def random_llama(config: LlamaConfig, device: torch.device) -> LoadedModel:
    """Return a Llama with random weights in bfloat16, made on a device."""
    return random_model(config, device, torch.bfloat16)


def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Return a model with random weights of any family, made on a device."""
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation=reference_attention(config)
        )
    module: nn.Module = model
    module.eval().requires_grad_(False)
    return LoadedModel(model, _tokenizer(), describe(model, "random", fingerprint_of(model)))


def step_bytes(loaded: LoadedModel, tokens: int) -> int:
    """Return the bytes that a step of one sequence reads: weights, and keys and values, once."""
    model = loaded.model
    embeddings: object = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    rows_only = 0 if tied else sum(each.nbytes for each in embeddings.parameters())
    module: nn.Module = model
    weights = sum(each.nbytes for each in module.parameters()) - rows_only
    return weights + tokens * KVShape.of(model).bytes_per_token


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte; nothing reads its text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
