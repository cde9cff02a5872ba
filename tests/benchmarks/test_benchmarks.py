"""The benchmarks run, and what they say of their engines is true; no test asserts a time."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.decoding import BatchEdits, BenchEngine, BenchmarkError, decoding
from benchmarks.models import OPTIONS, open_engine
from benchmarks.processes import Worker
from benchmarks.running_server import running_server
from benchmarks.turns import Turns, take_turns
from benchmarks.workers.steerserve_worker import generate
from benchmarks.workers.transformers_worker import load, static_batch
from server.engine.torch.attention.backend import LaneSpan
from server.engine.torch.attention.slab_attention import SlabMemory, SlabStep
from server.engine.torch.engine import TorchEngine
from server.engine.torch.model.loader import load_model
from server.engine.torch.options import EngineOptions
from server.engine.torch.step.batch import Batch
from steering.bank import Bank
from steering.dose import DoseMeter
from tests.serving import eventually

PROMPTS = [[1, 2, 3, 4], [50, 60, 70, 80]]
ECHO = """
import os, subprocess, sys
from benchmarks.workers.protocol import CONNECTION, serve
inherited = [int(os.environ[CONNECTION])]  # the child keeps the connection open
command = [sys.executable, "-c", "input()"]
child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=inherited)
print("a library says something")
info = {"child": str(child.pid)}
serve(lambda prompts, new: [prompt[:1] * new for prompt in prompts], info)
"""


@pytest.fixture
def tiny_llama(tiny_folders: Mapping[str, Path]) -> str:
    return str(tiny_folders["llama"])


@pytest.fixture
def engine(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> BenchEngine:
    """An engine that compiles nothing, as compiling takes most of the time."""
    monkeypatch.setattr("benchmarks.models.OPTIONS", replace(OPTIONS, compile_layers=False))
    return open_engine(tiny_llama)


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Worker]:
    """A worker that repeats each prompt's first token, and has a child of its own."""
    with Worker("echo", [sys.executable, "-c", ECHO], tmp_path) as worker:
        yield worker


