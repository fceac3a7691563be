"""Benchmarks: `python -m bench compile` and `python -m bench op`."""
