"""Runs one part of a check: python -m benchmarks.gpu.part NAME [--dry-run]."""

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Mapping
from typing import Final

from benchmarks.gpu.place import Place
from benchmarks.gpu.rows import Rows

# Imported one at a time: what one of them cannot import must not fail the others.
_FUNCTIONS: Final[Mapping[str, tuple[str, str]]] = {
    "environment": ("environment", "run"),
    "families": ("families", "run"),
    "tests": ("cuda_tests", "run"),
    "replayed": ("speed", "run_replayed"),
    "eager": ("speed", "run_eager"),
    "profile": ("profiling", "run"),
}


def main() -> int:
    """0 if nothing has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=_FUNCTIONS)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    # Why a fast path was turned off is in the log of this part.
    logging.basicConfig(stream=sys.stdout, format="%(name)s: %(message)s")
    logging.getLogger("server").setLevel(logging.DEBUG)
    rows = Rows()
    module, function = _FUNCTIONS[arguments.name]
    run = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    run(Place.of(arguments.dry_run), rows)
    return 1 if rows.failures else 0


if __name__ == "__main__":
    sys.exit(main())
