"""Retraining results and scores on disk: both forms give back what was written, bad files are told in a sentence."""

import io
import json

import numpy as np
import pytest
import scipy.sparse

from stride_ray.evaluate.retraining.results import (
    RetrainingResults,
    jsonl_bytes,
    npz_bytes,
    read_scores,
    read_truth,
    truth_from_jsonl,
    truth_from_npz,
    write_scores,
    write_truth,
)
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store

POOL = np.arange(100, 110)


def make(lengths=(4, 4, 4), seeds=2):
    rng = np.random.default_rng(0)
    subsets = tuple(np.sort(rng.choice(10, n, replace=False)) for n in lengths)
    losses = rng.random((seeds, len(lengths), 5)).astype(np.float32)
    return RetrainingResults(subsets, losses, tuple(f"seed{i}" for i in range(seeds)))


def assert_same(one, other):
    assert one.names == other.names
    assert len(one.subsets) == len(other.subsets)
    for a, b in zip(one.subsets, other.subsets, strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.losses.dtype == other.losses.dtype == np.float32
    np.testing.assert_array_equal(one.losses, other.losses)


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("lengths", [(4, 4, 4), (2, 7, 4)])
def test_both_forms_give_back_what_was_written(tmp_path, lengths):
    truth, store = make(lengths, seeds=11), Store(str(tmp_path))
    names = write_truth(store, truth, POOL)
    assert len(names) == 22
    assert_same(read_truth(store), truth)  # seed10 after seed9
    for name in store.names("", ".npz"):
        store.remove(name)
    assert_same(read_truth(store), truth)
    assert read_truth(store.child("empty")) is None


def test_the_files_are_as_the_benchmarks_and_the_authors_have_them():
    truth = make()
    arrays = np.load(io.BytesIO(npz_bytes(truth, 1)))
    assert (arrays["subsets"].shape, arrays["subsets"].dtype) == ((3, 4), np.int32)
    assert (arrays["losses"].shape, arrays["losses"].dtype) == ((3, 5), np.float32)
    header, *lines = [json.loads(line) for line in jsonl_bytes(truth, 1, POOL).splitlines()]
    assert header["_meta"]["pool_indices"] == POOL.tolist()
    assert [line["train_subset"] for line in lines] == [rows.tolist() for rows in truth.subsets]
    assert [line["train_subset_global"] for line in lines] == [POOL[rows].tolist() for rows in truth.subsets]
    assert all(len(line["test_loss"]) == 5 for line in lines)
    assert npz_bytes(truth, 0) == npz_bytes(make(), 0)


def test_rows_in_any_order_are_the_same_subset():
    given = npz(subsets=np.array([[5, 0, 9], [2, 8, 1]]), losses=np.ones((2, 3), np.float32))
    truth = truth_from_npz(given, "it")
    assert [rows.tolist() for rows in truth.subsets] == [[0, 5, 9], [1, 2, 8]]
    with pytest.raises(StrideError, match="pool row 9, and the pool has 9 rows"):
        truth.check(9, 3)


def test_corpus_rows_serve_where_pool_rows_are_missing():
    truth = make()
    header, *lines = [json.loads(line) for line in jsonl_bytes(truth, 0, POOL).splitlines()]
    for line in lines:
        del line["train_subset"]
    data = "\n".join(json.dumps(line) for line in [header, *lines]).encode()
    np.testing.assert_array_equal(truth_from_jsonl(data, "it").subsets[2], truth.subsets[2])
    lines[1]["train_subset_global"][0] = 7
    data = "\n".join(json.dumps(line) for line in [header, *lines]).encode()
    with pytest.raises(StrideError, match="it, line 3: corpus row 7 is not in the pool"):
        truth_from_jsonl(data, "it")


def test_membership_and_fit_to_a_benchmark():
    truth = make((2, 7, 4))
    member = truth.membership(12)
    assert member.shape == (3, 12)
    assert [np.flatnonzero(row).tolist() for row in member] == [rows.tolist() for rows in truth.subsets]
    assert truth.sizes == (2, 7)
    truth.check(10, 5)
    with pytest.raises(StrideError, match="pool row 9, and the pool has 9 rows"):
        truth.check(9, 5)
    with pytest.raises(StrideError, match="5 losses a subset, and there are 6 queries"):
        truth.check(10, 6)


def test_seeds_must_share_subsets_and_queries(tmp_path):
    store, truth = Store(str(tmp_path)), make()
    other = make((4, 4, 5))
    store.write("retraining_seed0.npz", npz_bytes(truth, 0))
    store.write("retraining_seed1.npz", npz_bytes(RetrainingResults(other.subsets, truth.losses, truth.names), 1))
    with pytest.raises(StrideError, match=r"retraining_seed1.npz and .*retraining_seed0.npz differ at subset 2"):
        read_truth(store)
    store.write(
        "retraining_seed1.npz", npz_bytes(RetrainingResults(truth.subsets[:2], truth.losses[:, :2], truth.names), 1)
    )
    with pytest.raises(StrideError, match="differ in their number"):
        read_truth(store)
    store.write(
        "retraining_seed1.npz", npz_bytes(RetrainingResults(truth.subsets, truth.losses[:, :, :4], truth.names), 1)
    )
    with pytest.raises(StrideError, match=r"losses of 4 queries and .* of 5"):
        read_truth(store)


LOSSES, ROWS = np.ones((2, 3), np.float32), np.array([[0, 1], [0, 2]])
BAD_ARRAYS = [
    (b"no zip", "cannot be read as numpy arrays"),
    (npz(losses=LOSSES), "it holds losses; it needs the arrays subsets and losses"),
    (npz(subsets=np.zeros((3, 2), int), losses=LOSSES), "3 subsets, and losses of shape"),
    (npz(subsets=np.array([[0, 1], [1, 1]]), losses=LOSSES), "subset 1 has a negative or a repeated pool row"),
    (npz(subsets=np.array([[0.5, 1], [1, 2]]), losses=LOSSES), "subset 0 must be a flat list of pool rows"),
    (npz(subsets=np.array([[0, 1], [0, 2]]), losses=LOSSES * np.nan), "loss of query 0 after subset 0 is not finite"),
    (npz(subsets=np.arange(4), losses=LOSSES), r"subsets has shape \(4,\)"),
    (npz(subsets=np.arange(4), offsets=np.array([0, 2, 3]), losses=LOSSES), "offsets must run from 0"),
    (npz(subsets=np.arange(4), offsets=np.array([0, 5, 4]), losses=LOSSES), "offsets decrease at subset 1"),
    (npz(subsets=np.array([[0], [1, 2]], dtype=object), losses=LOSSES), "it cannot be read as numpy"),
    (npz(subsets=ROWS, losses=LOSSES.astype(str)), "losses must be numbers, not <U"),
    (npz(subsets=ROWS, losses=LOSSES * 1j), "losses must be numbers, not complex"),
    (npz(subsets=ROWS, losses=LOSSES.astype(float) * 1e300), "loss of query 0 after subset 0 is not finite"),
    (npz(subsets=ROWS[:0], losses=LOSSES[:0]), "holds no subset"),
    (npz(subsets=np.arange(4), offsets=np.array([0, 1.5, 4]), losses=LOSSES), "offsets must run from 0"),
    (npz(subsets=np.arange(4), offsets=np.array(["0", "2", "4"]), losses=LOSSES), "offsets must run from 0"),
]


@pytest.mark.parametrize(("data", "told"), BAD_ARRAYS, ids=[told for _, told in BAD_ARRAYS])
def test_bad_arrays_are_told(data, told):
    with pytest.raises(StrideError, match=told):
        truth_from_npz(data, "it")


GOOD = '{"train_subset": [0, 1], "test_loss": [1.0, 2.0]}\n'
POOL_OF = '{"_meta": {"pool_indices": [%s]}}\n'
BAD_LINES = [
    ("", "holds no subset"),
    (GOOD + '{"train_sub', "line 2, is not valid JSON"),
    (GOOD + "[]", "line 2, is not a JSON object"),
    (GOOD + '{"test_loss": [1, 2]}', "line 2, has no train_subset"),
    (GOOD + '{"train_subset": [3]}', "line 2, has no test_loss"),
    (GOOD + '{"train_subset": [3], "test_loss": [1]}', "line 2: 1 losses, and 2 in the lines before"),
    ('{"train_subset": ["1"], "test_loss": [1]}', "line 1: train_subset must be a flat list of row numbers"),
    ('{"train_subset": null, "test_loss": [1]}', "train_subset must be a flat list of row numbers"),
    ('{"train_subset": [true], "test_loss": [1]}', "train_subset must be a flat list of row numbers"),
    ('{"train_subset": [1.5], "test_loss": [1]}', "train_subset holds 1.5, which is no row number"),
    (f'{{"train_subset": [{10**30}], "test_loss": [1]}}', "train_subset holds 1000"),
    ('{"train_subset": [1], "test_loss": ["1.5"]}', "line 1: test_loss must be a flat list of numbers"),
    ('{"train_subset": [1], "test_loss": [[1]]}', "test_loss must be a flat list of numbers"),
    ('{"train_subset": [1], "test_loss": [1e300]}', "is not finite"),
    (f'{{"train_subset": [1], "test_loss": [{10**400}]}}', "is not finite"),
    (POOL_OF % "5, 6" + '{"train_subset_global": [[5]], "test_loss": [1]}', "line 2: train_subset_global must be a"),
    (POOL_OF % "5, 6" + '{"train_subset_global": 5, "test_loss": [1]}', "train_subset_global must be a flat list"),
    (POOL_OF % '"a"' + '{"train_subset_global": [5], "test_loss": [1]}', "pool of the _meta header must be a flat"),
    (POOL_OF % "5.7" + '{"train_subset_global": [5], "test_loss": [1]}', "pool of the _meta header holds 5.7"),
    (POOL_OF % "5, 5" + '{"train_subset_global": [5], "test_loss": [1]}', "lists corpus row 5 twice"),
    ('{"train_subset": [1], "test_loss": [NaN]}', "is not finite"),
]


@pytest.mark.parametrize(("text", "told"), BAD_LINES, ids=[told for _, told in BAD_LINES])
def test_bad_lines_are_told(text, told):
    with pytest.raises(StrideError, match=told):
        truth_from_jsonl(text.encode(), "it")


def test_scores_in_every_form(tmp_path):
    store, scores = Store(str(tmp_path)), np.random.default_rng(0).random((3, 7)).astype(np.float32)
    scores[scores < 0.5] = 0
    np.save(tmp_path / "a.npy", scores)
    np.savez(tmp_path / "b.npz", whatever=scores)
    write_scores(store, "c.npz", scores)
    write_scores(store, "d.npz", scipy.sparse.csr_array(scores))
    for name in ("a.npy", "b.npz", "c.npz"):
        np.testing.assert_array_equal(read_scores(store, name), scores)
    sparse = read_scores(store, "d.npz")
    assert scipy.sparse.issparse(sparse)
    np.testing.assert_array_equal(sparse.toarray(), scores)


def test_bad_scores_are_told(tmp_path):
    store = Store(str(tmp_path))
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 2)), b=np.zeros((2, 2)))
    np.save(tmp_path / "nan.npy", np.full((2, 2), np.nan))
    np.save(tmp_path / "flat.npy", np.zeros(4))
    for name, told in (("two.npz", "holds a, b; it needs one array"), ("nan.npy", "finite"), ("flat.npy", r"\(4,\)")):
        with pytest.raises(StrideError, match=told):
            read_scores(store, name)


