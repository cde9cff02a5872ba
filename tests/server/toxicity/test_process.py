"""Tests of scorers in real worker processes: results, deaths, hangs, and a clean end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from server.toxicity.process import ScorerProcess
from server.toxicity.profanity import ProfanityScorer
from server.toxicity.scorer import ScoringError
from tests.toxicity_service import scoring_service

T = TypeVar("T")

TEXTS = ["You stupid asshole.", "Hello", "", "two\nlines\r\n", "日本語 🙂", "\x00\u2028"]


@contextmanager
def started(
    spec: str, answer_seconds: float = 30, restart_seconds: float = 0.01
) -> Iterator[ScorerProcess]:
    """Start a scorer; at the end close it and assert that its process is gone, zombie or not."""
    scorer = ScorerProcess(spec, answer_seconds=answer_seconds, restart_seconds=restart_seconds)
    try:
        yield scorer
    finally:
        begun = time.monotonic()
        scorer.close()
        assert time.monotonic() - begun < 5
        assert not psutil.pid_exists(scorer.pid)


@pytest.fixture(scope="module")
def embedded() -> Iterator[ScorerProcess]:
    with started("embedded") as scorer:
        scorer.wait_ready()
        yield scorer


def in_background(work: Callable[[], T]) -> Future[T]:
    """Run `work` on a thread of its own; return a future of its result or its ScoringError."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except ScoringError as error:
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future


def kill(scorer: ScorerProcess) -> int:
    """Kill the worker and wait for its end. Returns its process id."""
    pid = scorer.pid
    worker = psutil.Process(pid)
    worker.kill()
    while worker.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
    return pid


def test_scores_are_those_of_this_process(embedded: ScorerProcess) -> None:
    assert embedded.score(TEXTS) == ProfanityScorer().score(TEXTS)
    assert embedded.score([]) == []


def test_any_text_and_any_length(embedded: ScorerProcess) -> None:
    texts = ["\ud800 \udc00", "x" * 1_000_000, *TEXTS]
    assert embedded.score(texts)[2:] == ProfanityScorer().score(TEXTS)


def test_many_threads_may_ask(embedded: ScorerProcess) -> None:
    expected = ProfanityScorer().score(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        batches = [TEXTS[: 1 + n % len(TEXTS)] for n in range(40)]
        results = list(pool.map(embedded.score, batches))
    assert results == [expected[: len(batch)] for batch in batches]


def test_the_worker_yields_to_others(embedded: ScorerProcess) -> None:
    worker = psutil.Process(embedded.pid)
    assert worker.nice() == 19
    assert os.sched_getscheduler(embedded.pid) == os.SCHED_IDLE
    assert worker.environ()["OMP_NUM_THREADS"] == "1"
    assert worker.num_threads() == 1
    # It leads its own session, so a signal to the terminal's foreground group does not reach it.
    assert os.getsid(embedded.pid) == embedded.pid


def test_the_command_line_does_not_say_which_scorer() -> None:
    with started("http://user:SECRET@127.0.0.1:9") as scorer:
        assert "SECRET" not in " ".join(psutil.Process(scorer.pid).cmdline())
        scorer.wait_ready()
        with pytest.raises(ScoringError, match=r"at 127\.0\.0\.1:9 cannot be asked") as caught:
            scorer.score(["a"])
        assert "SECRET" not in str(caught.value)


def test_it_starts_from_any_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "json.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(folder)
    with started("http://127.0.0.1:9") as scorer:
        scorer.wait_ready()


def test_a_scorer_that_cannot_be_loaded() -> None:
    with started("bert") as scorer:
        for _ in range(2):  # the second time in a new process
            with pytest.raises(ScoringError, match="the toxicity scorer 'bert' is none of"):
                scorer.wait_ready()
        with pytest.raises(ScoringError, match="the toxicity scorer 'bert' is none of"):
            scorer.score(["a"])


def test_an_error_of_the_scorers_costs_its_batch_only() -> None:
    with scoring_service() as service, started(service.url) as scorer:
        assert scorer.score(["a", "bc"]) == [0.01, 0.02]
        pid = scorer.pid
        with pytest.raises(ScoringError, match="no number from 0 to 1"):
            scorer.score(["x" * 101])
        assert scorer.score(["abc"]) == [0.03]
        assert scorer.pid == pid


def test_a_worker_that_died_between_batches_is_replaced() -> None:
    with scoring_service() as service, started(service.url) as scorer:
        scorer.wait_ready()
        pid = kill(scorer)
        assert scorer.score(["abc"]) == [0.03]
        assert scorer.pid != pid
        assert not psutil.pid_exists(pid)


def test_a_replaced_worker_outlives_the_thread_that_asked_for_it() -> None:
    with scoring_service() as service, started(service.url) as scorer:
        scorer.wait_ready()
        kill(scorer)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(scorer.score, ["abc"]).result(20) == [0.03]
        pid = scorer.pid
        assert scorer.score(["abcd"]) == [0.04]
        assert scorer.pid == pid


def test_a_worker_that_dies_over_a_batch_loses_that_batch() -> None:
    with scoring_service() as service, started(service.url) as scorer:
        service.hold()
        lost = in_background(lambda: scorer.score(["abc"]))
        assert service.arrived.wait(20)
        pid = scorer.pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ScoringError, match="has died"):
            lost.result(20)
        assert not psutil.pid_exists(pid)
        service.go_on.set()
        assert scorer.score(["abc"]) == [0.03]


