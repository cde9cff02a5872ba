"""Runs other people's clients, harnesses and tools against this server, and prints a table.

`make conformance`, or `python -m tests.conformance [NAME ...]` for some of them. Each has an
environment of its own in the user's cache; the first run downloads some gigabytes.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from server.config import EMBEDDED_MODEL_NAME as MODEL
from server.engine.model.embedded import embedded_model_folder
from tests.conformance.lm_eval_harness import LM_EVAL
from tests.conformance.suites import SUITES, Results, Suite
from tests.processes import steerserve
from tests.tiny import save_tiny
from tests.tool_templates import CHAT, write_templates

# The names of models in openai-python's own tests.
NAMES = (MODEL, "gpt-3.5-turbo-instruct", "gpt-6-astra", "model")


def main(names: Sequence[str]) -> int:
    """Run the suites, all of them or those named; return 1 if anything failed."""
    known = {suite.name: suite for suite in (*SUITES, LM_EVAL)}
    if unknown := [name for name in names if name not in known]:
        print(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return 1
    chosen = [suite for name, suite in known.items() if not names or name in names]
    os.environ["CONFORMANCE_TOKENIZER"] = str(embedded_model_folder(print))
    rows = []
    with tempfile.TemporaryDirectory() as folder, _servers(Path(folder)) as (embedded, tiny):
        for suite in chosen:
            print(f"running {suite.name}", flush=True)
            url = tiny if suite.name == "schemathesis" else embedded
            rows.append((suite, _results(suite, url)))
    print("\n| what | version | result |\n|---|---|---|")
    for suite, results in rows:
        version = suite.packages[0].replace("==", "@").rpartition("@")[2]
        print(f"| {suite.name} | {version} | {_told(results)} |")
    return int(any(fault for _, results in rows for fault in results.values()))


@contextmanager
def _servers(folder: Path) -> Iterator[tuple[str, str]]:
    """Serve the embedded model, and a tiny one for thousands of requests."""
    model = folder / "model"
    save_tiny(model, chat_template=CHAT)
    templates = write_templates(folder)
    names = [word for name in NAMES for word in ("--served-model-name", name)]
    limit = ("--default-max-tokens", "64")  # of chats that set none
    short = ("--default-max-tokens", "4", "--max-completions-per-request", "4")
    (folder / "tiny").mkdir()
    with (
        steerserve(
            folder, *("--dtype", "float32", "--no-prefix-cache"), *limit, *names
        ) as embedded,
        steerserve(
            folder / "tiny",
            *("--model", str(model), "--served-model-name", MODEL, *short),
            *("--response-template", str(templates.response)),
        ) as tiny,
    ):
        yield embedded.url, tiny.url


def _results(suite: Suite, url: str) -> Results:
    try:
        return suite.run(suite, url)
    except Exception as error:
        return {"run": f"{type(error).__name__}: {error}"}


def _told(results: Results) -> str:
    return ", ".join(
        name if fault is None else f"**{name}: {' '.join(fault.split())[:300]}**"
        for name, fault in results.items()
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
