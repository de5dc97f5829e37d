"""The service under load: seconds to an answer by number of clients, throughput, memory, and answers lost to a death.

The clients of a row ask without a pause, each the next question of a file, until all requests are answered; one that is
told to come back (429) comes back after a second, and its waiting counts. Beside it stands what a person without the
service does: ``attribute`` on a file with one question.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from stride_ray.serve.service import QUERY

# Requests that are on their way when a replica is killed.
KILLED_AMONG = 16
# Seconds until a service must take requests.
START_SECONDS = 120.0


@dataclass(frozen=True)
class Running:
    """A running service: its address, its process, and the lines that it has printed."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str]


@contextmanager
def running(run: str, replicas: int, queue: int = 32) -> Iterator[Running]:
    """``stride-ray serve`` on a Ray of its own, once it takes requests."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "stride_ray", "serve", run, "--port", str(port), "--workers", str(replicas)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [*command, "--queue", str(queue)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    lines = list[str]()
    threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True).start()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not any("Ask at" in line for line in lines):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the service did not start: {''.join(lines)}")
            time.sleep(0.1)
        yield Running(f"http://127.0.0.1:{port}/", process, lines)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def ask(url: str, question: dict[str, Any]) -> tuple[int, float]:
    """Ask until there is room; returns the status and the seconds that it took."""
    started = time.monotonic()
    data = json.dumps(question).encode()
    while True:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                response.read()
                return response.status, time.monotonic() - started
        except urllib.error.HTTPError as error:
            if error.code != 429:
                return error.code, time.monotonic() - started
            time.sleep(1)


def replicas_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that hold the model."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [each for each in children if "ServeReplica:stride_ray:attributor" in " ".join(each.cmdline())]


def private_mb(process: psutil.Process) -> float:
    """Memory of a process without the operator rows that it maps, which replicas share."""
    return float(process.memory_full_info().uss) / 2**20


def load(url: str, questions: list[dict[str, Any]], clients: int, requests: int) -> dict[str, Any]:
    """Ask ``requests`` questions by ``clients`` at a time."""
    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda i: ask(url, questions[i % len(questions)]), range(requests)))
    wall = time.monotonic() - started
    seconds = np.array([took for _, took in found])
    return {
        "clients": clients,
        "requests": requests,
        "median": float(np.median(seconds)),
        "p95": float(np.quantile(seconds, 0.95)),
        "per_second": requests / wall,
        "failed": sum(status != 200 for status, _ in found),
    }


def measure_serving(run: str, queries: str, replicas: int, clients: list[int], requests: int) -> dict[str, Any]:
    """Measure the service of a fitted run.

    Args:
        run: run directory.
        queries: JSON Lines file of queries, as ``attribute`` reads it.
        replicas: copies of the model.
        clients: numbers of clients, a row each.
        requests: per row.

    Returns:
        ``rows`` (of ``load``), ``start`` seconds, ``memory_mb`` of the replicas before and after each row, the requests
        answered by then, ``lost`` of KILLED_AMONG requests when a replica was killed, and ``attribute`` seconds.
    """
    rows = [json.loads(line) for line in Path(queries).read_text("utf-8").splitlines() if line.strip()]
    questions = [{name: row[name] for name in QUERY if name in row} for row in rows]
    started = time.monotonic()
    with running(run, replicas) as service:
        url, process = f"{service.url}attribute", service.process
        found: dict[str, Any] = {"start": time.monotonic() - started, "replicas": replicas, "rows": []}
        load(url, questions, replicas, 2 * replicas)  # the sample of the solve is linearised by the first
        held = [(0, sum(map(private_mb, replicas_of(process))))]
        for count in clients:
            found["rows"].append(load(url, questions, count, requests))
            print(f"{count} client(s): {found['rows'][-1]}", file=sys.stderr, flush=True)
            held.append((held[-1][0] + requests, sum(map(private_mb, replicas_of(process)))))
        found["memory_mb"] = held
        with ThreadPoolExecutor(KILLED_AMONG) as pool:
            waiting = [pool.submit(ask, url, questions[i % len(questions)]) for i in range(KILLED_AMONG)]
            time.sleep(1)
            replicas_of(process)[0].kill()
            found["lost"] = sum(each.result()[0] != 200 for each in waiting)
    found["attribute"] = attribute_seconds(run, rows[0])
    return found


def attribute_seconds(run: str, row: dict[str, Any]) -> float:
    """Seconds of ``stride-ray attribute`` on a file with one query, whose tables are removed again."""
    from stride_ray.runtime.run import Run

    name = "served-once"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "query.jsonl"
        file.write_text(json.dumps(row) + "\n", "utf-8")
        started = time.monotonic()
        command = [sys.executable, "-m", "stride_ray", "attribute", run, "--queries", str(file), "--name", name]
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.monotonic() - started
    for stage in ("directions", "responses", "estimates", "influence"):
        Run(run).stage(stage, name).store.remove("")
    return seconds


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| clients | seconds to an answer, median | 95th percentile | answers a second | failed |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['clients']} | {row['median']:.2f} | {row['p95']:.2f} | {row['per_second']:.2f} | {row['failed']} |"
        for row in found["rows"]
    ]
    held = ", ".join(f"{mb:.0f} MiB after {count}" for count, mb in found["memory_mb"])
    return "\n".join(
        [
            *lines,
            "",
            f"{found['replicas']} replica(s), loaded in {found['start']:.0f} s.",
            f"Their own memory in all: {held} requests.",
            f"A replica killed among {KILLED_AMONG} requests: {found['lost']} answers lost.",
            f"stride-ray attribute on a file with one query: {found['attribute']:.1f} s.",
        ]
    )
