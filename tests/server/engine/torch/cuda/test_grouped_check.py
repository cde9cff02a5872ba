"""Tests that reward kernels are checked before use, and that they compile for absent GPUs.

The kernels refine the rows (hidden states before `lm_head`) of several reward heads together.
"""

import importlib
import logging
from types import ModuleType

import pytest
import torch
from torch import Tensor

from server.engine.model.description import ModelLoadError
from server.engine.torch.cuda import grouped_check
from server.engine.torch.cuda.grouped_check import make_grouped_refinement
from server.engine.torch.model import fallback
from tests.gpu_code import compiled_for_gpus
from tests.grouped import expected_of, mixed_settings, random_rows, refined_by, use_few_programs
from tests.tiny import random_head

CPU = torch.device("cpu")
UNITS = (24, 100)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module of the kernels, which Triton interprets here with large blocks."""
    pytest.importorskip("triton", reason="Triton is there on x86-64 Linux only")
    if torch.cuda.is_available():
        pytest.skip("they are compiled here, and not interpreted")
    launches = importlib.import_module("steering.kernels.reward_triton")
    use_few_programs(monkeypatch, launches)
    return launches


@pytest.mark.usefixtures("kernels")
def test_what_refines_rightly_is_used() -> None:
    refine = make_grouped_refinement(4, 32, CPU, UNITS)
    assert refine is not None
    assert not refine.has_heads([1])
    head = random_head(1)
    refine.put(3, head.prepare().prepared)
    h, how = random_rows(2, 32), mixed_settings(2)
    found = refined_by(refine, h, [(3, 2)], how)
    torch.testing.assert_close(found, expected_of([head] * 3, h, [(3, 2)], how))


@pytest.mark.parametrize("part", ["units", "gram_slopes", "ascend"])
def test_what_refines_wrongly_is_not_used(
    kernels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    part: str,
) -> None:
    right = getattr(kernels, part)

    def wrong(*arguments: object) -> Tensor:
        result: Tensor = right(*arguments)
        return result * 1.2

    monkeypatch.setattr(kernels, part, wrong)
    with caplog.at_level(logging.WARNING):
        assert make_grouped_refinement(4, 32, CPU, UNITS) is None
    assert "a row's edit is off by" in caplog.text


def test_without_triton_there_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(grouped_check, "_KERNELS", "steering.kernels.no_such_module")
    with caplog.at_level(logging.WARNING):
        assert make_grouped_refinement(4, 32, CPU, UNITS) is None
    assert "rewards run without kernels" in caplog.text
    monkeypatch.setattr(fallback, "has_failed", lambda _device: True)
    with pytest.raises(ModelLoadError, match="the GPU failed"):
        make_grouped_refinement(4, 32, CPU, UNITS)


def test_the_kernels_compile_for_an_a100_and_an_h100() -> None:
    """For heads of 1024 units, three programs of each kernel but one fit on a multiprocessor."""
    pytest.importorskip("triton", reason="Triton is there on x86-64 Linux only")
    for row in compiled_for_gpus("reward_kernel_compiler"):
        assert row["shared"] <= 32 * 1024, row
        assert row["registers"] * row["threads"] <= 65536 // (
            1 if row["kernel"] == "ascend" else 3
        ), row
        assert row["spilled"] <= 64, row
        # The kernels that read matrices copy 16 bytes at once.
        assert row["widest_copy"] == (
            16 if row["kernel"] in ("units", "gram_slopes", "finish") else 0
        )
