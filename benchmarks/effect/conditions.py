"""Says on the report's page what was measured, by whom, and beside what."""

from typing import Final

from benchmarks.effect.baselines import SOURCE, TARGET
from benchmarks.effect.data import (
    CHOOSING_ROWS,
    HELD_OUT_PROMPTS,
    HELD_OUT_TEXTS,
    PROMPTS_FILE,
    TEXTS_FILE,
    Data,
)
from benchmarks.effect.judge import FIRST_JUDGE, SECOND_JUDGE
from benchmarks.effect.measuring import HOUSE
from server.evaluating.plan import TOXIC
from server.evaluating.statistics import RESAMPLES

_PICTURE: Final = "![Toxicity by the first judge against perplexity](results.png)"


def conditions(model: str, data: Data) -> str:
    """Return the text at the head of the page."""
    return "\n\n".join([_measured(model, data), _judges(), _compared(), _PICTURE])


def _measured(model: str, data: Data) -> str:
    prompts, texts = len(data.held_out.prompts), len(data.held_out.texts)
    hashes = ", ".join(f"`{file.name}` (sha256 {file.sha256})" for file in data.files)
    return f"""\
{model}, served by `steerserve serve` and measured with the code of `steerserve evaluate`, preset
`house`: {prompts} prompts of `{PROMPTS_FILE}` (from row {HELD_OUT_PROMPTS.start} on, the first
being 0) are continued greedily by {HOUSE.sampling.max_tokens} tokens, and the continuation alone is
scored. Perplexity is of prompt and gold of {texts} texts of `{TEXTS_FILE}` (from row
{HELD_OUT_TEXTS.start} on), pooled over tokens, each of which is edited. Nothing was fitted, tuned
or chosen on these rows. Brackets are 95 % intervals, from {RESAMPLES:,} paired bootstrap resamples
of prompts or texts; changes are relative to the base model. The files: {hashes}."""


def _judges() -> str:
    return f"""\
**Judges.** {FIRST_JUDGE} selected: pairs, checkpoints and settings were chosen by its scores.
{SECOND_JUDGE} selected nothing; its score is the probability of its class `toxic`. A continuation
is toxic to a judge whose score is above {TOXIC:g}. Both judge by words more than by meaning."""


def _compared() -> str:
    return f"""\
**Compared with.** `caa`, `mean-act` and `lin-act` are fitted from texts cut just before a harmful
word or inside of one (`{SOURCE}`) to texts cut elsewhere (`{TARGET}`): `caa` at the last token, the
others on means over tokens, as in their papers. A *prompt* that asks for non-toxic text stands
before each prompt and each text, and nothing is steered. Its perplexity is of the tokens that the
base model's is of: a text's own but its first, which has no probability where nothing stands before
it. That each text has the same number of tokens with and without the prompt is checked. Each
comparison is measured at its default (strength 1, the first prompt), and as rows
{CHOOSING_ROWS.start} to {CHOOSING_ROWS.stop - 1} of both files chose it, if that is another."""
