"""Panels on what steering takes away: toxicity served beside the baseline."""

from docker.grafana.model import Panel, Section, Target
from docker.grafana.queries import (
    CHOSEN,
    RANGE,
    SMOOTH,
    STEERED,
    distribution,
    mean,
    total,
    unless_new,
)

SERVED = 'arm="served"'
BASELINE = 'arm="baseline"'
FROM = 'threshold="$threshold"'
SCORES = "completion_toxicity"
TOXICITY_LIMITS = ((0.3, "yellow"), (0.5, "red"))


def _mean_toxicity(*matchers: str, by: str = "") -> str:
    return unless_new(mean(SCORES, *matchers, by=by), f"{SCORES}_count", *matchers, by=by)


def _toxic_share(*matchers: str) -> str:
    toxic = total("increase", "toxic_completions_total", FROM, *matchers)
    scored = total("increase", f"{SCORES}_count", *matchers)
    return unless_new(f"{toxic} / ({scored} > 0)", f"{SCORES}_count", *matchers)


def _overall(arm: str) -> str:
    return mean(SCORES, arm, STEERED, CHOSEN, over=RANGE)


def _served_like_baselines(divisor: str) -> str:
    """The served scores of the mixture that the baselines were drawn from, divided."""
    served = mean(SCORES, SERVED, STEERED, CHOSEN, by="intervention", over=RANGE)
    drawn = total(
        "increase", f"{SCORES}_count", BASELINE, STEERED, CHOSEN, by="intervention", over=RANGE
    )
    whole = total("increase", f"{SCORES}_{divisor}", BASELINE, STEERED, CHOSEN, over=RANGE)
    return f"sum(({served}) * {drawn}) / ({whole} > 0)"


EFFECT = Section(
    "What steering takes away",
    (
        Panel(
            "Toxicity removed",
            "stat",
            "percentunit",
            "1 - served / baseline: by how much steered answers are less toxic, in the mean, than "
            "the base model's to the same prompts, over the time shown, weighted by the number of "
            "each intervention's baselines. Below 0 steering makes it worse; 0 also without a "
            "baseline (--baseline-sample-rate).",
            (
                Target(
                    f"(1 - {_served_like_baselines('sum')}) or on() vector(0)",
                    "removed",
                ),
            ),
            width=6,
            height=8,
            base="red",
            thresholds=((0, "yellow"), (0.2, "green")),
            decimals=0,
            minimum=None,
        ),
        Panel(
            "Mean toxicity served",
            "stat",
            "percentunit",
            "Mean score of the steered answers over the time shown, 0 to 100 %, weighted as in "
            "Toxicity removed, or as they came where there is no baseline. 0 as long as none has "
            "been scored.",
            (
                Target(
                    f"({_served_like_baselines('count')}) or ({_overall(SERVED)})"
                    " or on() vector(0)",
                    "served",
                ),
            ),
            width=3,
            height=8,
            thresholds=TOXICITY_LIMITS,
            decimals=1,
        ),
        Panel(
            "Mean toxicity baseline",
            "stat",
            "percentunit",
            "Mean score of what the base model would have answered instead, over the time shown. "
            "0 as long as none has been scored.",
            (Target(f"({_overall(BASELINE)}) or on() vector(0)", "baseline"),),
            width=3,
            height=8,
            thresholds=TOXICITY_LIMITS,
            decimals=1,
        ),
        Panel(
            "Answers scored",
            "stat",
            "short",
            "How many steered answers and how many baselines the figures beside rest on, over the "
            "time shown. Below a hundred of each, read them with care.",
            tuple(
                Target(
                    total("increase", f"{SCORES}_count", arm, STEERED, CHOSEN, over=RANGE)
                    + " or on() vector(0)",
                    name,
                )
                for arm, name in ((SERVED, "served"), (BASELINE, "baseline"))
            ),
            width=4,
            height=8,
            base="blue",
            decimals=0,
        ),
        Panel(
            "Toxicity by intervention",
            "bargauge",
            "percentunit",
            "Mean score over the time shown of each intervention's answers beside the base model's "
            "answers to the same prompts; `none` is unsteered traffic.",
            (
                Target(
                    unless_new(
                        mean(SCORES, CHOSEN, by="intervention, arm", over=RANGE),
                        f"{SCORES}_count",
                        CHOSEN,
                        by="intervention, arm",
                    ),
                    "{{intervention}}, {{arm}}",
                ),
            ),
            width=8,
            height=8,
            thresholds=TOXICITY_LIMITS,
            maximum=1,
            decimals=1,
        ),
        Panel(
            "Mean toxicity: served and baseline",
            "timeseries",
            "percentunit",
            "Mean score of steered answers, and of the base model's answers to a sample of the "
            "same prompts; for comparison, that of unsteered traffic. Gaps: nothing was scored.",
            (
                Target(_mean_toxicity(SERVED, STEERED, CHOSEN), "served, steered"),
                Target(_mean_toxicity(BASELINE, STEERED, CHOSEN), "baseline"),
                Target(_mean_toxicity(SERVED, 'intervention="none"'), "served, unsteered traffic"),
            ),
            width=8,
            thresholds=TOXICITY_LIMITS,
            interval=SMOOTH,
        ),
        Panel(
            "Share above threshold: served and baseline",
            "timeseries",
            "percentunit",
            "Share of answers whose score reaches the threshold chosen above (Toxic from): steered "
            "ones, and the base model's to a sample of the same prompts. Gaps: nothing was scored.",
            (
                Target(_toxic_share(SERVED, STEERED, CHOSEN), "served, steered"),
                Target(_toxic_share(BASELINE, STEERED, CHOSEN), "baseline"),
            ),
            width=8,
            thresholds=((0.1, "yellow"), (0.25, "red")),
            interval=SMOOTH,
        ),
        Panel(
            "Distribution of served scores",
            "heatmap",
            "percentunit",
            "How many steered answers got which score: a mean can hide a few very toxic ones.",
            (Target(distribution(SCORES, SERVED, STEERED, CHOSEN), "{{le}}"),),
            width=8,
            interval=SMOOTH,
        ),
    ),
)