SCORES = np.random.default_rng(0).random((3, 40))
MATRIX = {"data": np.ones(4), "indices": np.arange(4, dtype=np.int32), "indptr": np.arange(5, dtype=np.int32)}
MATRIX |= {"shape": np.array([4, 4]), "format": np.array(b"csr")}


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"scores": SCORES.astype(str)}, "finite numbers, queries × blocks; got <U"),
        ({"scores": SCORES * 1j}, "got complex128"),
        ({"scores": np.zeros((2, 2), "M8[s]")}, "got datetime64"),
        ({**MATRIX, "indices": np.array([0, 1, 2, 9])}, "sparse matrix: indices must be < 4"),
        ({**MATRIX, "indices": np.array([0, 1, 2, -3])}, "indices must be >= 0"),
        ({**MATRIX, "indptr": np.array([0, 1, 2, 3, 900])}, "cannot be read as a sparse matrix"),
        ({**MATRIX, "format": np.array(b"csc"), "indices": np.array([0, 1, 2, 9])}, "be read as a sparse matrix"),
        ({**MATRIX, "format": np.array(b"zzz")}, "cannot be read as a sparse matrix"),
        ({**MATRIX, "data": np.ones(2)}, "cannot be read as a sparse matrix"),
        ({**MATRIX, "data": np.array(["a"] * 4)}, "got <U1"),
    ],
)
def test_scores_of_other_types_and_broken_sparse_matrices_are_told(tmp_path, arrays, told):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(StrideError, match=told):
        read_scores(Store(str(tmp_path)), "s.npz")


@pytest.mark.parametrize("name", ["s.npz", "s.npy"])
def test_no_changed_byte_of_scores_ends_in_a_traceback(tmp_path, name):
    store = Store(str(tmp_path))
    np.savez_compressed(tmp_path / "s.npz", scores=SCORES)
    np.save(tmp_path / "s.npy", SCORES)
    good = store.read(name)
    told = 0
    for place in range(0, 400, 3):
        bad = bytearray(good)
        bad[place] ^= 0x0F
        store.write(name, bytes(bad))
        try:
            read_scores(store, name)
        except StrideError:
            told += 1
    assert told > 10


def test_an_archive_for_an_array_and_the_reverse_are_told(tmp_path):
    np.save(tmp_path / "array.npy", SCORES)
    np.savez(tmp_path / "archive.npz", scores=SCORES)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    with pytest.raises(StrideError, match=r"is a single array; it must be an \.npz file"):
        read_scores(Store(str(tmp_path)), "array.npz")
    with pytest.raises(StrideError, match=r"is an archive of arrays; it must be an \.npy file"):
        read_scores(Store(str(tmp_path)), "archive.npy")
