"""Write the dashboards: `python -m docker.grafana.make_dashboards`, from the repository's root.

Grafana reads the files. They are committed, and a test compares them with what this module makes.
"""

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from docker.grafana.service import service
from docker.grafana.steering import steering

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = {"service.json": service, "steering.json": steering}


def to_text(dashboard: Dashboard) -> str:
    """Return the content of a dashboard's file."""
    return JSONEncoder(indent=2, sort_keys=True, ensure_ascii=False).encode(dashboard) + "\n"


def main() -> None:
    """Write every dashboard's file."""
    for name, build in DASHBOARDS.items():
        (FOLDER / name).write_text(to_text(build()), encoding="utf-8")


if __name__ == "__main__":
    main()
