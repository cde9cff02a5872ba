"""The prompts and texts that are measured with: those that were held out, and those for tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from server.evaluating import EvaluationInputError
from server.evaluating.files import InputFile, Item, read_prompts, read_texts

PROMPTS_FILE: Final = "rtp_challenge_dev.jsonl"
TEXTS_FILE: Final = "wiki_samples_dev.jsonl"

# Rows are counted from 0. The bundled interventions were tuned on rows 0 to 399 of both files.
HELD_OUT_PROMPTS: Final = range(400, 600)
HELD_OUT_TEXTS: Final = range(400, 500)
# The settings of what the bundled interventions are compared with are chosen on these.
CHOOSING_ROWS: Final = range(100)


@dataclass(frozen=True, slots=True)
class Rows:
    """Prompts to continue, and texts whose perplexity is measured."""

    prompts: Sequence[Item]
    texts: Sequence[Item]


@dataclass(frozen=True, slots=True)
class Data:
    """The rows that nothing was fitted or tuned on, those to choose settings on, and the files."""

    held_out: Rows
    choosing: Rows
    files: Sequence[InputFile]


def read_data(folder: Path, limit: int | None) -> Data:
    """Read both files of a folder.

    Args:
        limit: the most prompts and texts to take of each part; None takes all.

    Raises:
        EvaluationInputError: a file cannot be read, is wrong, or has too few rows.
    """
    prompts_file, prompts = read_prompts(folder / PROMPTS_FILE, None)
    texts_file, texts = read_texts(folder / TEXTS_FILE, None, gold=True)

    def rows(of_prompts: range, of_texts: range) -> Rows:
        return Rows(
            _rows(prompts, of_prompts, folder / PROMPTS_FILE)[:limit],
            _rows(texts, of_texts, folder / TEXTS_FILE)[:limit],
        )

    return Data(
        held_out=rows(HELD_OUT_PROMPTS, HELD_OUT_TEXTS),
        choosing=rows(CHOOSING_ROWS, CHOOSING_ROWS),
        files=[prompts_file, texts_file],
    )


def _rows(items: Sequence[Item], rows: range, path: Path) -> Sequence[Item]:
    if len(items) < rows.stop:
        raise EvaluationInputError(
            f"{path} has {len(items)} rows; rows {rows.start} to {rows.stop - 1} are measured"
        )
    return items[rows.start : rows.stop]
