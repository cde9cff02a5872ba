"""The second judge, toxic-comment-classifier, which selected nothing.

It brings TensorFlow, and so it runs in a process with a virtual environment of its own.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from benchmarks.decoding import BenchmarkError
from benchmarks.processes import ROOT
from server.toxicity.scorer import ScoringError, check_scores

FIRST_JUDGE: Final = "alt-profanity-check"
SECOND_JUDGE: Final = "toxic-comment-classifier"
ENVIRONMENT: Final = ROOT / "constraints" / "judge_environment.sh"
_MODULE: Final = "benchmarks.workers.judge_worker"
_TRIED: Final = "Have a nice day."


@dataclass(frozen=True, slots=True)
class SecondJudge:
    """Scores texts in another process."""

    python: Path
    versions: Mapping[str, str]

    @classmethod
    def prepare(cls, environment: Path = ENVIRONMENT) -> Self:
        """Make the virtual environment if it is missing, and score a text.

        Args:
            environment: the script that prints the virtual environment's folder.

        Raises:
            BenchmarkError: there is no such environment and none can be made, or it scores nothing.
        """
        # pip and the script report errors on stderr.
        made = subprocess.run([str(environment)], stdout=subprocess.PIPE, text=True, check=False)
        if made.returncode:
            raise BenchmarkError(
                f"the second judge, {SECOND_JUDGE}, cannot be had (see above): nothing is measured"
            )
        python = Path(made.stdout.strip()) / "bin" / "python"
        _, versions = _run(python, [_TRIED])
        return cls(python, versions)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the probability that each text is toxic.

        Raises:
            BenchmarkError: the process fails.
        """
        scores, _ = _run(self.python, texts)
        return scores


def _run(python: Path, texts: Sequence[str]) -> tuple[list[float], Mapping[str, str]]:
    """Return the scores of texts, and the versions of the judge's packages."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "texts.json", Path(folder) / "scores.json"
        asked.write_text(json.dumps(texts))
        done = subprocess.run(
            [str(python), "-m", _MODULE, str(asked), str(answered)],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            *_, last = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise BenchmarkError(f"the second judge, {SECOND_JUDGE}, failed: {last}")
        answer = json.loads(answered.read_text())
    try:
        return check_scores(answer["scores"], len(texts)), answer["versions"]
    except ScoringError as error:
        raise BenchmarkError(f"the second judge, {SECOND_JUDGE}, failed: {error}") from error
