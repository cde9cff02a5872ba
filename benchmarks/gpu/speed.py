"""Decoding, steered and not, and the time to a long prompt's first token."""

import torch

from benchmarks.gpu.decoding import Bench, first_token_seconds, stack, step_seconds
from benchmarks.gpu.forms import form_of, graphs_of
from benchmarks.gpu.model import step_bytes
from benchmarks.gpu.place import Place
from benchmarks.gpu.rows import Rows
from server.engine.torch.attention.slab import KVShape
from server.engine.torch.memory_plan import MemoryPlan, plan_memory
from server.engine.torch.options import EngineOptions

_ARMS = ("none", "LinEAS", "ARGRE", "both")


def run_replayed(place: Place, rows: Rows) -> None:
    """With CUDA graphs, at all batches, with the memory beside its plan."""
    _run(place, rows, cuda_graphs=True)


def run_eager(place: Place, rows: Rows) -> None:
    """Without CUDA graphs."""
    _run(place, rows, cuda_graphs=False)


def _run(place: Place, rows: Rows, cuda_graphs: bool) -> None:
    plan: MemoryPlan | None = None
    bandwidth = place.bandwidth()
    bench = Bench.open(place, cuda_graphs)
    if place.device.type == "cuda":
        options = EngineOptions(max_batch_size=max(place.batches), cuda_graphs=cuda_graphs)
        plan = plan_memory(bench.loaded.model, bench.loaded.description.site_widths, options)
    rows.tell(attention=form_of(bench.core), graphs=graphs_of(bench.core))
    for batch in place.batches:
        base: float | None = None
        for name in _ARMS:
            with rows.attempt(batch=batch, steering=name):
                seconds = step_seconds(bench, [stack(name)] * batch, place)
                base = seconds if name == "none" else base
                rows.tell(**_speed(bench, place, batch, name, 1, seconds, base, bandwidth))
        if batch >= place.distinct:
            _distinct(bench, place, rows, batch, base, bandwidth)
    for name in ("none", "both"):
        with rows.attempt(steering=name):
            seconds = first_token_seconds(bench, stack(name), place)
            rows.tell(
                steering=name,
                prompt_tokens=place.long_prompt_tokens,
                first_token_ms=round(seconds * 1e3, 1),
            )
    if plan is not None:
        _tell_memory(bench, plan, place, rows)
    rows.tell(graphs_at_the_end=graphs_of(bench.core), pending=bench.core.compiling)


def _distinct(
    bench: Bench, place: Place, rows: Rows, batch: int, base: float | None, bandwidth: float
) -> None:
    """Measure a batch in which as many configurations are distinct as the place has."""
    for name in ("LinEAS", "ARGRE"):
        with rows.attempt(batch=batch, steering=name, distinct=place.distinct):
            # The bank's capacity bounds how many are loaded at once: one kind after the other.
            stacks = [stack(name, number % place.distinct) for number in range(batch)]
            seconds = step_seconds(bench, stacks, place)
            rows.tell(**_speed(bench, place, batch, name, place.distinct, seconds, base, bandwidth))


def _speed(
    bench: Bench,
    place: Place,
    batch: int,
    name: str,
    distinct: int,
    seconds: float,
    base: float | None,
    bandwidth: float,
) -> dict[str, str | int | float | None]:
    tokens = place.prompt_tokens + place.steps
    return {
        "batch": batch,
        "steering": name,
        "distinct": distinct,
        "step_ms": round(seconds * 1e3, 3),
        "tokens_per_s": round(batch / seconds, 1),
        "of_unsteered": None if base is None else round(base / seconds, 3),
        "of_bandwidth": (
            round(step_bytes(bench.loaded, tokens) / seconds / bandwidth, 3) if batch == 1 else None
        ),
    }


def _tell_memory(bench: Bench, plan: MemoryPlan, place: Place, rows: Rows) -> None:
    """Tell what memory was planned, what keys and values got, and what was used at most."""
    free, total = torch.cuda.mem_get_info(place.device)
    reserved = torch.cuda.memory_reserved(place.device)
    stored = bench.core.scheduler.pool.capacity * KVShape.of(bench.loaded.model).bytes_per_token
    rows.tell(
        keys_and_values_gb=round(stored / 1e9, 2),
        planned_interventions_gb=round(plan.bank / 1e9, 2),
        planned_step_gb=round(plan.step / 1e9, 2),
        planned_graphs_gb=round(plan.graphs / 1e9, 2),
        peak_allocated_gb=round(torch.cuda.max_memory_allocated(place.device) / 1e9, 2),
        reserved_gb=round(reserved / 1e9, 2),
        free_at_the_end_gb=round(free / 1e9, 2),
        # Graphs, the context and libraries, which torch's allocator does not know.
        beside_torch_gb=round((total - free - reserved) / 1e9, 2),
        total_gb=round(total / 1e9, 2),
    )
