"""Lets a real Prometheus scrape a real server, and runs all queries of dashboards and rules.

The dashboards are to show something from the first minute on: before any traffic each query gives a
number, and under the sample traffic each that should moves.
"""

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from docker.grafana.make_dashboards import DASHBOARDS, FOLDER
from tests.processes import ServerProcess, steerserve
from tests.prometheus import Prometheus, PrometheusProcess, Series, fill_in, prometheus

pytestmark = pytest.mark.embedded

ROOT = Path(__file__).parents[2]
TRAFFIC_SECONDS = 12
QUIET = {"model": "smollm2-135m-instruct", "prompt": "You are", "max_tokens": 2}
# docker/traffic.py sends these.
STEERINGS = (
    *(("detox-lineas",), ("detox-argre",), ("detox-dsas",)),
    ("detox-dsas", "detox-argre"),
)
GRAFANA: Mapping[str, str] = {
    "__rate_interval": "20s",
    "__range": "5m",
    "model": ".*",
    "instance": ".*",
    "intervention": ".*",
    "threshold": "0.5",
}
# Panels that stay at 0 while nothing goes wrong, or whose values last too short for a scrape.
STILL = {
    *("Failed share", "Alerts firing", "Preemptions", "Answers not scored", "Scoring queue"),
    *("Prefix cache hit rate", "Tokens: prompt, from the prefix cache"),
    "Running and waiting: waiting",
    "Share above threshold: served and baseline",  # few answers: perhaps none is toxic
}


@dataclass(frozen=True)
class Stand:
    """A server and the Prometheus that scrapes it."""

    server: ServerProcess
    prometheus: PrometheusProcess
    traffic_since: float = 0.0  # seconds since the epoch

    @property
    def api(self) -> Prometheus:
        return self.prometheus.api


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("scraped")
    options = {"STEERSERVE_BASELINE_SAMPLE_RATE": "1", "STEERSERVE_DOSE_INTERVAL": "1"}
    with steerserve(folder, env=options) as server:
        target = server.url.removeprefix("http://")
        with prometheus(folder, target) as scraper:
            yield Stand(server, scraper)


@dataclass(frozen=True)
class Query:
    """A panel's expression, with Grafana's variables filled in."""

    panel: str
    legend: str
    expression: str


def panel_queries() -> list[Query]:
    return [
        Query(panel["title"], target["legendFormat"], fill_in(target["expr"], GRAFANA))
        for name in DASHBOARDS
        for panel in json.loads((FOLDER / name).read_text())["panels"]
        for target in panel.get("targets", ())
    ]


def values(found: list[Series]) -> list[float]:
    return [value for series in found for _, value in series.points]


def test_no_panel_is_empty_before_any_traffic(stand: Stand) -> None:
    # A rate needs two scrapes of the server's metrics.
    stand.prometheus.wait_for('count_over_time(up{job="steerserve"}[1m]) >= 3 and up == 1', 30)
    for query in panel_queries():
        found = values(stand.api.query(query.expression))
        assert found, query
        assert all(map(math.isfinite, found)), query


@pytest.fixture(scope="module")
def busy(stand: Stand) -> Stand:
    """Send sample traffic to the server, and wait until Prometheus has scraped all of it."""
    began = time.time()
    subprocess.run(
        [
            *(sys.executable, ROOT / "docker" / "traffic.py", "--url", stand.server.url),
            *("--seconds", str(TRAFFIC_SECONDS), "--rate", "6"),
        ],
        check=True,
        timeout=120,
    )
    # Baselines give way to traffic, so each steering gets one more request while it is quiet.
    for steering in STEERINGS:
        body = {**QUIET, "steering": [{"intervention": name} for name in steering]}
        httpx.post(f"{stand.server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    for steering in STEERINGS:
        baseline = f'intervention="{"+".join(steering)}",arm="baseline"'
        stand.prometheus.wait_for(f"steerserve_completion_toxicity_count{{{baseline}}} > 0", 60)
    stand.prometheus.wait_for(
        "steerserve_requests_running + steerserve_requests_waiting"
        " + steerserve_toxicity_queue_depth == 0",
        60,
    )
    return replace(stand, traffic_since=began)


def test_every_panel_shows_the_sample_traffic(busy: Stand) -> None:
    (now,) = (point[0] for series in busy.api.query("vector(0)") for point in series.points)
    still = set()
    for query in panel_queries():
        # Queries a range: a mean over the last 20 s has no value once the traffic has ended.
        found = values(busy.api.query_range(query.expression, busy.traffic_since, now, 1))
        assert found, query
        assert all(map(math.isfinite, found)), query
        if not any(found):
            still.add(f"{query.panel}: {query.legend}")
    assert {title for title in still if not {title, title.rpartition(": ")[0]} & STILL} == set()


def test_steered_and_unsteered_traffic_is_told_apart(busy: Stand) -> None:
    scored = busy.api.query("steerserve_completion_toxicity_count > 0")
    assert {(series.labels["intervention"], series.labels["arm"]) for series in scored} == {
        ("none", "served"),
        *((name, arm) for name in map("+".join, STEERINGS) for arm in ("served", "baseline")),
    }


def test_every_variable_has_values(busy: Stand) -> None:
    expected = {
        "model": {"smollm2-135m-instruct"},
        "instance": {busy.server.url.removeprefix("http://")},
    }
    for name in DASHBOARDS:
        for variable in json.loads((FOLDER / name).read_text())["templating"]["list"]:
            if variable["type"] == "query":
                asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
                assert asked is not None, variable
                selector = fill_in(asked[1], GRAFANA)
                found = set(busy.api.get(f"label/{asked[2]}/values", **{"match[]": selector}))
                assert found >= expected.get(variable["name"], {"none", "detox-lineas"}), variable


def test_every_rule_runs_and_finds_the_series_that_it_asks_for(busy: Stand) -> None:
    rules: list[dict[str, Any]] = [
        rule for group in busy.api.get("rules")["groups"] for rule in group["rules"]
    ]
    assert len(rules) == 8
    for rule in rules:
        assert rule["health"] == "ok", rule
        busy.api.query(rule["query"])
        for selector in re.findall(r"(?:steerserve_\w+|up)\{[^}]*\}|steerserve_\w+", rule["query"]):
            assert busy.api.query(selector), (rule["name"], selector)


def test_a_server_that_is_gone_is_noticed(busy: Stand) -> None:
    firing = 'ALERTS{alertname="SteerserveEngineDead"}'
    assert not busy.api.query(firing)
    busy.server.process.terminate()
    assert busy.server.process.wait(60) == 0
    (alert,) = busy.prometheus.wait_for(firing, 60)
    assert alert.labels["instance"] == busy.server.url.removeprefix("http://")
    for query in panel_queries():
        if query.panel == "Engine":
            busy.prometheus.wait_for(f"({query.expression}) == 0", 60)
