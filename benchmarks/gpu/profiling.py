"""Profiles a steered decode step: its kernels, and how long each takes."""

from typing import Final

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.engine import begin, open_engine, steerings
from benchmarks.gpu.page import Page
from benchmarks.gpu.place import Place

_SHOWN: Final = 20
_WARM_STEPS: Final = 3  # the dose is measured in one of 16 steps, and not in the next


def run(place: Place, page: Page) -> None:
    """Profile a step in which all sequences are steered by both methods, graphs and all."""
    engine = open_engine(place, cuda_graphs=True)
    on_gpu = place.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    for batch in place.batches[:2]:
        with page.attempt(batch=batch):
            with begin(engine, [steerings(engine)["both"]] * batch, place) as trial:
                trial.seconds(_WARM_STEPS)
                with profile(activities=[activity]) as found:
                    trial.seconds(1)
            events = sorted(found.key_averages(), key=lambda each: -_microseconds(each, on_gpu))
            for event in events[:_SHOWN]:
                page.tell(
                    batch=batch,
                    kernel=event.key[:120],
                    calls=event.count,
                    total_ms=round(_microseconds(event, on_gpu) / 1e3, 3),
                )


def _microseconds(event: object, on_gpu: bool) -> float:
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return float(getattr(event, name))
