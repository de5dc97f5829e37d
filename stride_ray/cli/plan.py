"""Capacity planning: I/O, memory and time of a larger run, extrapolated from the measured cost of a pilot run.

A pilot is a finished run of the same model and options on a sample of the corpus. Each of its phases (``cost.json``) is
split into work, which grows with blocks or queries and is shared by the workers, and a remainder (starting workers and
model, reading, publishing), which is constant. Sizes on disk grow with their contents; a worker's memory is constant.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stride_ray.attribution.directions import queries_per_unit
from stride_ray.attribution.recover import PARTS_PER_UNIT
from stride_ray.attribution.rescore import MAX_CANDIDATES_PER_UNIT, candidate_count, candidates_needed, passes_over
from stride_ray.attribution.respond import QUERIES_PER_UNIT
from stride_ray.attribution.site_responses import SLICE
from stride_ray.attribution.site_responses import SLICES as SLICED
from stride_ray.corpus.blocks import shard_count, unit_count
from stride_ray.corpus.queries import check_name
from stride_ray.models.pool_worker import SLICES
from stride_ray.operators.site_fit import rows_for
from stride_ray.runtime.config import Config
from stride_ray.runtime.costs import COST_FILE
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run, Stage
from stride_ray.runtime.urls import redact_url


@dataclass(frozen=True)
class Size:
    """The quantities that the cost of a run depends on.

    Attributes:
        blocks: N.
        subsets: K of the Lasso.
        queries: number of queries.
        store: bytes of the per-site operators; 0 for the paper's forms.
        passes: passes over the pool in exact mode.
        rows: rows kept per query.
        candidates: candidates per query.
        together: queries per work unit of directions.
        responded: queries per work unit of responses.
    """

    blocks: int
    subsets: int
    queries: int
    store: float
    passes: int
    rows: int
    candidates: int
    together: int
    responded: int


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a stage.

    Attributes:
        stage: the name of its folder in the run directory.
        reads: bytes read from earlier stages; the corpus that ``blocks`` reads is not counted.
        writes: bytes.
        holds: peak memory of a worker, MB.
        seconds: wall-clock time.
        worker_seconds: work, summed over workers.
    """

    stage: str
    reads: float
    writes: float
    holds: int
    seconds: float
    worker_seconds: float


def _blocks(old: Size, new: Size) -> float:
    return new.blocks / old.blocks


def _queries(old: Size, new: Size) -> float:
    return new.queries / max(1, old.queries)


def _constant(old: Size, new: Size) -> float:
    return 1.0


def _passes(old: Size, new: Size) -> float:
    return _blocks(old, new) * new.passes / max(1, old.passes)


def _rescored(old: Size, new: Size) -> float:
    # Upper bound: assumes that no two queries share a candidate.
    return _queries(old, new) * new.candidates / max(1, old.candidates)


def _ranked(old: Size, new: Size) -> float:
    return _queries(old, new) * new.rows / old.rows


def _recovered(old: Size, new: Size) -> float:
    return _queries(old, new) * _blocks(old, new)


def _solved(old: Size, new: Size) -> float:
    # Measured (RESULTS.md, Scale): the number of active blocks grows with N until it reaches that of the subsets.
    before, after = (min(1.0, size.blocks / (SATURATION_BLOCKS_PER_SUBSET * size.subsets)) for size in (old, new))
    return _queries(old, new) * (after / before) ** 0.5


def _stored(old: Size, new: Size) -> float:
    return new.store / old.store if old.store else 1.0


def _multiplied(old: Size, new: Size) -> float:
    return _queries(old, new) * _stored(old, new)


def _shards(old: Size, new: Size) -> float:
    return shard_count(new.blocks) / shard_count(old.blocks)


# Stages in order, and whether each query set has its own folder.
STAGES = {
    "blocks": False,
    "curvature": False,
    "operators": False,
    "directions": True,
    "responses": True,
    "estimates": True,
    "influence": True,
    "exact": True,
}
# Stages of each attribution mode; "a further batch" is the part of "estimated" to be repeated for more queries.
MODES = {
    "estimated": ("blocks", "curvature", "operators", "directions", "responses", "estimates", "influence"),
    "a further batch": ("directions", "responses", "estimates", "influence"),
    "exact": ("blocks", "curvature", "directions", "exact"),
}
# Growth of a phase's work, by "label" of its progress line or "stage/label"; other phases do not grow.
GROWTH: dict[str, Callable[[Size, Size], float]] = {
    "shard": _blocks,
    "number": _blocks,
    "compare": _blocks,
    "count": _blocks,
    "queries": _queries,
    "code": _queries,
    "invert": _queries,
    "score": _passes,
    "influence/score": _rescored,
    "gather": _queries,
    "rank": _ranked,
    "fit": _blocks,
    "respond": _queries,
    "multiply": _multiplied,
    "sums": _shards,
    "recover": _solved,
    "columns": _recovered,
}