def test_a_hung_worker_is_ended() -> None:
    with scoring_service() as service, started(service.url, answer_seconds=0.3) as scorer:
        scorer.wait_ready()
        pid = scorer.pid
        service.hold()
        with pytest.raises(ScoringError, match=r"not answered in [0-9.]+ s and was ended"):
            scorer.score(["abc"])
        assert not psutil.pid_exists(pid)
        service.go_on.set()
        scorer.wait_ready()
        assert scorer.score(["abc"]) == [0.03]


def test_a_worker_that_takes_no_input_is_ended() -> None:
    with scoring_service() as service, started(service.url, answer_seconds=0.5) as scorer:
        scorer.wait_ready()
        os.kill(scorer.pid, signal.SIGSTOP)
        with pytest.raises(ScoringError, match="not answered"):
            scorer.score(["x" * 10_000_000])


def test_what_it_computes_is_counted_and_what_it_waits_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "profanity_check.py").write_text(
        "import time\n"
        "def work(seconds):\n"
        "    end = time.process_time() + seconds\n"
        "    while time.process_time() < end:\n"
        "        pass\n"
        "work(0.5)\n"
        "def predict_prob(texts):\n"
        "    if 'waits' in texts:\n"
        "        time.sleep(0.5)\n"
        "    if 'works' in texts:\n"
        "        work(0.3)\n"
        "    return [0.5] * len(texts)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with started("embedded", answer_seconds=30) as scorer:
        scorer.score(["waits"])
        assert scorer.processor_seconds < 0.2  # loading does not count either
        scorer.score(["works"])
        assert 0.25 <= scorer.processor_seconds < 0.7
        kill(scorer)
        scorer.score(["works"])
        assert 0.5 <= scorer.processor_seconds < 1.2  # includes the first worker's time


def test_restarts_are_spaced() -> None:
    with scoring_service() as service, started(service.url, restart_seconds=1.5) as scorer:
        begun = time.monotonic()
        scorer.wait_ready()
        kill(scorer)
        assert scorer.score(["abc"]) == [0.03]
        assert time.monotonic() - begun >= 1.4


def test_close_frees_who_is_waiting_for_scores() -> None:
    with scoring_service() as service, started(service.url) as scorer:
        service.hold()
        lost = in_background(lambda: scorer.score(["abc"]))
        assert service.arrived.wait(20)
        scorer.close()
        with pytest.raises(ScoringError, match="is closed"):
            lost.result(5)


def test_close_ends_a_stopped_worker_at_once() -> None:
    with scoring_service() as service, started(service.url) as scorer:
        scorer.wait_ready()
        os.kill(scorer.pid, signal.SIGSTOP)
        lost = in_background(lambda: scorer.score(["abc"]))
        with pytest.raises(TimeoutError):
            lost.result(0.1)
        begun = time.monotonic()
        scorer.close()
        assert time.monotonic() - begun < 1
        with pytest.raises(ScoringError, match="is closed"):
            lost.result(5)


def test_close_frees_who_is_waiting_for_the_next_start() -> None:
    with scoring_service() as service, started(service.url, restart_seconds=60) as scorer:
        scorer.wait_ready()
        kill(scorer)
        lost = in_background(lambda: scorer.score(["a"]))
        with pytest.raises(TimeoutError):
            lost.result(0.2)
        scorer.close()
        with pytest.raises(ScoringError, match="is closed"):
            lost.result(5)


def test_a_process_that_cannot_be_started_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(ScoringError, match=r"cannot be started: .*/nowhere/python"):
        ScorerProcess("embedded")


def test_close_while_it_loads_and_after_the_end() -> None:
    scorer = ScorerProcess("embedded")
    loading = in_background(scorer.wait_ready)
    scorer.close()
    scorer.close()
    with pytest.raises(ScoringError, match="is closed"):
        loading.result(5)
    for ask in (scorer.wait_ready, lambda: scorer.score(["a"])):
        with pytest.raises(ScoringError, match="is closed"):
            ask()
    assert not psutil.pid_exists(scorer.pid)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(
    "stopped",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help")
        ),
    ],
)
def test_the_worker_ends_with_its_parent(stopped: bool, replaced: bool) -> None:
    code = (
        "import os, signal\n"
        "from server.toxicity.process import ScorerProcess\n"
        "scorer = ScorerProcess('http://127.0.0.1:9', restart_seconds=0.01)\n"
        "scorer.wait_ready()\n"
        f"if {replaced}:\n"
        "    first = scorer.pid\n"
        "    os.kill(first, signal.SIGKILL)\n"
        "    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)\n"
        "    scorer.wait_ready()\n"
        "    assert scorer.pid != first\n"
        f"if {stopped}:\n"
        "    os.kill(scorer.pid, signal.SIGSTOP)\n"
        "    os.waitid(os.P_PID, scorer.pid, os.WSTOPPED | os.WNOWAIT)\n"
        "print(scorer.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
