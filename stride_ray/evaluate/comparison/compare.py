"""The comparison: every attribution method on one benchmark, scored, timed, and evaluated against retraining.

Baselines run one at a time, each as a Ray task in a fresh process with all cores of its machine, so that seconds and
memory are its own. STRIDE's variants run through the pipeline (``stride_variants``). Scores are published first and the
done marker last, so rerunning the command computes what is missing. A marker records everything the scores depend on;
scores with other dependencies are recomputed. A failed method gets a row with the reason.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.exceptions

from stride_ray.evaluate.baselines import METHODS
from stride_ray.evaluate.baselines.representation import airrep, embedding
from stride_ray.evaluate.comparison import stride_variants
from stride_ray.evaluate.comparison.removals import RemovalCurve, compare_removals
from stride_ray.evaluate.comparison.score_statistics import ScoreStatistics, score_statistics
from stride_ray.evaluate.comparison.table import Entry, as_markdown, best_rival, protocol, write_tables
from stride_ray.evaluate.comparison.units import CHECKPOINTS, POOL, Unit, chosen_methods, known_units
from stride_ray.evaluate.fitted_methods import FITTED_METHODS
from stride_ray.evaluate.retraining.benchmark import Benchmark, read_benchmark, reread_benchmark
from stride_ray.evaluate.retraining.finetune import checkpoints
from stride_ray.evaluate.retraining.lds import ALL, DEVELOPMENT, REPORT, Evaluation, Interval, evaluate, subset_sums
from stride_ray.evaluate.retraining.results import read_scores, write_scores
from stride_ray.models.batch_size import MAX_BATCH_TOKENS
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.memory import peak_mb
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.run import claim
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import allocate_workers, connected, hide_gpus, prepare_process
from stride_ray.runtime.urls import first_line

STATISTICS = pa.schema([("method", pa.string()), *((each.name, pa.float64()) for each in fields(ScoreStatistics))])


def compare(
    benchmark_url: str,
    out: str,
    methods: Sequence[str] | None = None,
    ablations: bool = False,
    compute: ComputeConfig | None = None,
    removal: RemovalCurve | None = None,
) -> dict[str, Any]:
    """Score, time and evaluate attribution methods on a benchmark.

    Args:
        benchmark_url: the folder, with retraining results (benchmark.read_benchmark).
        out: a path or fsspec URL; gets ``lds.parquet``, ``lds.md``, ``lds.png``, ``lds.svg``, ``statistics.parquet``,
            ``scores/<method>.npz`` (``sums/`` for FITTED_METHODS), ``runs/`` and ``checkpoints/``. Checkpoints need a
            local path.
        methods: names from ``method_names``; None: all but the ablations.
        ablations: include the ablations of STRIDE, and rivals with more damping.
        compute: where to run; None: a local Ray with all CPUs.
        removal: also retrain without the blocks that each method ranks first (removals.compare_removals).

    Returns:
        ``scored``: names of the methods scored now; ``failed``: reason by name; ``result``: the default method's
        figures on the report part (all queries if there are no parts) beside the best rival's; ``summary``: the
        Markdown tables of that part; ``scores``: by method, the default first, the name of its file in ``out``.

    Raises:
        StrideError: for a folder that is not a benchmark or has no retraining results, an unknown method, or an output
            folder of another benchmark.
    """
    compute = compute or ComputeConfig()
    benchmark = read_benchmark(benchmark_url)
    units = known_units(benchmark)
    chosen = chosen_methods(methods, ablations)
    store = claim(Store(out), "comparison", {"benchmark": benchmark.fingerprint}).store
    shelf = _ScoreCache(benchmark, store, units, compute)
    shown, reasons = [units[slug] for slug in chosen], dict[str, str]()
    waiting = [unit for unit in shown if shelf.marker(unit) is None]
    entries, sums, statistics = [], dict[str, np.ndarray](), list[dict[str, Any]]()
    with connected(compute) if waiting else nullcontext():
        for number, unit in enumerate(shown, 1):
            name = unit.entry.method
            _log(f"{number} of {len(shown)}: {name}{'' if unit in waiting else ' (scored before)'}")
            try:
                entry = shelf.ensure_scored(unit)
                sums[name], found = shelf.sums(unit)
            except Exception as error:
                # One method's failure, of any kind, must not lose the others' results.
                reasons[name] = _reason(error)
                entries.append(replace(unit.entry, note=reasons[name]))
                _log(f"  failed: {reasons[name]}")
                continue
            entries.append(entry)
            statistics += found
            _log(f"  {entry.seconds:.1f} s, {entry.peak_mb:.0f} MiB{_development_lds(benchmark, sums[name])}")
    files = {each.entry.method: f"scores/{each.slug}.npz" for each in shown if each.slug not in FITTED_METHODS}
    files = {method: name for method, name in files.items() if method in sums}
    if removal:
        removed = compare_removals(benchmark, store, files, removal, compute)
        entries = [replace(each, removal=removed.curves.get(each.method, [None])[0]) for each in entries]
    truth = benchmark.retrained()
    evaluation = evaluate(sums, truth, benchmark.kinds, benchmark.parts)
    notes = "\n".join(f"- {entry.method}: {entry.note}" for entry in entries if entry.method in sums)
    header = f"{protocol(benchmark.name, truth, len(benchmark.blocks))}\n\n{_measurement_note(shelf, shown)}\n\n{notes}"
    write_tables(store, evaluation, entries, header)
    store.write_table("statistics.parquet", pa.Table.from_pylist(statistics, STATISTICS))
    part = REPORT if any(each == REPORT for _, each in evaluation.cells) else ALL
    quoted = replace(evaluation, cells=tuple(cell for cell in evaluation.cells if cell[1] == part))
    result = _result(quoted, entries, part)
    return {
        "scored": [unit.entry.method for unit in waiting if unit.entry.method not in reasons],
        "failed": reasons,
        "result": {"benchmark": benchmark.name, "part": part, **result},
        "summary": as_markdown(quoted, entries, header),
        "scores": dict(sorted(files.items(), key=lambda each: each[0] != result["method"])),
    }


class _ScoreCache:
    """The published scores of a comparison; computes missing ones."""

    def __init__(self, benchmark: Benchmark, store: Store, units: dict[str, Unit], compute: ComputeConfig) -> None:
        self.benchmark, self.store, self.units, self.compute = benchmark, store, units, compute
        self.failures: dict[str, Exception] = {}

    def marker(self, unit: Unit) -> dict[str, Any] | None:
        """Return the done marker; None if missing or if the scores have other dependencies."""
        name = f"scores/_done/{unit.slug}.json"
        found = self.store.read_json(name) if self.store.exists(name) else None
        return found if found and found["keys"] == unit.keys else None

    def ensure_scored(self, unit: Unit) -> Entry:
        """Score the unit if necessary; returns its table entry with seconds and memory.

        Raises:
            Exception: the error of the method or of a unit that it needs.
        """
        marker = self.marker(unit)
        if unit.slug in self.failures:  # a shared unit that failed is not tried again for every method
            raise self.failures[unit.slug]
        if marker is None:
            try:
                marker = self._compute_and_mark(unit)
            except Exception as error:
                self.failures[unit.slug] = error
                raise
        note = "; ".join(each for each in (unit.entry.note, marker.get("remark", "")) if each)
        return replace(unit.entry, seconds=marker["seconds"], peak_mb=marker["peak_mb"], note=note)

    def _compute_and_mark(self, unit: Unit) -> dict[str, Any]:
        """Compute a unit and publish its marker."""
        for slug in unit.needs:
            self.ensure_scored(self.units[slug])
        self.store.remove(f"scores/_done/{unit.slug}.json")
        cores, device = _machine(self.compute)
        marker = {"unit": unit.slug, "keys": unit.keys, "cores": cores, "device": device, **self._compute(unit)}
        self.store.write_json(f"scores/_done/{unit.slug}.json", marker)
        return marker

    def sums(self, unit: Unit) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """(Q, S) subset sums of a finished unit, and a row of score statistics if it has scores."""
        if unit.slug in FITTED_METHODS:
            return read_scores(self.store, f"sums/{unit.slug}.npz"), []
        scores = read_scores(self.store, f"scores/{unit.slug}.npz")
        row = {"method": unit.entry.method, **asdict(score_statistics(scores))}
        row = {key: None if value != value else value for key, value in row.items()}
        return subset_sums(scores, self.benchmark.retrained().subsets), [row]

    def _compute(self, unit: Unit) -> dict[str, Any]:
        """Compute and publish a unit's scores; returns seconds, peak_mb and further marker fields."""
        runs, variant, started = self.store.child("runs"), unit.variant, time.monotonic()
        if unit.slug == POOL:
            stride_variants.shard_pool(self.benchmark, runs, self.compute)
            return {"seconds": time.monotonic() - started, "peak_mb": 0}
        if variant is None:
            return self._in_fresh_process(unit)
        if variant.plus:
            parts = [self.ensure_scored(self.units[slug]) for slug in unit.needs]
            scores = [read_scores(self.store, f"scores/{slug}.npz") for slug in unit.needs]
            write_scores(self.store, f"scores/{unit.slug}.npz", stride_variants.standardised_sum(*scores))
            seconds, peak = sum(part.seconds or 0 for part in parts), max(part.peak_mb or 0 for part in parts)
            return {"seconds": seconds, "peak_mb": peak}
        made = self._checkpoints(unit).get("checkpoints", ())
        found, peak, remark = stride_variants.score(self.benchmark, variant, runs, self.compute, made)
        cut = self.ensure_scored(self.units[POOL]).seconds or 0
        _publish(self.store, f"scores/{unit.slug}.npz", found, found.shape)
        return {"seconds": time.monotonic() - started + cut, "peak_mb": peak, "remark": remark}

    def _in_fresh_process(self, unit: Unit) -> dict[str, Any]:
        """Run a Ray task with all cores of a machine, in a process that is used for nothing else."""
        cores, device = _machine(self.compute)
        # A distinct runtime environment also stops Ray from reusing another task's process.
        variables = {name: value for name, value in unit.keys.items() if name in (airrep.VARIABLE, embedding.VARIABLE)}
        options: dict[str, Any] = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cores), **variables}}}
        options |= {"num_cpus": cores, "num_gpus": int(device == "cuda"), "max_calls": 1, "max_retries": 0}
        task: Any = ray.remote(**options)(_in_worker)
        facts = ray.get(task.remote(*self._worker_arguments(unit, cores, device)))
        if "failed" in facts:
            raise StrideError(facts["failed"])
        return facts

    def _worker_arguments(self, unit: Unit, cores: int, device: str) -> tuple[Any, ...]:
        """Build the arguments of ``_in_worker``."""
        given = {"batch_tokens": self.compute.batch_tokens or MAX_BATCH_TOKENS, **self._checkpoints(unit)}
        made_from = (self.benchmark.url, self.benchmark.fingerprint)
        return os.getcwd(), made_from, self.store, unit.slug, given, cores, device

    def _checkpoints(self, unit: Unit) -> dict[str, Any]:
        """The checkpoints that a unit needs, as arguments of Benchmark.problem; empty for others."""
        made = self.marker(self.units[CHECKPOINTS]) if CHECKPOINTS in unit.needs else None
        return {"checkpoints": tuple(made["folders"]), "learning_rates": tuple(made["rates"])} if made else {}


