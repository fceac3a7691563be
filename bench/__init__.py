"""Benchmarks and numeric checks: `python -m bench COMMAND`; README.md says what each does."""
