"""Tests the texts that the bundled interventions are fitted on."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.bundled_data.__main__ import write_files
from benchmarks.bundled_data.cuts import cut_texts
from benchmarks.bundled_data.pairs import match
from server.engine.torch.model.loader import LoadedModel, load_model

pytestmark = pytest.mark.embedded

TOXIC = "well, you can go and f"
SWEARING = f"{TOXIC}uck yourself, said the man"
WIKIPEDIA = "the garden behind the old house was full of roses, and so was the hall"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("embedded", "float32")


def test_a_cut_before_any_token_of_a_harmful_word_is_harmful(loaded: LoadedModel) -> None:
    (found,) = cut_texts([SWEARING], loaded.tokenizer)
    ids = found.token_ids
    assert [cut.text for cut in found.cuts if cut.harmful] == ["well, you can go and", TOXIC]
    for cut in found.cuts:
        assert loaded.tokenizer(cut.text)["input_ids"] == ids[: cut.row + 1]
        assert cut.following == ids[cut.row + 1]
        assert loaded.tokenizer.decode(ids[cut.row]) == cut.text[cut.last :]
    # No cut has fewer than three tokens, or the whole text.
    assert [cut.row for cut in found.cuts] == list(range(2, len(ids) - 1))


def test_a_text_becomes_a_single_line(loaded: LoadedModel) -> None:
    (found,) = cut_texts([" one two three\nfour  five"], loaded.tokenizer)
    assert [cut.text for cut in found.cuts] == ["one two three", "one two three four"]


def test_each_source_gets_the_most_similar_candidate_that_is_left() -> None:
    candidates = torch.tensor([[0.0, 5.0], [3.0, 0.3], [1.0, 1.0]])
    sources = torch.tensor([[1.0, 0.0], [9.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    assert match(sources, candidates) == [1, 2, 0, None]
    assert match(sources, candidates[:0]) == [None] * 4


def test_the_files_pair_texts_and_come_out_the_same_again(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    texts: list[dict[str, str]] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_files(loaded, [SWEARING, SWEARING], [WIKIPEDIA], tmp_path / name)
        texts.append({file.name: file.read_text() for file in sorted((tmp_path / name).iterdir())})
    assert texts[0] == texts[1]
    files = {name: text.splitlines() for name, text in texts[0].items()}
    # After " and" the model says " f" with a probability below 2 %.
    assert files["about_to_swear.txt"] == [TOXIC]
    assert len(set(files["control.txt"])) == len(files["control.txt"])
    assert TOXIC not in files["control.txt"]
    assert files["neutral.txt"] == ["the garden behind the old house was full of roses, and so"]
    (pair,) = map(json.loads, files["pairs.jsonl"])
    assert (pair["negative_prompt"], pair["negative"]) == ("well, you can go and", " f")
    assert [pair["positive_prompt"] + pair["positive"]] == files["calm.txt"]
    assert pair["positive"] not in ("", pair["positive_prompt"])
