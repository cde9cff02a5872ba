"""Panels that tell servers apart, where several serve one model."""

from docker.grafana.model import Panel, Section, Target
from docker.grafana.queries import API, by_server, rate, select, total

NAME = "{{instance}}"

_first_tokens = total("rate", "time_to_first_token_seconds_bucket", by="instance, le")

APART = Section(
    "Server by server",
    (
        Panel(
            "Requests by server",
            "timeseries",
            "reqps",
            "Requests to the API that ended, whatever their outcome. Behind one load balancer, "
            "servers that are alike get the same share.",
            (Target(rate("requests_total", API, by="instance"), NAME),),
            stacked=True,
        ),
        Panel(
            "Load by server",
            "timeseries",
            "none",
            "Completions being generated or waiting, of each server. If one has many more than the "
            "others at equal requests, it is slower.",
            (
                Target(
                    by_server(
                        f"sum by (instance) ({select('requests_running')})"
                        f" + sum by (instance) ({select('requests_waiting')})"
                    ),
                    NAME,
                ),
            ),
        ),
        Panel(
            "First token by server",
            "timeseries",
            "s",
            "95th percentile of the time to the first token, of each server. 0 while it has no "
            "traffic.",
            (Target(by_server(f"histogram_quantile(0.95, {_first_tokens}) >= 0"), NAME),),
        ),
    ),
)
