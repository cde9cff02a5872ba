"""A dashboard: rows of panels, the variables above them, and links to the other dashboards."""

from collections.abc import Iterable, Mapping

from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as models

from docker.grafana.panels import PROMETHEUS

TAG = "steerserve"


def dashboard(
    title: str,
    description: str,
    rows: Mapping[str, Iterable[Builder[models.Panel]]],
    variables: Iterable[Builder[models.VariableModel]] = (),
) -> models.Dashboard:
    """Lay out titled rows of panels, from left to right on a grid that is 24 units wide.

    Args:
        variables: further ones, beside the data source, the models and the servers.
    """
    link = DashboardLink("steerserve").type(models.DashboardLinkType.DASHBOARDS).tags([TAG])
    link.icon("external link").tooltip("The other dashboard of this server")
    made = (
        Dashboard(f"steerserve: {title}")
        .uid(f"steerserve-{title.lower()}")
        .description(description)
        .tags([TAG])
        .version(1)
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-30m", "now")
        .link(link.include_vars(True).keep_time(True))
        .variables([*_servers(), *variables])
    )
    for name, panels in rows.items():
        made.with_row(Row(name))
        for panel in panels:
            made.with_panel(panel)
    built = made.build()
    for number, each in enumerate(built.panels or (), start=1):
        each.id_val = number
    return built


def label_values(name: str, label: str, query: str) -> QueryVariable:
    """Let a reader choose any number of a label's values; all are chosen at first."""
    return (
        QueryVariable(name)
        .label(label)
        .datasource(PROMETHEUS)
        .query(f"label_values({query})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(text=["All"], value=["$__all"]))
    )


def _servers() -> tuple[Builder[models.VariableModel], ...]:
    provisioned = models.VariableOption(text="Prometheus", value="prometheus")
    source = DatasourceVariable("datasource").label("Data source").type("prometheus")
    return (
        source.current(provisioned),
        label_values("model", "Model", "steerserve_model_info, model").all_value(".*"),
        # The list holds the chosen models' servers only, so "All" must be this list and not ".*".
        label_values("instance", "Server", 'steerserve_model_info{model=~"$model"}, instance'),
    )