def _machine(compute: ComputeConfig) -> tuple[int, str]:
    """Return one task's cores, those of the largest machine capped by ``workers`` on CPU, and the device."""
    device = allocate_workers(compute, 1).device
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = int(max((each.get("CPU", 1) for each in nodes if device == "cpu" or "GPU" in each), default=1))
    return (min(compute.workers, most) if compute.workers and device == "cpu" else most), device


def _in_worker(
    folder: str, made_from: tuple[str, str], store: Store, slug: str, given: dict[str, Any], cores: int, device: str
) -> dict[str, Any]:
    """Run one unit in a worker; an error is returned as its reason, which Ray would bury in tracebacks."""
    prepare_process(folder, cores)
    hide_gpus(device)
    try:
        benchmark = reread_benchmark(*made_from)
        shape, started = (len(benchmark.queries), len(benchmark.blocks)), time.monotonic()
        facts: dict[str, Any] = {}
        if slug == CHECKPOINTS:
            facts = dict(zip(("folders", "rates"), checkpoints(benchmark, f"{store.url}/{slug}"), strict=True))
        elif slug in FITTED_METHODS:
            truth = benchmark.retrained()
            found, shape = FITTED_METHODS[slug].run(benchmark.problem(**given), truth), (shape[0], len(truth.subsets))
        else:
            found = METHODS[slug].run(benchmark.problem(**given))
        facts["seconds"] = time.monotonic() - started
        facts["peak_mb"] = peak_mb()
        if slug != CHECKPOINTS:
            _publish(store, f"{'sums' if slug in FITTED_METHODS else 'scores'}/{slug}.npz", found, shape)
        return facts
    except Exception as error:
        return {"failed": _reason(error)}


