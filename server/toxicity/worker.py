"""The worker process: `python -m server.toxicity.worker`.

Its environment says which scorer (SPEC_VARIABLE; a command line is everybody's to read) and which
process has started it (PARENT_VARIABLE). On Linux it dies with the thread that has started it.

First it says on stdout, in a line of JSON, `{"ready": true}`, or `{"error": "..."}` and ends. Then,
for each line of stdin, a JSON list of texts, it writes a line with `{"scores": [...]}` or
`{"error": "..."}`. It ends with stdin. stderr is for people.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
from contextlib import suppress
from typing import Final, TextIO

from server.toxicity.scorer import Backend, ScoringError, parse_spec
from server.variables import WORKER_PARENT, WORKER_SPEC

SPEC_VARIABLE: Final = WORKER_SPEC.name
PARENT_VARIABLE: Final = WORKER_PARENT.name

_BACKENDS: Final = {
    "embedded": "server.toxicity.profanity",
    "hf": "server.toxicity.classifier",
    "http": "server.toxicity.remote",
}
_MAX_MESSAGE: Final = 500  # characters; libraries quote whole files in their errors
_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>


def load_scorer(spec: str) -> Backend:
    """Load the scorer that a spec names, and no library that another one needs.

    Raises:
        ValueError: the spec is wrong, or `none`.
        Exception: whatever loading raises.
    """
    parsed = parse_spec(spec)
    if parsed.kind == "none":
        raise ValueError("the toxicity scorer 'none' scores nothing")
    scorer: Backend = importlib.import_module(_BACKENDS[parsed.kind]).load(parsed.target)
    return scorer


def answer(scorer: Backend, line: bytes) -> dict[str, object]:
    """The answer to one line: the scores, or why there are none."""
    try:
        texts = [_as_unicode(text) for text in json.loads(line)]
        return {"scores": scorer.score(texts)}
    except ScoringError as error:
        return {"error": _one_line(str(error))}
    except Exception as error:
        # Its type only: what it says may quote a text.
        return {"error": f"the toxicity scorer failed: {type(error).__name__}"}


def main() -> int:
    """Serve until stdin ends. Returns the exit status."""
    _die_with(int(os.environ.pop(PARENT_VARIABLE)))
    _yield_to_others()
    with _take_stdout() as protocol:
        try:
            scorer = load_scorer(os.environ.pop(SPEC_VARIABLE))
        except Exception as error:
            _say(protocol, {"error": _load_message(error)})
            return 1
        _say(protocol, {"ready": True})
        for line in sys.stdin.buffer:
            _say(protocol, answer(scorer, line))
    return 0


def _die_with(parent: int) -> None:
    """Be killed when the parent ends, even if stopped or hung by then; or end now if it has ended.

    Elsewhere, and where a sandbox forbids it, the end of stdin has to do.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != parent:
            sys.exit(1)


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


def _load_message(error: Exception) -> str:
    """All that there is to say, for the operator: no text was asked about so far."""
    message = str(error) or repr(error)
    if not isinstance(error, ScoringError | ValueError | OSError):
        message = f"{type(error).__name__}: {message}"
    return _one_line(message)


def _one_line(message: str) -> str:
    return " ".join(message.split())[:_MAX_MESSAGE]


if __name__ == "__main__":
    sys.exit(main())
