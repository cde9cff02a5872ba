"""The dashboard *Steering*: what interventions achieve, how strongly they act, what they cost."""

from grafana_foundation_sdk.builders.dashboard import CustomVariable
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.dashboard import Dashboard, Panel, VariableOption

from docker.grafana.dashboard import dashboard, label_values
from docker.grafana.panels import PERCENT, heatmap, timeseries
from docker.grafana.queries import (
    CHOSEN,
    SMOOTH,
    distribution,
    gauge,
    percentiles,
    rate,
    ratio,
    select,
    total,
    unless_new,
)
from docker.grafana.service import TOKEN_LIMITS
from docker.grafana.toxicity import toxicity

TOXIC_FROM = ("0.5", "0.8")  # scores from which server.metrics counts an answer as toxic


def steering() -> Dashboard:
    """Build the dashboard."""
    named = f"{select('completion_toxicity_count')}, intervention"
    intervention = label_values("intervention", "Intervention", named)
    options = [VariableOption(value == TOXIC_FROM[0], value, value) for value in TOXIC_FROM]
    threshold = CustomVariable("threshold").label("Toxic from").values(",".join(TOXIC_FROM))
    return dashboard(
        "Steering",
        "What interventions take away, how hard they push, and what they cost.",
        {
            "What steering takes away": toxicity(),
            "Traffic": _traffic(),
            "Dose": _dose(),
            "Cost of steering": _cost(),
            "Toxicity scoring": _scoring(),
        },
        [intervention.all_value(".*"), threshold.options(options).current(options[0])],
    )


def _traffic() -> list[TimeSeries]:
    steered, generated = rate("steered_tokens_total"), rate("generation_tokens_total")
    tokens = {
        "{{intervention}}": rate("steered_tokens_total", CHOSEN, by="intervention"),
        "unsteered": f"clamp_min(({generated}) - ({steered}), 0)",
    }
    share = ratio(total("rate", "steered_tokens_total"), total("rate", "generation_tokens_total"))
    return [
        timeseries("Tokens by intervention", "short", tokens, stacked=True).span(12),
        timeseries("Steered share of tokens", PERCENT, {"steered": share}).max(1).span(12),
    ]


def _dose() -> list[Builder[Panel]]:
    def quantile(share: float) -> str:
        buckets = total("rate", "steering_dose_bucket", CHOSEN, by="intervention, le")
        found = f"histogram_quantile({share}, {buckets}) >= 0"
        return unless_new(found, "steering_dose_count", CHOSEN, by="intervention")

    doses = {"{{intervention}}, median": quantile(0.5), "{{intervention}}, p95": quantile(0.95)}
    counts = distribution("steering_dose", CHOSEN)
    return [
        timeseries("Dose by intervention", PERCENT, doses, {1: "red"}).interval(SMOOTH).span(12),
        heatmap("Distribution of doses", PERCENT, counts).interval(SMOOTH).span(12),
    ]


def _cost() -> list[TimeSeries]:
    edits, steps = "steering_edit_seconds_total", "steering_step_seconds_total"
    edit_share = {"edits": ratio(total("rate", edits), total("rate", steps))}
    limits = {0.05: "yellow", 0.15: "red"}
    latency = percentiles("inter_token_latency_seconds", 50, 95)
    baselines = {"{{outcome}}": rate("baselines_total", by="outcome")}
    interventions = {
        "stored, most": gauge("interventions_stored", "max"),
        "stored, fewest": gauge("interventions_stored", "min"),
        "slots used": gauge("intervention_slots_used", "max"),
    }
    return [
        timeseries("Time taken by edits", PERCENT, edit_share, limits).interval(SMOOTH).span(6),
        timeseries("Inter-token latency while steering", "s", latency, TOKEN_LIMITS).span(6),
        timeseries("Baselines", "ops", baselines).span(6),
        timeseries("Interventions", "none", interventions).span(6),
    ]


def _scoring() -> list[TimeSeries]:
    lag = {
        **percentiles("toxicity_scoring_seconds", 50, 95),
        "waiting longest": gauge("toxicity_longest_wait_seconds", "max"),
    }
    waiting = {"waiting": gauge("toxicity_queue_depth")}
    dropped = {"dropped": rate("toxicity_dropped_total")}
    return [
        timeseries("Scoring lag", "s", lag, {2: "yellow", 10: "red"}),
        timeseries("Scoring queue", "none", waiting),
        timeseries("Answers not scored", "ops", dropped, {0.001: "red"}),
    ]
