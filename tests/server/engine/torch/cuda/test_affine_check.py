"""Tests that the affine kernel is checked at start, and used only if it is right."""

import importlib
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from server.engine.model.description import ModelLoadError
from server.engine.torch.cuda import affine_check
from server.engine.torch.cuda.affine_check import use_affine_kernel
from server.engine.torch.model import fallback
from steering.affine import MapTable, edit_stacks

CPU = torch.device("cpu")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list that collects the kernels put to use; none is registered in the process."""
    kernels: list[object] = []
    monkeypatch.setattr(affine_check, "use_kernel_on_gpus", kernels.append)
    return kernels


def stand_in(monkeypatch: pytest.MonkeyPatch, kernel: object) -> None:
    """Make a function stand in for the kernel."""
    module = SimpleNamespace(edit_stacks_triton=kernel)
    monkeypatch.setattr(importlib, "import_module", lambda _name: module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_edits_rightly_is_used(
    monkeypatch: pytest.MonkeyPatch, used: list[object], dtype: torch.dtype
) -> None:
    stand_in(monkeypatch, edit_stacks)
    assert use_affine_kernel(24, dtype, CPU)
    assert used == [edit_stacks]


def test_the_kernel_itself_passes(used: list[object]) -> None:
    pytest.importorskip("triton", reason="Triton is there on x86-64 Linux only")
    if torch.cuda.is_available():
        pytest.skip("it is compiled here, and not interpreted")
    assert use_affine_kernel(24, torch.float32, CPU)
    assert len(used) == 1


@pytest.mark.parametrize("wrong", ["edits", "unedited tokens", "doses", "gates", "it fails"])
def test_what_edits_wrongly_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
    used: list[object],
    caplog: pytest.LogCaptureFixture,
    wrong: str,
) -> None:
    def kernel(
        activations: Tensor, slots: Tensor, strength: Tensor, table: MapTable, doses: Tensor | None
    ) -> Tensor:
        if wrong == "it fails":
            raise RuntimeError("out of resources\nand more")
        if wrong == "gates":
            table = table._replace(flags=table.flags & 3)
        edited = edit_stacks(activations, slots, strength, table, doses)
        if wrong == "edits":
            edited[1, 3] += 1
        elif wrong == "unedited tokens":
            edited[0, 3] = -activations[0, 3]
        elif wrong == "doses" and doses is not None:
            doses[1, 0, 1] += 1
        return edited

    stand_in(monkeypatch, kernel)
    with caplog.at_level(logging.WARNING):
        assert not use_affine_kernel(24, torch.float32, CPU)
    assert not used
    assert "affine edits run without a kernel, which is slower" in caplog.text


def test_a_device_that_failed_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, used: list[object]
) -> None:
    stand_in(monkeypatch, None)
    monkeypatch.setattr(fallback, "has_failed", lambda _device: True)
    with pytest.raises(ModelLoadError, match="the GPU failed"):
        use_affine_kernel(24, torch.float32, CPU)
    assert not used
