"""The pool as stages read it, against a plain read of all parts."""

import numpy as np
import pyarrow as pa
import pytest
from conftest import everything
from hypothesis import given, settings
from hypothesis import strategies as st

from stride_ray.corpus import blocks
from stride_ray.corpus.blocks import Blocks, document_shares, fixed_lists
from stride_ray.corpus.documents import TokenizedDocument
from stride_ray.corpus.numbering import with_ordinals
from stride_ray.corpus.packing import make_blocks
from stride_ray.corpus.readers import Rejected
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store

TOKENS = 4


def encoded(name, count, masked):
    mask = np.arange(count) % 2 == 0 if masked else None
    return TokenizedDocument(name, f"source-{name}", np.arange(1, count + 1, dtype=np.int32), mask)


@pytest.fixture(params=[4096, 3])
def pool(request, tmp_path, monkeypatch):
    """Five parts, one of them empty, masks in some; with row groups of three rows too."""
    monkeypatch.setattr(blocks, "ROW_GROUP", request.param)
    monkeypatch.setattr("stride_ray.runtime.storage.ROW_GROUP", request.param)
    store, parts, first = Store(str(tmp_path)), [], 0
    for part, count in enumerate([5, 0, 1, 7, 2]):
        items = [encoded(f"{part}-{i}", 3 + i, masked=i % 2 == 1) for i in range(count)]
        table, counts = make_blocks(items or [Rejected("f", 1, "bad")], "pack", TOKENS, 0, 0)
        name = f"part-{part:05d}.parquet"
        store.write_table(name, with_ordinals(table, first))
        parts.append({"name": name, "blocks": counts.blocks})
        first += counts.blocks
    store.write_json("manifest.json", {"block_tokens": TOKENS, "parts": parts})
    return Blocks(store)


def test_batches_are_a_plain_read(pool):
    ids, mask = everything(pool)
    assert len(pool) == len(ids) > 20
    assert not mask.all()
    for start, stop, rows in [(0, len(pool), 5), (3, 4, 1), (2, 17, 100), (7, 7, 3), (0, len(pool), 1)]:
        batches = list(pool.batches(start, stop, rows))
        assert all(0 < len(batch.ids) <= rows for batch in batches)
        found = np.concatenate([batch.ordinals for batch in batches]) if batches else np.zeros(0, int)
        assert found.tolist() == list(range(start, stop))
        if batches:
            np.testing.assert_array_equal(np.concatenate([batch.ids for batch in batches]), ids[start:stop])
            np.testing.assert_array_equal(np.concatenate([batch.mask for batch in batches]), mask[start:stop])


def test_any_blocks_in_any_order(pool):
    ids, mask = everything(pool)

    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.integers(0, len(pool) - 1), max_size=12))
    def check(ordinals):
        assert pool.take(ordinals, ["ordinal"])["ordinal"].to_pylist() == ordinals
        if ordinals:
            batch = pool.batch(ordinals)
            np.testing.assert_array_equal(batch.ids, ids[ordinals])
            np.testing.assert_array_equal(batch.mask, mask[ordinals])

    check()


@pytest.mark.parametrize("ordinals", [[-1], [0, 10**6], [3, 2, 10**12]])
def test_blocks_outside_the_pool_are_named(pool, ordinals):
    outside = next(each for each in ordinals if not 0 <= each < len(pool))
    with pytest.raises(StrideError, match=rf"Block {outside} is not in .*, which has blocks 0 to {len(pool) - 1}"):
        pool.take(ordinals, ["ordinal"])


@pytest.mark.parametrize("read", [lambda pool: list(pool.batches(0, len(pool), 9)), lambda pool: pool.batch([0])])
def test_parts_that_were_swapped_are_named(pool, read):
    pool.take([0], ["ordinal"])
    first, other = (pool.manifest["parts"][i]["name"] for i in (0, 3))
    data = pool.store.read(first), pool.store.read(other)
    pool.store.write(first, data[1])
    pool.store.write(other, data[0])
    begins = int(pool._first[3])
    with pytest.raises(StrideError, match=rf"part-00000.parquet begins with block {begins}, .* with block 0: it is"):
        read(pool)


def test_a_file_is_opened_once_for_all_its_blocks(pool, monkeypatch):
    opened, real = [], Store.open_parquet
    monkeypatch.setattr(Store, "open_parquet", lambda self, name: opened.append(name) or real(self, name))
    pool.take(np.arange(len(pool)), ["ordinal"])
    assert len(opened) == len(set(opened)) > 1


def test_a_sample_is_without_repeats_and_repeatable(pool):
    sample = pool.sample(9, seed=1)
    assert sample.tolist() == sorted(set(sample.tolist())) == pool.sample(9, seed=1).tolist()
    assert len(sample) == 9
    assert sample.tolist() != pool.sample(9, seed=2).tolist()
    assert pool.sample(10**6, seed=1).tolist() == list(range(len(pool)))


class Sized(Blocks):
    """N alone, which is all that shards may depend on."""

    def __init__(self, n):
        self._first = np.array([0, n])


@given(st.integers(1, 10**6))
def test_shards_cut_the_pool_by_its_size_alone(n):
    shards = Sized(n).shards()
    assert shards == Sized(n).shards()
    assert min(n, 4) <= len(shards) <= 64
    assert [start for start, _ in shards] == [0, *(stop for _, stop in shards[:-1])]
    assert shards[-1][1] == n
    sizes = [stop - start for start, stop in shards]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_shards_do_not_depend_on_parts(pool):
    assert pool.shards() == Sized(len(pool)).shards()


def test_null_lists_are_filled():
    kind = pa.list_(pa.bool_(), 2)
    for rows in ([[True, False], None, [False, False]], [None, None], [[True, True]]):
        column = pa.chunked_array([pa.array(rows[:1], kind), pa.array(rows[1:], kind)])
        expected = np.array([row or [True, True] for row in rows])
        np.testing.assert_array_equal(fixed_lists(column, 2, True), expected)
        assert fixed_lists(column, 2, True).dtype == bool
    sliced = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2)).slice(1)
    np.testing.assert_array_equal(fixed_lists(sliced, 2, 0), [[0, 0], [3, 4]])


def test_shares_of_documents_add_up_to_one(pool):
    table = pool.take(np.arange(len(pool)), ["spans"])
    rows, documents, shares = document_shares(table)
    np.testing.assert_allclose(np.bincount(rows, shares, minlength=len(pool)), 1)
    expected = [
        (i, (span["source"], span["document_id"]), span["length"] / sum(each["length"] for each in spans))
        for i, spans in enumerate(table["spans"].to_pylist())
        for span in spans
    ]
    assert list(zip(rows.tolist(), documents, shares.tolist(), strict=True)) == expected
    assert max(np.bincount(rows)) > 1
