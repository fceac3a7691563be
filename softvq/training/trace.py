"""A trace of some steps, for chrome://tracing or ui.perfetto.dev."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule

from softvq.training.cuda_graph import WARM_STEPS
from softvq.training.settings import ConfigError


def check_trace(steps: int, left: int) -> None:
    """Raise ConfigError unless the `left` steps of a run are enough to trace so many of them."""
    needed = WARM_STEPS + 1 + steps
    if steps and left < needed:
        raise ConfigError(
            f"profile: a trace of {steps} steps needs {needed}, the first ones left out, but the "
            f"run has {left} to go"
        )


@contextmanager
def traced(path: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Write a trace of `steps` steps to a JSON file, the first ones left out; 0: none.

    What it gives is to be called after each step; the block goes on after the last traced one.
    """
    if not steps:
        yield lambda: None
        return
    plan = schedule(wait=WARM_STEPS, warmup=1, active=steps, repeat=1)
    with profile(
        schedule=plan, on_trace_ready=lambda trace: trace.export_chrome_trace(str(path))
    ) as profiler:
        yield profiler.step