def _directions(size: Size) -> int:
    return -(-size.queries // size.together)


def _responses(size: Size) -> int:
    return -(-size.queries // size.responded)


def _estimates(size: Size) -> int:
    return -(-_responses(size) // PARTS_PER_UNIT)


# Number of work units, which limits the parallelism of a phase; other phases are assumed to use all workers.
UNITS: dict[str, Callable[[Size], int]] = {
    "queries": _directions,
    "code": _directions,
    "invert": _directions,
    "respond": _responses,
    "recover": _estimates,
    "columns": _estimates,
    "rank": _directions,
    "gather": _responses,
    "precondition": lambda _: SLICES,
    "eigenvalues": lambda _: SLICES,
    "scale": lambda _: SLICES,
    "sums": lambda size: shard_count(size.blocks),
    "fit": lambda size: unit_count(size.blocks),
    "score": lambda size: size.passes * unit_count(size.blocks),
    "influence/score": lambda size: -(-size.queries * size.candidates // MAX_CANDIDATES_PER_UNIT),
    "multiply": lambda size: max(SLICED, -(-int(size.store) // SLICE)),
    "reduce": lambda _: 1,
    "judge": lambda _: 1,
    "sketch": lambda _: 1,
}
# Blocks per subset beyond which the Lasso solver's working sets stop growing.
SATURATION_BLOCKS_PER_SUBSET = 100
# By stage: growth of its output, and the earlier stages that it reads completely.
WRITES: dict[str, Callable[[Size, Size], float]] = {
    "blocks": _blocks,
    "exact": _ranked,
    "directions": _queries,
    "responses": _ranked,
    "estimates": _ranked,
    "influence": _ranked,
}
READS = {
    "curvature": ("blocks",),
    "operators": ("blocks",),
    "responses": ("directions", "operators"),
    "estimates": ("responses",),
    "influence": ("directions", "estimates"),
    "exact": ("blocks",),
}


def plan(pilot: Run, name: str, blocks: int, queries: int, workers: int) -> list[Estimate]:
    """Estimates for the pilot's finished stages, in order.

    Args:
        pilot: a finished run with the same model and options on a sample.
        name: the pilot's query set.
        blocks: N of the larger run.
        queries: number of queries of the larger run.
        workers: number of workers of the larger run.

    Raises:
        StrideError: the pilot has no recorded costs, or no finished query set of that name.
    """
    check_name(name)
    found = dict[str, tuple[Stage, dict[str, Any]]]()
    for stage, named in STAGES.items():
        found |= _costs(pilot, stage, name if named else "")
    if "blocks" not in found:
        raise StrideError("The pilot has no costs of its own; run shard and attribute in a new run directory first.")
    if not found.keys() & {"exact", "responses"}:
        names = {each for stage, named in STAGES.items() if named for each in pilot.store.names(stage)} - {name}
        raise StrideError(
            f"{redact_url(pilot.url)} has no finished query set {name!r} to go by; "
            + (f"--name one of: {', '.join(sorted(names))}." if names else "attribute a few queries in it first.")
        )
    old, new = _sizes(pilot, name, found, blocks, queries)
    written = {stage: _written(stage, opened.store.size(), old, new) for stage, (opened, _) in found.items()}
    estimates = []
    for stage, (_, cost) in found.items():
        seconds, worker_seconds = 0.0, 0.0
        for label, each in cost["phases"].items():
            grown = each["busy"] * GROWTH.get(f"{stage}/{label}", GROWTH.get(label, _constant))(old, new)
            rest = max(0.0, each["wall"] - each["busy"] / each["workers"])
            seconds += rest + grown / min(workers, _units(stage, label, new, workers))
            worker_seconds += grown
        reads = sum(written.get(each, 0.0) for each in READS.get(stage, ())) * (new.passes if stage == "exact" else 1)
        holds = max(each["peak_mb"] for each in cost["phases"].values())
        estimates.append(Estimate(stage, reads, written[stage], holds, seconds, worker_seconds))
    return estimates


def _written(stage: str, size: int, old: Size, new: Size) -> float:
    """Bytes that a stage will write, from its ``size`` in the pilot; of per-site operators only the rows grow."""
    if stage == "operators" and old.store:
        return max(0.0, size - old.store) + new.store
    return size * WRITES.get(stage, _constant)(old, new)


def _units(stage: str, label: str, size: Size, workers: int) -> int:
    """Number of work units of a phase; ``workers`` if unknown."""
    counted = UNITS.get(f"{stage}/{label}", UNITS.get(label))
    return workers if counted is None else max(1, counted(size))


def _costs(pilot: Run, stage: str, name: str) -> dict[str, tuple[Stage, dict[str, Any]]]:
    opened = pilot.stage(stage, name)
    return {stage: (opened, opened.store.read_json(COST_FILE))} if opened.store.exists(COST_FILE) else {}


def _sizes(pilot: Run, name: str, found: dict[str, Any], blocks: int, queries: int) -> tuple[Size, Size]:
    asked = next(found[stage][0] for stage in ("exact", "responses") if stage in found)
    known = asked.manifest()["queries"]
    gradient = 0
    if "curvature" in found:
        gradient = found["curvature"][0].manifest()["gradient_bytes"]
    together = queries_per_unit(gradient)
    options, pool = pilot.config, pilot.stage("blocks").manifest()["blocks"]

    def size(n: int, q: int) -> Size:
        passes = passes_over(gradient, q, options.compute.query_gb)
        facts = _operators(options, n)
        store = facts["subsets"] * facts["row_bytes"] if facts else 0.0
        candidates = min(n, candidate_count(options, facts))
        rows = min(n, options.attribute.top)
        responded = together if facts else QUERIES_PER_UNIT
        return Size(n, options.membership.subsets, q, store, passes, rows, candidates, together, responded)

    return size(pool, known), size(blocks, queries)


def _operators(config: Config, n_blocks: int) -> dict[str, Any]:
    """The size entries of manifest.json for per-site operators; empty for the paper's forms."""
    of_blocks, rows, room = rows_for(config, n_blocks)
    facts = {"rows": "blocks" if of_blocks else "subsets", "row_bytes": room, "subsets": rows, "blocks": n_blocks}
    return facts if config.operators.form == "sites" else {}


def table(estimates: list[Estimate], blocks: int, queries: int, workers: int) -> str:
    """The estimates as a table for display, with totals per mode."""
    lines = [
        f"{blocks:,} blocks, {queries:,} queries, {workers} workers",
        f"{'stage':<18}{'reads':>12}{'writes':>12}{'a worker holds':>16}{'work':>16}{'takes':>12}",
    ]
    for each in estimates:
        reads = "the corpus" if each.stage == "blocks" else _sized(each.reads)
        lines.append(
            f"{each.stage:<18}{reads:>12}{_sized(each.writes):>12}{_sized(each.holds * 1e6):>16}"
            f"{_timed(each.worker_seconds):>16}{_timed(each.seconds):>12}"
        )
    for mode, stages in MODES.items():
        parts = [each for each in estimates if each.stage in stages]
        if {each.stage for each in parts} == set(stages):
            writes, work, takes = (
                sum(getattr(each, of) for each in parts) for of in ("writes", "worker_seconds", "seconds")
            )
            lines.append(
                f"{'all of ' + mode:<18}{'':>12}{_sized(writes):>12}{'':>16}{_timed(work):>16}{_timed(takes):>12}"
            )
    return "\n".join(lines)


def memory(config: Config, estimates: list[Estimate]) -> str:
    """A warning line if a worker's peak memory exceeds ``compute.worker_gb``, else empty."""
    largest = max(estimates, key=lambda each: each.holds)
    held, allowed = largest.holds * 2**20, config.compute.worker_gb * 2**30
    if held <= allowed:
        return ""
    return (
        f"a worker of {largest.stage} held {held / 2**30:.1f} GiB in the pilot, and compute.worker_gb, by which "
        f"workers are counted and batches sized, is {config.compute.worker_gb:g}: raise it, or memory may run out\n"
    )


def accuracy(config: Config, n_blocks: int) -> str:
    """A line on the accuracy that ``operators.budget_gb`` allows for this pool size; empty for the paper's forms."""
    facts = _operators(config, n_blocks)
    if not facts:
        return ""
    a_block = facts["subsets"] * facts["row_bytes"] / n_blocks
    how = f", as rows of {facts['subsets']:,} subsets" if facts["rows"] == "subsets" else ""
    told = f"operators take {_sized(a_block)} a block{how}"
    taken, needed = candidate_count(config, facts), candidates_needed(n_blocks, a_block)
    if taken >= needed:
        return f"{told}; {taken:,} candidates a query hold some 95 % of the exact best ten\n"
    return (
        f"{told}; {taken:,} candidates a query are fewer than the {needed:,} that would hold 95 % of the exact best "
        "ten: raise operators.budget_gb\n"
    )


def _sized(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _timed(seconds: float) -> str:
    for unit, long in (("s", 120.0), ("min", 120 * 60.0), ("h", 72 * 3600.0)):
        if seconds < long:
            return f"{seconds / {'s': 1, 'min': 60, 'h': 3600}[unit]:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"
