"""Collects the metrics that are states of the engine and the registry, not events."""

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from interventions.registry import Registry
from server.engine.base import Engine

_PREFIX: Final = "steerserve_"


class EngineState(Collector):
    """Collects the present values of the engine and the registry, at every scrape."""

    def __init__(self, engine: Engine, interventions: Registry, model: str) -> None:
        self._engine = engine
        self._interventions = interventions
        self._model = model

    def describe(self) -> Iterator[Metric]:
        """Describe nothing; without this method, registering would call `collect`."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges = (
            ("engine_up", "1 while the engine serves, else 0.", self._engine.ready),
            ("requests_running", "Completions that are being generated.", stats.running),
            ("requests_waiting", "Completions that wait for their first step.", stats.waiting),
            (
                "kv_cache_usage_ratio",
                "Share of the KV cache that is in use, 0 to 1.",
                stats.kv_cache_usage,
            ),
            ("intervention_slots_used", "Interventions loaded in the bank.", stats.slots_used),
            ("interventions_stored", "Names in the registry.", len(self._interventions.entries())),
            ("engine_compiling", "Layer graphs that are being compiled.", stats.compiling),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(_PREFIX + name, text, value)
        counters = (
            (
                "preemptions",
                "Preemptions: times that a running completion gave up its KV cache.",
                stats.preemptions,
            ),
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_cache_queries,
            ),
            (
                "prefix_cache_hits",
                "Prompt tokens found in the prefix cache.",
                stats.prefix_cache_hits,
            ),
            (
                "steering_step_seconds",
                "Time of the sampled steered steps; measured on a CPU only.",
                stats.measured_step_seconds,
            ),
            (
                "steering_edit_seconds",
                "Time of the edits in the sampled steered steps, without those in compiled layers.",
                stats.measured_edit_seconds,
            ),
        )
        for name, text, value in counters:
            yield CounterMetricFamily(_PREFIX + name, text, value)
        info = GaugeMetricFamily(
            _PREFIX + "model_info", "The model that is served.", labels=["model"]
        )
        info.add_metric([self._model], 1)
        yield info
