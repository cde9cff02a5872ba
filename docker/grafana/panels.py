"""Panels: the builders of grafana-foundation-sdk, with the defaults of these dashboards.

Each function returns a panel's builder. Where a panel differs from the defaults, chain the
builder's own methods, such as `.span(12)` for its width (of 24) or `.max(1)` for the end of its
axis. `unit` is Grafana's name for it, `queries` maps legends to PromQL expressions, and `above`
maps each value to the colour from that value on. The description comes from
docs/observability.md, which explains every panel by its title.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import TypeAlias, TypeVar

from grafana_foundation_sdk.builders.bargauge import Panel as BarGauge
from grafana_foundation_sdk.builders.common import (
    GraphThresholdsStyleConfig,
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.builders.dashboard import FieldColor, ThresholdsConfig
from grafana_foundation_sdk.builders.heatmap import HeatmapColorOptions, YAxisConfig
from grafana_foundation_sdk.builders.heatmap import Panel as Heatmap
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

PAGE = Path(__file__).parents[2] / "docs" / "observability.md"
PERCENT = "percentunit"  # Grafana's unit for a share from 0 to 1
PROMETHEUS = DataSourceRef("prometheus", "${datasource}")

Queries: TypeAlias = Mapping[str, str]
Colors: TypeAlias = Mapping[float, str]
AnyPanel = TypeVar("AnyPanel", TimeSeries, Stat, BarGauge, Heatmap)


def timeseries(
    title: str, unit: str, queries: Queries, above: Colors | None = None, stacked: bool = False
) -> TimeSeries:
    """Plot series over time, with a dashed line at each value of `above`."""
    stacking = common.StackingMode("normal" if stacked else "none")
    limits = common.GraphThresholdsStyleMode("dashed" if above else "off")
    legend = VizLegendOptions().show_legend(True).display_mode(common.LegendDisplayMode.LIST)
    tooltip = VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
    return (
        _panel(TimeSeries(), title, unit, queries, above)
        .min(0)
        .draw_style(common.GraphDrawStyle.LINE)
        .line_width(2)
        .fill_opacity(25 if stacked else 8)
        .show_points(common.VisibilityMode.AUTO)
        .span_nulls(False)  # a gap shows that nothing was observed
        .stacking(StackingConfig().mode(stacking).group("A"))
        .thresholds_style(GraphThresholdsStyleConfig().mode(limits))
        .legend(legend.placement(common.LegendPlacement.BOTTOM))
        .tooltip(tooltip.sort(common.SortOrder.DESCENDING))
    )


def stat(
    title: str, unit: str, queries: Queries, above: Colors | None = None, base: str = "green"
) -> Stat:
    """Show each query's present value as a number, in the colour `base` below `above`."""
    text = common.BigValueTextMode
    return (
        _panel(Stat(), title, unit, queries, above, base)
        .height(4)
        .span(4)
        .reduce_options(_last())
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.NONE)
        .justify_mode(common.BigValueJustifyMode.CENTER)
        .text_mode(text.VALUE_AND_NAME if len(queries) > 1 else text.VALUE)
    )


def bar_gauge(title: str, unit: str, queries: Queries, above: Colors | None = None) -> BarGauge:
    """Show each series' present value as a horizontal bar."""
    return (
        _panel(BarGauge(), title, unit, queries, above)
        .min(0)
        .reduce_options(_last())
        .orientation(common.VizOrientation.HORIZONTAL)
        .display_mode(common.BarGaugeDisplayMode.GRADIENT)
        .show_unfilled(True)
    )


def heatmap(title: str, unit: str, buckets: str) -> Heatmap:
    """Plot a distribution over time; the query `buckets` gives a histogram's counts by `le`."""
    color = HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    return (
        _panel(Heatmap(), title, unit, {"{{le}}": buckets})
        .color(color.fill("dark-orange").exponent(0.5))
        .y_axis(YAxisConfig().unit(unit).axis_placement(common.AxisPlacement.LEFT))
        .hide_y_histogram()
        .hide_legend()
    )


def _panel(
    panel: AnyPanel,
    title: str,
    unit: str,
    queries: Queries,
    above: Colors | None = None,
    base: str = "green",
) -> AnyPanel:
    # Stats and bars show present values; a range query would add series that have ended.
    instant = isinstance(panel, Stat | BarGauge)
    form = PromQueryFormat.HEATMAP if isinstance(panel, Heatmap) else PromQueryFormat.TIME_SERIES
    for letter, (legend, expression) in zip(ascii_uppercase, queries.items(), strict=False):
        query = Dataquery().ref_id(letter).expr(expression).legend_format(legend).format(form)
        query.datasource(PROMETHEUS)
        panel.with_target(query.instant() if instant else query.range())
    color = FieldColorModeId.THRESHOLDS if instant else FieldColorModeId.PALETTE_CLASSIC
    steps = [Threshold(None, base), *(Threshold(*step) for step in (above or {}).items())]
    return (
        panel.title(title)
        .description(_explanation(title))
        .datasource(PROMETHEUS)
        .height(8)
        .span(8)
        .unit(unit)
        .color_scheme(FieldColor().mode(color))
        .thresholds(ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    )


def _last() -> ReduceDataOptions:
    return ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False)


def _explanation(title: str) -> str:
    page = PAGE.read_text(encoding="utf-8")
    item = rf"^- \*\*{re.escape(title)}\*\*: ((?:.+\n)+?)(?=\n|- )"
    found = re.search(item, page, re.MULTILINE)
    if found is None:
        raise LookupError(f'{PAGE} does not explain the panel "{title}"')
    return " ".join(found[1].split())
