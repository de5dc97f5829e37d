"""The one-pass fit beside the paper's trained loop on an accuracy benchmark: seconds to fit, and LDS, of each.

How long a loop must run is its own affair: its steps are doubled until four times as many do not make members and
others clearly more different under steering (``judge``), and what is compared is the shortest run at that level; a run
twice as long may well fail to show what one four times as long does. Learning rates decay over a run, so each length is
trained from its beginning. Nothing here looks at the retraining results but the LDS.
"""

from collections.abc import Mapping
from typing import Any

from stride_ray.evaluate.comparison.stride_variants import BLOCKS, FORMS, Variant, cut_pool, score
from stride_ray.evaluate.retraining.benchmark import Benchmark, read_benchmark
from stride_ray.runtime.costs import NAME
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import connected

# What the paper's loop is given beside its form and steps; linear responses, so that fits alone are compared.
_LOOP: dict[str, Any] = {"fit.method": "train", "respond.mode": "linear", "recover.row_scaling": False}
_ONCE: dict[str, Any] = {"fit.method": "closed_form"}


def measure_loop(benchmark_url: str, folder: str, form: str, steps: int, most_steps: int) -> dict[str, Any]:
    """Fit operators of one form in one pass, and by loops of ``steps``, twice as many, and so on.

    Args:
        benchmark_url: with retraining results.
        folder: what is made and measured stays: a second run goes on.
        form: gate, matrix or logit.
        steps: of the first loop.
        most_steps: of the longest.

    Returns:
        ``once`` and ``loops``: each with seconds of its fit, its judge's gap in nats with the gap's standard error, and
        LDS per part; ``plateau``: the steps that were enough, None where the longest loop was still gaining;
        ``ratio_loop``: seconds of that loop (of the longest where there is no plateau) over the one pass's.
    """
    benchmark = read_benchmark(benchmark_url)
    benchmark.retrained()
    store = Store(folder).child(benchmark.fingerprint)
    once = _measured(benchmark, store, f"once {form}", {**_ONCE, "operators.form": form})
    loops: list[dict[str, Any]] = []
    plateau = None
    while plateau is None and steps <= most_steps:
        changes = {**_LOOP, "operators.form": form, "fit.steps": steps}
        loops.append({"steps": steps, **_measured(benchmark, store, f"loop {form} {steps}", changes)})
        steps *= 2
        if len(loops) > 2 and not _gained(loops[-3], loops[-1]):
            plateau = loops[-3]["steps"]
    compared = loops[-1] if plateau is None else loops[-3]
    ratio = compared["seconds"] / once["seconds"]
    return {"form": form, "once": once, "loops": loops, "plateau": plateau, "ratio_loop": ratio}


def _gained(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether the gap grew by more than two standard errors of the difference."""
    error = (before["gap_error"] ** 2 + after["gap_error"] ** 2) ** 0.5
    return after["gap"] - before["gap"] > 2 * error


def _measured(benchmark: Benchmark, store: Store, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """One variant through the pipeline, or what was measured of it before."""
    variant = Variant(name, {**FORMS, **changes})
    kept = f"{variant.slug}.json"
    if store.exists(kept):
        return store.read_json(kept)
    runs, compute = store.child("runs"), ComputeConfig()
    with connected(compute):
        if not runs.exists(f"{BLOCKS}/blocks/manifest.json"):
            cut_pool(benchmark, runs, compute)
        scores, _, remarks = score(benchmark, variant, runs, compute)
    operators = Run(f"{runs.url}/{variant.slug}").stage("operators").store
    facts = operators.read_json("metadata.json")
    measured = {
        "seconds": operators.read_json(NAME)["wall"],
        "gap": facts["gap"],
        "gap_error": facts["gap_error"],
        "lds": benchmark.lds(scores),
        "remarks": remarks,
    }
    store.write_json(kept, measured)
    return measured


def table(found: Mapping[str, Any]) -> str:
    """What measure_loop found, for people."""
    cells = list(found["once"]["lds"])
    lines = [f"| {found['form']} | seconds | gap, nats | {' | '.join(cells)} |", "|---" * (3 + len(cells)) + "|"]
    for name, each in [("one pass", found["once"]), *((f"{one['steps']} steps", one) for one in found["loops"])]:
        lds = (f"{each['lds'][cell][0]:.3f}" for cell in cells)
        lines.append(
            f"| {name} | {each['seconds']:.1f} | {each['gap']:.4f} ± {each['gap_error']:.4f} | {' | '.join(lds)} |"
        )
    return "\n".join(lines)
