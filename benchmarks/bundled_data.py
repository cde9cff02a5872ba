"""Makes texts that end just before a harmful word, and others, to fit interventions on.

    python -m benchmarks.bundled_data ../shared/data WORK

An edit of the last hidden state can only change the token that comes next. So the texts to steer
away from end just before a harmful word: the state after their last token is about to produce it.
They are cut from ParaDetox's toxic sentences and from the model's own continuations of
RealToxicityPrompts. The other texts end just before a harmless word. A word is harmful if the
embedded scorer gives the word alone a score above 0.8.

Only the first rows of the prompts and of the neutral texts are read (`TUNED_PROMPTS`,
`TUNED_TEXTS`), so that the others can be measured.

The files, a text a line:

    about_to_swear.txt  texts that end before a harmful word
    calm.txt            texts of the same origin that end before another word
    control.txt         calm texts, and Wikipedia's that end before any word
    pairs.jsonl         for `fit argre`: the last word of a calm text against that of a text that
                        ends before a harmful word, each after a prompt of its own
"""

import argparse
import asyncio
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.running_server import running_server
from server.evaluating.client import EvaluationClient
from server.evaluating.plan import Sampling
from server.evaluating.settings import BASE
from server.toxicity.worker import load_scorer

TUNED_PROMPTS: Final = 400
"""Rows of rtp_challenge_dev.jsonl that are continued; the others are for measuring."""
TUNED_TEXTS: Final = 400
"""Rows of wiki_samples_dev.jsonl that the neutral texts are cut from."""

_SAMPLES: Final = 4  # continuations of each prompt
_AT_ONCE: Final = 32  # requests
_SAMPLING: Final = Sampling(24, temperature=1.0, top_p=0.95)
_HARMFUL: Final = 0.8  # a word's score
_FEWEST_WORDS: Final = 3  # of a text; the state after fewer says little
_SENTENCES: Final = 1500  # ParaDetox's that texts are cut from
_WORD: Final = re.compile(r"[A-Za-z][A-Za-z'*@$#]*")
_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class Cuts:
    """Texts that end before a word: a harmful one, or a harmless one."""

    harmful: list[str]
    harmless: list[str]


class Cutter:
    """Cuts texts before harmful words, and before others."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Score each of the texts' words."""
        words = sorted({word.lower() for text in texts for word in _WORD.findall(text)})
        scores = load_scorer("embedded").score(words)
        self._harmful = {
            word for word, score in zip(words, scores, strict=True) if score > _HARMFUL
        }
        self._random = random.Random(_SEED)

    def cuts(self, texts: Sequence[str], harmless: int) -> Cuts:
        """Cut each text before its first harmful word, and before harmless words ahead of it.

        Args:
            texts: the texts.
            harmless: the most cuts of one text before harmless words.

        Returns:
            The distinct cut texts, shuffled.
        """
        before_harmful: list[str] = []
        before_harmless: list[str] = []
        for text in texts:
            places: list[int] = []
            for match in _WORD.finditer(text):
                cut = text[: match.start()].rstrip()
                # A word inside of another one, or after a quotation mark, is not a token's start.
                fits = text[match.start() - 1 : match.start()] == " "
                fits = fits and len(cut.split()) >= _FEWEST_WORDS
                if match[0].lower() in self._harmful:
                    if fits:
                        before_harmful.append(cut)
                    break
                if fits:
                    places.append(len(cut))
            chosen = self._random.sample(places, min(harmless, len(places)))
            before_harmless += [text[:place] for place in chosen]
        return Cuts(self._shuffled(before_harmful), self._shuffled(before_harmless))

    def _shuffled(self, texts: Iterable[str]) -> list[str]:
        distinct = _distinct(texts)
        self._random.shuffle(distinct)
        return distinct


def _distinct(texts: Iterable[str], without: Sequence[str] = ()) -> list[str]:
    """Return the texts as single lines, each once, without those of another list."""
    lines = dict.fromkeys(" ".join(text.split()) for text in texts)
    unwanted = set(without)
    return [line for line in lines if line and line not in unwanted]


async def continuations(url: str, prompts: Sequence[str]) -> list[str]:
    """Return texts of the base model: each prompt with each of its sampled continuations."""
    async with EvaluationClient.connect(url, None, "", _AT_ONCE) as client:

        async def text(prompt: str, seed: int) -> str:
            return prompt + await client.complete(prompt, _SAMPLING, seed, BASE)

        return await asyncio.gather(
            *(text(prompt, seed) for prompt in prompts for seed in range(_SAMPLES))
        )


def write_files(
    continued: Sequence[str], toxic: Sequence[str], neutral: Sequence[str], work: Path
) -> None:
    """Cut the texts and write the files.

    Args:
        continued: prompts with continuations of the model's.
        toxic: sentences with harmful words.
        neutral: texts that are to stay as they are.
        work: the folder to write to.
    """
    cutter = Cutter([*continued, *toxic, *neutral])
    own, written = cutter.cuts(continued, harmless=1), cutter.cuts(toxic, harmless=1)
    wikipedia = cutter.cuts(neutral, harmless=2)
    harmful = _distinct([*own.harmful, *written.harmful])
    # The sides have equal shares of each origin; otherwise the origin would tell them apart.
    same = [*own.harmless[: len(own.harmful)], *written.harmless[: len(written.harmful)]]
    calm = _distinct(same, without=harmful)
    control = _distinct([*calm, *wikipedia.harmless], without=harmful)
    for name, texts in (("about_to_swear", harmful), ("calm", calm), ("control", control)):
        (work / f"{name}.txt").write_text("".join(f"{text}\n" for text in texts))
    with (work / "pairs.jsonl").open("w") as file:
        for negative, positive in zip(harmful, calm, strict=False):
            file.write(json.dumps(_pair(negative, positive)) + "\n")


def _pair(negative: str, positive: str) -> dict[str, str]:
    pair: dict[str, str] = {}
    for side, text in (("negative", negative), ("positive", positive)):
        prompt, _, word = text.rpartition(" ")
        pair |= {f"{side}_prompt": prompt, side: f" {word}"}
    return pair


def main() -> None:
    """Read the data, let the model continue the prompts, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with the data files")
    parser.add_argument("work", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    prompts = _json_lines(arguments.data / "rtp_challenge_dev.jsonl")[:TUNED_PROMPTS]
    texts = _json_lines(arguments.data / "wiki_samples_dev.jsonl")[:TUNED_TEXTS]
    rows = (arguments.data / "paradetox_fit.tsv").read_text().split("\n")[1 : _SENTENCES + 1]
    with running_server("embedded", "--dtype", "float32") as server:
        continued = asyncio.run(continuations(server.url, [row["prompt"] for row in prompts]))
    neutral = [row["prompt"] + row["gold"] for row in texts]
    write_files(continued, [row.split("\t")[0] for row in rows], neutral, arguments.work)


def _json_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
