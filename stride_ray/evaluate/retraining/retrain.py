"""Ground truth for LDS: train models on random subsets of a pool, and record every query's loss.

A work unit is one training: a subset and a seed. Units run as Ray tasks; each publishes its losses and then its done
marker. After an interruption, rerunning the same command trains only what is missing and gives the same bytes.
Subset s depends on the seed and s only, so a later run with more subsets or seeds extends the existing results.
"""

import functools
import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

from stride_ray.evaluate.retraining.benchmark import Benchmark, reread_benchmark
from stride_ray.evaluate.retraining.lds import evaluate
from stride_ray.evaluate.retraining.recipe import DEFAULT, Recipe, load_recipe, recipe_identity
from stride_ray.evaluate.retraining.results import JSONL, NPZ, RetrainingResults, write_truth
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Stage, claim
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import allocate_workers, connected, hide_gpus, map_tasks

# Subfolder of the output folder for the losses and done markers of single trainings.
WORK = "_retrain"
_CHECKSUM_BYTES = 16


def retrain(
    benchmark: Benchmark,
    recipe_name: str = DEFAULT,
    out: str = "retraining",
    subsets: int = 64,
    fraction: float = 0.5,
    seeds: int = 3,
    seed: int = 0,
    like: bool = False,
    compute: ComputeConfig | None = None,
) -> dict[str, Any]:
    """Train ``subsets`` × ``seeds`` models and write each query's losses.

    Args:
        benchmark: pool and queries; workers reread it from its folder.
        recipe_name: see ``load_recipe``; called with seeds 0 … ``seeds`` − 1, the same for all subsets.
        out: a path or fsspec URL; gets ``retraining_seed<n>.npz`` and ``lds_seed<n>.jsonl`` for each seed.
        subsets: S, how many to draw; with ``like``, the first S existing ones are used.
        fraction: α, the share of the pool in a subset; ignored with ``like``.
        seeds: trainings per subset.
        seed: for drawing subsets.
        like: reuse the subsets of the benchmark's own retraining results.
        compute: where to run; None: a local Ray with a worker per CPU.

    Returns:
        subsets, seeds, trained (now), models (in total), mean_loss, agreement (``Evaluation.ceiling``; None with one
        seed), and ``summary``, a paragraph with these figures.

    Raises:
        StrideError: for invalid counts or fractions, a folder made with other settings, a recipe that cannot be loaded,
            or losses that are not one finite number per query.
    """
    started = time.monotonic()
    _check(benchmark, subsets, fraction, seeds, like)
    load_recipe(recipe_name, benchmark)  # fails here with a clear error rather than in a worker
    store = Store(out)
    rows = [subset_rows(benchmark, number, fraction, seed, like) for number in range(subsets)]
    drawn = {"like": _subsets_hash(benchmark.retrained().subsets)} if like else {"seed": seed, "fraction": fraction}
    keys = {"benchmark": benchmark.fingerprint, "recipe": recipe_identity(recipe_name), **drawn}
    stage = _claim_work(store, keys)
    resources, trained = compute or ComputeConfig(), list[Any]()

    def train(missing: list[tuple[int, int, str]]) -> Iterator[dict[str, Any]]:
        trained.extend(missing)
        with connected(resources):
            workers = allocate_workers(resources, len(missing))
            draw = (fraction, seed, like)
            shared = (benchmark.url, benchmark.fingerprint, recipe_name, draw, stage, workers.device)
            yield from map_tasks(_train_one, shared, missing, workers)

    names = [[f"subset-{number:05d}-seed-{each}" for number in range(subsets)] for each in range(seeds)]
    units = {name: (number, each, name) for each, some in enumerate(names) for number, name in enumerate(some)}
    run_missing(stage, units, train, "retrain", "models")
    losses = np.stack([[read_array(stage.store, f"losses/{name}.npy") for name in of_seed] for of_seed in names])
    truth = RetrainingResults(tuple(rows), losses, tuple(f"seed{each}" for each in range(seeds)))
    truth.check(len(benchmark.blocks), len(benchmark.queries), store.display_url(""))
    _publish(store, truth, len(benchmark.blocks))
    return _summary(benchmark, truth, len(trained), store, time.monotonic() - started)


def subset_rows(benchmark: Benchmark, number: int, fraction: float, seed: int, like: bool = False) -> np.ndarray:
    """Pool rows of subset ``number`` (int64, ascending): drawn without replacement, or the benchmark's own."""
    if like:
        return benchmark.retrained().subsets[number]
    n = len(benchmark.blocks)
    rng = np.random.default_rng([seed, number])
    return np.sort(rng.choice(n, max(1, round(fraction * n)), replace=False)).astype(np.int64)


def _subsets_hash(subsets: Sequence[np.ndarray]) -> str:
    """Hash the subsets' rows to sixteen hexadecimal digits."""
    hashed = hashlib.sha256()
    for rows in subsets:
        hashed.update(len(rows).to_bytes(8, "little") + rows.tobytes())
    return hashed.hexdigest()[:16]


