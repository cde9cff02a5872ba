"""Asks a running Prometheus what the dashboards' expressions give, outside of Grafana."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import httpx

TIMEOUT_SECONDS = 30.0


class PrometheusError(Exception):
    """Prometheus refused a query; the message is its own."""


@dataclass(frozen=True)
class Series:
    """A series' labels, and its points as (seconds since the epoch, value)."""

    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]


class Prometheus:
    """The HTTP interface of a Prometheus; closed by `with`."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=f"{url}/api/v1/", timeout=TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def query(self, expression: str, at: float | None = None) -> list[Series]:
        """An instant vector, now or at a time in seconds since the epoch: one point a series.

        Raises:
            PrometheusError: the expression is not one.
        """
        when = {} if at is None else {"time": str(at)}
        found = self.get("query", query=expression, **when)["result"]
        return [Series(item["metric"], (_point(item["value"]),)) for item in found]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        """An expression from `start` to `end`, in seconds since the epoch, every `step` seconds.

        Raises:
            PrometheusError: the expression is not one.
        """
        found = self.get(
            "query_range", query=expression, start=str(start), end=str(end), step=str(step)
        )["result"]
        return [Series(item["metric"], tuple(map(_point, item["values"]))) for item in found]

    def get(self, path: str, **parameters: str) -> Any:
        """What a path under /api/v1 answers with.

        Raises:
            PrometheusError: it is an error.
        """
        body = self._client.get(path, params=parameters).json()
        if body["status"] != "success":
            raise PrometheusError(f"{body['error']}: {parameters}")
        return body["data"]


def fill_in(text: str, values: Mapping[str, str]) -> str:
    """Replace `$name` and `${name}`, as Grafana does before it asks.

    Raises:
        KeyError: there is no value for a name.
    """
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values[found[1] or found[2]], text)


def _point(pair: list[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
