"""Checks steerserve on a GPU, in at most eight minutes: `make gpu-check`.

It runs on a bare machine with torch, transformers, accelerate, psutil, safetensors and pytest, and
without what serves. Results are written to a Markdown and a JSON file as they come.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.page import Page
from benchmarks.gpu.parts import PARTS, ROOT, run_part


def main() -> int:
    """Return 0 if all parts have passed."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="run it on the CPU, tiny")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="parts to run")
    arguments = parser.parse_args()
    # A dry run measures nothing that counts, and must not replace the results of a GPU.
    results = ROOT / ("build/gpu-check" if arguments.dry_run else "benchmarks/results")
    out = arguments.out or results
    page = Page(out)
    page.start()
    passed = 0
    chosen = [part for part in PARTS if part.name in arguments.only]
    for part in chosen:
        print(f"{part.title} ({part.name}) ...", flush=True)
        page.begin(part.name, part.title)
        began = time.monotonic()
        command = ["-m", "benchmarks.gpu.part", part.name, str(out.absolute())]
        command += ["--dry-run"] if arguments.dry_run else []
        outcome = run_part(command, part.seconds, out / f"gpu-{part.name}.log")
        seconds = round(time.monotonic() - began, 1)
        page.end(**asdict(outcome), seconds=seconds)
        passed += outcome.passed
        tail = f"{outcome.tail}\n" if outcome.tail else ""
        print(f"{tail}{part.name}: {outcome.how}, {seconds} s", flush=True)
    sentence = f"{passed} of {len(chosen)} parts passed"
    page.close(sentence)
    print(out / "gpu.md", sentence, sep="\n")
    return 0 if passed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
