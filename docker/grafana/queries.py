"""The expressions that panels share.

A panel must never be empty on a server that has had no traffic, and must not invent values on one
that has. So what divides by a count has something to fall back to:

* times fall back to 0, which none can ever be;
* a mean or a quantile where 0 would say something (toxicity, dose) falls back to 0 only as long as
  nothing was ever counted. Later, a time without data is a gap.
"""

PREFIX = "steerserve_"
INSTANCE = 'instance=~"$instance"'
CHOSEN = 'intervention=~"$intervention"'
STEERED = 'intervention!="none"'  # `none` is what the base model wrote by itself
API = 'endpoint=~"/v1/.*|unmatched"'  # not the probes and not Prometheus itself
STEPS = "$__rate_interval"
RANGE = "$__range"  # all that the dashboard shows
SMOOTH = "1m"  # where little is observed, a rate over less would only be noise


def select(metric: str, *matchers: str) -> str:
    """The chosen servers' series of a metric, named without its prefix."""
    return f"{PREFIX}{metric}{{{', '.join((INSTANCE, *matchers))}}}"


def total(function: str, metric: str, *matchers: str, by: str = "", over: str = STEPS) -> str:
    """`rate` or `increase`, summed; `by` is a list of labels."""
    kept = f" by ({by}) " if by else ""
    return f"sum{kept}({function}({select(metric, *matchers)}[{over}]))"


def zero(by: str = "") -> str:
    """0 while a chosen server answers; the first label of `by` is then "no data"."""
    nothing = f"0 * sum({select('engine_up')})"
    label = by.partition(",")[0]
    return f'label_replace({nothing}, "{label}", "no data", "", "")' if label else nothing


def rate(metric: str, *matchers: str, by: str = "") -> str:
    """Per second, summed; 0 for what was scraped only once, or where there is no such series."""
    summed = total("rate", metric, *matchers, by=by)
    if not by:
        return f"{summed} or on() vector(0)"
    return f"{summed} or 0 * sum by ({by}) ({select(metric, *matchers)}) or on() {zero(by)}"


def gauge(metric: str, function: str = "sum") -> str:
    """A gauge over the chosen servers; 0 where none answers."""
    return f"{function}({select(metric)}) or on() vector(0)"


def by_server(expression: str) -> str:
    """An expression with the label `instance`; 0 for a server that it says nothing of."""
    each = f"0 * sum by (instance) ({select('engine_up')})"
    nothing = 'label_replace(vector(0), "instance", "no server", "", "")'
    return f"({expression}) or {each} or on() {nothing}"


def seconds(share: float, metric: str) -> str:
    """A quantile of a time; 0 while there is none."""
    buckets = total("rate", f"{metric}_bucket", by="le")
    return f"(histogram_quantile({share}, {buckets}) >= 0) or on() vector(0)"


def mean(metric: str, *matchers: str, by: str = "", over: str = STEPS) -> str:
    """A histogram's mean, without a sample where nothing was observed."""
    sums = total("increase", f"{metric}_sum", *matchers, by=by, over=over)
    return f"{sums} / ({total('increase', f'{metric}_count', *matchers, by=by, over=over)} > 0)"


def unless_new(expression: str, count: str, *matchers: str, by: str = "") -> str:
    """An expression of a histogram, or 0 as long as its count is 0 or not there."""
    counted = select(count, *matchers)
    kept = f" by ({by}) " if by else ""
    new = f"0 * (sum{kept}({counted}) == 0)"
    return f"({expression}) or {new} or ({zero(by)} and on() absent({counted}))"


def distribution(metric: str, *matchers: str) -> str:
    """How many observations fell into each bucket, for a heatmap."""
    buckets = total("increase", f"{metric}_bucket", *matchers, by="le")
    # Grafana takes one bucket from the next point by point, so all must begin together.
    ever = f"last_over_time({select(f'{metric}_bucket', *matchers)}[{RANGE}] @ end())"
    empty = f'label_replace(vector(0), "le", "+Inf", "", "") and on() absent({ever})'
    return f"{buckets} or on() ({empty})"
