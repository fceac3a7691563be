"""Reading what runs leave."""

import json

CLOCKS = ("images_per_second", "peak_memory")


def metrics_of(run):
    """The lines of metrics.jsonl, apart from what clock and machine say."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]
