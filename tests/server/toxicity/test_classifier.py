"""Tests of Hugging Face classifiers: whose label's probability counts, and where texts are cut."""

from pathlib import Path
from typing import Literal, TypeAlias

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from server.toxicity.classifier import load, probability_of
from server.toxicity.process import ScorerProcess
from server.toxicity.scorer import ScoringError
from tests.tiny import VOCABULARY, tiny_tokenizer

POSITIONS = 64
SOFTMAX = {0: "neutral", 1: "toxic"}
SIGMOIDS = {0: "severe_toxic", 1: "obscene", 2: "toxic", 3: "threat"}
TEXTS = ["Hello", "", "two\nlines", "日本語 🙂", "x" * 300, *(f"text {n}" * n for n in range(40))]


ProblemType: TypeAlias = Literal[
    "regression", "single_label_classification", "multi_label_classification"
]


def config_of(labels: dict[int, str], problem_type: ProblemType | None = None) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        pad_token_id=258,
        id2label=labels,
        label2id={label: index for index, label in labels.items()},
        problem_type=problem_type,
    )


def save_classifier(
    folder: Path, config: BertConfig | RobertaConfig, tokenizer: PreTrainedTokenizerFast | None
) -> Path:
    """Save a random classifier whose logits lie far apart; return its folder."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def tokenizer_of(max_tokens: int | None = POSITIONS) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    if max_tokens is not None:
        tokenizer.model_max_length = max_tokens
    return tokenizer


def logits_of(folder: Path, texts: list[str], max_tokens: int = POSITIONS) -> torch.Tensor:
    """Return (texts, labels) logits straight from transformers, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    module: nn.Module = model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        rows = [tokenizer(text)["input_ids"][:max_tokens] for text in texts]
        return torch.cat([module(torch.tensor([row])).logits for row in rows])


@pytest.mark.parametrize(
    ("labels", "problem_type", "softmax"),
    [
        (SOFTMAX, None, True),
        (SOFTMAX, "single_label_classification", True),
        (SOFTMAX, "multi_label_classification", False),
        (SIGMOIDS, None, False),
        (SIGMOIDS, "multi_label_classification", False),
        (SIGMOIDS, "single_label_classification", True),
        ({0: "severe_toxicity", 1: " Toxicity ", 2: "insult"}, None, False),
        ({0: "LABEL_0"}, None, False),
    ],
)
def test_probabilities_are_the_toxic_labels(
    labels: dict[int, str], problem_type: ProblemType | None, softmax: bool
) -> None:
    logits = torch.randn(5, len(labels))
    toxic = next(
        (
            index
            for index, label in labels.items()
            if label.strip().lower() in ("toxic", "toxicity")
        ),
        0,
    )
    expected = logits.softmax(1) if softmax else logits.sigmoid()
    found = probability_of(config_of(labels, problem_type))(logits)
    torch.testing.assert_close(found, expected[:, toxic])


def test_names_may_stand_in_label2id_only() -> None:
    config = config_of({0: "LABEL_0", 1: "LABEL_1"})
    config.label2id = {"toxic": 0, "neutral": 1}
    logits = torch.randn(5, 2)
    torch.testing.assert_close(probability_of(config)(logits), logits.softmax(1)[:, 0])


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({0: "LABEL_0", 1: "LABEL_1"}, r"\(LABEL_0, LABEL_1\), none"),
        ({0: "non-toxic", 1: "severe_toxic"}, r"\(non-toxic, severe_toxic\), none"),
        ({0: "toxic", 1: "toxicity"}, r"\(toxic, toxicity\), more than one"),
    ],
)
def test_labels_that_do_not_tell_are_named(labels: dict[int, str], says: str) -> None:
    with pytest.raises(ScoringError, match=says):
        probability_of(config_of(labels))


def test_a_regression_is_no_probability() -> None:
    with pytest.raises(ScoringError, match="regression"):
        probability_of(config_of({0: "toxicity"}, "regression"))


@pytest.mark.parametrize("labels", [SOFTMAX, SIGMOIDS])
def test_batches_score_as_each_text_by_itself(tmp_path: Path, labels: dict[int, str]) -> None:
    folder = save_classifier(tmp_path, config_of(labels), tokenizer_of())
    toxic = next(index for index, label in labels.items() if label == "toxic")
    scores = load(str(folder)).score(TEXTS)
    # The tokenizer gives an empty text no token, so the scorer takes a space instead.
    logits = logits_of(folder, [text or " " for text in TEXTS])
    expected = (logits.softmax(1) if labels is SOFTMAX else logits.sigmoid())[:, toxic]
    torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-4, rtol=1e-3)
    assert max(scores) - min(scores) > 0.01


def test_an_empty_text_and_no_texts(tmp_path: Path) -> None:
    scorer = load(str(save_classifier(tmp_path, config_of(SOFTMAX), tokenizer_of())))
    assert scorer.score([]) == []
    (score,) = scorer.score([""])
    assert 0 <= score <= 1


def test_robertas_positions_are_two_fewer_where_the_tokenizer_has_no_limit(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        pad_token_id=1,
        id2label=SOFTMAX,
    )
    folder = save_classifier(tmp_path, config, tokenizer_of(None))
    (score,) = load(str(folder)).score(["y" * 500])
    expected = logits_of(folder, ["y" * 500], POSITIONS - 2).softmax(1)[0, 1]
    assert score == pytest.approx(float(expected), abs=1e-4)


def test_in_a_worker_process(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, config_of(SOFTMAX), tokenizer_of())
    scorer = ScorerProcess(f"hf:{folder}")
    try:
        scores = scorer.score([*TEXTS, "lone \ud800"])
    finally:
        scorer.close()
    direct = load(str(folder)).score([*TEXTS, "lone \N{REPLACEMENT CHARACTER}"])
    assert scores == pytest.approx(direct, abs=1e-4)


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModel.from_config(config_of(SOFTMAX)).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    tokenizer_of().save_pretrained(tmp_path)
    with pytest.raises(ScoringError, match="lacks the weights classifier"):
        load(str(tmp_path))


def test_what_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ScoringError, match=r"cannot load the classifier .*nowhere"):
        load(str(tmp_path / "nowhere"))
