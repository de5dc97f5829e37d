"""Current and peak memory of this process or its GPU, and allocator settings that retain freed memory."""

import contextlib
import ctypes
import gc
import os
import resource
import sys
from typing import Any

from stride_ray.runtime.config import Config

# A model is small if its files are below this size (bytes); memory of a worker with a small model, GB.
SMALL_MODEL_BYTES, SMALL_MODEL_GB = 2**26, 1.5

# glibc mallopt options (malloc.h) and their values: large buffers come from the heap instead of mmap; the heap shrinks
# only when 2 GiB at its end are free, and grows by at least 64 MiB.
_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = (-4, 0), (-1, 2**31 - 1), (-2, 2**26)


def retain_freed_memory() -> None:
    """Make glibc retain freed memory for reuse; has no effect with other C libraries.

    A pass over blocks allocates the same large buffers for every batch. If they are mapped anew each time, the kernel
    has to zero their pages, which took a seventh of the scoring time.
    """
    for option, value in (_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD):
        _glibc("mallopt", option, value)


def release_freed_memory() -> None:
    """Give freed memory back to the system: what comes next may need buffers of other sizes, beside those retained."""
    gc.collect()
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        getattr(ctypes.CDLL(None), function)(*arguments)


def resident_bytes() -> int:
    """Return the resident set size of this process (0 without /proc)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def restart_peak(device: Any = None) -> None:
    """Reset the peak that `peak_bytes` returns; on systems that cannot reset it, it stays the lifetime peak.

    Args:
        device: a torch.device; for a GPU, its allocator's peak is reset.
    """
    release_freed_memory()
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
    """Return the peak memory of this process (or of a GPU's allocator) since `restart_peak`."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return _lifetime_peak()


def peak_mb() -> int:
    """Return the lifetime peak memory of this process in units of 2^20 bytes."""
    return round(_lifetime_peak() / 2**20)


def _lifetime_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def expected_gb(config: Config) -> float:
    """Return the memory that a worker is expected to take, in GB, which limits the number of workers.

    That is ``compute.worker_gb``, or at most SMALL_MODEL_GB with a small model.
    """
    path = config.model.path
    files = [entry for entry in os.scandir(path) if entry.is_file()] if os.path.isdir(path) else []
    if files and sum(entry.stat().st_size for entry in files) < SMALL_MODEL_BYTES:
        return min(SMALL_MODEL_GB, config.compute.worker_gb)
    return config.compute.worker_gb
