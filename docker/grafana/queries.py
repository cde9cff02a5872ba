"""PromQL expressions that panels share.

A panel must show something on a server without traffic, and must not invent values on a server with
traffic. So every expression that divides by a count has a fallback:

* A time falls back to 0, which no measured time can be.
* A mean or a quantile for which 0 would be a finding (toxicity, dose) falls back to 0 only until
  the first observation. After that, a time without observations is a gap.
"""

PREFIX = "steerserve_"
INSTANCE = 'instance=~"$instance"'
CHOSEN = 'intervention=~"$intervention"'
STEERED = 'intervention!="none"'  # `none` is the base model without steering
API = 'endpoint=~"/v1/.*|unmatched"'  # neither health probes nor /metrics
STEPS = "$__rate_interval"
RANGE = "$__range"  # the whole time range of the dashboard
SMOOTH = "1m"  # the shortest window for rates of metrics that are observed rarely


def select(metric: str, *matchers: str) -> str:
    """Select the chosen servers' series of a metric, which is named without its prefix."""
    return f"{PREFIX}{metric}{{{', '.join((INSTANCE, *matchers))}}}"


def total(function: str, metric: str, *matchers: str, by: str = "", over: str = STEPS) -> str:
    """Sum `rate` or `increase` of a counter; `by` is a comma-separated list of labels to keep."""
    kept = f" by ({by}) " if by else ""
    return f"sum{kept}({function}({select(metric, *matchers)}[{over}]))"


def or_zero(expression: str) -> str:
    """Fall back to 0 where the expression has no value."""
    return f"{expression} or on() vector(0)"


def zero(by: str = "") -> str:
    """Return 0 while a chosen server answers; the first label of `by` then reads "no data"."""
    nothing = f"0 * sum({select('engine_up')})"
    label = by.partition(",")[0]
    return f'label_replace({nothing}, "{label}", "no data", "", "")' if label else nothing


def rate(metric: str, *matchers: str, by: str = "") -> str:
    """Sum a counter's rate per second; 0 for a series with one sample, and where none exists."""
    summed = total("rate", metric, *matchers, by=by)
    if not by:
        return or_zero(summed)
    return f"{summed} or 0 * sum by ({by}) ({select(metric, *matchers)}) or on() {zero(by)}"


def gauge(metric: str, function: str = "sum") -> str:
    """Aggregate a gauge over the chosen servers; 0 where none answers."""
    return or_zero(f"{function}({select(metric)})")


def ratio(part: str, whole: str) -> str:
    """Divide two expressions; 0 where the divisor is 0, or where either has no value."""
    return or_zero(f"({part} / ({whole} > 0))")


def by_server(expression: str) -> str:
    """Keep an expression's label `instance`; 0 for a server for which it has no value."""
    each = f"0 * sum by (instance) ({select('engine_up')})"
    nothing = 'label_replace(vector(0), "instance", "no server", "", "")'
    return f"({expression}) or {each} or on() {nothing}"


def seconds(share: float, metric: str) -> str:
    """Estimate a quantile of a histogram of times; 0 while nothing is observed."""
    buckets = total("rate", f"{metric}_bucket", by="le")
    return or_zero(f"(histogram_quantile({share}, {buckets}) >= 0)")


def percentiles(metric: str, *percents: int, prefix: str = "") -> dict[str, str]:
    """Map legends ("p50", with the prefix before it) to a histogram's quantiles."""
    return {f"{prefix}p{percent}": seconds(percent / 100, metric) for percent in percents}


def mean(metric: str, *matchers: str, by: str = "", over: str = STEPS) -> str:
    """Divide a histogram's sum by its count; no sample where nothing was observed."""
    sums = total("increase", f"{metric}_sum", *matchers, by=by, over=over)
    return f"{sums} / ({total('increase', f'{metric}_count', *matchers, by=by, over=over)} > 0)"


def unless_new(expression: str, count: str, *matchers: str, by: str = "") -> str:
    """Fall back to 0 while the counter `count` is 0 or does not exist."""
    counted = select(count, *matchers)
    kept = f" by ({by}) " if by else ""
    new = f"0 * (sum{kept}({counted}) == 0)"
    return f"({expression}) or {new} or ({zero(by)} and on() absent({counted}))"


def distribution(metric: str, *matchers: str) -> str:
    """Count the observations up to each bucket's bound, for a heatmap."""
    buckets = total("increase", f"{metric}_bucket", *matchers, by="le")
    # Grafana subtracts neighbouring buckets point by point, so all of them must begin together.
    ever = f"last_over_time({select(f'{metric}_bucket', *matchers)}[{RANGE}] @ end())"
    empty = f'label_replace(vector(0), "le", "+Inf", "", "") and on() absent({ever})'
    return f"{buckets} or on() ({empty})"
