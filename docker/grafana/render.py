"""Draw the dashboards from what a running Prometheus has, without Grafana.

    python -m docker.grafana.render --url http://127.0.0.1:9090 --minutes 2 --out docs

It writes dashboard-service.png and dashboard-steering.png.
"""

import argparse
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from docker.grafana.drawing import CANVAS, TEXT, Line, draw_frame, draw_panel
from docker.grafana.make_dashboards import DASHBOARDS, FOLDER
from docker.grafana.model import GRID_COLUMNS
from docker.grafana.prometheus import Prometheus, Series, fill_in

COLUMN_INCHES = 0.64
ROW_INCHES = 0.36
GAP_INCHES = 0.06
HEADER_INCHES = 0.5
POINTS = 120  # of each series
SCRAPE_SECONDS = 5
ALL = ".*"


@dataclass(frozen=True)
class Span:
    """What time is drawn, in seconds since the epoch."""

    start: float
    end: float

    @property
    def step(self) -> float:
        """Seconds between two points."""
        return (self.end - self.start) / POINTS


def render(prometheus: Prometheus, dashboard: Mapping[str, Any], span: Span) -> Figure:
    """One dashboard as a figure, all servers and interventions chosen.

    Raises:
        PrometheusError: Prometheus refuses an expression.
    """
    bottom = max(item["gridPos"]["y"] + item["gridPos"]["h"] for item in dashboard["panels"])
    width, height = GRID_COLUMNS * COLUMN_INCHES, bottom * ROW_INCHES + HEADER_INCHES
    figure = Figure(figsize=(width, height), facecolor=CANVAS)
    page = _Page(figure, width, height)
    page.write(dashboard["title"], GAP_INCHES, HEADER_INCHES - 0.15, 14)
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            place = panel["gridPos"]
            page.write(
                f"▾ {panel['title']}",
                GAP_INCHES,
                HEADER_INCHES + (place["y"] + 0.75) * ROW_INCHES,
                11,
            )
        else:
            page.draw(panel, _lines(prometheus, panel, span))
    return figure


@dataclass(frozen=True)
class _Page:
    """A figure that is addressed in inches from its upper left corner."""

    figure: Figure
    width: float
    height: float

    def write(self, text: str, left: float, baseline: float, size: float) -> None:
        self.figure.text(
            left / self.width, 1 - baseline / self.height, text, color=TEXT, fontsize=size
        )

    def draw(self, panel: Mapping[str, Any], lines: list[Line]) -> None:
        place = panel["gridPos"]
        left = place["x"] * COLUMN_INCHES + GAP_INCHES
        top = HEADER_INCHES + place["y"] * ROW_INCHES + GAP_INCHES
        width = place["w"] * COLUMN_INCHES - 2 * GAP_INCHES
        height = place["h"] * ROW_INCHES - 2 * GAP_INCHES
        draw_frame(self.figure.add_axes(self._box(left, top, width, height)), panel["title"])
        # Room for the title, and for the labels and the legend where there are some.
        before, below = {
            "stat": (0.1, 0.1),
            "bargauge": (2.3, 0.15),
            "heatmap": (0.75, 0.3),
        }.get(panel["type"], (0.62, 0.62))
        inside = self._box(left + before, top + 0.36, width - before - 0.15, height - 0.36 - below)
        draw_panel(self.figure.add_axes(inside), panel, lines)

    def _box(
        self, left: float, top: float, width: float, height: float
    ) -> tuple[float, float, float, float]:
        return (
            left / self.width,
            1 - (top + height) / self.height,
            width / self.width,
            height / self.height,
        )


def _lines(prometheus: Prometheus, panel: Mapping[str, Any], span: Span) -> list[Line]:
    values = _variables(panel, span)
    found = []
    for target in panel["targets"]:
        expression = fill_in(target["expr"], values)
        series = (
            prometheus.query(expression, span.end)
            if target["instant"]
            else prometheus.query_range(expression, span.start, span.end, span.step)
        )
        found += [Line(_legend(target["legendFormat"], each), each) for each in series]
    return found


def _variables(panel: Mapping[str, Any], span: Span) -> dict[str, str]:
    """What Grafana would fill in; a panel's smallest step is in minutes, as "1m"."""
    smallest = 60 * float(panel["interval"].removesuffix("m")) if "interval" in panel else 0.0
    window = max(max(smallest, span.step) + SCRAPE_SECONDS, 4 * SCRAPE_SECONDS)
    return {
        "__rate_interval": f"{window:.0f}s",
        "__range": f"{span.end - span.start:.0f}s",
        "instance": ALL,
        "intervention": ALL,
        "threshold": "0.5",
    }


def _legend(pattern: str, series: Series) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: series.labels.get(found[1], ""), pattern)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="of Prometheus")
    parser.add_argument("--minutes", type=float, default=5.0, help="up to now")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the images")
    given = parser.parse_args()
    now = time.time()
    span = Span(now - 60 * given.minutes, now)
    with Prometheus(given.url) as prometheus:
        for name in DASHBOARDS:
            dashboard = json.loads((FOLDER / name).read_text(encoding="utf-8"))
            figure = render(prometheus, dashboard, span)
            figure.savefig(given.out / f"dashboard-{Path(name).stem}.png", dpi=100)


if __name__ == "__main__":
    main()
