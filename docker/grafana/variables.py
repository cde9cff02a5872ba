"""The dashboards' variables."""

from docker.grafana.model import DATA_SOURCE, Json


def data_source() -> dict[str, Json]:
    """Which Prometheus."""
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {"text": "Prometheus", "value": "prometheus"},
        "hide": 0,
    }


def values(name: str, label: str, query: str, everything: str | None = None) -> dict[str, Json]:
    """Values of a label, any number of which may be chosen; all of them at first.

    Args:
        everything: the regular expression for all of them; None takes the listed ones.
    """
    made: dict[str, Json] = {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATA_SOURCE,
        "query": query,
        "definition": query,
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }
    return made if everything is None else {**made, "allValue": everything}


def choice(name: str, label: str, options: tuple[str, ...]) -> dict[str, Json]:
    """One of a few fixed values; the first is chosen at first."""
    return {
        "name": name,
        "label": label,
        "type": "custom",
        "query": ",".join(options),
        "options": [
            {"text": option, "value": option, "selected": option == options[0]}
            for option in options
        ],
        "current": {"text": options[0], "value": options[0]},
        "multi": False,
        "includeAll": False,
        "hide": 0,
    }


# Only the servers of the chosen models are listed, so "all" must be these and not ".*".
SERVERS: tuple[dict[str, Json], ...] = (
    data_source(),
    values("model", "Model", "label_values(steerserve_model_info, model)", ".*"),
    values("instance", "Server", 'label_values(steerserve_model_info{model=~"$model"}, instance)'),
)
INTERVENTION = values(
    "intervention",
    "Intervention",
    'label_values(steerserve_completion_toxicity_count{instance=~"$instance"}, intervention)',
    ".*",
)
THRESHOLD = choice("threshold", "Toxic from", ("0.5", "0.8"))  # server.metrics.TOXIC_FROM
