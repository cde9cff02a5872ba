"""Checks the dashboards and docs/observability.md without Grafana and without Prometheus."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from docker.grafana.make_dashboards import DASHBOARDS, FOLDER, to_text
from docker.grafana.panels import timeseries
from interventions.registry import Registry
from server.config import Settings
from server.engine.torch.engine import TorchEngine
from server.metrics import TOXIC_FROM, Metrics
from tests.conftest import WriteArtifact

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
SCHEMA = json.loads(
    (Path(__file__).parents[1] / "data" / "grafana_dashboard.schema.json").read_text()
)
PAGE = (ROOT / "docs" / "observability.md").read_text()
RULES = yaml.safe_load((DOCKER / "prometheus" / "rules" / "steerserve.yml").read_text())
GRID_COLUMNS = 24
HISTOGRAM_PARTS = re.compile("_(?:bucket|sum|count)$")
BUILT_IN = {"__rate_interval", "__range"}  # variables that Grafana fills in itself

every_dashboard = pytest.mark.parametrize("name", sorted(DASHBOARDS))


def read(name: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((FOLDER / name).read_text())
    return made


def panels(name: str) -> list[dict[str, Any]]:
    return [panel for panel in read(name)["panels"] if panel["type"] != "row"]


def expressions(name: str) -> list[str]:
    return [target["expr"] for panel in panels(name) for target in panel["targets"]]


@every_dashboard
def test_the_committed_file_is_what_the_program_writes(name: str) -> None:
    assert (FOLDER / name).read_text() == to_text(DASHBOARDS[name]())


def test_a_panel_that_the_page_does_not_explain_is_an_error() -> None:
    with pytest.raises(LookupError, match='does not explain the panel "Nothing"'):
        timeseries("Nothing", "s", {"nothing": "vector(0)"})


@every_dashboard
def test_it_is_valid_by_grafanas_schema(name: str) -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.Draft7Validator(SCHEMA).validate(read(name))
    assert not jsonschema.Draft7Validator(SCHEMA).is_valid({**read(name), "panles": []})


@every_dashboard
def test_every_panel_says_what_it_shows(name: str) -> None:
    titles = [panel["title"] for panel in panels(name)]
    assert len(set(titles)) == len(titles) > 0
    for panel in panels(name):
        assert re.fullmatch(r"[A-Z0-9].*\.", panel["description"]), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
    assert len({panel["id"] for panel in read(name)["panels"]}) == len(read(name)["panels"])


@every_dashboard
def test_panels_lie_beside_each_other_on_the_grid(name: str) -> None:
    places = [panel["gridPos"] for panel in read(name)["panels"]]
    assert all(place["x"] + place["w"] <= GRID_COLUMNS for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or apart


@every_dashboard
def test_every_expression_keeps_to_the_chosen_servers_and_to_known_variables(name: str) -> None:
    variables = {variable["name"] for variable in read(name)["templating"]["list"]}
    for expression in expressions(name):
        selectors = re.findall(r"steerserve_\w+(?:\{([^}]*)\})?", expression)
        assert selectors or "ALERTS" in expression
        assert all('instance=~"$instance"' in matchers for matchers in selectors), expression
        used = set(re.findall(r"\$\{?(\w+)", expression))
        assert used <= variables | BUILT_IN, expression


def test_the_dashboards_lead_to_each_other() -> None:
    for name in DASHBOARDS:
        (link,) = read(name)["links"]
        assert link["type"] == "dashboards"
        assert all(set(link["tags"]) <= set(read(other)["tags"]) for other in DASHBOARDS)
    assert len({read(name)["uid"] for name in DASHBOARDS}) == len(DASHBOARDS)


def test_the_thresholds_to_choose_from_are_those_that_are_counted() -> None:
    (variable,) = (
        variable
        for variable in read("steering.json")["templating"]["list"]
        if variable["name"] == "threshold"
    )
    assert variable["query"].split(",") == [str(threshold) for threshold in TOXIC_FROM]


def test_what_is_provisioned_fits_together() -> None:
    grafana = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((grafana / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((grafana / "dashboards" / "steerserve.yaml").read_text())[
        "providers"
    ]
    compose = yaml.safe_load((DOCKER / "services.yaml").read_text())["services"]
    scraping = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == scraping["global"]["scrape_interval"]
    folder = provider["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in compose["grafana"]["volumes"]
    home = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/steering.json"
    for name in DASHBOARDS:
        chosen = read(name)["templating"]["list"][0]
        assert (chosen["type"], chosen["current"]["value"]) == ("datasource", source["uid"])


def metric_name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


@pytest.fixture
def registered(
    tiny_engine: TorchEngine,
    registry: Registry,
    affine_artifact: WriteArtifact,
) -> dict[str, tuple[str, set[str]]]:
    """Map every metric of the server to its type and its labels."""
    registry.add(affine_artifact("maps"), "maps")
    metrics = Metrics(tiny_engine, registry, "tiny")
    metrics.expect("/v1/completions", ("success",))
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        metric_name(family): (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for family in families
        if not family.name.endswith("_created")
    }


def test_every_metric_that_is_asked_for_is_registered(
    registered: dict[str, tuple[str, set[str]]],
) -> None:
    asked = [expression for name in DASHBOARDS for expression in expressions(name)]
    asked += [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
    asked += [
        variable["query"]
        for name in DASHBOARDS
        for variable in read(name)["templating"]["list"]
        if variable["type"] == "query"
    ]
    for expression in asked:
        for metric in re.findall(r"steerserve_\w+", expression):
            histogram = HISTOGRAM_PARTS.sub("", metric)
            known = registered.get(metric) or registered.get(histogram)
            assert known is not None, metric
            assert (known[0] == "histogram") == (histogram != metric), metric


def test_the_page_lists_every_metric_with_its_type_and_labels(
    registered: dict[str, tuple[str, set[str]]],
) -> None:
    rows = re.findall(
        r"^\| `(steerserve_\w+)` \| (\w+) \| (.*?) \| (\S.*\.) \|$", PAGE, re.MULTILINE
    )
    listed = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows}
    assert listed == registered


@every_dashboard
def test_the_page_explains_every_panel_as_the_dashboard_does(name: str) -> None:
    title = read(name)["title"].removeprefix("steerserve: ")
    (section,) = re.findall(
        rf"^## The dashboard \*{title}\*$(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL
    )
    items = re.findall(r"^- \*\*(.*?)\*\*: ((?:.+\n)+?)(?=\n|- )", section, re.MULTILINE)
    explained = {panel: " ".join(sentence.split()) for panel, sentence in items}
    assert explained == {panel["title"]: panel["description"] for panel in panels(name)}


def test_the_page_names_every_alert_and_no_other() -> None:
    rules = {rule["alert"]: rule["for"] for group in RULES["groups"] for rule in group["rules"]}
    rows = re.findall(r"^\| `(Steerserve\w+)` \| .* \| (\d+) (s|min) \|$", PAGE, re.MULTILINE)
    assert {name: f"{number}{unit[0]}" for name, number, unit in rows} == rules


def as_shown(default: object) -> str:
    if isinstance(default, float):
        return f"{default:g}"
    return {"None": "", "False": "off"}.get(str(default), str(default))


def test_the_options_of_the_page_are_settings_with_these_defaults() -> None:
    rows = re.findall(
        r"^\| (?:`--([a-z-]+)`)? ?\| `STEERSERVE_([A-Z_]+)` \| (.*?) ?\| .* \|$",
        PAGE,
        re.MULTILINE,
    )
    assert len(rows) == 8
    for flag, variable, default in rows:
        field = Settings.model_fields[variable.lower()]
        assert not flag or flag.replace("-", "_") == variable.lower()
        assert default.strip("`") == as_shown(field.default), variable
    for variable in re.findall(r"STEERSERVE_([A-Z_]+)", PAGE):
        assert variable.lower() in Settings.model_fields, variable
