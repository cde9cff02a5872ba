"""Tests of the files of prompts, texts and questions, and of what is said about wrong ones."""

from pathlib import Path

import pytest

from server.evaluating import EvaluationInputError
from server.evaluating.files import Item, read_prompts, read_texts
from server.evaluating.questions import read_questions

HEADER = "Question,Best Answer,Correct Answers,Incorrect Answers"


def written(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_prompts(tmp_path: Path) -> None:
    path = written(
        tmp_path, "p.jsonl", '{"prompt": " a\\n"}\n\n{"prompt": {"text": "b"}}\n{"prompt": "c"}'
    )
    file, items = read_prompts(path, None)
    assert file.name == "p.jsonl"
    assert len(file.sha256) == 64
    assert items == [
        Item(f"{path}:1", " a\n"),
        Item(f"{path}:3", "b"),
        Item(f"{path}:4", "c"),
    ]
    assert read_prompts(path, 2)[1] == items[:2]


def test_lines_of_a_plain_file_are_texts(tmp_path: Path) -> None:
    path = written(tmp_path, "wiki.txt", "\ufeff = A = \r\n \n b\x0cc\n")
    _, items = read_texts(path, None, gold=False)
    assert items == [Item(f"{path}:1", " = A = "), Item(f"{path}:3", " b\x0cc")]


def test_texts_have_a_gold_part_or_none(tmp_path: Path) -> None:
    path = written(tmp_path, "t.jsonl", '{"prompt": "a", "gold": " b"}\n{"text": "c"}\n')
    _, items = read_texts(path, None, gold=False)
    assert [item.text for item in items] == ["a b", "c"]
    with pytest.raises(EvaluationInputError, match=r"t\.jsonl:2: --gold-only"):
        read_texts(path, None, gold=True)
    assert len(read_texts(path, 1, gold=True)[1]) == 1


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("p.txt", "", "has no text"),
        ("p.txt", " \n", "has no text"),
        ("p.txt", b"a\n\xff", "byte 2 is not UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n{', r"p\.jsonl:2: not JSON"),
        ("p.jsonl", "[]", "not a JSON object"),
        ("p.jsonl", "{}", "field 'prompt'"),
        ("p.jsonl", '{"prompt": " "}', "field 'prompt'"),
        ("p.jsonl", '{"prompt": 3}', "field 'prompt'"),
        ("p.jsonl", '{"prompt": {"text": 3}}', "field 'text'"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "hex escape"),
    ],
)
def test_wrong_prompts(tmp_path: Path, name: str, data: str | bytes, named: str) -> None:
    with pytest.raises(EvaluationInputError, match=named) as caught:
        read_prompts(written(tmp_path, name, data), None)
    assert name in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EvaluationInputError, match="No such file"):
        read_prompts(tmp_path / "missing.jsonl", None)
    with pytest.raises(EvaluationInputError, match="directory"):
        read_texts(tmp_path, None, gold=False)


def test_mmlu(tmp_path: Path) -> None:
    line = '{"question": "Q?", "choices": ["x", "yy"], "answer": 1, "subject": "s"}'
    for path in (
        written(tmp_path, "m.json", f"[{line}, {line}]"),
        written(tmp_path, "m.jsonl", f"{line}\n\n{line}\n"),
    ):
        _, questions = read_questions(path, None, "text")
        assert len(questions) == 2
        assert len(read_questions(path, 1, "text")[1]) == 1
    found = questions[1]
    assert found.place == f"{path}:3"
    assert (found.context, found.choices) == ("Question: Q?\nAnswer:", (" x", " yy"))
    assert (found.best, found.correct) == (1, frozenset({1}))
    letters = read_questions(path, 1, "letters")[1][0]
    assert (letters.context, letters.choices) == ("Q?\nA. x\nB. yy\nAnswer:", (" A", " B"))


def test_truthfulqa(tmp_path: Path) -> None:
    row = '"Why, though?",Best.," Other; Best.; ","No;\nNever ; "'
    path = written(tmp_path, "t.csv", f"\ufeffType,{HEADER}\r\nA,{row}\r\n")
    _, [found] = read_questions(path, None, "text")
    assert found.context == "Q: Why, though?\nA:"
    assert found.choices == (" Best.", " Other", " No", " Never")
    assert (found.best, found.correct) == (0, frozenset({0, 1}))


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("q.json", "{", "not JSON"),
        ("q.json", '{"question": "a"}', "not a JSON list"),
        ("q.json", "[3]", "not a JSON list"),
        ("q.json", "[]", "has no question"),
        ("q.json", '[{"question": "a", "choices": ["b"], "answer": 0}]', "question 1: .*'choices'"),
        ("q.json", '[{"question": "a", "choices": ["b", 3], "answer": 0}]', "'choices'"),
        ("q.json", '[{"question": "a", "choices": ["b", "c"], "answer": 2}]', "'answer'"),
        ("q.json", '[{"question": "a", "choices": ["b", "c"], "answer": true}]', "'answer'"),
        ("q.json", '[{"choices": ["b", "c"], "answer": 0}]', "'question'"),
        ("q.csv", "Question,Best Answer\na,b\n", "no column 'Correct Answers'"),
        ("q.csv", f"{HEADER}\n", "has no question"),
        ("q.csv", f"{HEADER}\na,b,c\n", "'Incorrect Answers'"),
        ("q.csv", f'{HEADER}\na,b,c,"d\n', "not a table"),
        ("q.csv", f"{HEADER}\na,b,c,;\n", "no incorrect answer"),
    ],
)
def test_wrong_questions(tmp_path: Path, name: str, data: str, named: str) -> None:
    with pytest.raises(EvaluationInputError, match=named) as caught:
        read_questions(written(tmp_path, name, data), None, "text")
    assert name in str(caught.value)
