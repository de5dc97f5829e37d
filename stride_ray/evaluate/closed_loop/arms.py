"""Closed loop: does training on selected data beat training on equally much data selected at random or by rivals?

Arms of equal size are trained by the run's recipe with several seeds, and evaluated on queries not used for selection:
the other half of each target set, split by seed, or separate query sets. A work unit is one training, a Ray task with a
done marker, so an interrupted command resumes where it stopped.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.attribution.attribute import read_influence, stored_queries
from stride_ray.corpus.blocks import fixed_lists
from stride_ray.corpus.queries import fingerprint
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.evaluate.baselines.problem import Texts
from stride_ray.evaluate.closed_loop.answer_f1 import answer_f1, has_answers
from stride_ray.evaluate.closed_loop.rivals import RIVALS, USUAL, chosen_rivals, rival_targets
from stride_ray.evaluate.retraining.benchmark import Benchmark, unretrained_benchmark
from stride_ray.evaluate.retraining.lds import Interval, mean_interval
from stride_ray.evaluate.retraining.recipe import DEFAULT, load_recipe, recipe_identity
from stride_ray.evaluate.retraining.retrain import checked_losses, read_array, write_array
from stride_ray.models.query_batches import refuse_contrasts
from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Run, Stage, claim
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import allocate_workers, connected, hide_gpus, map_tasks
from stride_ray.selection.select import RANDOM, select, select_by

SELECTED = "selected"
# Each arm's folder inside the output folder; a rival's is named like the rival.
FOLDERS = {SELECTED: SELECTED, RANDOM: f"{SELECTED}/{RANDOM}"} | {rival.name: slug for slug, rival in RIVALS.items()}
# Measures of a trained model, and the folder of each in ``_retrain``.
LOSS, F1 = "loss, nats per token", "unigram F1"
MEASURES = {LOSS: "losses", F1: "f1"}


@dataclass(frozen=True)
class ClosedLoop:
    """Results of the arms.

    Attributes:
        selected_by, measured_on: numbers of queries.
        seeds: trainings per arm.
        tokens: training tokens per arm; ``pool_tokens`` is the pool's total.
        trainings: per arm, a name for each seed's training; ``_retrain/losses/<name>.npy`` has its queries' losses.
        arms: by measure (LOSS, and F1 for queries with prompts) and arm.
        differences: by measure, the selected arm minus each other arm, paired by query and seed.
    """

    selected_by: int
    measured_on: int
    seeds: int
    tokens: dict[str, int]
    pool_tokens: int
    trainings: dict[str, list[str]]
    arms: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]

    def as_table(self) -> str:
        """Format the results as Markdown."""
        lines = [
            f"Selected by {self.selected_by} queries, measured on {self.measured_on} others; {self.seeds} trainings an "
            f"arm; the pool has {self.pool_tokens} tokens. Intervals: 95 %, over queries and seeds.",
        ]
        for measure, arms in self.arms.items():
            lines += ["", f"| arm | tokens | {measure} | selected minus this |", "|---|---|---|---|"]
            for arm, figure in arms.items():
                other = self.differences[measure].get(arm)
                row = [arm, str(self.tokens[arm]), f"{figure:.4f}", f"{other:+.4f}" if other else ""]
                lines.append("| " + " | ".join(row) + " |")
        return "\n".join(lines)


def closed_loop(
    run: Run,
    names: Sequence[str],
    out: str,
    measure: Sequence[str] = (),
    seeds: int = 3,
    recipe: str = DEFAULT,
    rivals: Sequence[str] = USUAL,
) -> ClosedLoop:
    """Select, train on each arm, and evaluate on held-out queries.

    Training begins from ``model.start``, or from random weights of the model's shape, as in
    ``evaluate.retraining.finetune.FineTune``, unless another recipe is given. A rival's arm selects as many tokens
    under the same quotas, but by its own scores of documents (rivals.py).

    Args:
        run: attributed on the names; its ``select`` options set the method and the amount.
        names: target query sets. If ``measure`` is empty, half of each set's queries selects and the other half
            measures.
        out: a path or fsspec URL; gets the arms, the trainings' losses and ``closed_loop.json``.
        measure: query sets of the run to measure on.
        seeds: trainings per arm.
        recipe: see ``evaluate.retraining.recipe.load_recipe``.
        rivals: names of RIVALS, an arm each.

    Raises:
        StrideError: too few queries, an empty selection, a set that both selects and measures, an unknown rival, or as
            ``select``.
    """
    names = list(dict.fromkeys(names))
    if both := sorted(set(names) & set(measure)):
        raise StrideError(
            f"The query set {both[0]!r} is to select and to measure; measure on queries that do not select."
        )
    good = {name: _shuffled_successful_ids(run, name) for name in [*names, *measure]}
    chosen = {name: good[name] if measure else good[name][: len(good[name]) // 2] for name in names}
    asked = {name: good[name] for name in measure} or {name: good[name][len(good[name]) // 2 :] for name in names}
    if not all([*chosen.values(), *asked.values()]):
        raise StrideError("A target set has fewer than two good queries; one half selects and the other measures.")
    return compare_arms(run, chosen, asked, out, seeds, recipe, rivals)


def compare_arms(
    run: Run,
    chosen: Mapping[str, Sequence[str]],
    asked: Mapping[str, Sequence[str]],
    out: str,
    seeds: int = 3,
    recipe: str = DEFAULT,
    rivals: Sequence[str] = USUAL,
) -> ClosedLoop:
    """Run ``closed_loop`` on given query ids of each set: ``chosen`` ones select, ``asked`` ones measure."""
    if seeds < 1:
        raise StrideError(f"{seeds} seeds make no model; there must be at least 1.")
    store, compared = Store(out), chosen_rivals(rivals)
    questions = pa.concat_tables([_filter_queries(stored_queries(run, name), ids) for name, ids in asked.items()])
    refuse_contrasts(questions.to_pylist(), "a closed loop")
    summary = select(run, list(chosen), f"{store.url}/{FOLDERS[SELECTED]}", blocks=True, queries=chosen)
    if not summary["kept"]["tokens"]:
        raise StrideError("Nothing was selected; ask for more documents or tokens.")
    size = {"select.documents": 0, "select.tokens": summary["kept"]["tokens"], "select.drop": "none"}
    selecting = {name: _filter_queries(stored_queries(run, name), ids) for name, ids in chosen.items()}
    told = {SELECTED: summary["kept"], RANDOM: summary["random"]}
    for slug, targets in rival_targets(run, selecting, store.child("_rivals"), compared).items():
        rival = compared[slug]
        other = Run(run.url, run.config, {**size, "select.by": rival.by})
        told[rival.name] = select_by(other, targets, f"{store.url}/{slug}", blocks=True)["kept"]
    trainings = {
        arm: [f"{FOLDERS[arm].replace('/', '-')}-{digest(facts['files'])}-seed-{seed}" for seed in range(seeds)]
        for arm, facts in told.items()
    }
    measured = _train(run, store, questions, trainings, recipe)
    found = ClosedLoop(
        selected_by=sum(map(len, chosen.values())),
        measured_on=questions.num_rows,
        seeds=seeds,
        tokens={arm: facts["tokens"] for arm, facts in told.items()},
        pool_tokens=summary["pool"]["tokens"],
        trainings=trainings,
        arms={what: {arm: mean_interval(each) for arm, each in by.items()} for what, by in measured.items()},
        differences={
            what: {arm: mean_interval(by[SELECTED] - each) for arm, each in by.items() if arm != SELECTED}
            for what, by in measured.items()
        },
    )
    store.write_json("closed_loop.json", asdict(found))
    return found


def _shuffled_successful_ids(run: Run, name: str) -> list[str]:
    """Return a set's successful queries, shuffled by the seed and their ids."""
    rows = read_influence(run, name, "recovery").to_pylist()
    good = [row["query_id"] for row in rows if row["status"] == "ok"]
    seed = f"{run.config.seed}/{name}/"
    return sorted(good, key=lambda query: hashlib.blake2b((seed + query).encode()).digest())


