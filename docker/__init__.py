"""Everything that runs beside the server: containers, Prometheus, Grafana and sample traffic."""
