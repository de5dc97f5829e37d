"""Removal and retraining: a recipe of closed form, resuming, a tiny Llama without a query's twins, what is refused."""

import contextlib
import functools
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import documents, run_plainly, save_model, save_tokenizer, settings, write_lines

from stride_ray.attribution.attribute import attribute, read_influence
from stride_ray.corpus.shard import shard
from stride_ray.evaluate.baselines.problem import Texts
from stride_ray.evaluate.retraining.benchmark import Benchmark
from stride_ray.evaluate.retraining.removal import Retraining, _random_blocks, measure_removals, ranking_of
from stride_ray.evaluate.verify import verify
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.run import Run, Stage, claim
from stride_ray.runtime.storage import Store

N, Q, T, V, SEEDS = 60, 4, 12, 20, 3
RECIPE = """
from stride_ray.evaluate.retraining.finetune import FineTune


def short(benchmark):
    return FineTune(benchmark, epochs=4, batch=16, warmup_steps=2, learning_rate=0.02, bfloat16=False)


def no_numbers(benchmark):
    class Spoilt(FineTune):
        def losses(self, trained):
            return super().losses(trained) * float("nan")

    return Spoilt(benchmark, epochs=1)
"""


class Unigram:
    """Word frequencies with add-one smoothing, as a recipe: its losses have a closed form."""

    def __init__(self, benchmark):
        self.benchmark = benchmark

    def train(self, rows, seed):
        words = self.benchmark.blocks.ids[rows]
        return np.log((words.size + V) / (np.bincount(words.ravel(), minlength=V) + 1)), seed

    def losses(self, trained):
        costs, seed = trained
        # A seed moves every query's loss by something of its own: paired differences do not see it.
        return costs[self.benchmark.queries.ids].mean(1) + np.random.default_rng(seed).normal(0, 5, Q)


@functools.cache
def toy():
    """A pool in which blocks 0 … 5 repeat query 0, whose words are rare elsewhere; and its recipe."""
    rng = np.random.default_rng(0)
    ids, asked = rng.integers(4, V, (N, T)), rng.integers(4, V, (Q, T))
    asked[0] = rng.integers(0, 4, T)
    ids[:6] = asked[0]
    texts = [Texts(each.astype(np.int32), np.ones(each.shape, bool)) for each in (ids, asked)]
    benchmark = Benchmark("toy", *texts, np.full(Q, "all"), np.full(Q, "all"), "", None, None, "")
    return benchmark, Unigram(benchmark)


@pytest.fixture
def retraining(tmp_path, plain):
    """Trainings of the toy in a new folder."""
    stage = claim(Store(str(tmp_path / "out")), "toy", {}, identity="toy")
    return Retraining(toy, stage, N, SEEDS, ComputeConfig())


def of_query_0(first=6):
    """The ranking that finds the repeated blocks, the last of them first."""
    scores = np.zeros(N)
    scores[:first] = np.arange(1, first + 1)
    return ranking_of(scores, [0], "query 0")


def closed_form(removed):
    """Query 0's loss after training without some blocks, without a seed's share."""
    benchmark, recipe = toy()
    costs, _ = recipe.train(np.setdiff1d(np.arange(N), removed), 0)
    return costs[benchmark.queries.ids[0]].mean()


def test_blocks_of_positive_influence_are_ranked_best_first_and_ties_by_ordinal():
    ranking = ranking_of(np.array([0.2, -1.0, 0.0, 0.7, 0.2]), [1], "it")
    assert ranking.blocks.tolist() == [3, 0, 4]
    assert ranking.influence.tolist() == [0.7, 0.2, 0.2]
    assert ranking.first(2).tolist() == [0, 3]


def test_a_larger_random_removal_contains_a_smaller_one():
    small, large = (_random_blocks(N, count, 1).tolist() for count in (5, 20))
    assert set(small) < set(large) < set(range(N))
    assert small == sorted(small)
    assert small != _random_blocks(N, 5, 2).tolist()