def test_the_engine_is_measured_in_this_process(tiny_llama: str, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    sections = "steering,distinct,growth"
    arguments = ["--quick", "--model", tiny_llama, "--only", sections, "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    pages = {
        name: json.loads((tmp_path / f"{name}.json").read_text()) for name in sections.split(",")
    }
    for name, page in pages.items():
        assert page["machine"]
        assert page["versions"]["torch"] == torch.__version__
        assert page["dtype"] in ("bfloat16", "float32")
        assert page["command"] in (tmp_path / f"{name}.md").read_text()
    labels = [(each["batch"], each["label"]) for each in pages["steering"]["steering"]]
    trials = (
        *("none, once more", "LinEAS at 2 sites", "gated maps at 2 sites"),
        *("ARGRE, 5 iterations", "both"),
    )
    assert labels == [(batch, trial) for batch in (1, 2) for trial in trials]
    assert [each["heads"] for each in pages["distinct"]["heads"]] == [1, 4]
    assert pages["distinct"]["bandwidth_bytes_per_second"] > 1e8
    assert len(pages["growth"]["loaded"]) == 2
    assert set(pages["growth"]["lookup_seconds"]) == {"1", "10"}


def test_each_trial_is_steered_as_it_should_and_nothing_is_left(engine: BenchEngine) -> None:
    steered = (engine.lineas(),)
    runner = engine.core._runner
    run = runner.run
    seen: list[bool] = []

    def recording(batch: Batch, bank: Bank, meter: DoseMeter | None = None) -> Tensor:
        affine = batch.route.affine
        found = {} if affine is None else bank.tables_for(affine)
        assert len(found) in (0, len(engine.sites))
        seen.append(bool(found))
        return run(batch, bank, meter)

    turns = Turns(rounds=2, steps=2, prompt_tokens=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run", recording)
        seconds = take_turns(
            engine, {"plain": [()] * 2, "steered": [steered] * 2}, turns, lambda: None
        )
    # In turns, in each step of three rounds, the first of which warms up.
    assert seen[-12:] == [False, True] * 6
    assert all(len(each) == 2 and min(each) > 0 for each in seconds.values())
    engine.core.check()
    assert not engine.core.has_work


def test_sequences_of_a_trial_stay_neighbours_of_one_length(engine: BenchEngine) -> None:
    """Attention takes one call for every trial, and no trial needs a mask that others do not."""
    step = SlabMemory.step
    seen: list[tuple[int, int]] = []

    def recording(memory: SlabMemory, spans: list[LaneSpan]) -> SlabStep:
        found = step(memory, spans)
        seen.append((len(found._parts), len({span.start for span in spans})))
        return found

    steered = (engine.lineas(),)
    trials: dict[str, BatchEdits] = {"two": [()] * 2, "four": [steered] * 4, "three": [()] * 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlabMemory, "step", recording)
        five_of_the_smallest = 5 * 64
        patch.setattr("server.engine.torch.attention.slab._GROUP_TOKENS", five_of_the_smallest)
        take_turns(engine, trials, Turns(rounds=1, steps=4, prompt_tokens=8), lambda: None)
    assert seen[-24:] == [(1, 1)] * 24


def test_trials_that_do_not_fit_together_are_not_measured(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "benchmarks.models.OPTIONS", replace(OPTIONS, kv_cache_gb=0.0001, compile_layers=False)
    )
    engine = open_engine(tiny_llama)
    free = engine.core.scheduler.pool.free_blocks
    with pytest.raises(BenchmarkError, match=f"of which {free} are free"):
        take_turns(engine, {"plain": [()] * 9, "again": [()] * 9}, Turns(1, 20, 8), lambda: None)


def test_a_step_that_advances_too_few_is_no_measurement(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, max_batch_size=2, compile_layers=False)
    monkeypatch.setattr("benchmarks.models.OPTIONS", options)
    engine = open_engine(tiny_llama)
    with pytest.raises(BenchmarkError, match="steps, not 1"):
        take_turns(engine, {"plain": [()] * 3}, Turns(1, 2, 4), lambda: None)
    with (
        pytest.raises(BenchmarkError, match="a step advanced 1 of 3 sequences"),
        decoding(engine, [()] * 3, prompt_tokens=4, new_tokens=6) as trial,
    ):
        trial.seconds(1)
    engine.core.check()
    assert not engine.core.has_work


def test_doses_are_measured_as_often_in_each_trial(engine: BenchEngine) -> None:
    measured: list[int] = []
    meter = engine.core._meter

    def recording(batch: Batch) -> DoseMeter | None:
        found = meter(batch)
        if found is not None:
            measured.append(len(batch.rows))
        return found

    steered = (engine.lineas(),)
    turns = Turns(rounds=1, steps=16, prompt_tokens=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.core, "_meter", recording)
        take_turns(engine, {"one": [steered], "two": [steered] * 2}, turns, lambda: None)
    assert measured[-4:] == [1, 2, 1, 2]


def test_an_intervention_that_breaks_the_model_is_not_measured(engine: BenchEngine) -> None:
    edits = (engine.lineas(strength=1e38),)
    with pytest.raises(BenchmarkError, match="a sequence was lost"):
        take_turns(engine, {"broken": [edits]}, Turns(1, 3, 4), lambda: None)


def wait_until_stopped(process: psutil.Process) -> None:
    """A signal needs a moment to arrive."""
    deadline = time.monotonic() + 10
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline, process.status()
        time.sleep(0.01)


def test_a_worker_answers_and_is_stopped_in_between(echo: Worker) -> None:
    child = psutil.Process(int(echo.info["child"]))
    for _ in range(2):
        answer = echo.generate(PROMPTS, 3)
        assert answer.tokens == [[1, 1, 1], [50, 50, 50]]
        assert answer.seconds > 0
        for process in (child, psutil.Process(child.ppid())):
            wait_until_stopped(process)


def test_a_worker_that_dies_shows_the_end_of_its_log(echo: Worker, tmp_path: Path) -> None:
    child = psutil.Process(int(echo.info["child"]))
    os.kill(child.ppid(), signal.SIGKILL)
    with pytest.raises(BenchmarkError, match="echo has ended"):
        echo.generate(PROMPTS, 3)
    child.kill()
    broken = Worker("broken", [sys.executable, "-c", "raise SystemExit('no such model')"], tmp_path)
    with pytest.raises(BenchmarkError, match="no such model"), broken:
        pass


def test_a_server_is_stopped_when_it_has_been_measured(tiny_llama: str) -> None:
    with running_server(tiny_llama, "--toxicity-scorer", "none", "--no-compile-layers") as server:
        assert server.metric("requests_running") == 0
        assert server.process.is_running()
    assert not server.process.is_running()


async def test_ours_and_transformers_generate_the_same(tiny_llama: str) -> None:
    with torch.inference_mode():
        expected = static_batch(load(tiny_llama, "float32"))(PROMPTS, 6)
    engine = TorchEngine(load_model(tiny_llama, "float32"), lambda _: {}, EngineOptions())
    await engine.start()
    assert await generate(engine, PROMPTS, 6) == expected
    await eventually(lambda: engine.stats().running == 0)
    await engine.close()
