"""Benchmarks: what the package claims about speed and memory, measured beside what anyone would use instead.

`recover` times the recovery of influence against scikit-learn's Lasso and celer, one thread each, on the same problem,
the same penalty and the same duality gap. It prints a table for people and one JSON object as its last line.

`select` makes up influence tables of so many rows in a folder (kept: a second run only selects), ranks the documents
that they name, chooses among them and writes the manifest, and prints seconds and peak memory.

`respond` and `fit` time responses and passes over blocks on random weights of a model's shape, on CPU or GPU, beside
what bounds them: plain matrix products, a loop through the whole model, a forward pass.

`loop` fits operators in one pass and by the paper's trained loop, as long as that needs, on an accuracy benchmark.

`scale` runs all stages on made-up text at several sizes: seconds and memory per stage, how they grow, and what
`stride-ray plan` foretold from the smallest. `shard` stands beside datasets.map with the same tokenizer.

`recall` fills an accuracy benchmark's pool up with blocks of other texts and tells how many of the exact best blocks
are among the candidates of estimates and of words, as the pool grows.

`peers` runs bergson and a LoGRA beside ours on an accuracy benchmark's model, pool and queries, in an environment of
their own that it makes: seconds from start to end, memory, bytes stored, LDS.

    python jobs/benchmark.py recall --benchmark continued --texts texts/ --blocks 1600,6400,25600 --folder /tmp/recall
    python jobs/benchmark.py recover --blocks 1000000
    python jobs/benchmark.py recover --blocks 100000000 --baseline-queries 0
    python jobs/benchmark.py select --rows 100000000 --folder /tmp/rows
    python jobs/benchmark.py scale --blocks 1e4,1e5,1e6 --folder /tmp/scale
    python jobs/benchmark.py shard --blocks 1e6 --folder /tmp/scale
    python jobs/benchmark.py peers --benchmark continued --folder /tmp/peers --multiples 1,4,16
    python jobs/benchmark.py loop --benchmark continued --folder /tmp/loop --form matrix
    python jobs/benchmark.py respond --shape 135m --subsets 1000 --dtype bfloat16 --device cuda
    python jobs/benchmark.py fit --shape 286m --tokens 512 --blocks 256 --dtype bfloat16 --device cuda
    python jobs/benchmark.py solve --shape small --blocks 32 --batch-tokens 8192
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stride_ray.arguments import count, counts

if TYPE_CHECKING:
    import scipy.sparse
    from numpy.typing import NDArray

    from stride_ray.membership import Membership

PLANTED = 50  # blocks with influence on each query


def planted_responses(membership: Membership, n_blocks: int, queries: int, noise: float, seed: int) -> NDArray:
    """Return (queries, K) responses M w + noise: w has PLANTED standard normal entries; noise is in sd of M w."""
    import numpy as np

    rng = np.random.default_rng(seed)
    K = membership.subsets
    responses = np.empty((queries, K))
    for row in responses:
        blocks = rng.choice(n_blocks, min(PLANTED, n_blocks), replace=False)
        ids = membership.columns_at(blocks)
        weights = np.repeat(rng.standard_normal(len(blocks)), ids.shape[1])
        row[:] = np.bincount(ids.ravel(), weights, minlength=K + 1)[:K]
        row += noise * row.std() * rng.standard_normal(K)
    return responses


def full_gap(M: scipy.sparse.csc_array, y: NDArray, weights: NDArray, penalty: float) -> float:
    """Return the duality gap of ½‖y − c − Mw‖² + λ‖w‖₁ over ½‖y − ȳ‖²: one judge for every solver's weights (N,)."""
    import numpy as np

    target = y - y.mean()
    residual = target - M @ weights
    residual -= residual.mean()
    largest = np.abs(M.T @ residual).max()
    scale = min(residual @ target / (residual @ residual), penalty / largest)
    primal = 0.5 * residual @ residual + penalty * np.abs(weights).sum()
    dual = scale * residual @ target - 0.5 * scale**2 * residual @ residual
    return float((primal - dual) / (0.5 * target @ target))


