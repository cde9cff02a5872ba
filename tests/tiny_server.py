"""Runs `steerserve` with a slow engine that dies or hangs in a step once a file exists.

tests/server/test_lifecycle.py starts it as a process. STEERSERVE_TEST_DEATH names the file: if it
is empty, the engine's thread dies; otherwise its step never ends.
"""

import os
import sys
import threading
import time
from pathlib import Path
from unittest import mock

from server.__main__ import main
from server.engine.torch.core import EngineCore
from server.variables import TEST_DEATH

STEP_SECONDS = 0.02


def run() -> None:
    death = Path(os.environ[TEST_DEATH.name])
    step = EngineCore.step

    def slow_step(core: EngineCore) -> object:
        if death.exists():
            if death.stat().st_size:
                threading.Event().wait()
            sys.exit("the engine thread dies, as the test wants")
        time.sleep(STEP_SECONDS)
        return step(core)

    with (
        mock.patch.object(EngineCore, "step", slow_step),
        mock.patch("server.engine.torch.engine.LAST_STEP_SECONDS", 3.0),
    ):
        main()


if __name__ == "__main__":
    run()
