"""Evaluates every panel for two servers of one model: sums, maxima, and quantiles over both."""

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from docker.grafana.make_dashboards import DASHBOARDS, FOLDER
from tests.prometheus import fill_in, tool

STEP = 15  # seconds between two samples
SERIES_STEPS = 60
FIRST, SECOND = "a:8000", "b:8000"
GRAFANA = {
    "__rate_interval": "1m",
    "__range": "5m",
    "instance": ".*",
    "intervention": ".*",
    "threshold": "0.5",
}

Labels = Mapping[str, str]

# The value of each gauge, at the first and at the second server.
GAUGES = {
    "engine_up": (1, 1),
    'model_info{model="m"}': (1, 1),
    "requests_running": (2, 5),
    "requests_waiting": (1, 3),
    "kv_cache_usage_ratio": (0.2, 0.9),
    "intervention_slots_used": (3, 5),
    "interventions_stored": (7, 6),
    "toxicity_queue_depth": (4, 6),
    "toxicity_longest_wait_seconds": (3, 8),
}
SERVED, BASELINE = (f'{{intervention="detox", arm="{arm}"}}' for arm in ("served", "baseline"))
PLAIN = '{intervention="none", arm="served"}'
# The growth of each counter per second, at the first and at the second server.
COUNTERS = {
    'requests_total{endpoint="/v1/completions", outcome="success"}': (1, 3),
    'requests_total{endpoint="/v1/completions", outcome="rejected"}': (1, 2),
    'requests_total{endpoint="/metrics", outcome="success"}': (1, 1),
    "generation_tokens_total": (10, 30),
    "prompt_tokens_total": (1, 2),
    "prefix_cache_queries_total": (2, 6),
    "prefix_cache_hits_total": (1, 1),
    "preemptions_total": (1, 1),
    'steered_tokens_total{kind="affine", intervention="detox"}': (10, 6),
    "steering_step_seconds_total": (1, 3),
    "steering_edit_seconds_total": (0.1, 0.1),
    'baselines_total{outcome="completed"}': (1, 2),
    "toxicity_dropped_total": (1, 1),
    f"completion_toxicity_count{SERVED}": (1, 3),
    f"completion_toxicity_sum{SERVED}": (0.2, 2.4),
    f"completion_toxicity_count{BASELINE}": (1, 1),
    f"completion_toxicity_sum{BASELINE}": (0.8, 1),
    f"completion_toxicity_count{PLAIN}": (1, 1),
    f"completion_toxicity_sum{PLAIN}": (0, 0.2),
    f'toxic_completions_total{SERVED[:-1]}, threshold="0.5"}}': (0, 2),
    f'toxic_completions_total{BASELINE[:-1]}, threshold="0.5"}}': (1, 0.8),
    'steering_dose_count{intervention="detox"}': (1, 3),
}
# Histograms and their labels. The first server observes values up to 1, the second values above.
HISTOGRAMS = {
    **dict.fromkeys(
        (
            *("time_to_first_token_seconds", "inter_token_latency_seconds"),
            *("request_duration_seconds", "request_queue_seconds", "toxicity_scoring_seconds"),
            *("request_prompt_tokens", "request_generation_tokens"),
        ),
        "",
    ),
    "steering_dose": 'intervention="detox"',
    "completion_toxicity": 'intervention="detox", arm="served"',
}
BUCKETS = {"1.0": (1, 0), "5.0": (1, 3), "+Inf": (1, 3)}
# Four observations a second: one is at most 1, three are spread evenly between 1 and 5.
P50, P95, P99 = (1 + 4 * (4 * share - 1) / 3 for share in (0.5, 0.95, 0.99))
BUCKETS_IN_A_MINUTE = {"1.0": 60.0, "5.0": 240.0, "+Inf": 240.0}


def alone(value: float) -> dict[str, float]:
    return {"{}": value}


def of(label: str, **values: float) -> dict[str, float]:
    return {f'{{{label}="{name}"}}': value for name, value in values.items()}