def benchmark_recover(args: argparse.Namespace) -> int:
    """Time recover, celer and scikit-learn on planted influence; print the table and the JSON line."""
    try:
        import celer
    except ImportError:
        celer = None
        if args.baseline_queries:
            print("celer is not installed, so there is nothing to compare with: pip install stride-ray[benchmark]")
            return 2
    import numpy as np
    from sklearn.linear_model import Lasso
    from threadpoolctl import threadpool_limits

    from stride_ray.membership import Membership
    from stride_ray.memory import peak_bytes, resident_bytes, restart_peak
    from stride_ray.recover import recover

    N, K = args.blocks, args.subsets
    membership = Membership(K, args.degree, args.seed)
    responses = planted_responses(membership, N, args.queries, args.noise, args.seed)
    baseline = min(args.baseline_queries, args.queries)
    rows: list[dict[str, Any]] = []

    def timed(name: str, count: int, solve: Callable[[], Any]) -> Any:
        restart_peak()
        before = resident_bytes()
        start = time.perf_counter()
        result = solve()
        seconds = (time.perf_counter() - start) / count
        peak = peak_bytes()
        rows.append({"solver": name, "queries": count, "seconds": seconds, "peak": peak, "grown": peak - before})
        return result

    with threadpool_limits(limits=1):
        recover(responses[:1], membership, min(N, 2000), ratio=0.5)  # compiles, which happens once per installation
        recovered = timed(
            "stride_ray", args.queries, lambda: recover(responses, membership, N, ratio=args.ratio, tolerance=args.gap)
        )
        id_bytes = N * args.degree * membership.dtype.itemsize
        rows[0]["above_M"] = rows[0]["grown"] - (id_bytes if id_bytes <= 256 << 20 else 0)
        if not baseline:
            return _alone(args, rows[0], recovered)
        M = membership.matrix(0, N)
        for q in range(baseline):
            y = responses[q]
            largest = float(np.abs(M.T @ (y - y.mean())).max())
            if abs(recovered[q].penalty - args.ratio * largest) > 1e-9 * largest:
                raise AssertionError("the penalties differ")

        def fit_all(make: Callable[..., Any], **options: Any) -> list[NDArray]:
            # Both scale the objective by 1/K and stop at a gap of tol·‖y − ȳ‖²/K: tol is half the gap over ½‖y − ȳ‖².
            models = [make(alpha=recovered[q].penalty / K, tol=args.gap / 2, **options) for q in range(baseline)]
            return [model.fit(M, responses[q]).coef_ for q, model in enumerate(models)]

        solutions = {
            "celer": timed("celer", baseline, lambda: fit_all(celer.Lasso)),
            "scikit-learn": timed("scikit-learn", baseline, lambda: fit_all(Lasso, max_iter=100_000)),
        }
        ours = []
        for query in recovered[:baseline]:
            weights = np.zeros(N)
            weights[query.ordinals] = query.weights
            ours.append(weights)
        solutions["stride_ray"] = ours
        for row in rows:
            name = row["solver"]
            row["gap"] = max(full_gap(M, responses[q], w, recovered[q].penalty) for q, w in enumerate(solutions[name]))
            row["active"] = float(np.median([np.count_nonzero(w) for w in solutions[name]]))
            row.setdefault("above_M", row["grown"])  # M was built before
        rows[0]["active"] = float(np.median([len(query.weights) for query in recovered]))

    difference = max(
        float(np.abs(w - ours[q]).max() / np.abs(ours[q]).max())
        for name in ("celer", "scikit-learn")
        for q, w in enumerate(solutions[name])
    )
    own = rows[0]["seconds"]
    print(f"N={N:,} K={K} d={args.degree} planted={PLANTED} noise={args.noise} λ/λ_max={args.ratio}, one thread each")
    print(f"asked of all: full-problem gap ≤ {args.gap:g} · ½‖y−ȳ‖² (tol={args.gap / 2:g} in scikit-learn and celer;")
    print("scikit-learn 1.9 also waits until no coefficient moves by more than tol of the largest)")
    print(f"{'solver':14}{'queries':>8}{'s/query':>12}{'times ours':>12}{'gap':>11}{'active':>8}", end="")
    print(f"{'peak MiB':>10}{'above M':>9}")
    for row in rows:
        print(
            f"{row['solver']:14}{row['queries']:>8}{row['seconds']:>12.5f}{row['seconds'] / own:>12.1f}"
            f"{row['gap']:>11.1e}{row['active']:>8.0f}{row['peak'] / 2**20:>10.0f}{row['above_M'] / 2**20:>9.0f}"
        )
    print(f"largest difference of a weight from scikit-learn's or celer's: {difference:.1e} of the largest weight")
    print(f"rounds: median {np.median([query.rounds for query in recovered]):.0f}; ", end="")
    print(f"largest gap over all {args.queries} queries, as reported: {max(query.gap for query in recovered):.1e}")
    seconds = {row["solver"]: row["seconds"] for row in rows}
    summary = {
        "blocks": N,
        "subsets": K,
        "degree": args.degree,
        "queries": args.queries,
        "baseline_queries": baseline,
        "gap_asked": args.gap,
        "ratio_sklearn": seconds["scikit-learn"] / own,
        "ratio_celer": seconds["celer"] / own,
        "seconds_per_query": own,
        "seconds_per_query_sklearn": seconds["scikit-learn"],
        "seconds_per_query_celer": seconds["celer"],
        "max_relative_difference": difference,
        "gaps": {row["solver"]: row["gap"] for row in rows},
        "median_active": rows[0]["active"],
        "peak_bytes": rows[0]["peak"],
        "bytes_above_M": rows[0]["above_M"],
    }
    print(json.dumps(summary))
    return 0


