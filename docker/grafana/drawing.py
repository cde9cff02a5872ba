"""Draws a panel's data in the manner of Grafana's dark theme."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from docker.grafana.prometheus import Series

CANVAS = "#111217"
SURFACE = "#181b1f"
BORDER = "#2c3039"
TEXT = "#ccccdc"
MUTED = "#8e8e99"
NAMED = {"green": "#73bf69", "yellow": "#f2cc0c", "red": "#f2495c", "blue": "#5794f2"}
PALETTE = (*NAMED.values(), "#ff9830", "#b877d9", "#8ab8ff", "#c4162a", "#96d98d")


@dataclass(frozen=True)
class Line:
    """A series under its legend."""

    name: str
    series: Series

    @property
    def times(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """In seconds since the epoch."""
        return np.array([time for time, _ in self.series.points])

    @property
    def values(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Beside `times`."""
        return np.array([value for _, value in self.series.points])


def draw_panel(axes: Axes, panel: Mapping[str, Any], lines: Sequence[Line]) -> None:
    """Draw into axes that cover the panel's inside."""
    match panel["type"]:
        case "stat":
            _draw_stat(axes, panel, lines)
        case "bargauge":
            _draw_bars(axes, panel, lines)
        case "heatmap":
            _draw_heatmap(axes, panel, lines)
        case _:
            _draw_lines(axes, panel, lines)


def draw_frame(axes: Axes, title: str) -> None:
    """A panel's surface and title, on axes that cover all of it."""
    axes.set_axis_off()
    frame = FancyBboxPatch(
        (0, 0), 1, 1, boxstyle="square,pad=0", facecolor=SURFACE, edgecolor=BORDER, linewidth=1
    )
    frame.set_transform(axes.transAxes)
    axes.add_patch(frame)
    axes.annotate(
        title, (0, 1), (8, -16), "axes fraction", "offset points", color=TEXT, fontsize=9.5
    )


def shown(value: float, unit: str, decimals: int | None = None) -> str:
    """A value in a panel's unit, in few characters."""
    match unit:
        case "percentunit":
            return f"{100 * value:.3g} %" if decimals is None else f"{100 * value:.{decimals}f} %"
        case "s":
            return f"{value:.3g} s" if abs(value) >= 1 or not value else f"{1000 * value:.3g} ms"
        case "reqps":
            return f"{value:.3g} req/s" if decimals is None else f"{value:.{decimals}f} req/s"
        case "ops":
            return f"{value:.3g} /s"
        case _:
            return f"{value:.0f}" if decimals == 0 or value == int(value) else f"{value:.3g}"


def _unit(panel: Mapping[str, Any]) -> tuple[str, int | None]:
    defaults = panel["fieldConfig"]["defaults"]
    return defaults["unit"], defaults.get("decimals")


def _color_of(panel: Mapping[str, Any], value: float) -> str:
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    passed = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
    return NAMED[passed[-1]]


def _draw_lines(axes: Axes, panel: Mapping[str, Any], lines: Sequence[Line]) -> None:
    unit, _ = _unit(panel)
    axes.set_facecolor(SURFACE)
    stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    floor: dict[float, float] = {}  # what is drawn at each time so far
    for line, color in zip(lines, cycle(PALETTE), strict=False):
        low = np.array([floor.get(time, 0.0) for time in line.times])
        high = low + line.values
        axes.plot(line.times, high, color=color, linewidth=1.3, label=line.name)
        axes.fill_between(line.times, low, high, color=color, alpha=0.12)
        if stacked:
            floor |= dict(zip(line.times, high, strict=True))
    top = axes.get_ylim()[1]
    for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1:]:
        if step["value"] <= top:
            axes.axhline(step["value"], color=NAMED[step["color"]], linewidth=0.9, linestyle="--")
    axes.set_ylim(bottom=0)
    axes.grid(color=BORDER, linewidth=0.6)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))
    _finish_time_axis(axes)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.08, -0.11),
        ncols=3 if len(lines) < 7 else 4,
        fontsize=7,
        labelcolor=TEXT,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.0,
        borderaxespad=0,
    )


def _finish_time_axis(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda second, _: f"{datetime.fromtimestamp(second, UTC):%H:%M:%S}")
    )
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(colors=MUTED, labelsize=7, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_stat(axes: Axes, panel: Mapping[str, Any], lines: Sequence[Line]) -> None:
    axes.set_axis_off()
    unit, decimals = _unit(panel)
    names = {
        value: option["text"]
        for mapping in panel["fieldConfig"]["defaults"].get("mappings", ())
        for value, option in mapping["options"].items()
    }
    for number, line in enumerate(lines):
        last = line.values[-1]
        words = names.get(f"{last:g}", shown(last, unit, decimals))
        if panel["options"]["textMode"] == "name":
            words = line.name
        height = 1 - (number + 0.5) / len(lines)
        size = 34 if panel["gridPos"]["w"] >= 6 and panel["gridPos"]["h"] > 4 else 18
        size = min(size, 16) if len(words) > 12 else size
        axes.text(0.5, height, words, color=_color_of(panel, last), fontsize=size, ha="center",
                  va="center", transform=axes.transAxes)  # fmt: skip
        if len(lines) > 1:
            axes.text(0.5, height - 0.16, line.name, color=MUTED, fontsize=8, ha="center",
                      va="center", transform=axes.transAxes)  # fmt: skip


def _draw_bars(axes: Axes, panel: Mapping[str, Any], lines: Sequence[Line]) -> None:
    unit, decimals = _unit(panel)
    axes.set_facecolor(SURFACE)
    for place, line in enumerate(reversed(lines)):
        last = line.values[-1]
        axes.barh(place, 1, color=BORDER, height=0.62)
        axes.barh(place, last, color=_color_of(panel, last), height=0.62)
        axes.text(1.01, place, shown(last, unit, decimals), color=TEXT, fontsize=8, va="center")
    axes.set_yticks(range(len(lines)), [line.name for line in reversed(lines)])
    axes.set_xticks([])
    axes.set_xlim(0, 1.2)
    axes.tick_params(colors=TEXT, labelsize=7.5, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_heatmap(axes: Axes, panel: Mapping[str, Any], lines: Sequence[Line]) -> None:
    """Each bucket's own count: Prometheus's are of all that is not above the bucket's bound."""
    unit, _ = _unit(panel)
    axes.set_facecolor(SURFACE)
    buckets = sorted(lines, key=lambda line: float(line.series.labels["le"]))
    times = buckets[0].times
    buckets = [bucket for bucket in buckets if len(bucket.times) == len(times)]
    counts = [buckets[0].values, *(b.values - a.values for a, b in pairwise(buckets))]
    grid = np.maximum(np.array(counts), 0)
    axes.pcolormesh(times, np.arange(len(buckets)), np.ma.masked_less(grid, 1e-9),
                    cmap="Oranges_r", vmin=-grid.max() / 3, shading="nearest")  # fmt: skip
    bounds = [float(bucket.series.labels["le"]) for bucket in buckets]
    axes.set_yticks(
        np.arange(len(buckets)),
        [f"≤ {shown(bound, unit)}" if np.isfinite(bound) else "more" for bound in bounds],
    )
    _finish_time_axis(axes)
