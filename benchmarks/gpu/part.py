"""Runs one part of a check: python -m benchmarks.gpu.part NAME FOLDER [--dry-run]."""

import argparse
import logging
import pkgutil
import sys
import warnings
from pathlib import Path

from benchmarks.gpu.page import Page
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.place import Place


def main() -> int:
    """Return 0 if nothing has failed."""
    functions = {part.name: part.function for part in PARTS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=functions)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    # The part's log tells why a fast path was turned off.
    logging.basicConfig(stream=sys.stdout, format="%(name)s: %(message)s")
    logging.getLogger("server").setLevel(logging.DEBUG)
    page = Page(arguments.folder)
    # Only the module of this part is imported, so that one that fails does not fail the others.
    run = pkgutil.resolve_name(f"benchmarks.gpu.{functions[arguments.name]}")
    run(Place.of(arguments.dry_run), page)
    return 1 if page.failures else 0


if __name__ == "__main__":
    sys.exit(main())
