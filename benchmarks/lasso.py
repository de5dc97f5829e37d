"""Recovery of influence compared with scikit-learn's Lasso and celer: same problem, same penalty, same duality gap."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.output import print_figures

if TYPE_CHECKING:
    import scipy.sparse
    from numpy.typing import NDArray

    from stride_ray.operators.membership import Membership

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
    """Return the duality gap of ½‖y − c − Mw‖² + λ‖w‖₁ over ½‖y − ȳ‖²: one check for all solvers' weights (N,)."""
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

    from stride_ray.attribution.lasso.recovery import recover
    from stride_ray.operators.membership import Membership
    from stride_ray.runtime.memory import peak_bytes, resident_bytes, restart_peak

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
        recover(responses[:1], membership, min(N, 2000), ratio=0.5)  # triggers compilation, once per installation
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
    """Print the figures without other solvers, for problems that they cannot hold in memory."""
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
    return print_figures(found)
