"""How much memory this process, or its GPU, holds and has held at most; and that it keeps what it frees."""

import contextlib
import ctypes
import gc
import os
import resource
import sys
from typing import Any

from stride_ray.runtime.config import Config

# A small model's files, bytes, and what a worker with one takes, GB.
SMALL_MODEL_BYTES, SMALL_MODEL_GB = 2**26, 1.5

# glibc's mallopt: options (malloc.h) and their values. Large buffers come from the heap instead of a mapping of their
# own; the heap shrinks only when 2 GiB at its end are free, and grows by at least 64 MiB.
_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = (-4, 0), (-1, 2**31 - 1), (-2, 2**26)


def keep_freed() -> None:
    """Have freed memory kept for what this process asks for next; under another C library than glibc nothing changes.

    A pass over blocks asks for the same large buffers with every batch. Mapped anew each time, their pages are cleared
    by the kernel first, which took a seventh of the time of scoring.
    """
    for option, value in (_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD):
        _glibc("mallopt", option, value)


def _glibc(function: str, *arguments: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, another system
        getattr(ctypes.CDLL(None), function)(*arguments)


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
    _glibc("malloc_trim", 0)
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


def expected_gb(config: Config) -> float:
    """What a worker is expected to take, for how many there may be: ``compute.worker_gb``, less with a small model."""
    path = config.model.path
    files = [entry for entry in os.scandir(path) if entry.is_file()] if os.path.isdir(path) else []
    small = bool(files) and sum(entry.stat().st_size for entry in files) < SMALL_MODEL_BYTES
    return min(SMALL_MODEL_GB, config.compute.worker_gb) if small else config.compute.worker_gb
