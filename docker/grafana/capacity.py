"""Panels on how full the server is, what fails, and how large requests are."""

from docker.grafana.model import Panel, Section, Target
from docker.grafana.queries import API, gauge, rate, seconds, total


def _sizes(metric: str, name: str) -> tuple[Target, ...]:
    return tuple(
        Target(seconds(share, metric), f"{name}, {quantile}")
        for share, quantile in ((0.5, "p50"), (0.95, "p95"))
    )


CAPACITY = Section(
    "Capacity",
    (
        Panel(
            "Running and waiting",
            "timeseries",
            "none",
            "Completions being generated, and those that wait for their first step.",
            (
                Target(gauge("requests_running"), "running"),
                Target(gauge("requests_waiting"), "waiting"),
            ),
            width=6,
        ),
        Panel(
            "KV cache in use",
            "timeseries",
            "percentunit",
            "Share of the memory for keys and values in use, of the fullest server. When it is all "
            "in use, the completion that came last yields.",
            (Target(gauge("kv_cache_usage_ratio", "max"), "in use"),),
            width=6,
            maximum=1,
            thresholds=((0.8, "yellow"), (0.95, "red")),
        ),
        Panel(
            "Preemptions",
            "timeseries",
            "ops",
            "Times a second that a completion yielded its memory and will be computed again. If "
            "this stays above 0, give --kv-cache-gb more or lower --max-batch-size.",
            (Target(rate("preemptions_total"), "preemptions"),),
            width=6,
        ),
        Panel(
            "Prefix cache hit rate",
            "timeseries",
            "percentunit",
            "Share of the looked-up prompt tokens that were computed before. 0 where nothing is "
            "looked up.",
            (
                Target(
                    f"({total('rate', 'prefix_cache_hits_total')} / "
                    f"({total('rate', 'prefix_cache_queries_total')} > 0)) or on() vector(0)",
                    "found",
                ),
            ),
            width=6,
            maximum=1,
        ),
    ),
)

DETAIL = Section(
    "Errors and sizes",
    (
        Panel(
            "Errors by outcome",
            "timeseries",
            "reqps",
            "Requests to the API that did not succeed. client_error: refused as faulty; rejected: "
            "the queue was full; unavailable: not ready, or without the score that was asked for; "
            "cancelled: the client left.",
            (
                Target(
                    rate("requests_total", API, 'outcome!="success"', by="outcome"), "{{outcome}}"
                ),
            ),
        ),
        Panel(
            "Requests by route",
            "timeseries",
            "reqps",
            "All HTTP requests, the probes and Prometheus's own among them.",
            (Target(rate("requests_total", by="endpoint"), "{{endpoint}}"),),
        ),
        Panel(
            "Request sizes",
            "timeseries",
            "short",
            "Prompt and generated tokens of requests that ended well. 0 while there is no traffic.",
            (
                *_sizes("request_prompt_tokens", "prompt"),
                *_sizes("request_generation_tokens", "generated"),
            ),
        ),
    ),
)
