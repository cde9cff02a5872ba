"""`steerserve` with an engine that is slow, and dies in its next step once a file is there.

A process of its own for tests/test_lifecycle.py: STEERSERVE_TEST_DEATH names the file.
"""

import os
import sys
import time
from pathlib import Path
from unittest import mock

from server.__main__ import main
from server.engine.torch.core import EngineCore

STEP_SECONDS = 0.02


def run() -> None:
    death = Path(os.environ["STEERSERVE_TEST_DEATH"])
    step = EngineCore.step

    def slow_step(core: EngineCore) -> object:
        if death.exists():
            sys.exit("the engine thread dies, as the test wants")
        time.sleep(STEP_SECONDS)
        return step(core)

    with mock.patch.object(EngineCore, "step", slow_step):
        main()


if __name__ == "__main__":
    run()