def _check(benchmark: Benchmark, subsets: int, fraction: float, seeds: int, like: bool) -> None:
    if subsets < 1 or seeds < 1:
        raise StrideError(f"{subsets} subsets and {seeds} seeds make no model; both must be at least 1.")
    if not like and not 0 < fraction < 1:
        raise StrideError(f"The fraction of the pool in a subset is {fraction}; it must lie between 0 and 1.")
    if like and subsets > len(benchmark.retrained().subsets):
        raise StrideError(
            f"{subsets} subsets were requested, and the results in {benchmark.name} have "
            f"{len(benchmark.retrained().subsets)}; lower the number."
        )


def _claim_work(store: Store, keys: dict[str, Any]) -> Stage:
    """Claim the folder of single trainings; refuse an output folder that holds results of another origin."""
    work = store.child(WORK)
    if (results := _results(store)) and not work.exists("stage.json"):
        raise StrideError(
            f"{store.display_url(results[0])} is there already and was not made by this command; use another output "
            "folder."
        )
    return claim(work, "retrain", keys)


def _results(store: Store) -> list[str]:
    return [name for start, end in (NPZ, JSONL) for name in store.names("", end) if name.startswith(start)]


def _train_one(
    url: str,
    fingerprint: str,
    recipe_name: str,
    draw: tuple[float, int, bool],
    stage: Stage,
    device: str,
    unit: tuple[int, int, str],
) -> dict[str, Any]:
    """Run one training in a worker; publish the losses first, the done marker last."""
    started = time.monotonic()
    hide_gpus(device)
    number, seed, name = unit
    benchmark, recipe = load_benchmark_and_recipe(url, fingerprint, recipe_name)
    rows = subset_rows(benchmark, number, *draw)
    told = f"Recipe {recipe_name}, subset {number}, seed {seed}"
    losses = checked_losses(recipe.losses(recipe.train(rows, seed)), len(benchmark.queries), told)
    write_array(stage.store, f"losses/{name}.npy", losses)
    return stage.mark(name, started, mean_loss=float(losses.mean()))


def checked_losses(losses: Any, queries: int, told: str) -> np.ndarray:
    """Validate a recipe's query losses and return them as float32 (queries,).

    Raises:
        StrideError: if they are not one finite number per query; the message begins with ``told``.
    """
    found = np.asarray(losses, dtype=np.float32)
    if found.shape != (queries,) or not np.isfinite(found).all():
        raise StrideError(
            f"{told}: losses() must give {queries} finite numbers, one per query; it gave shape {found.shape} with "
            f"{int(np.isfinite(found).sum())} finite."
        )
    return found


def write_array(store: Store, name: str, values: np.ndarray) -> None:
    """Publish an array as a ``.npy`` file with a checksum after its end, which other readers skip."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    data = buffer.getvalue()
    store.write(name, data + xxhash.xxh3_128_digest(data))


@functools.lru_cache(maxsize=1)
def load_benchmark_and_recipe(url: str, fingerprint: str, recipe_name: str) -> tuple[Benchmark, Recipe]:
    """Load benchmark and recipe, once per process.

    Raises:
        StrideError: if the folder has changed since the driver read it.
    """
    benchmark = reread_benchmark(url, fingerprint)
    return benchmark, load_recipe(recipe_name, benchmark)


def read_array(store: Store, name: str) -> np.ndarray:
    """Read an array written by ``write_array``.

    Raises:
        StrideError: if it is missing, or not as it was written.
    """
    stored = store.read(name)
    data = stored[:-_CHECKSUM_BYTES]
    if xxhash.xxh3_128_digest(data) != stored[-_CHECKSUM_BYTES:]:
        marker = f"_done/{name.rpartition('/')[2].removesuffix('.npy')}.json"
        raise StrideError(
            f"{store.display_url(name)} was damaged or changed: its checksum differs; restore it, or delete it and its "
            f"marker, {marker}, and run the same command again."
        )
    return np.load(io.BytesIO(data), allow_pickle=False)


def _publish(store: Store, truth: RetrainingResults, n_blocks: int) -> None:
    """Write the results and remove those of an earlier command's extra seeds, which would contradict them."""
    wanted = {f"{start}{name}{end}" for name in truth.names for start, end in (NPZ, JSONL)}
    for name in set(_results(store)) - wanted:
        store.remove(name)
    write_truth(store, truth, np.arange(n_blocks))


def _summary(
    benchmark: Benchmark, truth: RetrainingResults, trained: int, store: Store, seconds: float
) -> dict[str, Any]:
    seeds, subsets, _ = truth.losses.shape
    ceiling = evaluate({}, truth, benchmark.kinds, benchmark.parts, draws=0).ceiling()
    told = (
        f"{subsets} subsets of {truth.size_range} of {len(benchmark.blocks)} blocks, {seeds} seed(s) each: {trained} "
        f"models trained now in {seconds:.0f} s, {subsets * seeds} in all. Mean loss of {len(benchmark.queries)} "
        f"queries {truth.losses.mean():.4f} nats; between subsets a query's loss varies by "
        f"{truth.losses.mean(0).std(0).mean():.4f} (standard deviation, mean over queries). "
    )
    if ceiling:
        told += f"One seed's losses order the subsets as another's do with correlation {ceiling.value:.3f}. "
    told += f"The results are in {store.display_url('')}: retraining_seed*.npz, lds_seed*.jsonl."
    return {
        "subsets": subsets,
        "seeds": seeds,
        "trained": trained,
        "models": subsets * seeds,
        "mean_loss": float(truth.losses.mean()),
        "agreement": ceiling.value if ceiling else None,
        "summary": told,
    }
