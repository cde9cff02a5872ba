"""The dashboard *Service*: whether the server is up, how fast it answers, and how full it is."""

from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.models.common import BigValueTextMode as TextMode
from grafana_foundation_sdk.models.dashboard import Dashboard, ValueMap, ValueMappingResult

from docker.grafana.dashboard import dashboard
from docker.grafana.panels import PERCENT, stat, timeseries
from docker.grafana.queries import (
    API,
    INSTANCE,
    by_server,
    gauge,
    or_zero,
    percentiles,
    rate,
    ratio,
    select,
    total,
)

# People read about one token in 0.1 s; SteerserveFirstTokenSlow alerts from 5 s on.
TOKEN_LIMITS = {0.1: "yellow", 0.5: "red"}
FIRST_TOKEN_LIMITS = {1.0: "yellow", 5.0: "red"}


def service() -> Dashboard:
    """Build the dashboard."""
    return dashboard(
        "Service",
        "Throughput, latency, capacity and errors of the servers, together and one by one.",
        {
            "Now": _now(),
            "Throughput": _throughput(),
            "Latency": _latency(),
            "Capacity": _capacity(),
            "Errors and sizes": _errors_and_sizes(),
            "Server by server": _server_by_server(),
        },
    )


def _now() -> list[Stat]:
    serves = or_zero(f'min({select("engine_up")} or up{{job="steerserve", {INSTANCE}}})')
    words = ValueMap({"0": ValueMappingResult("down"), "1": ValueMappingResult("up")})
    no_server = 'label_replace(vector(0), "model", "no server", "", "")'
    model = f"sum by (model) ({select('model_info')}) or on() {no_server}"
    requests, tokens = rate("requests_total", API), rate("generation_tokens_total")
    failed = total("rate", "requests_total", API, 'outcome=~"rejected|unavailable|server_error"')
    failed_share = {"failed": ratio(failed, total("rate", "requests_total", API))}
    limits = {0.01: "yellow", 0.05: "red"}
    # The alerts of all servers count, because a server that is long gone cannot be chosen.
    firing = or_zero('count(ALERTS{alertstate="firing", alertname=~"Steerserve.*"})')
    return [
        stat("Engine", "none", {"engine": serves}, {1: "green"}, "red").mappings([words]).span(3),
        stat("Model", "none", {"{{model}}": model}, base="blue").text_mode(TextMode.NAME).span(5),
        stat("Requests per second", "reqps", {"requests": requests}, base="blue").decimals(1),
        stat("Tokens per second", "short", {"tokens": tokens}, base="blue").decimals(0),
        stat("Failed share", PERCENT, failed_share, limits).decimals(1),
        stat("Alerts firing", "none", {"alerts": firing}, {1: "red"}),
    ]


def _throughput() -> list[TimeSeries]:
    outcomes = {"{{outcome}}": rate("requests_total", API, by="outcome")}
    tokens = {
        "generated": rate("generation_tokens_total"),
        "prompt": rate("prompt_tokens_total"),
        "prompt, from the prefix cache": rate("prefix_cache_hits_total"),
    }
    return [
        timeseries("Requests by outcome", "reqps", outcomes, stacked=True).span(12),
        timeseries("Tokens", "short", tokens).span(12),
    ]


def _latency() -> list[TimeSeries]:
    first_token = percentiles("time_to_first_token_seconds", 50, 95, 99)
    inter_token = percentiles("inter_token_latency_seconds", 50, 95, 99)
    end_to_end = percentiles("request_duration_seconds", 50, 95, 99)
    queue = percentiles("request_queue_seconds", 50, 95, 99)
    return [
        timeseries("Time to first token", "s", first_token, FIRST_TOKEN_LIMITS).span(6),
        timeseries("Inter-token latency", "s", inter_token, TOKEN_LIMITS).span(6),
        timeseries("End-to-end latency", "s", end_to_end).span(6),
        timeseries("Queue time", "s", queue, FIRST_TOKEN_LIMITS).span(6),
    ]


def _capacity() -> list[TimeSeries]:
    completions = {"running": gauge("requests_running"), "waiting": gauge("requests_waiting")}
    in_use = {"in use": gauge("kv_cache_usage_ratio", "max")}
    limits = {0.8: "yellow", 0.95: "red"}
    hits, lookups = "prefix_cache_hits_total", "prefix_cache_queries_total"
    found = {"found": ratio(total("rate", hits), total("rate", lookups))}
    return [
        timeseries("Running and waiting", "none", completions).span(6),
        timeseries("KV cache in use", PERCENT, in_use, limits).max(1).span(6),
        timeseries("Preemptions", "ops", {"preemptions": rate("preemptions_total")}).span(6),
        timeseries("Prefix cache hit rate", PERCENT, found).max(1).span(6),
    ]


def _errors_and_sizes() -> list[TimeSeries]:
    errors = rate("requests_total", API, 'outcome!="success"', by="outcome")
    routes = rate("requests_total", by="endpoint")
    sizes = {
        **percentiles("request_prompt_tokens", 50, 95, prefix="prompt, "),
        **percentiles("request_generation_tokens", 50, 95, prefix="generated, "),
    }
    return [
        timeseries("Errors by outcome", "reqps", {"{{outcome}}": errors}),
        timeseries("Requests by route", "reqps", {"{{endpoint}}": routes}),
        timeseries("Request sizes", "short", sizes),
    ]


def _server_by_server() -> list[TimeSeries]:
    requests = rate("requests_total", API, by="instance")
    running, waiting = select("requests_running"), select("requests_waiting")
    load = by_server(f"sum by (instance) ({running}) + sum by (instance) ({waiting})")
    buckets = total("rate", "time_to_first_token_seconds_bucket", by="instance, le")
    first_token = by_server(f"histogram_quantile(0.95, {buckets}) >= 0")
    return [
        timeseries("Requests by server", "reqps", {"{{instance}}": requests}, stacked=True),
        timeseries("Load by server", "none", {"{{instance}}": load}),
        timeseries("First token by server", "s", {"{{instance}}": first_token}),
    ]
