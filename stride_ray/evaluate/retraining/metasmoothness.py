"""Metasmoothness: can attribution work for a recipe at all, that is, do parameters respond linearly to data weights?

It trains three times, with block weights 1, 1 + h·v and 1 + 2h·v, v ~ N(0, I) (Engstrom et al. 2025, arXiv 2503.13751).
If the second step moves the parameters as the first did, the effect of small changes in a block's weight is
predictable. If it moves them in an unrelated direction, no influence function can predict retraining for this recipe.
"""

import inspect
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from stride_ray.evaluate.retraining.benchmark import Benchmark
from stride_ray.evaluate.retraining.recipe import DEFAULT, load_recipe, recipe_identity
from stride_ray.evaluate.retraining.retrain import load_benchmark_and_recipe, read_array, write_array
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Stage, claim
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import allocate_workers, connected, hide_gpus, map_tasks

# h: standard deviation of the first step in a block's weight; the second step has the same size.
STEP = 0.1


def metasmoothness(
    benchmark: Benchmark,
    recipe_name: str = DEFAULT,
    out: str = "metasmoothness",
    draws: int = 3,
    seed: int = 0,
    step: float = STEP,
    compute: ComputeConfig | None = None,
) -> dict[str, Any]:
    """Train with weights 1, 1 + h·v and 1 + 2h·v for several v, and compare how the parameters moved.

    S = Σ_i |Δ_i| sign(θ_h − θ_0)_i sign(θ_2h − θ_h)_i / Σ_i |Δ_i| with Δ = θ_2h − θ_0: 1 if every parameter keeps its
    direction, 0 if it reverses half of the time.

    Args:
        benchmark: its whole pool is trained on.
        recipe_name: see ``load_recipe``; its ``train(rows, seed, weights)`` must take one weight per row and return a
            ``torch.nn.Module``.
        out: a path or fsspec URL; a rerun resumes there.
        draws: number of draws of v.
        seed: for v, and for every training, so that trainings differ in their weights only.
        step: h.
        compute: where to run; None: a local Ray with a worker per CPU.

    Returns:
        ``smoothness``, the mean of S over draws; ``each``, S per draw; ``summary``, a sentence.

    Raises:
        StrideError: for a recipe without weights, a folder made with other settings, or parameters that are not finite.
    """
    if draws < 1 or not step > 0:
        raise StrideError(
            f"{draws} draws of steps of {step} measure nothing; draws must be at least 1 and step positive."
        )
    if "weights" not in inspect.signature(load_recipe(recipe_name, benchmark).train).parameters:
        raise StrideError(f"Recipe {recipe_name}: its train(rows, seed) takes no weights; add weights=None, one a row.")
    keys = {"benchmark": benchmark.fingerprint, "recipe": recipe_identity(recipe_name), "seed": seed, "step": step}
    stage = claim(Store(out), "metasmoothness", keys)
    units = [(0, 0), *((draw, times) for draw in range(draws) for times in (1, 2))]
    resources = compute or ComputeConfig()

    def train(missing: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        with connected(resources):
            workers = allocate_workers(resources, len(missing))
            shared = (benchmark.url, benchmark.fingerprint, recipe_name, stage, workers.device, seed, step)
            yield from map_tasks(_train_one, shared, missing, workers)

    run_missing(stage, {_name(unit): unit for unit in units}, train, "train", "models")
    start, *moved = (read_array(stage.store, f"{_name(unit)}.npy") for unit in units)
    each = [smoothness(start, one, two) for one, two in zip(moved[::2], moved[1::2], strict=True)]
    mean = float(np.mean(each))
    spread = f", from {min(each):.3f} to {max(each):.3f}" if draws > 1 else ""
    told = f"Metasmoothness {mean:.3f} ({draws} draw(s) of weights{spread}; h = {step:g}): 1 is straight, 0 is noise."
    return {"smoothness": mean, "each": each, "summary": told}


def smoothness(start: np.ndarray, one: np.ndarray, two: np.ndarray) -> float:
    """S of parameters (P,) after training at weights 1, 1 + h·v and 1 + 2h·v; nan if no parameter moved."""
    size = np.abs(two - start, dtype=np.float64)
    agree = np.sign(one - start) * np.sign(two - one)
    total = float(size.sum())
    return float((size * agree).sum()) / total if total else float("nan")


def _name(unit: tuple[int, int]) -> str:
    """Return the unit's file name; all draws share θ_0, "start"."""
    return f"draw-{unit[0]:03d}-step-{unit[1]}" if unit[1] else "start"


def _train_one(
    url: str,
    fingerprint: str,
    recipe_name: str,
    stage: Stage,
    device: str,
    seed: int,
    step: float,
    unit: tuple[int, int],
) -> dict[str, Any]:
    """Run one training in a worker; publish the parameters first, the done marker last."""
    started = time.monotonic()
    hide_gpus(device)
    draw, times = unit
    benchmark, recipe = load_benchmark_and_recipe(url, fingerprint, recipe_name)
    train: Any = recipe.train  # the driver has checked that it takes weights
    n = len(benchmark.blocks)
    v = np.random.default_rng([seed, draw]).standard_normal(n)
    trained = train(np.arange(n), seed, weights=1 + times * step * v)
    with torch.no_grad():
        parameters = torch.cat([p.detach().flatten().float().cpu() for p in trained.parameters()]).numpy()
    if not np.isfinite(parameters).all():
        raise StrideError(f"Recipe {recipe_name}, {_name(unit)}: the trained parameters are not finite.")
    write_array(stage.store, f"{_name(unit)}.npy", parameters)
    return stage.mark(_name(unit), started)
