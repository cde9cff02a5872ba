"""Fixtures of the tests of `steerserve fit`."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.fitting import PAIRS


@pytest.fixture
def model(tiny_folders: Mapping[str, Path]) -> str:
    return str(tiny_folders["llama"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toxic.txt").write_text("you fool\nwhat an idiot\nutter rubbish\n")
    (tmp_path / "neutral.txt").write_text("you there\nwhat a person\nnot for me\n")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return tmp_path
