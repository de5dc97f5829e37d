"""A benchmark's folder: any lengths, columns and architecture, and what is wrong with it told in a sentence."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from stride_ray.evaluate.retraining.benchmark import read_benchmark
from stride_ray.evaluate.retraining.results import RetrainingResults, write_truth
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store

VOCABULARY, CONTEXT = 50, 24
LENGTHS = [5, 12, 1, 20, 7, 16, 24, 9] * 3
QUERY_LENGTHS = [6, 24, 11, 2, 18]


def sequences(lengths, seed):
    """Token ids with something to learn: each follows the one before it, now and then not."""
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        steps = np.where(rng.random(length) < 0.8, 3, rng.integers(0, VOCABULARY, length))
        found.append(((rng.integers(0, VOCABULARY) + np.cumsum(steps)) % VOCABULARY).tolist())
    return found


def write_benchmark(folder, start=True, **columns):
    """A tiny benchmark with a GPT-2 and sequences of many lengths; further columns of the queries by name."""
    folder.mkdir(parents=True)
    pool = pa.array(sequences(LENGTHS, 0), pa.list_(pa.int32()))
    pq.write_table(pa.table({"token_ids": pool}), folder / "pool.parquet")
    queries = {"token_ids": pa.array(sequences(QUERY_LENGTHS, 1), pa.large_list(pa.int64())), **columns}
    pq.write_table(pa.table(queries), folder / "queries.parquet")
    sizes = {"n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2}
    for seed, name in enumerate(["model", "start"] if start else ["model"]):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)
        GPT2LMHeadModel(config).save_pretrained(folder / name)
    return str(folder)


def write_results(folder, n_queries=5):
    rng = np.random.default_rng(0)
    subsets = tuple(np.sort(rng.choice(len(LENGTHS), n, replace=False)) for n in (9, 12, 12))
    truth = RetrainingResults(subsets, rng.random((2, 3, n_queries)).astype(np.float32), ("seed0", "seed1"))
    write_truth(Store(str(folder)), truth, np.arange(len(LENGTHS)))
    return truth


def test_sequences_of_any_length(tmp_path):
    folder = write_benchmark(tmp_path / "made")
    benchmark = read_benchmark(folder)
    for texts, given in (
        (benchmark.blocks, sequences(LENGTHS, 0)),
        (benchmark.queries, sequences(QUERY_LENGTHS, 1)),
    ):
        assert (texts.ids.dtype, texts.mask.dtype) == (np.int32, bool)
        assert [texts.tokens(row).tolist() for row in range(len(texts))] == given
        assert not texts.ids[~texts.mask].any()
    assert benchmark.name == "made"
    assert benchmark.kinds.tolist() == benchmark.parts.tolist() == ["all"] * 5


def test_kinds_parts_and_results(tmp_path):
    kinds, parts = ["near", "far", "far", "near", "near"], ["report", "report", "development", "report", "development"]
    folder = write_benchmark(tmp_path / "made", kind=kinds, part=parts)
    with pytest.raises(StrideError, match=r"holds no retraining_.*make them with 'python jobs/retrain.py'"):
        read_benchmark(folder).retrained()
    truth = write_results(folder)
    benchmark = read_benchmark(folder)
    assert (benchmark.kinds.tolist(), benchmark.parts.tolist()) == (kinds, parts)
    np.testing.assert_array_equal(benchmark.retrained().losses, truth.losses)


def test_problem_holds_no_results(tmp_path):
    folder = write_benchmark(tmp_path / "made")
    write_results(folder)
    problem = read_benchmark(folder).problem(("a", "b"), (1e-3, 5e-4), seed=3)
    assert (problem.model, problem.start) == (f"{folder}/model", f"{folder}/start")
    assert (problem.checkpoints, problem.learning_rates, problem.seed) == (("a", "b"), (1e-3, 5e-4), 3)
    assert not any(isinstance(value, RetrainingResults) for value in vars(problem).values())
    assert read_benchmark(write_benchmark(tmp_path / "scratch", start=False)).problem().start is None


def test_fixed_lists_of_another_benchmark(tmp_path):
    folder = write_benchmark(tmp_path / "made")
    ids = np.arange(60, dtype=np.int32).reshape(10, 6) % VOCABULARY
    column = pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), 6)
    pq.write_table(pa.table({"document": ["x"] * 10, "token_ids": column}), tmp_path / "made" / "pool.parquet")
    blocks = read_benchmark(folder).blocks
    np.testing.assert_array_equal(blocks.ids, ids)
    assert blocks.mask.all()


def test_fingerprint_follows_the_content(tmp_path):
    one, same = (read_benchmark(write_benchmark(tmp_path / name)).fingerprint for name in "ab")
    assert one == same
    table = pq.read_table(tmp_path / "b" / "pool.parquet")
    pq.write_table(table.slice(1), tmp_path / "b" / "pool.parquet")
    assert read_benchmark(str(tmp_path / "b")).fingerprint != one


def lists(rows, kind=None):
    return pa.table({"token_ids": pa.array(rows, kind or pa.list_(pa.int32()))})


BAD = [
    ("queries.parquet", pa.table({"text": ["a"]}), r"queries.parquet has no column token_ids \(it has text\)"),
    ("queries.parquet", lists([[1, 2], [3]]), "row 1: token_ids has 1 tokens; it needs at least 2"),
    ("pool.parquet", lists([[1, 2], None]), "pool.parquet, row 1: token_ids has 0 tokens"),
    ("pool.parquet", lists([[1, -2]]), "holds an empty, a negative"),
    ("pool.parquet", lists([[1, None]]), "holds an empty, a negative"),
    ("pool.parquet", lists([]), "has no rows"),
    ("pool.parquet", lists([[0.5]], pa.list_(pa.float32())), "must be lists of integers, not list"),
    ("queries.parquet", lists([[1, 2]]).append_column("kind", pa.array([None], pa.string())), "row 0: kind is empty"),
    ("queries.parquet", lists([[1, 2]]).append_column("kind", [[" "]]), "row 0: kind is empty"),
    ("queries.parquet", lists([[1, 2]]).append_column("part", [[float("nan")]]), "row 0: part is empty"),
    ("queries.parquet", lists([[1, 2]]).append_column("kind", [[["a"]]]), "kind must be texts, not list"),
    ("queries.parquet", lists([[1, 2]]).append_column("kind", [["a"]]).append_column("kind", [["b"]]), "two columns"),
    ("pool.parquet", lists([[1, 2]]).append_column("token_ids", [[1]]), "two columns named 'token_ids'; rename one"),
    ("pool.parquet", None, "pool.parquet is missing; it needs pool.parquet, queries.parquet and a model/ folder"),
    ("model/config.json", None, "model/config.json is missing"),
]


@pytest.mark.parametrize(("name", "table", "told"), BAD, ids=[told for _, _, told in BAD])
def test_bad_folders_are_told(tmp_path, name, table, told):
    folder = tmp_path / "made"
    write_benchmark(folder)
    (folder / name).unlink()
    if table is not None:
        pq.write_table(table, folder / name)
    with pytest.raises(StrideError, match=told):
        read_benchmark(str(folder))


def test_results_of_other_queries_are_told(tmp_path):
    folder = write_benchmark(tmp_path / "made")
    write_results(folder, n_queries=4)
    with pytest.raises(StrideError, match="4 losses a subset, and there are 5 queries"):
        read_benchmark(folder)
