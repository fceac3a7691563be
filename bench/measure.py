"""Time and memory of a piece of work on a device."""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

COLD_BYTES = 2**30  # written before each sample on a GPU
BUSY_CYCLES = 20_000_000  # that a GPU then waits: 10 ms, more than queueing a call takes the host
MOST_OF_MEMORY = 0.9  # of what is free: beyond it the kernel would kill instead of refuse


class NotMeasured(Exception):
    """Says why, as another process found it."""


class Clock:
    """Times stretches of work without waiting for the device in between."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.filler = torch.empty(COLD_BYTES if self.cuda else 0, dtype=torch.uint8, device=device)

    def settle(self) -> None:
        """Empty a GPU's caches, and keep it busy until the work to be timed is queued."""
        self.filler.zero_()
        if self.cuda:
            torch.cuda._sleep(BUSY_CYCLES)

    def mark(self) -> float | torch.cuda.Event:
        """A point in time."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        """Between two marks."""
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def quantiles(values: list[float]) -> dict[str, float]:
    """The columns p20, p50 and p80."""
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = torch.tensor(values, dtype=torch.float64).quantile(levels)
    return dict(zip(("p20", "p50", "p80"), found.tolist(), strict=True))


def reason(error: BaseException) -> str:
    """Why a candidate has no number, in one line for its row."""
    text = str(error).strip()
    if isinstance(error, NotMeasured):
        return text
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    return f"failed: {type(error).__name__}: {text.partition(chr(10))[0][:120]}"


def bounded_memory() -> None:
    """Let allocations of this process fail before the machine runs out of memory; Linux."""
    free = _field("/proc/meminfo", "MemAvailable")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(MOST_OF_MEMORY * free), hard))


def peak_bytes(device: torch.device, prepare: Callable[..., Callable[[], object]], *given) -> int:
    """Most memory that the second call of prepare(*given) holds beyond what was held before it.

    On a CPU in a process of its own, since nothing else tells whose memory it is. What the call
    returns counts too.
    """
    if device.type == "cuda":
        work = prepare(*given)
        before = torch.cuda.memory_allocated()
        work()  # what it keeps for later, as a CUDA graph does, counts; its compilation does not
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_resident_peak, args=(sender, prepare, given))
    # Freed blocks go back at once: the first call must not leave room for the second.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    process.start()
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = "out of memory"  # killed
    process.join()
    if isinstance(answer, str):
        raise NotMeasured(answer)
    return answer


def _resident_peak(sender: Connection, prepare: Callable[..., Callable], given: tuple) -> None:
    try:
        bounded_memory()
        work = prepare(*given)
        work()
        before = _field("/proc/self/status", "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        work()
        sender.send(_field("/proc/self/status", "VmHWM") - before)
    except Exception as error:
        sender.send(reason(error))


def _field(file: str, name: str) -> int:
    """Bytes of one field of a /proc file."""
    return 1024 * int(Path(file).read_text().partition(f"{name}:")[2].split()[0])
