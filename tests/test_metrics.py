"""What Prometheus would read from a node while a stage works."""

import os
import subprocess
import sys
import time
import urllib.request

from servers import free_port

# In a process of its own: a Ray with a port for metrics is not the one that the other tests share.
DRIVER = """
import sys, ray
from stride_ray.runtime.progress import progress
from stride_ray.runtime.tasks import WorkerAllocation, map_tasks

def unit(number):
    return {"blocks": 10, "queries": number, "failed": number % 2, "largest_gap": number / 1000}

port = int(sys.argv[1])
ray.init("local", num_cpus=1, include_dashboard=False, _metrics_export_port=port,
         _system_config={"metrics_report_interval_ms": 500})
progress(map_tasks(unit, (), [1, 2, 3], WorkerAllocation(1, "cpu")), "recover", 3, "units", lambda _: 1)
progress(iter([{"queries": ["a", "b"], "blocks": [1]}]), "other", 1, "units", lambda _: 1)  # names of other things
print("done", flush=True)
sys.stdin.readline()
"""


def read(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("ray_stride_") and 'stage="recover"' in line:
            name, value = line.split("{")[0], line.rsplit(" ", 1)[1]
            found[name] = float(value)
    return found


def test_progress_reaches_the_metrics_endpoint():
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        assert driver.stdout.readline() == "done\n"
        wanted = {
            "ray_stride_units_total": 3.0,
            "ray_stride_blocks_total": 30.0,
            "ray_stride_responses_total": 6.0,
            "ray_stride_failures_total": 2.0,
        }
        until, found = time.monotonic() + 60, {}
        while time.monotonic() < until and not wanted.items() <= found.items():
            time.sleep(0.5)
            found = read(port)
        assert wanted.items() <= found.items(), found
        assert found["ray_stride_solver_gap"] in (0.001, 0.002, 0.003)
    finally:
        driver.kill()
        driver.wait()
