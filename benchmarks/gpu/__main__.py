"""Checks steerserve on a GPU, in at most eight minutes: `make gpu-check`.

Made for a bare machine: it needs torch, transformers, accelerate, psutil, safetensors and pytest,
and nothing of what serves. Results are appended to a Markdown and a JSON file as they come.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Final

from benchmarks.gpu.page import Page
from benchmarks.gpu.parts import PARTS, ROOT, run_part

_RESULTS: Final = ROOT / "benchmarks" / "results"


def main() -> int:
    """0 if all parts have passed."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="all of it on the CPU, in small")
    parser.add_argument("--out", type=Path, help="the folder to write to", default=None)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some parts")
    arguments = parser.parse_args()
    # A dry run measures nothing that counts, and must not replace what a GPU has shown.
    out = arguments.out or (ROOT / "build" / "gpu-check" if arguments.dry_run else _RESULTS)
    page = Page(out, shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]))
    passed = 0
    chosen = [part for part in PARTS if part.name in arguments.only]
    for part in chosen:
        sys.stdout.write(f"{part.title} ({part.name}) ...\n")
        sys.stdout.flush()
        page.begin(part)
        began = time.monotonic()
        with (out / f"gpu-{part.name}.log").open("w", buffering=1) as log:
            command = part.command(arguments.dry_run)
            outcome = run_part(command, part.seconds, page.row, log)
        page.end(outcome, time.monotonic() - began)
        passed += outcome.passed
        sys.stdout.write(f"{outcome.tail}\n" if outcome.tail else "")
        sys.stdout.write(f"{part.name}: {outcome.how}, {time.monotonic() - began:.1f} s\n")
        sys.stdout.flush()
    sentence = f"{passed} of {len(chosen)} parts passed"
    page.close(sentence)
    sys.stdout.write(f"{out / 'gpu.md'}\n{sentence}\n")
    return 0 if passed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
