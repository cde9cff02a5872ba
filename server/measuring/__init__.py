"""Measuring: turns, medians, ratios and tables, with the standard library alone.

`steerserve bench` and `benchmarks` share these modules. `make gpu-check` uses them on a machine
without pydantic, typer and rich, so nothing here may import those.
"""
