"""Removal curves of methods on a benchmark of clouds: same-class examples matter, and what is published says so."""

import argparse

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from conftest import run_plainly
from test_classification import SHORT, N, Q, blobs

from stride_ray.cli.arguments import shares
from stride_ray.evaluate.comparison.removals import SCHEMA, TOP, RemovalCurve, compare_removals, concentration
from stride_ray.evaluate.retraining.classification import write_benchmark
from stride_ray.evaluate.retraining.results import write_scores
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.storage import Store


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return write_benchmark(blobs(), str(tmp_path_factory.mktemp("removals") / "benchmark"), Q, 8, 2, SHORT)


@pytest.fixture
def store(benchmark, tmp_path):
    """A folder with the scores of an oracle, of its opposite, of noise, and of a method that finds nothing."""
    out = Store(str(tmp_path / "out"))
    same = (benchmark.queries.ids[:, 1:] == benchmark.blocks.ids[:, 1]).astype(np.float32)
    noise = 0.01 * np.random.default_rng(0).random((Q, N)).astype(np.float32)
    write_scores(out, "oracle.npz", scipy.sparse.csr_array(same * (1 + noise)))
    write_scores(out, "opposite.npz", (1 - same) * (1 + noise))
    write_scores(out, "nothing.npz", 0 * same)
    return out


def measured(benchmark, store, *names, **options):
    wanted = RemovalCurve((0.1, 0.3), **{"per_query": 2, "seeds": 2, **options})
    return compare_removals(benchmark, store, {name: f"{name}.npz" for name in names}, wanted, ComputeConfig())


def test_without_examples_of_its_class_a_query_costs_more(benchmark, store, monkeypatch):
    run_plainly(monkeypatch)
    found = measured(benchmark, store, "oracle", "opposite", "nothing")
    small, large = found.curves["oracle"]
    assert (small.blocks, large.blocks, large.queries) == (4, 12, 2)
    assert large.difference.low > 0
    assert large.first.value > small.first.value
    assert found.curves["opposite"][1].first.value < large.first.value - 0.1
    assert found.curves["opposite"][1].random == large.random
    assert list(found.failed) == ["nothing"]
    assert "0 have a positive influence on query 4; remove a smaller share" in found.failed["nothing"]
    table = pq.read_table(f"{store.url}/removal.parquet")
    assert table.schema.equals(SCHEMA)
    row = table.to_pylist()[1]
    assert (row["method"], row["share"], row["blocks"]) == ("oracle", 0.3, 12)
    assert (row["first"], row["difference_low"]) == (large.first.value, large.difference.low)
    lines = store.read("removal.md").decode().splitlines()
    assert [line.split(" | ")[1] for line in lines if line.startswith("| 0.3")] == ["oracle", "opposite"]
    plotted = store.read("removal.svg")
    assert b"uniform" in plotted
    assert b"blocks drawn at random" in plotted
    assert b"opposite" in plotted
    # Again: nothing is trained, and the same bytes are written.
    monkeypatch.setattr("stride_ray.evaluate.retraining.removal.map_tasks", lambda *_: pytest.fail("trained again"))
    again = measured(benchmark, store, "oracle", "opposite", "nothing")
    assert again.curves == found.curves
    assert store.read("removal.svg") == plotted


def test_the_trainings_of_one_method_are_the_next_one_s(benchmark, store, monkeypatch):
    run_plainly(monkeypatch)
    measured(benchmark, store, "opposite", per_query=0, seeds=1)
    assert len(store.names("removal/losses")) == 1 + 2 + 2  # whole, random and first
    measured(benchmark, store, "opposite", "oracle", per_query=0, seeds=1)
    assert len(store.names("removal/losses")) == 1 + 2 + 4
    with pytest.raises(StrideError, match="removes no block of a pool of 40"):
        compare_removals(benchmark, store, {}, RemovalCurve((0.001,)), ComputeConfig())


def test_concentration_is_the_top_s_share_of_what_is_positive():
    scores = np.array([[3.0, 0.0, 1.0, -2.0], [0.0, -1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    one = concentration(scores, [0])
    assert one[TOP <= 0.25].tolist() == [0.75] * int((TOP <= 0.25).sum())
    assert (one[TOP > 0.25] == 1.0).all()
    both = concentration(scipy.sparse.csr_array(scores), [0, 1, 2])  # the second has nothing positive
    np.testing.assert_allclose(both, (one + np.ceil(4 * TOP) / 4) / 2)
    assert np.isnan(concentration(scores, [1])).all()


@pytest.mark.parametrize("text", ["", "1", "0", "0.1,", "a", "0.1,nan", "-0.1"])
def test_shares_that_are_none(text):
    assert shares("0.1,0.2") == (0.1, 0.2)
    with pytest.raises(argparse.ArgumentTypeError, match="is not a list of shares between 0 and 1"):
        shares(text)
