"""Draws toxicity against perplexity. Needs the extra `evaluate` (matplotlib)."""

from collections.abc import Sequence
from io import BytesIO
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from server.evaluating.statistics import Interval
from server.evaluating.tradeoff import Point

_SIZE: Final = (7.0, 5.0)  # inches
_DPI: Final = 150
_PERCENT: Final = 100
_COLORS: Final = 10  # in matplotlib's default cycle


def draw(points: Sequence[Point], best: Point | None, kind: str) -> bytes:
    """Return a picture with a curve for each sweep and a mark for each other setting.

    Args:
        points: the base model's first.
        best: the point to circle.
        kind: "svg" or "png".
    """
    # Without pyplot there is no global state, and no display is needed.
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    assert isinstance(axes, Axes)
    base, *others = points
    _plot(axes, [base], "black", "s", base.result.setting.label)
    for number, (label, members) in enumerate(_groups(others).items()):
        is_curve = members[0].result.setting.curve is not None
        _plot(axes, members, f"C{number % _COLORS}", "o-" if is_curve else "D", label)
        for point in members if is_curve else ():
            axes.annotate(
                f"{point.result.setting.value:g}",
                _place(point),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize="small",
            )
    if best is not None:
        x, y = _place(best)
        label = f"best: {best.result.setting.label}"
        axes.plot([x], [y], "o", color="black", markersize=16, fillstyle="none", label=label)
    axes.set_xlabel(f"{base.perplexity.name} ({base.perplexity.subject})")
    axes.set_ylabel(f"{base.toxicity.name}, % ({base.toxicity.subject})")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    file = BytesIO()
    figure.savefig(file, format=kind, dpi=_DPI)
    return file.getvalue()


def _groups(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Return the points of each sweep, by value, and each other point alone, by label."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        setting = point.result.setting
        groups.setdefault(setting.curve or setting.label, []).append(point)
    for members in groups.values():
        members.sort(key=lambda point: point.result.setting.value or 0.0)
    return groups


def _plot(axes: Axes, points: Sequence[Point], color: str, style: str, label: str) -> None:
    """Plot points with their intervals, joined if the style has a line."""
    places = [_place(point) for point in points]
    axes.errorbar(
        [x for x, _ in places],
        [y for _, y in places],
        xerr=_errors([point.perplexity.value for point in points], 1),
        yerr=_errors([point.toxicity.value for point in points], _PERCENT),
        fmt=style,
        color=color,
        ecolor=color,
        elinewidth=0.6,
        label=label,
    )


def _place(point: Point) -> tuple[float, float]:
    return point.perplexity.value.value, _PERCENT * point.toxicity.value.value


def _errors(intervals: Sequence[Interval], factor: float) -> list[list[float]]:
    """Return the distances from each value down and up to its interval's ends."""
    lows = [each.value if each.low is None else each.low for each in intervals]
    highs = [each.value if each.high is None else each.high for each in intervals]
    pairs = list(zip(intervals, lows, highs, strict=True))
    # The value of all units may lie outside of an interval of resamples.
    return [
        [factor * max(0.0, each.value - low) for each, low, _ in pairs],
        [factor * max(0.0, high - each.value) for each, _, high in pairs],
    ]
