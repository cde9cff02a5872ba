"""Tests the choice between pages and slabs, their fallbacks, and the plan of a GPU's memory."""

import logging
from dataclasses import replace

import pytest
import torch

from server.engine.model.description import ModelLoadError
from server.engine.torch import build, memory_plan
from server.engine.torch.attention import plan as kv_plan
from server.engine.torch.attention.paged_attention import PagedMemory
from server.engine.torch.attention.paged_check import WrongAttentionError
from server.engine.torch.attention.plan import KVOptions, plan_kv
from server.engine.torch.attention.slab_attention import SlabMemory
from server.engine.torch.build import build_core
from server.engine.torch.memory_plan import plan_memory
from server.engine.torch.model import fallback
from server.engine.torch.model.loader import LoadedModel
from server.engine.torch.options import AttentionChoice, EngineOptions
from tests.conftest import LoadTiny
from tests.paged import paged_reference

GIGABYTE = 10**9


def options(attention: AttentionChoice = "automatic", size: int | None = 2 * 10**7) -> KVOptions:
    return KVOptions(attention, prefix_cache=True, bytes=size)


@pytest.fixture
def suited(load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """Load a model, and pretend that its device (the CPU) suits pages."""
    monkeypatch.setattr(kv_plan, "pages_unsupported_reason", lambda *_: None)
    return load_tiny()


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(kv_plan, "check_pages", fail)
    monkeypatch.setattr(kv_plan, "_KERNEL", "tests.paged")
    monkeypatch.setattr("tests.paged.attend_pages", paged_reference, raising=False)


def test_a_cpu_has_slabs_and_refuses_pages(load_tiny: LoadTiny) -> None:
    model = load_tiny().model
    assert isinstance(plan_kv(model, options()).memory, SlabMemory)
    assert isinstance(plan_kv(model, options("slabs")).memory, SlabMemory)
    with pytest.raises(ModelLoadError, match=r"pages are for a GPU \(--attention\)"):
        plan_kv(model, options("pages"))


def test_pages_that_pass_their_check_are_used(
    suited: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_plan, "_KERNEL", "tests.paged")
    monkeypatch.setattr("tests.paged.attend_pages", paged_reference, raising=False)
    for attention in ("automatic", "pages"):
        memory = plan_kv(suited.model, options(attention)).memory
        assert isinstance(memory, PagedMemory)
        assert memory.attend is paged_reference
    assert isinstance(plan_kv(suited.model, options("slabs")).memory, SlabMemory)


@pytest.mark.parametrize(
    "error", [WrongAttentionError("off by 1"), RuntimeError("out of resource\nand more")]
)
def test_pages_that_fail_their_check_are_replaced_by_slabs_with_a_warning(
    suited: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    failing(monkeypatch, error)
    with caplog.at_level(logging.WARNING):
        assert isinstance(plan_kv(suited.model, options()).memory, SlabMemory)
    [record] = caplog.records
    assert "--attention slabs" in record.message
    assert str(error).splitlines()[0] in record.message
    assert "and more" not in record.message
    with pytest.raises(ModelLoadError, match="attention over pages does not work here"):
        plan_kv(suited.model, options("pages"))


def test_a_machine_without_triton_has_slabs(
    suited: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_plan, "_KERNEL", "no_such_module")
    assert isinstance(plan_kv(suited.model, options()).memory, SlabMemory)
    assert "ModuleNotFoundError" in caplog.text


@pytest.mark.parametrize("attention", ["automatic", "pages"])
def test_a_device_that_has_failed_serves_nothing(
    suited: LoadedModel, monkeypatch: pytest.MonkeyPatch, attention: AttentionChoice
) -> None:
    failing(monkeypatch, torch.AcceleratorError("an illegal memory access was encountered"))
    monkeypatch.setattr(fallback, "has_failed", lambda _device: True)
    with pytest.raises(ModelLoadError, match=r"--attention slabs does without.*an illegal"):
        plan_kv(suited.model, options(attention))


def test_out_of_memory_names_kv_cache_gb(
    suited: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kv_plan, "checked_kernel", lambda *_: paged_reference)
    monkeypatch.setattr(kv_plan, "PagedMemory", fail)
    fail.probe_lanes = 6  # type: ignore[attr-defined]
    with pytest.raises(ModelLoadError, match="--kv-cache-gb"):
        plan_kv(suited.model, options())


def test_the_plan_has_room_for_interventions_a_step_and_graphs(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_tiny()
    monkeypatch.setattr(memory_plan, "free_memory", lambda _device: 2 * GIGABYTE)
    options = EngineOptions(max_batch_size=20, max_loaded_interventions=4)
    plan = plan_memory(loaded.model, loaded.description.site_widths, options)
    # Each of 5 slots (the identity and 4 interventions) has room for float32 maps at two sites of
    # width 32 (weight, bias, low, high, gate), and a head of 1,024 units with its W1 W1^T.
    assert plan.bank == 5 * 4 * (2 * (32 * 5 + 1) + 1024 * (32 + 1024 + 3))
    assert plan.step > options.max_batch_size * loaded.description.vocab_size * 4
    assert plan.graphs > 0
    spent = plan.bank + plan.step + plan.graphs + plan.libraries
    assert 0 < plan.keys_and_values <= 2 * GIGABYTE - spent
    assert "GB keys and values" in plan.summary()
    more = plan_memory(
        loaded.model,
        loaded.description.site_widths,
        replace(options, max_loaded_interventions=400, cuda_graphs=False),
    )
    assert more.bank > 50 * plan.bank
    assert more.graphs == 0


def test_on_one_gpu_keys_and_values_get_what_the_plan_leaves(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_tiny()
    monkeypatch.setattr(memory_plan, "free_memory", lambda _device: 2 * GIGABYTE)
    options = EngineOptions()
    assert build._kv_options(loaded, options).bytes is None, "a CPU has no plan"
    monkeypatch.setattr(type(loaded.model), "device", torch.device("cuda", 0))
    plan = plan_memory(loaded.model, loaded.description.site_widths, options)
    assert build._kv_options(loaded, options).bytes == plan.keys_and_values
    assert build._kv_options(loaded, replace(options, kv_cache_gb=0.5)).bytes == GIGABYTE // 2


def test_a_gpu_without_room_says_what_to_lower(load_tiny: LoadTiny) -> None:
    with pytest.raises(ModelLoadError, match="--max-batch-size"):
        build_core(load_tiny(), EngineOptions(kv_cache_gb=1e-9))
