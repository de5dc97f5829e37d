"""How much memory this process, or its GPU, holds and has held at most."""

import gc
import os
import resource
import sys
from typing import Any


def resident_bytes() -> int:
    """Return the memory that this process holds now (0 where /proc is missing)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def restart_peak(device: Any = None) -> None:
    """Make `peak_bytes` count from here; where the system does not allow that, it goes on counting from the start.

    Args:
        device: a torch.device; of a GPU, its allocator's peak is meant.
    """
    gc.collect()
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak_bytes(device: Any = None) -> int:
    """Return the most memory that this process (or a GPU's allocator) held since `restart_peak`."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return _lifetime_peak()


def peak_mb() -> int:
    """Return the most memory that this process has held since it was started, MB."""
    return round(_lifetime_peak() / 2**20)


def _lifetime_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
