"""What people use with servers like this one, run unmodified: `python -m tests.conformance`."""