def apart(first: float, second: float) -> dict[str, float]:
    return {f'{{instance="{FIRST}"}}': first, f'{{instance="{SECOND}"}}': second}


def quantiles(title: str, *names: str) -> dict[str, dict[str, float]]:
    known = {"p50": P50, "p95": P95, "p99": P99}
    return {f"{title}: {name}": alone(known[name[-3:]]) for name in names}


EXPECTED: dict[str, dict[str, float]] = {
    "Engine: engine": alone(1),
    "Model: {{model}}": of("model", m=2),  # the panel shows the label, not the value
    "Requests per second: requests": alone(7),
    "Tokens per second: tokens": alone(40),
    "Failed share: failed": alone(3 / 7),
    "Alerts firing: alerts": alone(2),
    "Requests by outcome: {{outcome}}": of("outcome", success=4, rejected=3),
    "Tokens: generated": alone(40),
    "Tokens: prompt": alone(3),
    "Tokens: prompt, from the prefix cache": alone(2),
    **quantiles("Time to first token", "p50", "p95", "p99"),
    **quantiles("Inter-token latency", "p50", "p95", "p99"),
    **quantiles("End-to-end latency", "p50", "p95", "p99"),
    **quantiles("Queue time", "p50", "p95", "p99"),
    "Running and waiting: running": alone(7),
    "Running and waiting: waiting": alone(4),
    "KV cache in use: in use": alone(0.9),
    "Preemptions: preemptions": alone(2),
    "Prefix cache hit rate: found": alone(2 / 8),
    "Errors by outcome: {{outcome}}": of("outcome", rejected=3),
    "Requests by route: {{endpoint}}": {
        '{endpoint="/v1/completions"}': 7,
        '{endpoint="/metrics"}': 2,
    },
    **quantiles("Request sizes", "prompt, p50", "prompt, p95", "generated, p50", "generated, p95"),
    "Requests by server: {{instance}}": apart(2, 5),
    "Load by server: {{instance}}": apart(3, 8),
    "First token by server: {{instance}}": apart(0.95, 1 + 4 * 0.95),
    "Toxicity removed: removed": alone(1 - (2.6 / 4) * 2 / 1.8),
    "Mean toxicity served: served": alone(2.6 / 4),
    "Mean toxicity baseline: baseline": alone(1.8 / 2),
    "Answers scored: served": alone(4 * 300),
    "Answers scored: baseline": alone(2 * 300),
    "Toxicity by intervention: {{intervention}}, {{arm}}": {
        '{intervention="detox", arm="served"}': 2.6 / 4,
        '{intervention="detox", arm="baseline"}': 1.8 / 2,
        '{intervention="none", arm="served"}': 0.2 / 2,
    },
    "Mean toxicity: served and baseline: served, steered": alone(2.6 / 4),
    "Mean toxicity: served and baseline: baseline": alone(1.8 / 2),
    "Mean toxicity: served and baseline: served, unsteered traffic": alone(0.2 / 2),
    "Share above threshold: served and baseline: served, steered": alone(2 / 4),
    "Share above threshold: served and baseline: baseline": alone(1.8 / 2),
    "Distribution of served scores: {{le}}": of("le", **BUCKETS_IN_A_MINUTE),
    "Tokens by intervention: {{intervention}}": of("intervention", detox=16),
    "Tokens by intervention: unsteered": alone(24),
    "Steered share of tokens: steered": alone(16 / 40),
    "Dose by intervention: {{intervention}}, median": of("intervention", detox=P50),
    "Dose by intervention: {{intervention}}, p95": of("intervention", detox=P95),
    "Distribution of doses: {{le}}": of("le", **BUCKETS_IN_A_MINUTE),
    "Time taken by edits: edits": alone(0.2 / 4),
    **quantiles("Inter-token latency while steering", "p50", "p95"),
    "Baselines: {{outcome}}": of("outcome", completed=3),
    "Interventions: stored, most": alone(7),
    "Interventions: stored, fewest": alone(6),
    "Interventions: slots used": alone(5),
    **quantiles("Scoring lag", "p50", "p95"),
    "Scoring lag: waiting longest": alone(8),
    "Scoring queue: waiting": alone(10),
    "Answers not scored: dropped": alone(2),
}
# Targets that do not aggregate over servers, or only values that are the same at both.
NOT_TOGETHER = {
    *("Engine: engine", "Alerts firing: alerts"),
    *("Load by server: {{instance}}", "First token by server: {{instance}}"),
}


