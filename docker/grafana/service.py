"""The dashboard *Service*: is the server up, fast enough, and full?"""

from docker.grafana.capacity import CAPACITY, DETAIL
from docker.grafana.model import Dashboard, Panel, Section, Target
from docker.grafana.queries import API, INSTANCE, rate, seconds, select, total
from docker.grafana.servers import APART
from docker.grafana.variables import SERVERS

TOKEN_LIMITS = ((0.1, "yellow"), (0.5, "red"))  # ten tokens a second: about what one reads
FIRST_TOKEN_LIMITS = ((1.0, "yellow"), (5.0, "red"))  # red: the alert's bound


def _percentiles(metric: str) -> tuple[Target, ...]:
    return tuple(
        Target(seconds(share, metric), name)
        for share, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
    )


NOW = Section(
    "Now",
    (
        Panel(
            "Engine",
            "stat",
            "none",
            "Whether every chosen server's engine serves. Down also where one does not answer "
            "Prometheus.",
            (
                Target(
                    f'min({select("engine_up")} or up{{job="steerserve", {INSTANCE}}})'
                    " or on() vector(0)",
                    "engine",
                ),
            ),
            width=3,
            height=4,
            base="red",
            thresholds=((1, "green"),),
            names=(("0", "down"), ("1", "up")),
        ),
        Panel(
            "Model",
            "stat",
            "none",
            "What is served, by the name that clients use.",
            (
                Target(
                    f"sum by (model) ({select('model_info')})"
                    ' or on() label_replace(vector(0), "model", "no server", "", "")',
                    "{{model}}",
                ),
            ),
            width=5,
            height=4,
            base="blue",
            shows_name=True,
        ),
        Panel(
            "Requests per second",
            "stat",
            "reqps",
            "Requests to the API that ended, whatever their outcome.",
            (Target(rate("requests_total", API), "requests"),),
            width=4,
            height=4,
            base="blue",
            decimals=1,
        ),
        Panel(
            "Tokens per second",
            "stat",
            "short",
            "Tokens generated for clients.",
            (Target(rate("generation_tokens_total"), "tokens"),),
            width=4,
            height=4,
            base="blue",
            decimals=0,
        ),
        Panel(
            "Failed share",
            "stat",
            "percentunit",
            "Share of the API's requests that the server failed: refused when full, unavailable, "
            "or ended by an error of its own. What clients got wrong is not counted.",
            (
                Target(
                    "(("
                    + rate("requests_total", API, 'outcome=~"rejected|unavailable|server_error"')
                    + f") / (({total('rate', 'requests_total', API)}) > 0)) or on() vector(0)",
                    "failed",
                ),
            ),
            width=4,
            height=4,
            thresholds=((0.01, "yellow"), (0.05, "red")),
            decimals=1,
        ),
        Panel(
            "Alerts firing",
            "stat",
            "none",
            "Alert rules that fire, for whichever server; Prometheus's page Alerts names them.",
            (
                Target(
                    # Not by server: one that is long gone is not among those to choose from.
                    'count(ALERTS{alertstate="firing", alertname=~"Steerserve.*"})'
                    " or on() vector(0)",
                    "alerts",
                ),
            ),
            width=4,
            height=4,
            thresholds=((1, "red"),),
        ),
    ),
)

THROUGHPUT = Section(
    "Throughput",
    (
        Panel(
            "Requests by outcome",
            "timeseries",
            "reqps",
            "Requests to the API that ended, each once, by how they ended.",
            (Target(rate("requests_total", API, by="outcome"), "{{outcome}}"),),
            width=12,
            stacked=True,
        ),
        Panel(
            "Tokens",
            "timeseries",
            "short",
            "Tokens per second: generated for clients, and of admitted prompts. Of the prompts', "
            "those found in the prefix cache are not computed again.",
            (
                Target(rate("generation_tokens_total"), "generated"),
                Target(rate("prompt_tokens_total"), "prompt"),
                Target(rate("prefix_cache_hits_total"), "prompt, from the prefix cache"),
            ),
            width=12,
        ),
    ),
)

LATENCY = Section(
    "Latency",
    (
        Panel(
            "Time to first token",
            "timeseries",
            "s",
            "From a request's arrival to a completion's first token: waiting, and computing the "
            "prompt. 0 while there is no traffic.",
            _percentiles("time_to_first_token_seconds"),
            width=6,
            thresholds=FIRST_TOKEN_LIMITS,
        ),
        Panel(
            "Inter-token latency",
            "timeseries",
            "s",
            "Between one token of a completion and the next; its inverse is how fast text appears. "
            "0 while there is no traffic.",
            _percentiles("inter_token_latency_seconds"),
            width=6,
            thresholds=TOKEN_LIMITS,
        ),
        Panel(
            "End-to-end latency",
            "timeseries",
            "s",
            "From a generating request's arrival to its last token. It grows with the number of "
            "tokens asked for. 0 while there is no traffic.",
            _percentiles("request_duration_seconds"),
            width=6,
        ),
        Panel(
            "Queue time",
            "timeseries",
            "s",
            "From a completion's submission to its first step. Where it makes up most of the time "
            "to the first token, the server is full. 0 while there is no traffic.",
            _percentiles("request_queue_seconds"),
            width=6,
            thresholds=FIRST_TOKEN_LIMITS,
        ),
    ),
)

SERVICE = Dashboard(
    "steerserve-service",
    "steerserve: Service",
    "Throughput, latency, capacity and errors of the servers, together and one by one.",
    (NOW, THROUGHPUT, LATENCY, CAPACITY, DETAIL, APART),
    SERVERS,
)
