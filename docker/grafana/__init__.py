"""The dashboards, as a program that writes what Grafana reads."""