def _filter_queries(table: pa.Table, ids: Sequence[str]) -> pa.Table:
    wanted = set(ids)
    return table.filter(pa.array([query in wanted for query in table["query_id"].to_pylist()]))


def _train(
    run: Run, store: Store, questions: pa.Table, trainings: Mapping[str, Sequence[str]], recipe: str
) -> dict[str, dict[str, np.ndarray]]:
    """Train the arms and return, by measure and arm, (seeds, queries) float32."""
    store.write_table("queries.parquet", questions)
    model, start = run.config.model.path, run.config.model.start
    keys = {
        "model": model,
        "start": start,
        "recipe": recipe_identity(recipe),
        "queries": fingerprint(questions),
    }
    stage = claim(store.child("_retrain"), "closed loop", keys)
    tokenizer = run.stage("blocks").store.child("tokenizer").url
    load_recipe(recipe, arm_benchmark(store, FOLDERS[SELECTED], model, start))  # fails here with a clear error
    units = {name: (arm, seed, name) for arm, names in trainings.items() for seed, name in enumerate(names)}

    def train(missing: list[Any]) -> Iterator[dict[str, Any]]:
        with connected(run.config.compute):
            workers = allocate_workers(run.config.compute, len(missing))
            given = (store, stage, model, start, recipe, tokenizer, workers.device)
            yield from map_tasks(train_arm, given, missing, workers)

    markers = run_missing(stage, units, train, "train", "models")
    measured = [what for what in MEASURES if what == LOSS or markers[0]["f1"] is not None]
    return {what: read_measured(store, what, trainings) for what in measured}


