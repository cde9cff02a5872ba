"""What refines rows fast, made when an engine starts; and what is done where it cannot be."""

from pathlib import Path

import pytest
import torch

from server.engine.torch.cpu import native_refinement
from server.engine.torch.cpu.native_refinement import make_native_refinement
from server.engine.torch.options import EngineOptions
from steering.native import NativeBuildError, NativeRefinement, build_native
from tests.conftest import StartEngine
from tests.oracles import Oracle
from tests.steered import (
    PROMPTS,
    STACKS,
    assert_equal_to_oracle,
    expected_of,
    generate,
    interventions_of,
)
from tests.tiny import tiny_model


def test_nothing_is_left_where_it_was_made(tmp_path: Path) -> None:
    build_native(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("no-such-compiler", "no-such-compiler"),
        ("false", "false failed"),
        ("true", "refine.so"),
        ("g++ '", "No closing quotation"),
        ("g++ -Drefine=other", "undefined symbol: refine"),
    ],
)
def test_without_a_compiler_that_works_nothing_is_made(
    compiler: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(NativeBuildError, match=said):
        build_native(tmp_path)


@pytest.mark.parametrize("options", ["", "-mno-avx512f"])
def test_a_strict_compiler_has_nothing_to_say(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for a processor whose registers are shorter."""
    monkeypatch.setenv("CXX", f"g++ -Wall -Wextra -Werror {options}")
    build_native(tmp_path)


def test_what_computes_wrongly_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(_self: NativeRefinement, h: torch.Tensor, *_: object) -> torch.Tensor:
        return h.clone()

    monkeypatch.setattr(NativeRefinement, "__call__", leave)
    assert make_native_refinement() is None
    assert "rewards run uncompiled" in caplog.text


async def test_without_a_compiler_a_server_refines_by_the_equations(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_folder: Path) -> NativeRefinement:
        raise NativeBuildError("no compiler")

    oracle = Oracle(tiny_model("llama"))
    monkeypatch.setattr(native_refinement, "build_native", fail)
    options = EngineOptions(kv_cache_gb=0.02, compile_layers=True)
    engine = await start_engine(interventions_of(), "llama", options)
    assert engine._core.interventions.bank.native is None
    assert "rewards run uncompiled" in caplog.text
    assert "--no-compile-layers: NativeBuildError: no compiler" in caplog.text
    outputs = await generate(engine, PROMPTS[0], STACKS["r"])
    assert_equal_to_oracle(outputs, *expected_of(oracle, "llama", PROMPTS[0], STACKS["r"]))


@pytest.mark.parametrize("stack", ["r", "r with other settings", "four"])
async def test_a_request_is_refined_by_it_and_equals_the_oracle(
    start_engine: StartEngine, stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    call = NativeRefinement.__call__

    def counted(self: NativeRefinement, h: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append(len(h))
        return call(self, h, *rest)  # type: ignore[arg-type]

    oracle = Oracle(tiny_model("llama"))
    monkeypatch.setattr(NativeRefinement, "__call__", counted)
    options = EngineOptions(kv_cache_gb=0.02, compile_layers=True, prefix_cache=False)
    engine = await start_engine(interventions_of(), "llama", options)
    calls.clear()
    outputs = await generate(engine, PROMPTS[0], STACKS[stack])
    assert len(calls) >= len(outputs)
    assert_equal_to_oracle(outputs, *expected_of(oracle, "llama", PROMPTS[0], STACKS[stack]))
