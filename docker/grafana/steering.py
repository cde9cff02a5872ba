"""The dashboard *Steering*: what interventions take away, how hard they push, what they cost."""

from docker.grafana.effect import EFFECT
from docker.grafana.model import Dashboard, Panel, Section, Target
from docker.grafana.queries import (
    CHOSEN,
    SMOOTH,
    distribution,
    gauge,
    rate,
    seconds,
    total,
    unless_new,
)
from docker.grafana.variables import INTERVENTION, SERVERS, THRESHOLD

DOSE = "steering_dose"


def _dose(share: float) -> str:
    buckets = total("rate", f"{DOSE}_bucket", CHOSEN, by="intervention, le")
    found = f"histogram_quantile({share}, {buckets}) >= 0"
    return unless_new(found, f"{DOSE}_count", CHOSEN, by="intervention")


TRAFFIC = Section(
    "Traffic",
    (
        Panel(
            "Tokens by intervention",
            "timeseries",
            "short",
            "Tokens per second by what steered them: one intervention, a stack (names joined by "
            "+), or none.",
            (
                Target(rate("steered_tokens_total", CHOSEN, by="intervention"), "{{intervention}}"),
                Target(
                    f"clamp_min(({rate('generation_tokens_total')})"
                    f" - ({rate('steered_tokens_total')}), 0)",
                    "unsteered",
                ),
            ),
            width=12,
            stacked=True,
        ),
        Panel(
            "Steered share of tokens",
            "timeseries",
            "percentunit",
            "Share of the generated tokens that an intervention edited. With the policy `required` "
            "or `locked` anything below 100 % is an edit whose settings do nothing.",
            (
                Target(
                    f"(({rate('steered_tokens_total')}) / "
                    f"({total('rate', 'generation_tokens_total')} > 0)) or on() vector(0)",
                    "steered",
                ),
            ),
            width=12,
            maximum=1,
        ),
    ),
)

STRENGTH = Section(
    "Dose",
    (
        Panel(
            "Dose by intervention",
            "timeseries",
            "percentunit",
            "Size of the edit relative to the activation, in a sample of the steps. Near 0: the "
            "intervention has stopped acting; above 100 %: it overwrites the model.",
            (
                Target(_dose(0.5), "{{intervention}}, median"),
                Target(_dose(0.95), "{{intervention}}, p95"),
            ),
            width=12,
            thresholds=((1.0, "red"),),
            interval=SMOOTH,
        ),
        Panel(
            "Distribution of doses",
            "heatmap",
            "percentunit",
            "How many sampled steps had which dose, over the chosen interventions.",
            (Target(distribution(DOSE, CHOSEN), "{{le}}"),),
            width=12,
            interval=SMOOTH,
        ),
    ),
)

COST = Section(
    "Cost of steering",
    (
        Panel(
            "Time taken by edits",
            "timeseries",
            "percentunit",
            "Share of the steered steps' time that the edits took, in a sample of the steps. "
            "Measured on a CPU only: 0 on a GPU, and while nothing is steered.",
            (
                Target(
                    f"({total('rate', 'steering_edit_seconds_total')} / "
                    f"({total('rate', 'steering_step_seconds_total')} > 0)) or on() vector(0)",
                    "edits",
                ),
            ),
            width=6,
            thresholds=((0.05, "yellow"), (0.15, "red")),
            interval=SMOOTH,
        ),
        Panel(
            "Inter-token latency while steering",
            "timeseries",
            "s",
            "Between one token and the next, steered or not: a batch's tokens come together. If "
            "steering costs, this rises with the steered share of tokens. 0 without traffic.",
            (
                Target(seconds(0.5, "inter_token_latency_seconds"), "p50"),
                Target(seconds(0.95, "inter_token_latency_seconds"), "p95"),
            ),
            width=6,
            thresholds=((0.1, "yellow"), (0.5, "red")),
        ),
        Panel(
            "Baselines",
            "timeseries",
            "ops",
            "Unsteered answers per second generated beside steered ones, and those given up "
            "because requests wanted the room. This is what measuring costs.",
            (Target(rate("baselines_total", by="outcome"), "{{outcome}}"),),
            width=6,
        ),
        Panel(
            "Interventions",
            "timeseries",
            "none",
            "Names in the registry, of the server with most and of the one with fewest: the same, "
            "but for two seconds, where servers share one. And interventions loaded, of the server "
            "with most. When the bank is full, the one that was used longest ago is replaced, and "
            "read again when it is asked for.",
            (
                Target(gauge("interventions_stored", "max"), "stored, most"),
                Target(gauge("interventions_stored", "min"), "stored, fewest"),
                Target(gauge("intervention_slots_used", "max"), "slots used"),
            ),
            width=6,
        ),
    ),
)

SCORING = Section(
    "Toxicity scoring",
    (
        Panel(
            "Scoring lag",
            "timeseries",
            "s",
            "From an answer's end to its score. It costs clients nothing, but the panels above "
            "are late by as much. Above a minute for the one that has waited longest: answers come "
            "faster than they are scored. 0 while nothing is scored, or waits.",
            (
                Target(seconds(0.5, "toxicity_scoring_seconds"), "p50"),
                Target(seconds(0.95, "toxicity_scoring_seconds"), "p95"),
                Target(gauge("toxicity_longest_wait_seconds", "max"), "waiting longest"),
            ),
            thresholds=((2.0, "yellow"), (10.0, "red")),
        ),
        Panel(
            "Scoring queue",
            "timeseries",
            "none",
            "Answers that wait for their score. At STEERSERVE_TOXICITY_QUEUE_SIZE further ones are "
            "dropped.",
            (Target(gauge("toxicity_queue_depth"), "waiting"),),
        ),
        Panel(
            "Answers not scored",
            "timeseries",
            "ops",
            "Answers per second that got no score: the queue was full, or the scorer failed.",
            (Target(rate("toxicity_dropped_total"), "dropped"),),
            thresholds=((0.001, "red"),),
        ),
    ),
)

STEERING = Dashboard(
    "steerserve-steering",
    "steerserve: Steering",
    "What interventions take away, how hard they push, and what they cost.",
    (EFFECT, TRAFFIC, STRENGTH, COST, SCORING),
    (*SERVERS, INTERVENTION, THRESHOLD),
)
