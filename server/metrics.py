"""Every Prometheus metric of the server, in one registry of its own."""

from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from interventions.registry import Registry
from server.engine.base import Engine

MAX_INTERVENTION_LABELS: Final = 100
OTHER: Final = "other"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# From a GPU's sub-millisecond decode step to a CPU's second under load.
TOKEN_SECONDS: Final = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0),
)
FIRST_TOKEN_SECONDS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0),
)
REQUEST_SECONDS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0),
    *(15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 240.0, 480.0, 960.0),
)
QUEUE_SECONDS: Final = (0.0001, 0.0005, 0.001, *FIRST_TOKEN_SECONDS[1:])
TOKEN_COUNTS: Final = tuple(float(2**power) for power in range(18))


class Metrics:
    """The server's metrics. Counters and histograms are fed as things happen; gauges at a scrape.

    All but `render` is called on the event loop.
    """

    def __init__(self, engine: Engine, interventions: Registry) -> None:
        """Both are only read, when the page is rendered."""
        registry = CollectorRegistry()
        self._registry = registry
        self._engine = engine
        self._interventions = interventions

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"steerserve_{name}", text, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"steerserve_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"steerserve_{name}", text, registry=registry)

        self._first_token = histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to a completion's first token.",
            FIRST_TOKEN_SECONDS,
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds",
            "Between one token of a completion and the next.",
            TOKEN_SECONDS,
        )
        self._duration = histogram(
            "request_duration_seconds",
            "From a generating request's arrival to its last token.",
            REQUEST_SECONDS,
        )
        self._queue = histogram(
            "request_queue_seconds",
            "From a completion's submission to its first step.",
            QUEUE_SECONDS,
        )
        self._request_prompt = histogram(
            "request_prompt_tokens", "Prompt tokens of a finished request.", TOKEN_COUNTS
        )
        self._request_generation = histogram(
            "request_generation_tokens", "Generated tokens of a finished request.", TOKEN_COUNTS
        )
        self._requests = counter(
            "requests", "HTTP requests by route and outcome.", ("endpoint", "outcome")
        )
        self._prompt = counter("prompt_tokens", "Prompt tokens of admitted requests.")
        self._generation = counter("generation_tokens", "Tokens generated.")
        self._steered = counter(
            "steered_tokens", "Tokens generated under steering.", ("kind", "intervention")
        )
        self._running = gauge("requests_running", "Completions being generated.")
        self._waiting = gauge("requests_waiting", "Completions that wait for their first step.")
        self._cache_usage = gauge("kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1.")
        self._slots = gauge("intervention_slots_used", "Interventions loaded in the bank.")
        self._stored = gauge("interventions_stored", "Names in the registry.")
        self._labels: set[str] = set()

    def first_token(self, seconds: float) -> None:
        """A completion's first token came, `seconds` after the request."""
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """A further token of a completion came, `seconds` after the one before."""
        self._inter_token.observe(seconds)

    def queued(self, seconds: float) -> None:
        """A completion's first step began, `seconds` after its submission."""
        self._queue.observe(seconds)

    def admitted(self, prompt_tokens: int) -> None:
        """All completions of a request were admitted."""
        self._prompt.inc(prompt_tokens)

    def generated(self, tokens: int, kind: str | None, intervention: str | None) -> None:
        """Tokens were generated; `kind` and `intervention` are None where nothing was edited."""
        self._generation.inc(tokens)
        if kind is not None and intervention is not None:
            self._steered.labels(kind, self._bounded(intervention)).inc(tokens)

    def finished(self, seconds: float, prompt_tokens: int, generated_tokens: int) -> None:
        """A generating request ended well, `seconds` after it came."""
        self._duration.observe(seconds)
        self._request_prompt.observe(prompt_tokens)
        self._request_generation.observe(generated_tokens)

    def answered(self, endpoint: str, outcome: str) -> None:
        """An HTTP request ended. `endpoint` is a route's template, never the client's path."""
        self._requests.labels(endpoint, outcome).inc()

    def render(self) -> bytes:
        """The metrics page, with the gauges as they are now."""
        stats = self._engine.stats()
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._cache_usage.set(stats.kv_cache_usage)
        self._slots.set(stats.slots_used)
        self._stored.set(len(self._interventions.entries()))
        return generate_latest(self._registry)

    def _bounded(self, intervention: str) -> str:
        """The label, or `other` once there are too many: each costs memory for good."""
        if intervention not in self._labels and len(self._labels) >= MAX_INTERVENTION_LABELS:
            return OTHER
        self._labels.add(intervention)
        return intervention
