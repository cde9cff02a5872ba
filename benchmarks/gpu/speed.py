"""Measures decoding, steered and not, and the time to a long prompt's first token."""

import torch

from benchmarks.decoding import BatchEdits, BenchEngine
from benchmarks.gpu.engine import (
    attention_of,
    begin,
    first_token_seconds,
    graphs_of,
    open_engine,
    options_of,
    steerings,
)
from benchmarks.gpu.model import step_bytes
from benchmarks.gpu.page import Page
from benchmarks.gpu.place import Place
from server.engine.torch.attention.slab import KVShape
from server.engine.torch.memory_plan import MemoryPlan, plan_memory


def run_replayed(place: Place, page: Page) -> None:
    """Measure with CUDA graphs."""
    _run(place, page, cuda_graphs=True)


def run_eager(place: Place, page: Page) -> None:
    """Measure without CUDA graphs."""
    _run(place, page, cuda_graphs=False)


def _run(place: Place, page: Page, cuda_graphs: bool) -> None:
    """Measure at all batch sizes, and compare the memory that is used with what was planned."""
    bandwidth = place.bandwidth()
    engine = open_engine(place, cuda_graphs)
    loaded = engine.loaded
    plan: MemoryPlan | None = None
    if place.device.type == "cuda":
        widths = loaded.description.site_widths
        plan = plan_memory(loaded.model, widths, options_of(place, cuda_graphs))
    page.tell(attention=attention_of(engine.core), graphs=graphs_of(engine.core))
    for batch in place.batches:
        _decode(engine, place, page, batch, bandwidth)
    for name in ("none", "both"):
        with page.attempt(steering=name):
            seconds = first_token_seconds(engine, steerings(engine)[name], place)
            page.tell(
                steering=name,
                prompt_tokens=place.long_prompt_tokens,
                first_token_ms=round(seconds * 1e3, 1),
            )
    if plan is not None:
        _tell_memory(engine, plan, place, page)
    page.tell(graphs_at_the_end=graphs_of(engine.core), pending=engine.core.compiling)


def _decode(engine: BenchEngine, place: Place, page: Page, batch: int, bandwidth: float) -> None:
    """Measure a batch that is steered in each way, and ones with distinct configurations."""
    batches: dict[tuple[str, int], BatchEdits] = {
        (name, 1): [edits] * batch for name, edits in steerings(engine).items()
    }
    if batch >= place.distinct:
        # One kind after the other, as the bank's capacity bounds how many are loaded at once.
        for name in ("LinEAS", "ARGRE"):
            batches[name, place.distinct] = [
                steerings(engine, row % place.distinct)[name] for row in range(batch)
            ]
    unsteered: float | None = None
    read = step_bytes(engine.loaded, place.prompt_tokens + place.steps)
    for (name, distinct), edits in batches.items():
        with page.attempt(batch=batch, steering=name, distinct=distinct):
            with begin(engine, edits, place) as trial:
                seconds = trial.seconds(place.steps) / place.steps
            if name == "none":
                unsteered = seconds
            page.tell(
                batch=batch,
                steering=name,
                distinct=distinct,
                step_ms=round(seconds * 1e3, 3),
                tokens_per_s=round(batch / seconds, 1),
                of_unsteered=unsteered and round(unsteered / seconds, 3),
                of_bandwidth=round(read / seconds / bandwidth, 3) if batch == 1 else None,
            )


def _tell_memory(engine: BenchEngine, plan: MemoryPlan, place: Place, page: Page) -> None:
    """Tell the memory that was planned, that keys and values got, and that was used at most."""
    free, total = torch.cuda.mem_get_info(place.device)
    reserved = torch.cuda.memory_reserved(place.device)
    per_token = KVShape.of(engine.loaded.model).bytes_per_token
    page.tell(
        keys_and_values_gb=_gb(engine.core.scheduler.pool.capacity * per_token),
        planned_interventions_gb=_gb(plan.bank),
        planned_step_gb=_gb(plan.step),
        planned_graphs_gb=_gb(plan.graphs),
        peak_allocated_gb=_gb(torch.cuda.max_memory_allocated(place.device)),
        reserved_gb=_gb(reserved),
        free_at_the_end_gb=_gb(free),
        # Graphs, the context and libraries, which torch's allocator does not know.
        beside_torch_gb=_gb(total - free - reserved),
        total_gb=_gb(total),
    )


def _gb(size: float) -> float:
    return round(size / 1e9, 2)
