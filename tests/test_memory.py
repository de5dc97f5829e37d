"""What a process holds: freed memory is kept for the next batch, and given back where a peak is measured from."""

import json
import platform
import subprocess
import sys

import pytest

# Ten buffers of 64 MiB one after the other: page faults of the first, of the rest; what is held then; after a restart.
BUFFERS = """
import ctypes, json, resource, sys
from stride_ray.runtime.memory import retain_freed_memory, peak_bytes, resident_bytes, restart_peak

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
if sys.argv[1] == "keep":
    retain_freed_memory()
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(10):
    buffer = ctypes.c_void_p(library.malloc(ctypes.c_size_t(2**26)))
    ctypes.memset(buffer, 1, 2**26)
    library.free(buffer)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
held = resident_bytes()
restart_peak()
print(json.dumps([faults[1] - faults[0], faults[-1] - faults[1], held, resident_bytes(), peak_bytes()]))
"""


def ran(way):
    done = subprocess.run([sys.executable, "-c", BUFFERS, way], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_a_buffer_like_the_last_one_takes_no_new_pages_and_a_peak_starts_without_what_was_freed():
    first, rest, held, after, peak = ran("keep")
    assert rest < first / 4
    _, mapped, given_back, *_ = ran("give back")
    assert mapped > 4 * max(first, rest)  # what is spared
    assert held > given_back + 2**25
    assert after < held - 2**25
    assert peak < held - 2**25