def _publish(store: Store, name: str, found: np.ndarray, shape: tuple[int, ...]) -> None:
    """Validate scores, then write them."""
    if found.shape != shape or not np.isfinite(found).all():
        raise StrideError(f"It gave scores of shape {found.shape}, finite: {np.isfinite(found).all()}; not {shape}.")
    write_scores(store, name, found)


def _reason(error: Exception) -> str:
    """Format an error in one line: StrideErrors as they are, others with their class."""
    return str(error) if isinstance(error, StrideError) else f"{type(error).__name__}: {first_line(error)}"


def _log(text: str) -> None:
    print(f"evaluate: {text}", file=sys.stderr, flush=True)


def _development_lds(benchmark: Benchmark, sums: np.ndarray) -> str:
    """LDS on development queries, for the progress line; other queries are not evaluated before the end."""
    rows = np.flatnonzero(benchmark.parts == DEVELOPMENT)
    if not len(rows):
        return ""
    truth = benchmark.retrained()
    few = replace(truth, losses=truth.losses[:, :, rows])
    found = evaluate({"it": sums[rows]}, few, [ALL] * len(rows), [ALL] * len(rows), draws=0)
    return f", LDS {found.figure('it').lds.value:.3f} on development queries"


def _measurement_note(shelf: _ScoreCache, shown: Sequence[Unit]) -> str:
    """Describe how seconds and memory were measured."""
    markers = [marker for unit in shown if (marker := shelf.marker(unit))]
    places = dict.fromkeys(f"{marker['cores']} core(s), {marker['device']}" for marker in markers)
    text = (
        f"Measured on {' and on '.join(places) or 'nothing: all methods failed'}. Seconds are the wall clock to score "
        "every query, one method after another, each with all of these cores: a rival's from its call to its scores, "
        "in a fresh process; STRIDE's with starting its workers, cutting the pool into blocks, and fitting. MiB: the "
        "process's largest resident memory on the host; for STRIDE the largest worker's times the number of workers. "
    )
    made = shelf.marker(shelf.units[CHECKPOINTS])
    if made and any(CHECKPOINTS in unit.needs for unit in shown):
        users = [unit.entry.method for unit in shown if CHECKPOINTS in unit.needs]
        text += f"Training once more for checkpoints took {made['seconds']:.1f} s, not counted ({', '.join(users)}). "
    return text + "Nothing was chosen on the report part: options were set on development queries or elsewhere."


def _result(evaluation: Evaluation, entries: Sequence[Entry], part: str) -> dict[str, Any]:
    """The default method's figures by kind, beside the best rival's."""
    default = next((e.method for e in entries if e.default and e.method in evaluation.methods), None)
    kinds: dict[str, Any] = {}
    for kind, _ in evaluation.cells if default else ():
        mine = evaluation.figure(default or "", kind, part)
        kinds[kind] = {"lds": _numbers(mine.lds), "queries": mine.queries}
        if rival := best_rival(evaluation, entries, kind, part):
            paired = evaluation.paired(default or "", rival, kind, part)
            kinds[kind] |= {"rival": rival, "rival_lds": _numbers(evaluation.figure(rival, kind, part).lds)}
            kinds[kind] |= {"difference": _numbers(paired.difference), "ratio": _numbers(paired.ratio)}
    return {"method": default, "kinds": kinds}


def _numbers(interval: Interval) -> list[float | None]:
    """Return the figure and its interval's ends for JSON; null for nan."""
    return [None if np.isnan(each) else round(each, 4) for each in (interval.value, interval.low, interval.high)]
