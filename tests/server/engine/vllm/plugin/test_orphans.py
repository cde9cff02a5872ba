"""The end of vLLM's processes with the server, in processes that are related as vLLM's are."""

import os
import subprocess
import sys

import psutil
import pytest

from server.engine.vllm.plugin.orphans import SERVER_VARIABLE

# Each starts the next, and is told how to: a server, a scheduler, and a worker, which says when it
# watches the server.
_WORKER = """
import time
from server.engine.vllm.plugin.orphans import end_with_server
end_with_server()
print("watching", flush=True)
time.sleep(60)
"""
_SCHEDULER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
_SERVER = """
import os, subprocess, sys
os.environ[sys.argv[1]] = str(os.getpid())
subprocess.run([sys.executable, "-c", *sys.argv[2:]])
"""


@pytest.mark.parametrize("is_told", [True, False])
def test_scheduler_and_worker_end_with_a_killed_server_that_started_them(is_told: bool) -> None:
    """A worker that is not told of its server, as on another machine, stays."""
    variable = SERVER_VARIABLE if is_told else "NOTHING"
    environment = {name: value for name, value in os.environ.items() if name != SERVER_VARIABLE}
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, variable, _SCHEDULER, _WORKER],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "watching\n"
    others = psutil.Process(server.pid).children(recursive=True)
    assert len(others) == 2
    server.kill()  # its parent, this process, has not reaped it while the worker looks
    _, alive = psutil.wait_procs(others, timeout=30 if is_told else 2)
    for process in alive:
        process.kill()
    server.communicate()
    assert len(alive) == (0 if is_told else 2)
