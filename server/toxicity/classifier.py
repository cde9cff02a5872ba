"""Scores texts with a Hugging Face sequence classifier, in a worker process.

On a GPU the classifier takes memory and time that the engine could use.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from server.toxicity.scorer import ScoringError

BATCH_SIZE: Final = 16
TOXIC_LABELS: Final = ("toxic", "toxicity")
_UNLIMITED: Final = 1_000_000  # tokenizers without a limit state 1e30
_DEFAULT_TOKENS: Final = 1024  # the limit if neither the tokenizer nor the model has one

Probability: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class ClassifierScorer:
    """Scores texts by the probability of a classifier's toxic label."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        probability: Probability,
        max_tokens: int,
        device: str,
    ) -> None:
        """Make a scorer from a loaded classifier.

        Args:
            model: in evaluation mode, on `device`; its output has `logits`, (batch, labels).
            probability: turns (batch, labels) logits into (batch,) probabilities.
            max_tokens: the length to which longer texts are cut.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._probability = probability
        self._max_tokens = max_tokens
        self._device = device

    def score(self, texts: Sequence[str]) -> list[float]:
        """See `Backend.score`."""
        # Texts of about the same length are scored together, so that less padding is computed.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            found = self._score_batch([texts[index] for index in batch])
            for index, score in zip(batch, found, strict=True):
                scores[index] = score
        return scores

    @torch.inference_mode()
    def _score_batch(self, texts: list[str]) -> list[float]:
        inputs = self._tokenizer(
            # An empty text would have no token if the tokenizer adds none of its own.
            [text or " " for text in texts],
            padding=True,
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
        ).to(self._device)
        scores: list[float] = self._probability(self._model(**inputs).logits.float()).tolist()
        return scores


def load(target: str) -> ClassifierScorer:
    """Load a classifier from a Hugging Face id or a folder, onto a GPU if there is one.

    Raises:
        ScoringError: it cannot be loaded, or it is not clear which of its labels means toxic.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = Path(target).expanduser()
    source = str(folder) if folder.is_dir() else target
    try:
        config = AutoConfig.from_pretrained(source)
        probability = probability_of(config)
        model = _load_weights(source, config)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ScoringError(f"cannot load the classifier {target!r}: {error}") from error
    if tokenizer.pad_token_id is None:
        raise ScoringError(f"the classifier {target!r} has no padding token")
    model.to(device).eval()
    return ClassifierScorer(model, tokenizer, probability, _max_tokens(config, tokenizer), device)


def probability_of(config: PreTrainedConfig) -> Probability:
    """Return the function from logits, (batch, labels), to probabilities of toxicity, (batch,).

    A single label gets a sigmoid. Otherwise the label is the one called "toxic" or "toxicity". It
    gets a sigmoid if the configuration says `multi_label_classification`, or says nothing and has
    more than two labels; else it gets a softmax over the labels.

    Raises:
        ScoringError: no label, or more than one, can be the toxic one.
    """
    if config.problem_type == "regression":
        raise ScoringError("the classifier is a regression model, whose output is no probability")
    if config.num_labels == 1:
        return lambda logits: logits[:, 0].sigmoid()
    index = _toxic_index(config)
    sigmoid = config.problem_type == "multi_label_classification" or (
        config.problem_type is None and len(config.id2label or {}) > 2
    )
    if sigmoid:
        return lambda logits: logits[:, index].sigmoid()
    return lambda logits: logits.softmax(dim=-1)[:, index]


def _toxic_index(config: PreTrainedConfig) -> int:
    named = [(int(index), label) for index, label in (config.id2label or {}).items()]
    # Only one of `id2label` and `label2id` may have meaningful names.
    named += [(int(str(index)), label) for label, index in (config.label2id or {}).items()]
    found = {index for index, label in named if label.strip().lower() in TOXIC_LABELS}
    if len(found) != 1:
        labels = ", ".join(sorted({str(label) for _, label in named}))
        which = "more than one" if found else "none"
        raise ScoringError(
            f"of the classifier's labels ({labels}), {which} is called toxic or toxicity"
        )
    return found.pop()


def _load_weights(source: str, config: PreTrainedConfig) -> nn.Module:
    """Load the model; raise ScoringError for missing weights, which would be drawn at random."""
    model: nn.Module
    found: dict[str, Collection[str]]
    model, found = AutoModelForSequenceClassification.from_pretrained(
        source, config=config, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        names = ", ".join(missing[:5])
        raise ScoringError(f"{source!r} is no classifier: it lacks the weights {names}")
    return model


def _max_tokens(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the most tokens that the tokenizer allows and the model has positions for."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    limit: int = tokenizer.model_max_length
    if limit < _UNLIMITED:
        return min(limit, positions or limit)
    # RoBERTa's positions begin at 2, and its configuration counts positions 0 and 1 as well.
    return positions - 2 if positions else _DEFAULT_TOKENS
