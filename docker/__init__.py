"""What runs around the server: containers, Prometheus, Grafana, and traffic to look at."""
