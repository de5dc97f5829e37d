"""The one-pass fit compared with the paper's trained loop on an accuracy benchmark: fitting time and LDS.

The loop's length is determined by its own criterion: steps are doubled until four times as many do not significantly
increase the difference between members and others under steering (validation.py). The shortest run at that level is
compared, because a run twice as long may miss a gain that one four times as long shows. Learning rates decay over a
run, so each length is trained from scratch. Only the LDS uses the retraining results.
"""

from collections.abc import Mapping
from typing import Any

from stride_ray.evaluate.comparison.stride_variants import BLOCKS, FORMS, Variant, score, shard_pool
from stride_ray.evaluate.retraining.benchmark import Benchmark, read_benchmark
from stride_ray.runtime.costs import COST_FILE
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import connected

# The paper's loop, besides form and steps; responses are linear, so that only the fits are compared.
_LOOP: dict[str, Any] = {"fit.method": "train", "respond.mode": "linear", "recover.row_scaling": False}
_ONCE: dict[str, Any] = {"fit.method": "closed_form"}


def measure_loop(
    benchmark_url: str, folder: str, form: str, steps: int, most_steps: int, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fit operators of one form in one pass, and by loops of ``steps``, twice as many, and so on.

    Args:
        benchmark_url: with retraining results.
        folder: outputs are kept there, so a second run resumes.
        form: gate, matrix or logit.
        steps: of the first loop.
        most_steps: of the longest loop.
        changes: further options of every fit, such as membership.subsets or fit.start.

    Returns:
        ``once`` and ``loops``: each with seconds of its fit, the validation gap in nats with its standard error, and
        LDS per part; ``plateau``: the steps that were enough, None if the longest loop was still improving;
        ``ratio_loop``: seconds of that loop (the longest if there is no plateau) over the one pass's.
    """
    benchmark = read_benchmark(benchmark_url)
    benchmark.retrained()
    store = Store(folder).child(benchmark.fingerprint)
    changes = changes or {}
    given = {"operators.form": form, **changes}
    name = " ".join([form, *(f"{key} {value}" for key, value in changes.items())])
    once = _measured(benchmark, store, f"once {name}", {**given, **_ONCE})
    loops: list[dict[str, Any]] = []
    plateau = None
    while plateau is None and steps <= most_steps:
        trained = {**_LOOP, **given, "fit.steps": steps}
        loops.append({"steps": steps, **_measured(benchmark, store, f"loop {name} {steps}", trained)})
        steps *= 2
        if len(loops) > 2 and not _gained(loops[-3], loops[-1]):
            plateau = loops[-3]["steps"]
    compared = loops[-1] if plateau is None else loops[-3]
    ratio = compared["seconds"] / once["seconds"]
    return {"form": name, "once": once, "loops": loops, "plateau": plateau, "ratio_loop": ratio}


def _gained(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether the gap grew by more than two standard errors of the difference."""
    error = (before["gap_error"] ** 2 + after["gap_error"] ** 2) ** 0.5
    return after["gap"] - before["gap"] > 2 * error


def _measured(benchmark: Benchmark, store: Store, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Run one variant through the pipeline, or read its earlier measurement."""
    variant = Variant(name, {**FORMS, **changes})
    kept = f"{variant.slug}.json"
    if store.exists(kept):
        return store.read_json(kept)
    runs, compute = store.child("runs"), ComputeConfig()
    with connected(compute):
        if not runs.exists(f"{BLOCKS}/blocks/manifest.json"):
            shard_pool(benchmark, runs, compute)
        scores, _, remarks = score(benchmark, variant, runs, compute)
    operators = Run(f"{runs.url}/{variant.slug}").stage("operators").store
    facts = operators.read_json("manifest.json")
    measured = {
        "seconds": operators.read_json(COST_FILE)["wall"],
        "gap": facts["gap"],
        "gap_error": facts["gap_error"],
        "lds": benchmark.lds(scores),
        "remarks": remarks,
    }
    store.write_json(kept, measured)
    return measured


def table(found: Mapping[str, Any]) -> str:
    """Format the result as Markdown."""
    cells = list(found["once"]["lds"])
    lines = [f"| {found['form']} | seconds | gap, nats | {' | '.join(cells)} |", "|---" * (3 + len(cells)) + "|"]
    for name, each in [("one pass", found["once"]), *((f"{one['steps']} steps", one) for one in found["loops"])]:
        lds = (f"{each['lds'][cell][0]:.3f}" for cell in cells)
        lines.append(
            f"| {name} | {each['seconds']:.1f} | {each['gap']:.4f} ± {each['gap_error']:.4f} | {' | '.join(lds)} |"
        )
    return "\n".join(lines)