def expressions() -> dict[str, str]:
    return {
        f"{panel['title']}: {target['legendFormat']}": fill_in(target["expr"], GRAFANA)
        for name in DASHBOARDS
        for panel in json.loads((FOLDER / name).read_text())["panels"]
        for target in panel.get("targets", ())
    }


def labelled(name: str, server: str, further: str = "") -> str:
    metric, _, labels = name.partition("{")
    inside = [f'job="steerserve", instance="{server}"', labels.rstrip("}"), further]
    return f"steerserve_{metric}{{{', '.join(filter(None, inside))}}}"


def input_series() -> list[dict[str, str]]:
    made: dict[str, str] = {}
    for place, server in enumerate((FIRST, SECOND)):
        made[f'up{{job="steerserve", instance="{server}"}}'] = f"1x{SERIES_STEPS}"
        for name, values in GAUGES.items():
            made[labelled(name, server)] = f"{values[place]}x{SERIES_STEPS}"
        for name, rates in COUNTERS.items():
            made[labelled(name, server)] = f"0+{rates[place] * STEP}x{SERIES_STEPS}"
        for name, labels in HISTOGRAMS.items():
            for bound, rates in BUCKETS.items():
                series = labelled(f"{name}_bucket{{{labels}}}", server, f'le="{bound}"')
                made[series] = f"0+{rates[place] * STEP}x{SERIES_STEPS}"
        firing = f'alertstate="firing", alertname="SteerserveQueueFull", instance="{server}"'
        made[f"ALERTS{{{firing}}}"] = f"1x{SERIES_STEPS}"
    return [{"series": series, "values": values} for series, values in made.items()]


def differing(folder: Path, asked: Mapping[str, str]) -> set[str]:
    """Return the targets of which promtool computes other values than the expected ones."""
    cases = [
        {
            "expr": rounded(expression),
            "eval_time": "10m",
            "exp_samples": [
                {"labels": labels, "value": round(value, 4)}
                for labels, value in EXPECTED[name].items()
            ],
        }
        for name, expression in asked.items()
    ]
    test = {"interval": f"{STEP}s", "input_series": input_series(), "promql_expr_test": cases}
    path = folder / "test.yml"
    path.write_text(yaml.safe_dump({"evaluation_interval": f"{STEP}s", "tests": [test]}))
    ran = subprocess.run(
        [tool("promtool"), "test", "rules", path], capture_output=True, text=True, timeout=60
    )
    found = set(re.findall(r'expr: "((?:[^"\\]|\\.)*)", time', ran.stdout + ran.stderr))
    assert bool(found) == (ran.returncode != 0), ran.stdout + ran.stderr
    told = {json.loads(f'"{expression}"') for expression in found}
    return {name for name, expression in asked.items() if rounded(expression) in told}


def rounded(expression: str) -> str:
    """Round an expression's values, because promtool compares floats exactly."""
    return f"round({expression}, 0.0001)"


def test_every_target_is_expected_to_show_something() -> None:
    assert set(EXPECTED) == set(expressions())


def test_panels_take_two_servers_together_rightly(tmp_path: Path) -> None:
    assert differing(tmp_path, expressions()) == set()


@pytest.mark.parametrize("other", ["max", "min", "sum"])
def test_another_way_to_take_them_together_would_be_found(tmp_path: Path, other: str) -> None:
    changed = {
        name: re.sub(r"\b(sum|max|min)(?= by|\()", other, expression)
        for name, expression in expressions().items()
    }
    same = {name for name, expression in changed.items() if expression == expressions()[name]}
    found = differing(tmp_path, changed)
    assert found
    assert set(changed) - found <= same | NOT_TOGETHER
