"""The first row of *Steering*: how toxic steered answers are, compared with the baseline.

The baseline is a sample of unsteered answers: for some steered requests, chosen at random, the
server also generates the answer of the base model (`--baseline-sample-rate`).
"""

from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.dashboard import Panel

from docker.grafana.panels import PERCENT, bar_gauge, heatmap, stat, timeseries
from docker.grafana.queries import (
    CHOSEN,
    RANGE,
    SMOOTH,
    STEERED,
    distribution,
    mean,
    or_zero,
    total,
    unless_new,
)

SERVED = 'arm="served"'
BASELINE = 'arm="baseline"'
SCORES = "completion_toxicity"
LIMITS = {0.3: "yellow", 0.5: "red"}
SHARE_LIMITS = {0.1: "yellow", 0.25: "red"}


def toxicity() -> list[Builder[Panel]]:
    """Build the row: figures over the dashboard's time range, and below them graphs over time."""
    return [*_figures(), *_graphs()]


def _figures() -> list[Builder[Panel]]:
    removed = {"removed": or_zero(f"(1 - {_reweighted('sum')})")}
    served = {"served": or_zero(f"({_reweighted('count')}) or ({_overall(SERVED)})")}
    baseline = {"baseline": or_zero(f"({_overall(BASELINE)})")}
    scored = {"served": or_zero(_scored(SERVED)), "baseline": or_zero(_scored(BASELINE))}
    by = "intervention, arm"
    means = unless_new(mean(SCORES, CHOSEN, by=by, over=RANGE), f"{SCORES}_count", CHOSEN, by=by)
    bars = bar_gauge(
        "Toxicity by intervention", PERCENT, {"{{intervention}}, {{arm}}": means}, LIMITS
    )
    limits = {0: "yellow", 0.2: "green"}
    figures = [
        stat("Toxicity removed", PERCENT, removed, limits, "red").decimals(0).span(6),
        stat("Mean toxicity served", PERCENT, served, LIMITS).decimals(1).span(3),
        stat("Mean toxicity baseline", PERCENT, baseline, LIMITS).decimals(1).span(3),
        stat("Answers scored", "short", scored, base="blue").decimals(0),
    ]
    return [*(figure.height(8) for figure in figures), bars.max(1).decimals(1)]


def _graphs() -> list[Builder[Panel]]:
    means = {
        "served, steered": _mean(SERVED, STEERED, CHOSEN),
        "baseline": _mean(BASELINE, STEERED, CHOSEN),
        "served, unsteered traffic": _mean(SERVED, 'intervention="none"'),
    }
    shares = {
        "served, steered": _toxic_share(SERVED, STEERED, CHOSEN),
        "baseline": _toxic_share(BASELINE, STEERED, CHOSEN),
    }
    scores = distribution(SCORES, SERVED, STEERED, CHOSEN)
    return [
        timeseries("Mean toxicity: served and baseline", PERCENT, means, LIMITS).interval(SMOOTH),
        timeseries(
            "Share above threshold: served and baseline", PERCENT, shares, SHARE_LIMITS
        ).interval(SMOOTH),
        heatmap("Distribution of served scores", PERCENT, scores).interval(SMOOTH),
    ]


def _mean(*matchers: str) -> str:
    return unless_new(mean(SCORES, *matchers), f"{SCORES}_count", *matchers)


def _toxic_share(*matchers: str) -> str:
    toxic = total("increase", "toxic_completions_total", 'threshold="$threshold"', *matchers)
    scored = total("increase", f"{SCORES}_count", *matchers)
    return unless_new(f"{toxic} / ({scored} > 0)", f"{SCORES}_count", *matchers)


def _scored(arm: str, by: str = "") -> str:
    return total("increase", f"{SCORES}_count", arm, STEERED, CHOSEN, by=by, over=RANGE)


def _overall(arm: str) -> str:
    return mean(SCORES, arm, STEERED, CHOSEN, over=RANGE)


def _reweighted(divisor: str) -> str:
    """Weight each intervention's mean served score by its number of baselines, then divide.

    Baselines are a sample, so their mixture of interventions differs from that of the served
    answers. With the baselines' weights, both means are over the same mixture.

    Args:
        divisor: "count" gives the mean served score, "sum" its ratio to the mean baseline score.
    """
    served = mean(SCORES, SERVED, STEERED, CHOSEN, by="intervention", over=RANGE)
    weights = _scored(BASELINE, by="intervention")
    whole = total("increase", f"{SCORES}_{divisor}", BASELINE, STEERED, CHOSEN, over=RANGE)
    return f"sum(({served}) * {weights}) / ({whole} > 0)"
