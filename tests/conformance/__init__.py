"""Runs what people use with servers like this one, unmodified: `python -m tests.conformance`."""