def _alone(args: argparse.Namespace, row: dict[str, Any], recovered: list[Any]) -> int:
    """What is printed where no other solver could hold the problem."""
    import numpy as np

    found = {
        "blocks": args.blocks,
        "subsets": args.subsets,
        "degree": args.degree,
        "queries": args.queries,
        "seconds_per_query": row["seconds"],
        "largest_gap": max(each.gap for each in recovered),
        "median_rounds": float(np.median([each.rounds for each in recovered])),
        "median_active": float(np.median([len(each.weights) for each in recovered])),
        "peak_bytes": row["peak"],
        "bytes_grown": row["grown"],
    }
    return _printed(found)


def _printed(found: dict[str, Any]) -> int:
    """Print what was found, a line each for people, and the JSON line."""
    for name, value in found.items():
        print(f"{name:24}{value}")
    print(json.dumps(found))
    return 0


def benchmark_select(args: argparse.Namespace) -> int:
    """Rank and choose among made-up documents; print a line for people and the JSON line."""
    import tempfile

    from stride_ray.config import Config
    from stride_ray.evaluate.rows import make_tables
    from stride_ray.memory import peak_bytes, resident_bytes, restart_peak
    from stride_ray.selection.choice import Best, reasons, write_manifest
    from stride_ray.selection.ranking import Database, batches, rank_documents
    from stride_ray.storage import Store

    options = Config().updated({"select.by": args.by, "select.tokens": 0.2}).select
    store = Store(args.folder)
    started = time.perf_counter()
    target, pool = make_tables(store, args.rows, args.documents)
    made = time.perf_counter()
    restart_peak()
    before = resident_bytes()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch, Database(scratch) as database:
        ordered = rank_documents(database, [target], (store, pool), (), options, 0)
        ranked = time.perf_counter()
        best = Best(options, args.documents, args.documents * 1000, 0)
        kept, _ = write_manifest(best, batches(ordered), reasons(options), 1, store, scratch)
        spilled = sum(os.path.getsize(os.path.join(scratch, name)) for name in os.listdir(scratch) if "." in name)
    done = time.perf_counter()
    summary = {
        "rows": args.rows,
        "documents": args.documents,
        "by": args.by,
        "kept": kept.documents,
        "table_bytes": sum(store.fs.size(store.path(name)) for name in target.tables),
        "scratch_bytes": spilled,
        "seconds_making": made - started,
        "seconds_ranking": ranked - made,
        "seconds_choosing": done - ranked,
        "resident_before": before,
        "peak_bytes": peak_bytes(),
    }
    print(
        f"{args.rows:,} rows, {args.documents:,} documents: ranked in {ranked - made:.0f} s, chosen in "
        f"{done - ranked:.0f} s, peak memory {summary['peak_bytes'] / 2**20:.0f} MiB (2048 are allowed)"
    )
    print(json.dumps(summary))
    return 0 if summary["peak_bytes"] <= 2**31 else 1


