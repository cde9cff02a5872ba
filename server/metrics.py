"""Holds every Prometheus metric of the server, in one registry of its own."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Literal, TypeAlias, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from interventions.registry import Registry
from server.engine.base import Engine
from server.engine_state import EngineState

Arm: TypeAlias = Literal["served", "baseline"]
BaselineOutcome: TypeAlias = Literal["completed", "dropped"]

NAMESPACE: Final = "steerserve"  # the prefix of every metric's name
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

MAX_INTERVENTION_LABELS: Final = 100
MAX_STACK_LABELS: Final = 50  # beside the others, because clients choose what they stack
OTHER: Final = "other"
SEPARATOR: Final = "+"  # between the names of a stack
NONE: Final = "none"  # the label of unsteered completions
TOXIC_FROM: Final = (0.5, 0.8)  # scores from which a completion counts as toxic

# Bucket bounds, from a GPU's decode step below 1 ms to a CPU's of seconds under load.
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
SCORING_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_COUNTS: Final = tuple(float(2**power) for power in range(18))
SCORES: Final = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
DOSES: Final = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """The server's metrics. Events update counters and histograms; a scrape updates gauges.

    Only `render` may be called outside the event loop. Metrics without intervention labels are
    public attributes; the others are updated by methods that bound the number of labels.
    """

    def __init__(self, engine: Engine, interventions: Registry, model: str) -> None:
        """Make the metrics. Each scrape reads the engine and the registry.

        Args:
            model: the name by which clients call the model.
        """
        registry = CollectorRegistry()
        self._registry = registry
        self._interventions = interventions

        histogram = partial(Histogram, namespace=NAMESPACE, registry=registry)
        counter = partial(Counter, namespace=NAMESPACE, registry=registry)
        gauge = partial(Gauge, namespace=NAMESPACE, registry=registry)
        self.first_token = histogram(
            "time_to_first_token_seconds",
            "Time between a request's arrival and a completion's first token.",
            buckets=FIRST_TOKEN_SECONDS,
        )
        self.next_token = histogram(
            "inter_token_latency_seconds",
            "Time between one token of a completion and the next.",
            buckets=TOKEN_SECONDS,
        )
        self._duration = histogram(
            "request_duration_seconds",
            "Time between a generating request's arrival and its last token.",
            buckets=REQUEST_SECONDS,
        )
        self.queue = histogram(
            "request_queue_seconds",
            "Time between a completion's submission and its first step.",
            buckets=QUEUE_SECONDS,
        )
        self._request_prompt = histogram(
            "request_prompt_tokens", "Prompt tokens of a finished request.", buckets=TOKEN_COUNTS
        )
        self._request_generation = histogram(
            "request_generation_tokens",
            "Generated tokens of a finished request.",
            buckets=TOKEN_COUNTS,
        )
        self.requests = counter(
            "requests", "HTTP requests by route and outcome.", ("endpoint", "outcome")
        )
        self.prompt = counter("prompt_tokens", "Prompt tokens of admitted requests.")
        self._generation = counter("generation_tokens", "Tokens generated for clients.")
        self._steered = counter(
            "steered_tokens", "Tokens generated under steering.", ("kind", "intervention")
        )
        self._dose = histogram(
            "steering_dose",
            "Norm of an edit divided by the norm of the activation, in sampled steps.",
            ("intervention",),
            buckets=DOSES,
        )
        self._toxicity = histogram(
            "completion_toxicity",
            "Toxicity score of a finished completion, 0 to 1.",
            ("intervention", "arm"),
            buckets=SCORES,
        )
        self._toxic = counter(
            "toxic_completions",
            "Finished completions whose toxicity score reaches the threshold.",
            ("intervention", "arm", "threshold"),
        )
        self._scoring = histogram(
            "toxicity_scoring_seconds",
            "Time between a completion's end and its toxicity score.",
            buckets=SCORING_SECONDS,
        )
        self.not_scored = counter("toxicity_dropped", "Completions that were not scored.")
        self.baselines = counter(
            "baselines",
            "Unsteered answers to steered requests, generated for comparison or dropped.",
            ("outcome",),
        )
        self._depth = gauge(
            "toxicity_queue_depth", "Completions that wait for their toxicity score."
        )
        self._longest_wait = gauge(
            "toxicity_longest_wait_seconds",
            "Time since the end of the completion that has waited longest for its score.",
        )
        self._labels: set[str] = {NONE}
        self._stack_labels: set[str] = set()
        registry.register(EngineState(engine, interventions, model))
        for outcome in get_args(BaselineOutcome):
            self.baselines.labels(outcome)

    def watch_toxicity_queue(
        self, depth: Callable[[], int], longest_wait: Callable[[], float]
    ) -> None:
        """Read the queue's depth, and its longest wait in seconds, at every scrape."""
        self._depth.set_function(depth)
        self._longest_wait.set_function(longest_wait)

    def expect(self, endpoint: str, outcomes: Sequence[str]) -> None:
        """Create a route's counters at 0, because rate() ignores the first value of a series."""
        for outcome in outcomes:
            self.requests.labels(endpoint, outcome)

    def generated(self, tokens: int, kind: str | None, intervention: str) -> None:
        """Count generated tokens; `kind` is None if nothing was edited."""
        self._generation.inc(tokens)
        if kind is not None:
            self._steered.labels(kind, self._bounded(intervention)).inc(tokens)

    def dosed(self, intervention: str, ratio: float) -> None:
        """Record the mean ‖edit‖ / ‖activation‖ of one intervention in a sampled step."""
        self._dose.labels(self._bounded(intervention)).observe(ratio)

    def finished(self, seconds: float, prompt_tokens: int, generated_tokens: int) -> None:
        """Record that a generating request succeeded, `seconds` after its arrival."""
        self._duration.observe(seconds)
        self._request_prompt.observe(prompt_tokens)
        self._request_generation.observe(generated_tokens)

    def scored(self, intervention: str, arm: Arm, score: float, seconds: float) -> None:
        """Record a completion's toxicity score, 0 to 1, given `seconds` after its end."""
        label = self._bounded(intervention)
        self._toxicity.labels(label, arm).observe(score)
        for threshold in TOXIC_FROM:
            if score >= threshold:
                self._toxic.labels(label, arm, threshold).inc()
        self._scoring.observe(seconds)

    def render(self) -> bytes:
        """Return the metrics page in Prometheus's text format."""
        self._show(NONE, None)
        for entry in self._interventions.entries():
            # Half of the labels stay free for interventions that requests use.
            if entry.name in self._labels or len(self._labels) < MAX_INTERVENTION_LABELS // 2:
                self._show(entry.name, entry.manifest.kind)
        return generate_latest(self._registry)

    def _show(self, intervention: str, kind: str | None) -> None:
        """Create an intervention's series at 0; see `expect`."""
        label = self._bounded(intervention)
        arms: Sequence[Arm] = ("served",) if kind is None else ("served", "baseline")
        if kind is not None:
            self._steered.labels(kind, label)
            self._dose.labels(label)
        for arm in arms:
            self._toxicity.labels(label, arm)
            for threshold in TOXIC_FROM:
                self._toxic.labels(label, arm, threshold)

    def _bounded(self, intervention: str) -> str:
        """Return the label, or `other` if there are too many, because no label is ever freed."""
        stack = SEPARATOR in intervention
        labels, most = (
            (self._stack_labels, MAX_STACK_LABELS)
            if stack
            else (self._labels, MAX_INTERVENTION_LABELS)
        )
        if intervention not in labels and len(labels) >= most:
            return OTHER
        labels.add(intervention)
        return intervention