def test_the_rise_is_the_closed_form_s(retraining):
    one, two = measure_removals(retraining, [of_query_0()], [0.05, 0.1])
    assert (one.blocks, two.blocks, one.pool, one.queries, one.seeds) == (3, 6, N, 1, SEEDS)
    for found, removed in ((one, [3, 4, 5]), (two, range(6))):
        rise = closed_form(removed) - closed_form([])
        assert found.first.value == pytest.approx(rise, abs=1e-5)
        # Every seed removes the same: what seeds do to the loss itself is not in the interval.
        assert (found.first.low, found.first.high) == pytest.approx((rise, rise), abs=1e-5)
        assert found.difference.value == pytest.approx(found.first.value - found.random.value, abs=1e-6)
        assert found.random.value < rise / 2
        assert found.random.low < found.random.high  # every seed draws its own
        assert "above zero: retraining confirms the ranking" in found.verdict
    assert two.concentration == 1.0
    assert one.concentration == pytest.approx((4 + 5 + 6) / 21)
    assert two.first.value > one.first.value > 0


def test_a_ranking_of_the_wrong_blocks_is_not_confirmed(retraining):
    scores = np.zeros(N)
    scores[40:46] = 1.0
    (found,) = measure_removals(retraining, [ranking_of(scores, [0], "query 0")], [0.1])
    assert found.first.value == pytest.approx(closed_form(range(40, 46)) - closed_form([]), abs=1e-5)
    assert "retraining confirms" not in found.verdict


def test_each_ranking_is_measured_on_its_own_queries(retraining):
    wrong = np.zeros(N)
    wrong[40:46] = 1.0
    (found,) = measure_removals(retraining, [of_query_0(), ranking_of(wrong, [2, 3], "two")], [0.1])
    (alone,) = measure_removals(retraining, [ranking_of(wrong, [2, 3], "two")], [0.1])
    assert (found.queries, alone.queries) == (3, 2)
    expected = (closed_form(range(6)) - closed_form([]) + 2 * alone.first.value) / 3
    assert found.first.value == pytest.approx(expected, abs=1e-5)


def test_an_interrupted_measurement_goes_on_and_another_share_reuses_what_it_can(retraining, tmp_path, monkeypatch):
    undisturbed = measure_removals(retraining, [of_query_0()], [0.1])
    whole = Retraining(toy, claim(Store(str(tmp_path / "again")), "toy", {}, identity="toy"), N, SEEDS, ComputeConfig())
    trained, train = [], Unigram.train

    def stopping(recipe, rows, seed):
        trained.append((len(rows), seed))
        if len(trained) == 5:
            raise KeyboardInterrupt
        return train(recipe, rows, seed)

    monkeypatch.setattr(Unigram, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure_removals(whole, [of_query_0()], [0.1])
    assert len(whole.stage.store.names("_done")) == 4
    assert measure_removals(whole, [of_query_0()], [0.1]) == undisturbed
    assert len(trained) == 5 + 5  # of nine trainings, four were there
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "losses").iterdir()} for name in ("out", "again")
    )
    assert len(first) == 9
    assert first == second
    measure_removals(whole, [of_query_0()], [0.1, 0.05])
    assert sorted(trained[10:]) == [(57, seed) for seed in range(SEEDS) for _ in range(2)]


@pytest.mark.parametrize(
    ("share", "seeds", "told"),
    [
        (0.0, 1, r"share of the pool to remove is 0; it must lie between 0 and 1"),
        (1.0, 1, r"is 1; it must lie between 0 and 1"),
        (float("nan"), 1, r"is nan; it must lie between 0 and 1"),
        (0.005, 1, r"A share of 0.005 removes no block of a pool of 60; it must lie between 0.017 and 0.98"),
        (0.999, 1, r"removes every block of a pool of 60"),
        (0.5, 1, r"30 blocks are to be removed, and 6 have a positive influence on query 0; remove a smaller share"),
        (0.1, 0, r"0 seeds make no model; there must be at least 1"),
    ],
)
def test_what_cannot_be_removed_is_told(share, seeds, told, retraining):
    asked = Retraining(toy, retraining.stage, N, seeds, ComputeConfig())
    with pytest.raises(StrideError, match=told):
        measure_removals(asked, [of_query_0()], [share])
    assert not retraining.stage.store.names("_done")


