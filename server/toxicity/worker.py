"""The worker process: `python -m server.toxicity.worker`.

The environment gives the scorer to load (WORKER_SPEC; every user could read a command line) and the
process that has started the worker (WORKER_PARENT). On Linux the worker is killed when the thread
that has started it ends.

First the worker writes a line of JSON to stdout: `{"ready": true}`, or `{"error": "..."}` before it
exits. Then it reads lines from stdin, each a JSON list of texts, and answers each with a line:
`{"scores": [...]}` or `{"error": "..."}`. It exits at the end of stdin. stderr is for people.
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

_BACKENDS: Final = {
    "embedded": "server.toxicity.profanity",
    "hf": "server.toxicity.classifier",
    "http": "server.toxicity.remote",
    "python": "server.toxicity.function",
}
_MAX_MESSAGE: Final = 500  # characters; libraries quote whole files in their errors
_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>


def load_scorer(spec: str) -> Backend:
    """Load the scorer that a spec names, without the libraries that only other scorers need.

    Raises:
        ValueError: the spec is wrong, or `none`.
        Exception: any error of the loading.
    """
    parsed = parse_spec(spec)
    if parsed.kind == "none":
        raise ValueError("the toxicity scorer 'none' scores nothing")
    scorer: Backend = importlib.import_module(_BACKENDS[parsed.kind]).load(parsed.target)
    return scorer


def answer(scorer: Backend, line: bytes) -> dict[str, object]:
    """Return the answer to one line: the scores, or the error."""
    try:
        texts = [_as_unicode(text) for text in json.loads(line)]
        return {"scores": scorer.score(texts)}
    except ScoringError as error:
        return {"error": _one_line(str(error))}
    except Exception as error:
        # Only the error's type is told, because its message may quote a text.
        return {"error": f"the toxicity scorer failed: {type(error).__name__}"}


def main() -> int:
    """Serve until stdin ends; return the exit status."""
    _end_with_parent(int(os.environ.pop(WORKER_PARENT.name)))
    _lower_priority()
    with _take_stdout() as protocol:
        try:
            scorer = load_scorer(os.environ.pop(WORKER_SPEC.name))
        except Exception as error:
            _write_message(protocol, {"error": _load_message(error)})
            return 1
        _write_message(protocol, {"ready": True})
        for line in sys.stdin.buffer:
            _write_message(protocol, answer(scorer, line))
    return 0


def _end_with_parent(parent: int) -> None:
    """Have Linux kill this process when its parent ends, even a hung one; exit if it has ended.

    On other systems, or if a sandbox forbids this, the worker ends at the end of stdin.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != parent:
            sys.exit(1)


def _lower_priority() -> None:
    """Take only the processor time that nobody else wants."""
    os.nice(19)
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it; niceness is nearly as good
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _take_stdout() -> TextIO:
    """Keep stdout for the protocol; redirect what libraries print to stderr."""
    protocol = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return protocol


def _write_message(protocol: TextIO, message: dict[str, object]) -> None:
    protocol.write(json.dumps(message) + "\n")
    protocol.flush()


def _as_unicode(text: str) -> str:
    """Replace lone surrogates, which no encoding and no tokenizer takes, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _load_message(error: Exception) -> str:
    """Return the full message for the operator; no text has come yet that it could quote."""
    message = str(error) or repr(error)
    if not isinstance(error, ScoringError | ValueError | OSError):
        message = f"{type(error).__name__}: {message}"
    return _one_line(message)


def _one_line(message: str) -> str:
    return " ".join(message.split())[:_MAX_MESSAGE]


if __name__ == "__main__":
    sys.exit(main())
