"""Other attribution tools on one machine: the same model, pool and queries, seconds, memory, bytes stored and LDS.

The peers live in their own environment. Every tool, ours included, runs as its users run it, as commands starting with
the interpreter, so start-up counts for all; several pool sizes show how much it matters. LDS is measured on the
benchmark's own pool only. Tools that keep state for the next batch of queries are also timed on a second batch.
"""

import json
import os
import shutil
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.peers.tools import BATCH_TOKENS, TOOLS, Tool, ToolPaths
from stride_ray.evaluate.comparison.stride_variants import settings
from stride_ray.evaluate.retraining.benchmark import Benchmark, read_benchmark
from stride_ray.runtime.config import Config, dumps
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.storage import Store

PEERS = ("bergson==2.5.1", "dattri==0.3.0")
# Their requirements without torchvision and torchaudio, which neither imports and CPU builds of torch lack.
REQUIRED = (
    "accelerate bitsandbytes datasets huggingface-hub jaxtyping jinja2 ml_dtypes natsort numpy peft petname "
    "pretty_midi pyarrow pyyaml scipy simple-parsing torchopt tqdm transformers"
).split()
PAUSE = 0.2  # seconds between memory samples


def compare_peers(
    benchmark_url: str, folder: str, multiples: Sequence[int], names: Sequence[str] = ()
) -> dict[str, Any]:
    """Run every tool on the benchmark's pool, once for every multiple of its size.

    Args:
        benchmark_url: a local benchmark folder (benchmark.read_benchmark).
        folder: for the peers' environment, inputs and outputs; earlier measurements there are reused.
        multiples: pool sizes relative to the benchmark's; rows beyond the first multiple are the pool's, rotated.
        names: of the tools; none: all.

    Returns:
        ``rows``: per tool and multiple seconds, peak bytes (proportional set size of all its processes), stored bytes
        and, at the first multiple, LDS by part and kind; and the ratios of the peers' seconds to ours.

    Raises:
        StrideError: for a folder that is not a benchmark, or a tool that is unknown or fails.
    """
    if unknown := set(names) - {tool.name for tool in TOOLS}:
        known = "; ".join(tool.name for tool in TOOLS)
        raise StrideError(f"Unknown tool {min(unknown)!r} to compare with; there are: {known}.")
    benchmark, root = read_benchmark(benchmark_url), Path(folder).resolve()
    chosen = [tool for tool in TOOLS if not names or tool.name in names]
    python = environment(root / "environment") if any(not tool.ours for tool in chosen) else sys.executable
    rows = []
    for multiple in multiples:
        place = inputs(benchmark, root / f"inputs-{multiple}", multiple, python)
        for tool in chosen:
            rows.append(measured(tool, place, root / f"{tool.name}-{multiple}", benchmark, multiple))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"benchmark": benchmark.name, "cores": os.cpu_count(), "rows": rows, "ratios": ratios(rows)}


def environment(folder: Path) -> str:
    """Return the peers' interpreter, creating the environment if necessary: our torch version, their packages."""
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        venv.create(folder, clear=True, with_pip=True)
        torch_here = torch.__version__.partition("+")[0]
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _checked([*pip, f"torch=={torch_here}", *REQUIRED], folder / "log")
        _checked([*pip, "--no-deps", *PEERS], folder / "log")
        (folder / "complete").touch()
    return str(python)


