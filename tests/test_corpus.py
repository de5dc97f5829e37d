"""Blocks: nothing is dropped, padding never counts, identities are unique and stay."""

import hashlib
import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stride_ray.corpus import packing
from stride_ray.corpus.documents import TokenizedDocument, read
from stride_ray.corpus.files import END as END_OF_FILE
from stride_ray.corpus.files import SourceFile
from stride_ray.corpus.numbering import (
    document_hashes,
    number_part,
    read_staged,
    repeats,
    with_ordinals,
    write_staged,
)
from stride_ray.corpus.packing import Counts, block_id, block_schema, iter_blocks, make_blocks
from stride_ray.corpus.readers import Rejected
from stride_ray.corpus.splits import InputSplit, plan
from stride_ray.corpus.tokenization.encoding import encode_stream
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Stage, part_name
from stride_ray.runtime.storage import Store

END, PAD = 9, 0
LAYOUT = pytest.mark.parametrize("layout", ["pack", "split"])


@st.composite
def corpora(draw):
    documents = []
    for i in range(draw(st.integers(0, 12))):
        ids = draw(st.lists(st.integers(1, 9), min_size=1, max_size=25))
        mask = draw(st.none() | st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        documents.append(encoded(f"d{i}", ids, mask, source=draw(st.sampled_from(["web", "books"]))))
    return documents


def encoded(name, ids, mask=None, source="web"):
    return TokenizedDocument(name, source, np.array(ids, np.int32), None if mask is None else np.array(mask, bool))


def with_end(document, layout):
    """A document's tokens and mask as its blocks should hold them."""
    ids = document.ids.tolist()
    mask = [True] * len(ids) if document.mask is None else document.mask.tolist()
    if layout == "pack" and ids[-1] != END:
        ids, mask = [*ids, END], [*mask, document.mask is None]
    return ids, mask


def put_together(table):
    """``{document: (ids, mask)}`` from the spans alone, and what no span covers."""
    documents, padding = {}, []
    for row in table.to_pylist():
        flags = row["loss_mask"] or [True] * len(row["token_ids"])
        position = 0
        for span in row["spans"]:
            ids, mask = documents.setdefault(span["document_id"], ([], []))
            assert span["start"] == len(ids)
            ids += row["token_ids"][position : position + span["length"]]
            mask += flags[position : position + span["length"]]
            position += span["length"]
        padding += zip(row["token_ids"][position:], flags[position:], strict=True)
    return documents, padding


@LAYOUT
@settings(deadline=None, max_examples=150)
@given(documents=corpora(), block_tokens=st.integers(1, 16), batch=st.integers(1, 4))
def test_nothing_is_dropped(layout, documents, block_tokens, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_BATCH_BLOCKS", batch)
        table, counts = make_blocks(documents, layout, block_tokens, END, PAD)
    found, padding = put_together(table)
    assert found == {d.document_id: with_end(d, layout) for d in documents}
    assert set(padding) <= {(PAD, False)}
    limit = block_tokens * (1 if layout == "pack" else max(len(documents), 1))
    assert len(padding) < limit
    assert (counts.documents, counts.blocks) == (len(documents), table.num_rows)
    assert counts.tokens == sum(len(ids) for ids, _ in found.values())
    assert counts.target_tokens == sum(sum(mask) for _, mask in found.values())


@LAYOUT
@settings(deadline=None, max_examples=100)
@given(documents=corpora(), block_tokens=st.integers(1, 8))
def test_rows_are_told_by_their_first_and_longest_span(layout, documents, block_tokens):
    table, _ = make_blocks(documents, layout, block_tokens, END, PAD)
    sources = {d.document_id: d.source for d in documents}
    for row in table.to_pylist():
        first, longest = row["spans"][0], max(row["spans"], key=lambda span: span["length"])
        assert row["block_id"] == block_id(sources[first["document_id"]], first["document_id"], first["start"])
        assert row["source"] == sources[longest["document_id"]]
        assert layout == "pack" or len(row["spans"]) == 1
        assert row["loss_mask"] is None or not all(row["loss_mask"])
    assert len(set(table["block_id"].to_pylist())) == table.num_rows


@LAYOUT
def test_a_small_example(layout):
    documents = [encoded("a", [1, 2, 3]), encoded("b", [4, 5, END], [False, True, True]), encoded("c", [6])]
    documents = [replace(document, place=7 * i) for i, document in enumerate(documents)]
    table, _ = make_blocks(documents, layout, 4, END, PAD)
    if layout == "pack":
        ids = [[1, 2, 3, END], [4, 5, END, 6], [END, PAD, PAD, PAD]]
        masks = [None, [False, True, True, True], [True, False, False, False]]
        spans = [[("a", "web", 0, 0, 4)], [("b", "web", 7, 0, 3), ("c", "web", 14, 0, 1)], [("c", "web", 14, 1, 1)]]
    else:
        ids = [[1, 2, 3, PAD], [4, 5, END, PAD], [6, PAD, PAD, PAD]]
        masks = [[True, True, True, False], [False, True, True, False], [True, False, False, False]]
        spans = [[("a", "web", 0, 0, 3)], [("b", "web", 7, 0, 3)], [("c", "web", 14, 0, 1)]]
    assert table["token_ids"].to_pylist() == ids
    assert table["loss_mask"].to_pylist() == masks
    assert [[tuple(span.values()) for span in row] for row in table["spans"].to_pylist()] == spans


def test_a_masked_document_keeps_its_mask_when_an_end_is_added():
    table, counts = make_blocks([encoded("a", [1, 2], [False, True])], "pack", 3, END, PAD)
    assert table["token_ids"].to_pylist() == [[1, 2, END]]
    assert table["loss_mask"].to_pylist() == [[False, True, False]]
    assert counts.target_tokens == 1


def test_block_ids_never_change():
    name = json.dumps(["web", "d", 512]).encode()
    assert block_id("web", "d", 512) == int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
    assert block_id("a", "b", 0) == 4962690000256899010
    assert len({block_id("a", "b", 0), block_id("b", "a", 0), block_id("a", "b", 1), block_id("", "ab", 0)}) == 4


@LAYOUT
@pytest.mark.parametrize("numbered", [0, 1, 2])
def test_a_documents_name_is_its_own_whatever_ids_the_input_has(tmp_path, layout, numbered):
    """Three parts, the first ``numbered`` of them numbered before; "a" of x is another document than that of w."""
    stage, staged = Stage(Store(str(tmp_path / "blocks")), "0"), Stage(Store(str(tmp_path / "staged")), "0")
    ids = ["aaab", "ac", "aa"]
    sources = ["wwxw", "ww", "xw"]
    units = [InputSplit(str(i), "jsonl", (SourceFile(f"{i}.jsonl", "", 1, ""),), 0, END_OF_FILE) for i in range(3)]
    for i in range(3):
        named = enumerate(zip(ids[i], sources[i], strict=True))
        documents = [replace(encoded(name, [1, 2, 3], source=source), place=10 * j) for j, (name, source) in named]
        table, counts = make_blocks(documents, layout, 2, END, PAD)
        write_staged(staged.store, part_name(i), table)
        staged.mark(part_name(i), 0.0, counts=counts.to_dict(), max_token_id=3)
    for known in (numbered, 3):  # interrupted, or with input added
        found = [document_hashes(stage, staged, (i, part_name(i) in stage.done()))["hashes"] for i in range(known)]
        repeated, shared = repeats(found) if found else ([], 0)
        for i in range(known):
            if part_name(i) not in stage.done():
                number_part(stage, staged, (i, 0, units[i], repeated[i], frozenset()))
    assert shared == 1
    assert [marker["counts"]["repeated"] for marker in stage.done().values()] == [1, 1, 2]
    assert [marker["renamed"] for marker in stage.done().values()] == [
        ["w", "a~0.jsonl#10"],
        ["w", "a~1.jsonl#0"],
        ["x", "a~2.jsonl#0"],
    ]
    rows = [row for i in range(3) for row in stage.store.read_table(f"{part_name(i)}.parquet").to_pylist()]
    spans = [span for row in rows for span in row["spans"]]
    assert list(dict.fromkeys((span["source"], span["document_id"]) for span in spans)) == [
        *(("w", "a"), ("w", "a~0.jsonl#10"), ("x", "a"), ("w", "b")),
        *(("w", "a~1.jsonl#0"), ("w", "c"), ("x", "a~2.jsonl#0"), ("w", "a~2.jsonl#10")),
    ]
    assert len({row["block_id"] for row in rows}) == len(rows)
    for row in rows:
        first = row["spans"][0]
        assert row["block_id"] == block_id(first["source"], first["document_id"], first["start"])


@pytest.mark.parametrize("numbered", [0, 1, 2])
def test_a_new_name_is_not_one_that_another_document_has(tmp_path, numbered):
    """The second "7" of part 0 would get the ids of documents of parts 0 and 1; an interruption changes nothing."""
    stage, staged = Stage(Store(str(tmp_path / "blocks")), "0"), Stage(Store(str(tmp_path / "staged")), "0")
    ids = [["7", "7", "7~0.jsonl#10"], ["7~0.jsonl#10~", "7"]]
    units = [InputSplit(str(i), "jsonl", (SourceFile(f"{i}.jsonl", "", 1, ""),), 0, END_OF_FILE) for i in range(2)]
    for i, names in enumerate(ids):
        documents = [replace(encoded(name, [1, 2, 3], source="w"), place=10 * j) for j, name in enumerate(names)]
        table, counts = make_blocks(documents, "split", 2, END, PAD)
        write_staged(staged.store, part_name(i), table)
        staged.mark(part_name(i), 0.0, counts=counts.to_dict(), max_token_id=3)
    for stop in (numbered, 2):
        found = [document_hashes(stage, staged, (i, part_name(i) in stage.done())) for i in range(2)]
        repeated, _ = repeats([each["hashes"] for each in found])
        taken = frozenset(name for each in found for name in each["marked"].tolist())
        for i in range(stop):
            if part_name(i) not in stage.done():
                number_part(stage, staged, (i, 0, units[i], repeated[i], taken))
    rows = [row for i in range(2) for row in stage.store.read_table(f"{part_name(i)}.parquet").to_pylist()]
    assert list(dict.fromkeys(span["document_id"] for row in rows for span in row["spans"])) == [
        *("7", "7~0.jsonl#10~~", "7~0.jsonl#10", "7~0.jsonl#10~", "7~1.jsonl#10"),
    ]


def test_ordinals_and_schema_survive_parquet():
    documents = [encoded(f"d{i}", [1] * (i + 1), None if i % 2 else [True] + [False] * i) for i in range(9)]
    table, _ = make_blocks(documents, "split", 4, END, PAD)
    assert table.schema == block_schema(4, ordinals=False)
    numbered = with_ordinals(table, 100)
    assert numbered.schema == block_schema(4)
    assert numbered["ordinal"].to_pylist() == list(range(100, 100 + table.num_rows))
    file = io.BytesIO()
    pq.write_table(numbered, file)
    assert pq.read_table(file).equals(numbered)
    assert numbered["loss_mask"].null_count > 0


def test_a_unit_without_documents_gives_an_empty_table():
    table, counts = make_blocks([Rejected("f", 3, "bad")], "pack", 8, END, PAD)
    assert table.num_rows == 0
    assert with_ordinals(table, 5).schema == block_schema(8)
    assert (counts.documents, counts.rejected, counts.rejects) == (0, 1, [Rejected("f", 3, "bad")])
    lost = Rejected("f", 3, "bad", rows=500)
    counts.reject(lost)
    assert (counts.rejected, lost.sentence()) == (501, "f, rows 3 to 502: bad")


def test_counts_add_up_and_travel_as_json():
    parts = [
        make_blocks([encoded("a", [1, 2]), *[Rejected("f", i, "bad")] * 15], "pack", 2, END, PAD)[1] for i in (1, 2)
    ]
    parts[0].unused, parts[1].unused = ["b", "c"], ["a", "b"]
    parts[0].unrendered = ["tools"]
    total = parts[0] + parts[1]
    assert (total.unused, total.unrendered) == (["a", "b", "c"], ["tools"])
    assert (total.documents, total.blocks, total.tokens, total.target_tokens, total.rejected) == (2, 4, 6, 6, 30)
    assert [reject.row for reject in total.rejects] == [1] * 15 + [2] * 5
    assert Counts.from_dict(json.loads(json.dumps(total.to_dict()))) == total
    assert sum(parts, Counts()) == total


def test_blocks_come_in_batches_before_the_input_ends():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield encoded(f"d{len(taken)}", [1] * 1000)

    batch = next(iter_blocks(endless(), "pack", 100, END, PAD, Counts()))
    assert batch.num_rows == 1024
    assert len(taken) < 110


def test_wrong_layouts_are_told():
    for layout, size, words in (("packed", 4, "choose pack or split"), ("pack", 0, "block_tokens")):
        with pytest.raises(StrideError, match=words):
            make_blocks([], layout, size, END, PAD)


@LAYOUT
def test_block_ids_do_not_depend_on_the_place_and_are_unique_over_units(tmp_path, layout):
    seen = []
    for place in ("here", "there/deep"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        rows = [{"ids": [i % 8 + 1] * (i + 1)} for i in range(30)]
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pq.write_table(pa.table({"ids": [row["ids"] for row in rows]}), folder / "b.parquet", row_group_size=7)
        units = plan([str(folder)], 300)
        assert len(units) > 6
        columns = {"token_ids": "ids"}
        tables = [make_blocks(encode_stream(read(u, columns), None), layout, 16, END, PAD)[0] for u in units]
        seen.append([number for table in tables for number in table["block_id"].to_pylist()])
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == len(seen[0]) > 50


def test_what_is_left_for_numbering_comes_back_whole_and_a_torn_file_is_a_sentence(tmp_path):
    table, _ = make_blocks([TokenizedDocument("a", "s", np.arange(20, dtype=np.int32))], "split", 8, 0, 0)
    store = Store(str(tmp_path))
    write_staged(store, "00000", table)
    assert read_staged(store, "00000").equals(table)
    (tmp_path / "00000.arrow").write_bytes((tmp_path / "00000.arrow").read_bytes()[:-20])
    with pytest.raises(
        StrideError, match=r"00000.arrow was damaged or changed: .*; delete its folder .* and run the same command"
    ):
        read_staged(store, "00000")
