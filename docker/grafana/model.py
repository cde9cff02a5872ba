"""What a dashboard is made of here, and its JSON in Grafana's format."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
Kind: TypeAlias = Literal["timeseries", "stat", "bargauge", "heatmap"]

GRID_COLUMNS = 24
SNAPSHOTS = ("stat", "bargauge")
DATA_SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Target:
    """A query, and what its series are called."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel. `thresholds` are (from, colour) above the colour `base`."""

    title: str
    kind: Kind
    unit: str  # Grafana's name of it
    description: str
    targets: tuple[Target, ...]
    width: int = 8
    height: int = 8
    thresholds: tuple[tuple[float, str], ...] = ()
    base: str = "green"
    decimals: int | None = None
    maximum: float | None = None
    minimum: float | None = 0
    stacked: bool = False
    interval: str | None = None  # the smallest step between points, and so the rates' window
    names: tuple[tuple[str, str], ...] = ()  # a value, and the word to show for it
    shows_name: bool = False  # the series' name is the message, its value says nothing


@dataclass(frozen=True)
class Section:
    """A row of the dashboard with its panels, laid out from left to right."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """A dashboard. Links lead to all others with the tag `steerserve`."""

    uid: str
    title: str
    description: str
    sections: tuple[Section, ...]
    variables: tuple[dict[str, Json], ...]

    def to_json(self) -> dict[str, Json]:
        """The dashboard as Grafana's provisioning reads it."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["steerserve"],
            "schemaVersion": 39,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "10s",
            "time": {"from": "now-30m", "to": "now"},
            "timezone": "browser",
            "annotations": {"list": []},
            "links": [_links()],
            "templating": {"list": list(self.variables)},
            "panels": _placed(self.sections),
        }


def _links() -> Json:
    return {
        "title": "steerserve",
        "type": "dashboards",
        "icon": "external link",
        "tooltip": "The other dashboard of this server",
        "tags": ["steerserve"],
        "asDropdown": False,
        "targetBlank": False,
        "includeVars": True,
        "keepTime": True,
    }


def _placed(sections: tuple[Section, ...]) -> list[Json]:
    """Rows and panels with their places on the grid, which is 24 columns wide."""
    placed: list[Json] = []
    top = 0
    for section in sections:
        place: dict[str, Json] = {"x": 0, "y": top, "w": GRID_COLUMNS, "h": 1}
        placed.append(
            {
                "type": "row",
                "id": len(placed) + 1,
                "title": section.title,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        top += 1
        left = tallest = 0
        for panel in section.panels:
            if left + panel.width > GRID_COLUMNS:
                top, left, tallest = top + tallest, 0, 0
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            placed.append(_panel(panel, len(placed) + 1, place))
            left, tallest = left + panel.width, max(tallest, panel.height)
        top += tallest
    return placed


def _panel(panel: Panel, number: int, place: dict[str, Json]) -> Json:
    made: dict[str, Json] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATA_SOURCE,
        "gridPos": place,
        "targets": [_target(panel, target, index) for index, target in enumerate(panel.targets)],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
    }
    if panel.interval is not None:
        made["interval"] = panel.interval
    return made


def _target(panel: Panel, target: Target, index: int) -> Json:
    return {
        "refId": chr(ord("A") + index),
        "datasource": DATA_SOURCE,
        "expr": target.expression,
        "legendFormat": target.legend,
        "format": "heatmap" if panel.kind == "heatmap" else "time_series",
        # A number is of now: what a series was before it ended would be shown beside it.
        "range": panel.kind not in SNAPSHOTS,
        "instant": panel.kind in SNAPSHOTS,
    }


def _field(panel: Panel) -> dict[str, Json]:
    steps: list[Json] = [{"value": None, "color": panel.base}]
    steps += [{"value": value, "color": color} for value, color in panel.thresholds]
    by_value = panel.kind in SNAPSHOTS
    field: dict[str, Json] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "thresholds" if by_value else "palette-classic"},
        "custom": _custom(panel),
    }
    bounds = (("min", panel.minimum), ("max", panel.maximum), ("decimals", panel.decimals))
    field |= {name: value for name, value in bounds if value is not None}
    if panel.names:
        shown: dict[str, Json] = {value: {"text": text} for value, text in panel.names}
        field["mappings"] = [{"type": "value", "options": shown}]
    return field


def _custom(panel: Panel) -> dict[str, Json]:
    if panel.kind != "timeseries":
        return {}
    return {
        "drawStyle": "line",
        "lineWidth": 2,
        "fillOpacity": 25 if panel.stacked else 8,
        "showPoints": "auto",
        "spanNulls": False,  # a gap says that there was nothing
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if panel.thresholds else "off"},
    }


def _text_mode(panel: Panel) -> Json:
    if panel.shows_name:
        return "name"
    return "value_and_name" if len(panel.targets) > 1 else "value"


def _options(panel: Panel) -> dict[str, Json]:
    last: Json = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    match panel.kind:
        case "timeseries":
            return {
                "legend": {
                    "showLegend": True,
                    "displayMode": "list",
                    "placement": "bottom",
                    "calcs": [],
                },
                "tooltip": {"mode": "multi", "sort": "desc"},
            }
        case "stat":
            return {
                "reduceOptions": last,
                "colorMode": "value",
                "graphMode": "none",
                "justifyMode": "center",
                "textMode": _text_mode(panel),
            }
        case "bargauge":
            return {
                "reduceOptions": last,
                "orientation": "horizontal",
                "displayMode": "gradient",
                "showUnfilled": True,
            }
        case "heatmap":
            return {
                "calculate": False,
                "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
                "cellGap": 1,
                "yAxis": {"unit": panel.unit, "axisPlacement": "left"},
                "tooltip": {"mode": "single", "yHistogram": False},
                "legend": {"show": False},
            }
