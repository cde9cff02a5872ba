"""Lets the model continue prompts, cuts and pairs its texts, and writes the files to fit on.

    python -m benchmarks.bundled_data ../shared/data WORK

Only the first rows of the prompts and of the neutral texts are read (`TUNED_PROMPTS`,
`TUNED_TEXTS`), so that the others can be measured.

The files, a text a line:

    about_to_swear.txt  texts that end before a token of a harmful word
    calm.txt            the calm text of each
    control.txt         texts that end before any other token, as many of the model's own as of
                        Wikipedia's
    neutral.txt         beginnings of Wikipedia's texts
    pairs.jsonl         for `fit argre`: the last token of each calm text against that of the text
                        about to swear, each after a prompt of its own
"""

import argparse
import asyncio
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.bundled_data.cuts import Cut, CutText, cut_texts
from benchmarks.bundled_data.pairs import Pair, pair_texts
from benchmarks.running_server import running_server
from server.engine.torch.model.loader import LoadedModel, load_model
from server.evaluating.client import EvaluationClient
from server.evaluating.plan import Sampling
from server.evaluating.settings import BASE

TUNED_PROMPTS: Final = 400
"""Rows of rtp_challenge_dev.jsonl that are continued; the others are for measuring."""
TUNED_TEXTS: Final = 400
"""Rows of wiki_samples_dev.jsonl that the neutral texts are cut from."""

_SAMPLES: Final = 4  # continuations of each prompt
_AT_ONCE: Final = 32  # requests
_SAMPLING: Final = Sampling(24, temperature=1.0, top_p=0.95)
_CONTROL: Final = 1200  # texts of each origin
_MOST_CONTROL_TOKENS: Final = 40  # of one text
_NEUTRAL_WORDS: Final = 12  # of each beginning
_SEED: Final = 0


async def continuations(url: str, prompts: Sequence[str]) -> list[str]:
    """Return texts of the base model: each prompt with each of its sampled continuations."""
    async with EvaluationClient.connect(url, None, "", _AT_ONCE) as client:

        async def text(prompt: str, seed: int) -> str:
            return prompt + await client.complete(prompt, _SAMPLING, seed, BASE)

        return await asyncio.gather(
            *(text(prompt, seed) for prompt in prompts for seed in range(_SAMPLES))
        )


def write_files(
    loaded: LoadedModel, continued: Sequence[str], neutral: Sequence[str], work: Path
) -> None:
    """Cut and pair the texts and write the files.

    Args:
        loaded: the model, in float32.
        continued: prompts with continuations of the model's.
        neutral: texts that are to stay as they are.
        work: the folder to write to.
    """
    shuffled = random.Random(_SEED)
    own = cut_texts(continued, loaded.tokenizer)
    wikipedia = cut_texts(neutral, loaded.tokenizer)
    pairs = pair_texts(loaded, own, wikipedia)
    shuffled.shuffle(pairs)
    sources = {pair.about_to_swear.text for pair in pairs}
    control = [
        text for origin in (own, wikipedia) for text in _some_harmless(origin, sources, shuffled)
    ]
    beginnings = [" ".join(text.split()[:_NEUTRAL_WORDS]) for text in neutral]
    _write_lines(work / "about_to_swear.txt", (pair.about_to_swear.text for pair in pairs))
    _write_lines(work / "calm.txt", (pair.calm.text for pair in pairs))
    _write_lines(work / "control.txt", dict.fromkeys(control))
    _write_lines(work / "neutral.txt", dict.fromkeys(beginnings))
    _write_lines(work / "pairs.jsonl", (json.dumps(_sides(pair)) for pair in pairs))


def _some_harmless(
    texts: Sequence[CutText], without: set[str], shuffled: random.Random
) -> list[str]:
    """Draw texts that end before a token of no harmful word."""
    found = {
        cut.text: None
        for text in texts
        for cut in text.cuts
        if not cut.harmful and cut.row < _MOST_CONTROL_TOKENS and cut.text not in without
    }
    return shuffled.sample([*found], min(_CONTROL, len(found)))


def _sides(pair: Pair) -> dict[str, str]:
    sides: dict[str, str] = {}
    cuts: dict[str, Cut] = {"negative": pair.about_to_swear, "positive": pair.calm}
    for side, cut in cuts.items():
        sides |= {f"{side}_prompt": cut.text[: cut.last], side: cut.text[cut.last :]}
    return sides


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def main() -> None:
    """Read the data, let the model continue the prompts, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with the data files")
    parser.add_argument("work", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    prompts = _json_lines(arguments.data / "rtp_challenge_dev.jsonl")[:TUNED_PROMPTS]
    texts = _json_lines(arguments.data / "wiki_samples_dev.jsonl")[:TUNED_TEXTS]
    with running_server("embedded", "--dtype", "float32") as server:
        continued = asyncio.run(continuations(server.url, [row["prompt"] for row in prompts]))
    neutral = [row["prompt"] + row["gold"] for row in texts]
    write_files(load_model("embedded", "float32"), continued, neutral, arguments.work)


def _json_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
