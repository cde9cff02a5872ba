"""Keeps what vLLM reports of its scheduler, for the metrics page."""

from dataclasses import dataclass
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from server.engine.output import EngineStats


@dataclass(slots=True)
class SchedulerCounts:
    """The gauges as vLLM last reported them, and its counters added up."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0

    def add(self, scheduler: Any, iteration: Any) -> None:
        """Take vLLM's `SchedulerStats` and `IterationStats` of one step, each of which may lack."""
        if scheduler is not None:
            self.running = scheduler.num_running_reqs
            self.waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            self.kv_cache_usage = scheduler.kv_cache_usage
            self.prefix_cache_queries += scheduler.prefix_cache_stats.queries
            self.prefix_cache_hits += scheduler.prefix_cache_stats.hits
        if iteration is not None:
            self.preemptions += iteration.num_preempted_reqs

    def rest(self) -> None:
        """Say that no request is held. vLLM reports at steps, and none follows the last abort."""
        self.running = self.waiting = 0
        self.kv_cache_usage = 0.0

    def stats(self, slots_used: int, background: int) -> EngineStats:
        """Return the counts as the engine protocol has them: without background work."""
        return EngineStats(
            running=max(0, self.running - background),
            waiting=self.waiting,
            kv_cache_usage=self.kv_cache_usage,
            slots_used=slots_used,
            preemptions=self.preemptions,
            prefix_cache_queries=self.prefix_cache_queries,
            prefix_cache_hits=self.prefix_cache_hits,
        )


class CountsLogger(StatLoggerBase):
    """Hands vLLM's statistics to `SchedulerCounts`."""

    def __init__(self, counts: SchedulerCounts) -> None:
        self._counts = counts

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take one step's statistics."""
        self._counts.add(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        """Do nothing: vLLM calls this once, when it has started."""
