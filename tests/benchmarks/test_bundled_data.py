"""Tests the texts that the bundled interventions are fitted on."""

import json
from pathlib import Path

from benchmarks.bundled_data import Cutter, write_files

TOXIC = "well I think that you are a stupid man and an idiot"
CALM = "the garden behind the old house was full of roses"
EARLY = "you idiot of the year"
QUOTED = 'she called out "idiot and left the room at once'


def test_a_text_is_cut_before_its_first_harmful_word() -> None:
    cuts = Cutter([TOXIC]).cuts([TOXIC], harmless=100)
    assert cuts.harmful == ["well I think that you are a"]
    # Each ends before a word that comes ahead of the harmful one, and after at least three words.
    assert sorted(cuts.harmless) == sorted(
        ["well I think", "well I think that", "well I think that you", "well I think that you are"]
    )


def test_a_text_without_a_harmful_word_is_cut_anywhere() -> None:
    cuts = Cutter([CALM]).cuts([CALM], harmless=100)
    assert cuts.harmful == []
    words = CALM.split()
    assert sorted(cuts.harmless) == sorted(" ".join(words[:n]) for n in range(3, len(words)))


def test_a_place_that_is_no_start_of_a_token_is_left_out() -> None:
    for text in (EARLY, QUOTED):
        cuts = Cutter([text]).cuts([text], harmless=100)
        assert cuts.harmful == []
        assert not any("idiot" in cut for cut in cuts.harmless)


def test_the_files_are_distinct_lines_and_come_out_the_same_again(tmp_path: Path) -> None:
    texts: list[dict[str, str]] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_files([TOXIC, f"{CALM}\nand trees", TOXIC], [TOXIC], [CALM], tmp_path / name)
        texts.append({file.name: file.read_text() for file in sorted((tmp_path / name).iterdir())})
    assert texts[0] == texts[1]
    files = {name: text.splitlines() for name, text in texts[0].items()}
    assert files["about_to_swear.txt"] == ["well I think that you are a"]
    assert len(set(files["control.txt"])) == len(files["control.txt"])
    assert set(files["calm.txt"]) <= set(files["control.txt"])
    assert not set(files["about_to_swear.txt"]) & set(files["control.txt"])
    (pair,) = map(json.loads, files["pairs.jsonl"])
    assert pair["negative_prompt"] + pair["negative"] == "well I think that you are a"
    assert pair["positive_prompt"] + pair["positive"] == files["calm.txt"][0]
    assert pair["negative"] == " a"
