from dataclasses import replace

import pytest
import torch
from rich.progress import Progress

from benchmarks.core import BenchmarkError
from benchmarks.gpu import (
    measure_gpu,
    measure_on,
    open_random,
    random_llama,
    read_speed,
    step_bytes,
)
from benchmarks.options import Options
from tests.conftest import LoadTiny

QUICK = replace(Options.quick("embedded", "cuda", None), rounds=2)


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with Progress() as bar, pytest.raises(BenchmarkError, match="no GPU"):
        measure_gpu(QUICK, bar)


def test_the_model_that_is_measured_has_seven_billion_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.gpu.describe", lambda *_: None)  # which runs the model
    loaded = random_llama(torch.device("meta"))
    assert loaded.model.dtype == torch.bfloat16
    assert 7e9 < loaded.model.num_parameters() < 8e9


def test_all_arms_are_measured_at_all_batches(load_tiny: LoadTiny) -> None:
    bench = open_random(load_tiny(), 4)
    with Progress() as bar:
        section = measure_on(bench, 1e9, (1, 3), QUICK, bar)
    speeds, bandwidth = section.tables
    assert [row[1] for row in speeds.cells] == ["1"] * 3 + ["3"] * 3
    assert len(bandwidth.cells) == 1
    [row] = bandwidth.cells
    assert float(row[2]) / float(row[3]) == pytest.approx(float(row[4]), abs=1)


def test_what_a_step_reads_is_weights_keys_and_values(load_tiny: LoadTiny) -> None:
    loaded = load_tiny()
    bench = open_random(loaded, 4)
    embeddings = loaded.model.get_parameter("model.embed_tokens.weight").numel() * 4
    weights = loaded.model.num_parameters() * 4 - embeddings
    assert step_bytes(bench, 0) == weights
    assert step_bytes(bench, 10) == weights + 10 * 256


def test_reading_takes_time() -> None:
    assert 1e7 < read_speed(torch.device("cpu"), 1 << 22) < 1e13