def benchmark_speed(args: argparse.Namespace) -> int:
    """Time responses or passes over the pool; print what was found, a line each, and the JSON line."""
    from stride_ray.evaluate.speed import Setting, measure_passes, measure_respond, measure_solve
    from stride_ray.memory import keep_freed

    keep_freed()  # as every worker does
    given = {key: value for key, value in vars(args).items() if key not in ("command", "run")}
    measures = {"respond": measure_respond, "fit": measure_passes, "solve": measure_solve}
    return _printed(measures[args.command](Setting(**given)))


def benchmark_loop(args: argparse.Namespace) -> int:
    """Fit in one pass and by loops; print the table and the JSON line."""
    from stride_ray.evaluate.loop import measure_loop, table

    found = measure_loop(args.benchmark, args.folder, args.form, args.steps, args.most_steps)
    print(table(found))
    print(json.dumps(found))
    return 0


def benchmark_scale(args: argparse.Namespace) -> int:
    """Run the pipeline at several sizes; print the table and the JSON line."""
    from stride_ray.evaluate.scale import measure, table

    found = measure(args.folder, args.blocks)
    print(table(found))
    print(json.dumps(found))
    return 0


def benchmark_shard(args: argparse.Namespace) -> int:
    """Shard beside datasets.map; print a line each and the JSON line."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many cores as workers, not more
    from stride_ray.evaluate.scale import measure_shard

    found = measure_shard(args.folder, args.blocks, args.tokens, args.workers)
    for name, rate in found["tokens_per_second"].items():
        print(f"{name:12}{rate:>14,.0f} tokens a second")
    print(json.dumps(found))
    return 0


def benchmark_recall(args: argparse.Namespace) -> int:
    """Recall of the exact best blocks by pool size; print the table and the JSON line."""
    from stride_ray.evaluate.recall import measure_recall, table

    found = measure_recall(args.benchmark, args.texts, args.folder, args.blocks, args.row_bytes)
    print(table(found))
    print(json.dumps(found))
    return 0


def benchmark_peers(args: argparse.Namespace) -> int:
    """Run every tool; print the table and the JSON line."""
    from stride_ray.evaluate.peers.measure import compare_peers, table

    found = compare_peers(args.benchmark, args.folder, args.multiples, [each for each in args.tools.split(";") if each])
    print(table(found))
    print(json.dumps(found))
    return 0


def main() -> int:
    """Parse the command line and run the benchmark asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("recover", help="recovery of influence against scikit-learn and celer")
    command.add_argument("--blocks", type=count, required=True, help="N, columns of M")
    command.add_argument("--subsets", type=count, default=1000, help="K")
    command.add_argument("--degree", type=count, default=10, help="d")
    command.add_argument("--queries", type=count, default=64, help="queries that ours solves")
    command.add_argument(
        "--baseline-queries", type=int, default=2, help="of those, that the others solve, who hold M; 0: none"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--ratio", type=float, default=0.195, help="λ/λ_max; the default leaves about 55 active")
    command.add_argument("--noise", type=float, default=0.3, help="sd of the noise over that of the planted response")
    command.add_argument("--gap", type=float, default=1e-9, help="duality gap over ½‖y−ȳ‖² that every solver reaches")
    command.set_defaults(run=benchmark_recover)
    command = commands.add_parser("select", help="selection from made-up influence tables of any size")
    command.add_argument("--rows", type=count, required=True, help="rows of influence")
    command.add_argument("--documents", type=count, default=5_000_000, help="in the pool")
    command.add_argument("--by", default="rank", choices=("rank", "mean", "share"))
    command.add_argument("--folder", required=True, help="for the tables and what spills; some 3 GB for 1e8 rows")
    command.set_defaults(run=benchmark_select)
    for name, what in (
        ("respond", "responses, exact and linear"),
        ("fit", "passes over blocks"),
        ("solve", "a query's solve"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--shape", default="small", choices=("small", "135m", "286m", "600m"), help="of the model")
        command.add_argument("--device", default="auto", help="auto, cpu or cuda")
        command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
        command.add_argument("--form", default="gate", choices=("gate", "matrix"), help="of the operators")
        command.add_argument("--rank", type=count, default=16, help="r")
        command.add_argument("--subsets", type=count, default=64, help="K")
        command.add_argument("--tokens", type=count, default=128, help="in a query and in a block")
        command.add_argument("--queries", type=count, default=4)
        command.add_argument("--blocks", type=count, default=64)
        command.add_argument("--batch-tokens", type=count, default=16384, help="in one forward")
        command.set_defaults(run=benchmark_speed)
    command = commands.add_parser("loop", help="the one-pass fit beside the trained loop, on an accuracy benchmark")
    command.add_argument("--benchmark", required=True, help="its folder")
    command.add_argument("--folder", required=True, help="what is made and measured stays: a second run goes on")
    command.add_argument("--form", default="matrix", choices=("gate", "matrix", "logit"), help="of the operators")
    command.add_argument("--steps", type=count, default=100, help="of the first loop; then twice as many, and so on")
    command.add_argument("--most-steps", type=count, default=1600, help="of the longest")
    command.set_defaults(run=benchmark_loop)
    command = commands.add_parser("scale", help="seconds and memory of all stages at several sizes of the pool")
    command.add_argument("--blocks", type=counts, default="1e4,1e5,1e6", help="sizes; the smallest is plan's pilot")
    command.add_argument("--folder", required=True, help="what is made stays: a second run goes on")
    command.set_defaults(run=benchmark_scale)
    command = commands.add_parser("shard", help="tokens a second beside datasets.map with the same tokenizer")
    command.add_argument("--blocks", type=count, default=1_000_000)
    command.add_argument("--tokens", type=count, default=512, help="in a block")
    command.add_argument("--workers", type=count, default=2)
    command.add_argument("--folder", required=True)
    command.set_defaults(run=benchmark_shard)
    command = commands.add_parser("recall", help="how many of the exact best blocks shortlists hold")
    command.add_argument("--benchmark", required=True, help="an accuracy benchmark's folder, local")
    command.add_argument("--texts", required=True, nargs="+", help="what its pool is filled up with")
    command.add_argument("--blocks", type=counts, default="1600,6400,25600", help="sizes of the pool")
    command.add_argument("--row-bytes", type=counts, default="320,1250,5000,20000", help="of a block's operator")
    command.add_argument("--folder", required=True, help="what is made and measured stays: a second run goes on")
    command.set_defaults(run=benchmark_recall)
    command = commands.add_parser("peers", help="bergson and a LoGRA beside ours, from start to end")
    command.add_argument("--benchmark", required=True, help="an accuracy benchmark's folder, local")
    command.add_argument("--folder", required=True, help="what is made and measured stays: a second run goes on")
    command.add_argument(
        "--multiples", type=counts, default="1", help="sizes of the pool over the benchmark's (default: 1)"
    )
    command.add_argument("--tools", default="", help="names as the table has them, with ; between; default: all")
    command.set_defaults(run=benchmark_peers)
    args = parser.parse_args()
    # Before numpy is imported: its libraries read these once. Hence the imports inside the commands.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"
    from stride_ray.cli import exit_status

    return exit_status("benchmark", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
