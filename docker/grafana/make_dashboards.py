"""Write the dashboards: `python -m docker.grafana.make_dashboards`, from the repository's root.

Grafana reads the files that this writes. They are committed, and a test compares them.
"""

import json
from pathlib import Path

from docker.grafana.model import Dashboard
from docker.grafana.service import SERVICE
from docker.grafana.steering import STEERING

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = {"service.json": SERVICE, "steering.json": STEERING}


def to_text(dashboard: Dashboard) -> str:
    """The file's content."""
    return json.dumps(dashboard.to_json(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write both files."""
    for name, dashboard in DASHBOARDS.items():
        (FOLDER / name).write_text(to_text(dashboard), encoding="utf-8")


if __name__ == "__main__":
    main()