def read_measured(store: Store, measure: str, trainings: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """By arm, (seeds, queries) float32 of a finished loop's trainings; ``store`` is the loop's folder."""
    return {
        arm: np.stack([read_array(store, f"_retrain/{MEASURES[measure]}/{name}.npy") for name in names])
        for arm, names in trainings.items()
    }


def train_arm(
    store: Store,
    stage: Stage,
    model: str,
    start: str,
    recipe_name: str,
    tokenizer: str,
    device: str,
    unit: tuple[str, int, str],
) -> dict[str, Any]:
    """Run one training in a worker; publish the measurements first, the done marker last."""
    started = time.monotonic()
    hide_gpus(device)
    arm, seed, name = unit
    benchmark = arm_benchmark(store, FOLDERS[arm], model, start)
    recipe = load_recipe(recipe_name, benchmark)
    trained = recipe.train(np.arange(len(benchmark.blocks)), seed)
    told = f"Recipe {recipe_name}, arm {arm}, seed {seed}"
    losses = checked_losses(recipe.losses(trained), len(benchmark.queries), told)
    write_array(stage.store, f"losses/{name}.npy", losses)
    queries = store.read_table("queries.parquet").to_pylist()
    f1 = None
    if has_answers(queries) and hasattr(trained, "generate"):
        found = answer_f1(trained, load_tokenizer(tokenizer), queries)
        write_array(stage.store, f"f1/{name}.npy", found)
        f1 = float(found.mean())
    return stage.mark(name, started, mean_loss=float(losses.mean()), f1=f1)


def arm_benchmark(store: Store, arm: str, model: str, start: str) -> Benchmark:
    """An arm's blocks and the measured queries as a recipe's benchmark; tokens without loss are masked."""
    data = store.child(f"{arm}/data")
    tables = [data.read_table(name, ["token_ids", "loss_mask"]) for name in data.names("", ".parquet")]
    table = pa.concat_tables(tables)
    width = table["token_ids"].type.list_size
    blocks = Texts(fixed_lists(table["token_ids"], width, 0), fixed_lists(table["loss_mask"], width, True))
    queries = store.read_table("queries.parquet").to_pylist()
    return unretrained_benchmark(data.url, blocks, queries, model, start, digest([data.url]))