def inputs(benchmark: Benchmark, folder: Path, multiple: int, python: str) -> ToolPaths:
    """Write model, pool and queries in each tool's format under ``folder``."""
    names = ("model", "pool", "queries", "", "run.toml", "asked.parquet")
    place = ToolPaths(python, *(str(folder / name) for name in names))
    if (folder / "complete").exists():
        return place
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Store(benchmark.model).root, place.model, copy_function=shutil.copyfile)
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        path = Path(place.model, name)
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: BATCH_TOKENS}))
    pool, queries = (
        [texts.tokens(i).tolist() for i in range(len(texts))] for texts in (benchmark.blocks, benchmark.queries)
    )
    many = [row[turn:] + row[:turn] for turn in range(multiple) for row in pool]
    datasets.Dataset.from_dict({"input_ids": many}).save_to_disk(place.pool)
    datasets.Dataset.from_dict({"input_ids": queries}).save_to_disk(place.queries)
    ids = [f"q{i}" for i in range(len(queries))]
    pq.write_table(pa.table({"id": ids, "token_ids": pa.array(queries, pa.list_(pa.int32()))}), place.asked)
    pq.write_table(pa.table({"token_ids": pa.array(many, pa.list_(pa.int32()))}), folder / "pool.parquet")
    ours = settings(benchmark, Store(str(folder)), ComputeConfig(), {"corpus.input": [str(folder / "pool.parquet")]})
    Path(place.config).write_text(dumps(Config().updated(ours)))
    (folder / "complete").touch()
    return place


def measured(tool: Tool, place: ToolPaths, folder: Path, benchmark: Benchmark, multiple: int) -> dict[str, Any]:
    """Measure one row, or read an earlier measurement."""
    result = folder / "measured.json"
    if not result.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        here = replace(place, run=str(folder / "run"))
        Path(here.run).mkdir()
        began, peak = time.perf_counter(), 0
        for command in tool.commands(here):
            peak = max(peak, _checked(command, folder / "log"))
        seconds = time.perf_counter() - began
        further = None
        if tool.further is not None:
            began = time.perf_counter()
            for command in tool.further(here):
                peak = max(peak, _checked(command, folder / "log"))
            further = time.perf_counter() - began
        row = {
            "tool": tool.name,
            "ours": tool.ours,
            "blocks": multiple * len(benchmark.blocks),
            "seconds": seconds,
            "further_seconds": further,
            "peak_bytes": peak,
            "stored_bytes": sum(path.stat().st_size for path in Path(here.run).rglob("*") if path.is_file()),
        }
        if multiple == 1:
            scores = tool.scores(here, len(benchmark.queries), len(benchmark.blocks))
            np.save(folder / "scores.npy", scores)
            row["lds"] = benchmark.lds(scores)
        result.write_text(json.dumps(row))
    return json.loads(result.read_text())


def _checked(command: list[str], log: Path) -> int:
    """Run a command to completion; returns the peak total memory of its processes, bytes."""
    peak = 0
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    with open(log, "a") as file:
        process = psutil.Popen(command, stdout=file, stderr=file, env=environment)
        while process.poll() is None:
            peak = max(peak, sum(_held(each) for each in [process, *_children(process)]))
            time.sleep(PAUSE)
    if process.returncode:
        told = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise StrideError(f"{' '.join(command[:6])} … ended with status {process.returncode}: {told}; see {log}.")
    return peak


def _children(process: Any) -> list[Any]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _held(process: Any) -> int:
    """Proportional set size of a process, bytes; 0 if it has ended."""
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Every peer's seconds over each of ours, at equal pool size."""
    return {
        f"{peer['tool']} / {own['tool']} at {peer['blocks']}": peer["seconds"] / own["seconds"]
        for peer in rows
        for own in rows
        if own["ours"] and not peer["ours"] and own["blocks"] == peer["blocks"]
    }


def table(found: dict[str, Any]) -> str:
    """Format the rows as Markdown."""
    lines = [
        "| tool | blocks | s | s, a further batch | peak MiB | stored MiB | LDS |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lds = "; ".join(f"{name}: {value[0]:.3f}" for name, value in row.get("lds", {}).items() if "report, " in name)
        sizes = f"{row['peak_bytes'] / 2**20:.0f} | {row['stored_bytes'] / 2**20:.0f}"
        further = f"{row['further_seconds']:.0f}" if row.get("further_seconds") is not None else ""
        lines.append(f"| {row['tool']} | {row['blocks']:,} | {row['seconds']:.0f} | {further} | {sizes} | {lds} |")
    return "\n".join(lines)
