"""The dashboards as code; `make_dashboards` writes the JSON files that Grafana reads."""
