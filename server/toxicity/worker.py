"""The worker process: `python -m server.toxicity.worker SPEC`.

First it says on stdout, in a line of JSON, `{"ready": true}`, or `{"error": "..."}` and ends. Then,
for each line of stdin, a JSON list of texts, it writes a line with `{"scores": [...]}` or
`{"error": "..."}`. It ends with stdin. stderr is for people.
"""

import importlib
import json
import os
import sys
from contextlib import suppress
from typing import Final, TextIO

from server.toxicity.scorer import Scorer, ScoringError, parse_spec

_BACKENDS: Final = {
    "embedded": "server.toxicity.profanity",
    "hf": "server.toxicity.classifier",
    "http": "server.toxicity.remote",
}
_MAX_MESSAGE: Final = 500  # characters; libraries quote whole files in their errors


def load_scorer(spec: str) -> Scorer:
    """Load the scorer that a spec names, and no library that another one needs.

    Raises:
        ValueError: the spec is wrong, or `none`.
        Exception: whatever loading raises.
    """
    parsed = parse_spec(spec)
    if parsed.kind == "none":
        raise ValueError("the toxicity scorer 'none' scores nothing")
    scorer: Scorer = importlib.import_module(_BACKENDS[parsed.kind]).load(parsed.target)
    return scorer


def answer(scorer: Scorer, line: bytes) -> dict[str, object]:
    """The answer to one line: the scores, or why there are none."""
    try:
        texts = [_as_unicode(text) for text in json.loads(line)]
        return {"scores": scorer.score(texts)}
    except Exception as error:
        return {"error": _message(error)}


def main() -> int:
    """Serve until stdin ends. Returns the exit status."""
    _yield_to_others()
    with _take_stdout() as protocol:
        try:
            scorer = load_scorer(sys.argv[1])
        except Exception as error:
            _say(protocol, {"error": _message(error)})
            return 1
        _say(protocol, {"ready": True})
        for line in sys.stdin.buffer:
            _say(protocol, answer(scorer, line))
    return 0


def _yield_to_others() -> None:
    """Take only the processor time that nobody else wants."""
    os.nice(19)
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it; niceness is nearly as good
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _take_stdout() -> TextIO:
    """Keep stdout for the protocol; what a library prints goes to stderr."""
    protocol = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return protocol


def _say(protocol: TextIO, message: dict[str, object]) -> None:
    protocol.write(json.dumps(message) + "\n")
    protocol.flush()


def _as_unicode(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which no encoding and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _message(error: Exception) -> str:
    message = " ".join(str(error).split()) or repr(error)
    if not isinstance(error, ScoringError | ValueError | OSError):
        message = f"{type(error).__name__}: {message}"
    return message[:_MAX_MESSAGE]


if __name__ == "__main__":
    sys.exit(main())
