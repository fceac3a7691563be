"""What this machine has: cores and memory."""

import os
from pathlib import Path

import torch

CONTAINER = Path("/sys/fs/cgroup/memory.max")  # the most that a container may take, or "max"


def cores() -> int:
    """How many this process may use, where several of a run are on the machine its share."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        available = len(os.sched_getaffinity(0))
    else:
        available = os.cpu_count() or 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def memory(device: torch.device) -> int:
    """Bytes of the device's memory, and no more than the machine's."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if CONTAINER.exists() and (text := CONTAINER.read_text().strip()) != "max":
        limits.append(int(text))
    if device.type == "cuda":
        limits.append(torch.cuda.get_device_properties(device).total_memory)
    return min(limits)
