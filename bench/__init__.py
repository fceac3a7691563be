"""Benchmarks: `python -m bench op`."""