@pytest.fixture(scope="module")
def attributed(tmp_path_factory):
    """A run on documents of which some hold a query word for word, with exact answers; a recipe."""
    root = tmp_path_factory.mktemp("verify")
    rare = "zebra quartz fjord waltz nymph"
    texts = [*documents(20), *(f"{rare} {rare} {rare}." for _ in range(4))]
    tokenizer = save_tokenizer(root / "tokenizer", texts)
    save_model(root / "model", texts, tokenizer, steps=40)
    corpus = write_lines(root / "corpus.jsonl", [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    asked = [{"id": "rare", "text": f"{rare} {rare}"}, {"id": "blank", "text": "a"}]
    queries = write_lines(root / "queries.jsonl", [*asked, {"id": "sea", "text": "the anchor met the tide"}])
    (root / "recipe.py").write_text(RECIPE)
    parts = SimpleNamespace(corpus=corpus, model=root / "model")
    with pytest.MonkeyPatch.context() as patch:
        run_plainly(patch)
        run = Run(
            str(root / "run"),
            changes=settings(parts, attribute__exact=True, corpus__layout="split", corpus__columns="id=id,text=text"),
        )
        shard(run)
        attribute(run, queries, "asked", io.StringIO())
    return SimpleNamespace(run=run, root=root, recipe=f"{root / 'recipe.py'}:short", queries=queries)


@pytest.fixture
def copy(attributed, tmp_path):
    """A copy of that run, to verify in."""
    shutil.copytree(attributed.root / "run", tmp_path / "run", ignore=shutil.ignore_patterns("verify"))
    return Run(str(tmp_path / "run"), attributed.run.config)


def test_without_its_twins_a_query_costs_more(attributed, copy, plain):
    found = verify(copy, "asked", share=0.08, seeds=2, recipe=attributed.recipe, per_query=1)
    removal = found.removal
    assert (removal.queries, found.per_query, found.failed, found.mode) == (1, 1, 1, "exact")
    assert removal.difference.low > 0.2
    table = read_influence(copy, "asked").to_pylist()
    best = [row for row in table if row["query_id"] == "rare" and row["rank"] <= removal.blocks]
    assert {"d20", "d21", "d22", "d23"} <= {row["document_id"] for row in best}
    retraining = Retraining(toy, Stage(Store(f"{copy.url}/verify/asked"), ""), removal.pool, 2, ComputeConfig())
    ordinals = np.sort([row["ordinal"] for row in best])
    rises = [(retraining.losses(ordinals, s) - retraining.losses(np.zeros(0, np.int64), s))[0] for s in range(2)]
    assert removal.first.value == pytest.approx(np.mean(rises), abs=1e-6)
    losses = {row["query_id"]: row["base_loss"] for row in read_influence(copy, "asked", "recovery").to_pylist()}
    assert found.attributed == pytest.approx(losses["rare"])


def test_the_whole_set_s_first_blocks_are_those_of_the_summed_influence(attributed, copy, plain):
    found = verify(copy, "asked", share=0.08, seeds=1, recipe=attributed.recipe)
    table = read_influence(copy, "asked").to_pandas().groupby("ordinal")["influence"].sum()
    best = np.sort(table.sort_values(ascending=False).index[: found.removal.blocks].to_numpy())
    names = Store(f"{copy.url}/verify/asked").names("losses")
    assert len(names) == 3
    retraining = Retraining(toy, Stage(Store(f"{copy.url}/verify/asked"), ""), found.removal.pool, 1, ComputeConfig())
    first = retraining.losses(best, 0)
    whole = retraining.losses(np.zeros(0, np.int64), 0)
    assert found.removal.first.value == pytest.approx(float((first - whole).mean()), abs=1e-6)
    assert (found.removal.queries, found.failed, found.per_query) == (2, 1, 0)


def test_the_verb_says_what_it_found_and_a_rerun_trains_nothing(attributed, copy, plain, told, monkeypatch):
    given = ["verify", copy.url, "--name", "asked", "--share", "0.08", "--seeds", "1", "--recipe", attributed.recipe]
    out = told(*given, code=0)
    line = next(line for line in out.splitlines() if line.startswith("Without the "))
    assert "blocks ranked first, the queries of 'asked' cost" in line
    assert "random blocks" in line
    assert "one training each does not show the noise of training: use more seeds" in out
    assert "2 queries (1 failed) with 1 training each by" in out
    assert "from random weights (model.start is empty)" in out
    files = {path: path.read_bytes() for path in (Path(copy.url) / "verify").rglob("*") if path.is_file()}
    assert json.loads((Path(copy.url) / "verify/asked/verification.json").read_text())["removal"]["seeds"] == 1
    monkeypatch.setattr("stride_ray.evaluate.retraining.removal.map_tasks", lambda *_: pytest.fail("trained again"))
    assert [each for each in told(*given, code=0).splitlines() if each.startswith("Without the ")] == [line]
    assert {path: path.read_bytes() for path in (Path(copy.url) / "verify").rglob("*") if path.is_file()} == files
    asked = pq.read_table(Path(copy.url) / "verify/asked/queries.parquet")["query_id"].to_pylist()
    assert asked == ["rare", "sea"]


def test_through_ray_it_is_the_same(attributed, copy, one_ray, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        run_plainly(patch)
        plainly = verify(copy, "asked", 0.08, 1, attributed.recipe)
    shutil.copytree(attributed.root / "run", tmp_path / "other", ignore=shutil.ignore_patterns("verify"))
    other = Run(str(tmp_path / "other"), attributed.run.config, {"compute.workers": 2})
    assert verify(other, "asked", 0.08, 1, attributed.recipe) == plainly


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            ["--name", "nothing"],
            "exact/nothing is not finished; run",
        ),
        (["--no-exact"], "Query set 'asked' has only exact influence"),
        (["--share", "2"], "The share of the pool to remove is 2; it must lie between 0 and 1"),
        (["--share", "0.0001"], "removes no block of a pool of"),
        (["--share", "0.97"], "have a positive influence on the queries together; remove a smaller share"),
        (["--share", "0.97", "--per-query", "1"], "have a positive influence on the query 'rare'; remove a smaller"),
        (["--recipe", "nowhere.py:short"], "Recipe file nowhere.py does not exist"),
        (["--recipe", "recipe"], "is not package.module:attribute or file.py:attribute"),
        (["--start", "/nowhere"], "model path /nowhere does not exist"),
    ],
)
def test_what_cannot_be_verified_is_told(given, sentence, copy, told, plain):
    name = [] if "--name" in given else ["--name", "asked"]
    assert sentence in told("verify", copy.url, *name, *given)


def test_losses_that_are_no_numbers_a_pool_that_grew_and_queries_that_all_failed_are_told(
    attributed, copy, told, plain, tmp_path
):
    asked = ["verify", copy.url, "--name", "asked", "--share", "0.08"]
    spoilt = f"{attributed.root / 'recipe.py'}:no_numbers"
    assert "losses() must give 2 finite numbers" in told(*asked, "--seeds", "1", "--recipe", spoilt)
    short = write_lines(tmp_path / "short.jsonl", [{"id": "short", "text": "a"}])
    with contextlib.suppress(StrideError):
        attribute(copy, short, "short", io.StringIO())
    assert "failed" in told("verify", copy.url, "--name", "short", "--share", "0.08")
    more = write_lines(tmp_path / "more.jsonl", [{"id": "new", "text": "the gull met the storm"}])
    shard(Run(copy.url, copy.config, {"corpus.input": [str(attributed.root / "corpus.jsonl"), more]}))
    assert "was made from other blocks than are in the pool now" in told(*asked)
    assert "is not finished; run 'stride-ray shard' first" in told("verify", tmp_path / "new", "--name", "asked")
