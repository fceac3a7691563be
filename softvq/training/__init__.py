"""Training: configuration, the loop, the run folder."""
