"""The service: HTTP, engines and metrics."""
