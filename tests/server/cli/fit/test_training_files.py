"""Tests of the files that `steerserve fit` reads."""

import json
from pathlib import Path

import pytest

from server.cli.fit.training_files import TrainingFileError, read_lines, read_pairs
from tests.fitting import PAIRS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"one\n\nthree\n", "x.txt:2: the line is empty"),
        (b"one\n\xff\n", "byte 4 is not UTF-8"),
    ],
)
def test_lines_that_mean_nothing_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(TrainingFileError, match=message):
        read_lines(path)


def test_lines_keep_what_is_in_them(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("one \u2028 two\r\n  three\x0c\n".encode())
    assert read_lines(path).lines == ("one \u2028 two", "  three\x0c")


def test_both_sides_have_one_prompt_or_one_each(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"positive": "a", "negative": "b"}\n'
        '{"prompt": "c", "positive": "a", "negative": "b"}\n'
        '{"positive_prompt": "d", "positive": "a", "negative_prompt": "", "negative": "b"}\n'
    )
    _, pairs = read_pairs(path)
    prompts = [(pair.positive.prompt, pair.negative.prompt) for pair in pairs]
    assert prompts == [("", ""), ("c", "c"), ("d", "")]
    assert {(pair.positive.text, pair.negative.text) for pair in pairs} == {("a", "b")}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "x.jsonl:2: not JSON"),
        ('{"positive": "\\ud83d x", "negative": "b"}', "x.jsonl:2: not JSON: .*hex escape"),
        ('{"positive": "a", "negative": ' + "[" * 10_000, "x.jsonl:2: not JSON: recursion"),
        ('{"positive": "a", "negative": ' + "1" * 9_000 + "}", "x.jsonl:2: not JSON: number"),
        ("[1]", "x.jsonl:2: a pair is an object"),
        ('{"positive": "a"}', "x.jsonl:2: the field 'negative'"),
        ('{"positive": "", "negative": "b"}', "x.jsonl:2: the field 'positive'"),
        ('{"positive": 1, "negative": "b"}', "x.jsonl:2: the field 'positive'"),
        ('{"positive": "a", "negative": "b", "prompt": 3}', "x.jsonl:2: the field 'prompt'"),
        ('{"positive": "a", "negative": "b", "promt": "c"}', "x.jsonl:2: unknown field 'promt'"),
        (
            '{"positive": "a", "negative": "b", "prompt": "", "negative_prompt": ""}',
            "x.jsonl:2: either the field 'prompt' .* 'prompt' and 'negative_prompt' are both there",
        ),
        (
            '{"positive": "a", "negative": "b", "prompt": "c", "positive_prompt": "d", '
            '"negative_prompt": "e"}',
            "x.jsonl:2: either the field 'prompt'",
        ),
        (
            '{"positive": "a", "negative": "b", "positive_prompt": "c"}',
            "x.jsonl:2: 'positive_prompt' needs the field 'negative_prompt' beside it",
        ),
        (
            '{"positive": "a", "negative": "b", "negative_prompt": ""}',
            "x.jsonl:2: 'negative_prompt' needs the field 'positive_prompt' beside it",
        ),
        (
            '{"positive": "a", "negative": "b", "positive_prompt": "", "negative_prompt": null}',
            "x.jsonl:2: the field 'negative_prompt' must be a string",
        ),
    ],
)
def test_a_malformed_pair_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(PAIRS[0]) + "\n" + line + "\n")
    with pytest.raises(TrainingFileError, match=message):
        read_pairs(path)


def test_a_byte_order_mark_is_no_part_of_the_first_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert read_lines(path).lines == ("one", "two")
