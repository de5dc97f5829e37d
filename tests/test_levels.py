"""From source to document to block to span: what each level says, and that the levels agree."""

import html
import itertools
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stride_ray.attribution.attribute import read_influence, token_influences
from stride_ray.attribution.query_set import QuerySet
from stride_ray.attribution.tables import DOCUMENTS, shortest_run, sum_to_sources
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.tokenization.tokenizer import load_saved_tokenizer
from stride_ray.runtime.errors import StrideError


@pytest.mark.parametrize(
    ("values", "lengths", "found"),
    [
        ([0.1, 0.0, 0.5, 0.3], [4], (2, 1)),
        ([0.3, 0.3, 0.3, 0.3], [4], (0, 2)),
        ([0.2, 0.4, 0.5, 0.1], [4], (1, 2)),  # of runs as short, the one with most
        ([-0.1, -0.6, 0.1, -0.2], [4], (1, 1)),  # a harmful block's run is harmful
        ([0.1, 0.3, 0.3, 0.1], [2, 2], (0, 2)),  # not across documents
        ([0.4, 0.3, 0.5, 0.2, 0.1], [1, 1, 1, 1, 1], (2, 1)),  # no document holds half: the one with most
        ([1.0, 0.0, 0.0], [2], (0, 1)),  # padding is no document
        ([0.0, 0.0], [2], (0, 1)),
    ],
)
def test_the_shortest_run(values, lengths, found):
    assert shortest_run(np.array(values, np.float32), lengths) == found


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=12), st.data())
def test_no_shorter_run_holds_as_much(numbers, data):
    cut = data.draw(st.integers(1, len(numbers)))
    lengths = [cut, len(numbers) - cut] if cut < len(numbers) else [cut]
    values = np.array(numbers, float)
    start, length = shortest_run(values, lengths)
    sign, edges = (1 if values.sum() >= 0 else -1), np.cumsum([0, *lengths])
    inside = [
        (a, b) for low, high in itertools.pairwise(edges) for a in range(low, high) for b in range(a + 1, high + 1)
    ]
    assert (start, start + length) in inside
    enough = [(a, b) for a, b in inside if sign * values[a:b].sum() >= sign * values.sum() / 2]
    if enough:
        assert length == min(b - a for a, b in enough)
        assert sign * values[start : start + length].sum() == max(
            sign * values[a:b].sum() for a, b in enough if b - a == length
        )


def test_documents_add_up_to_sources_in_order():
    rows = [
        ("q", 1, "a", "s", 1, 0.5),
        ("q", 2, "b", "t", 1, 0.4),
        ("q", 3, "c", "t", 2, 0.3),
        ("r", 1, "a", "s", 1, -1.0),
    ]
    documents = pa.Table.from_pylist([dict(zip(DOCUMENTS.names, row, strict=True)) for row in rows], DOCUMENTS)
    assert [tuple(row.values()) for row in sum_to_sources(documents).to_pylist()] == [
        ("q", 1, "t", 2, pytest.approx(0.7)),
        ("q", 2, "s", 1, 0.5),
        ("r", 1, "s", 1, -1.0),
    ]


def test_the_levels_of_a_real_answer_agree(exactly):
    sums = {
        level: read_influence(exactly.run, "asked", level).group_by("query_id").aggregate([("influence", "sum")])
        for level in ("influence", "documents", "sources")
    }
    totals = {level: dict(zip(*found.to_pydict().values(), strict=True)) for level, found in sums.items()}
    assert len(totals["influence"]) > 1
    for level in ("documents", "sources"):
        assert totals[level] == pytest.approx(totals["influence"], rel=1e-9)


def test_a_span_lies_in_its_document_and_holds_what_it_says(exactly):
    stage = exactly.run.stage("exact", "asked")
    blocks, tokenizer = (
        Blocks(exactly.run.stage("blocks").store),
        load_saved_tokenizer(exactly.run.store.child("blocks")),
    )
    spans = stage.store.read_table("spans-00000.parquet").to_pylist()
    assert spans
    split = token_influences(exactly.run, "asked", sorted({span["query_id"] for span in spans}))
    for span in spans:
        (block,) = blocks.take([span["ordinal"]], ["spans", "token_ids"]).to_pylist()
        values, first = split[span["query_id"], span["ordinal"]], 0
        for each in block["spans"]:
            here = first + span["start"] - each["start"]
            if each["document_id"] == span["document_id"] and first <= here < first + each["length"]:
                assert here + span["length"] <= first + each["length"]
                held = sum(values[here : here + span["length"]])
                assert span["influence"] == pytest.approx(held, rel=1e-4, abs=1e-7)
                assert span["text"] == tokenizer.decode(block["token_ids"][here : here + span["length"]])
                break
            first += each["length"]
        else:
            pytest.fail(f"{span} is in no document of its block")


def test_a_query_set_reads_its_tables_once_and_shows_its_page(exactly):
    asked = QuerySet(exactly.run, "asked")
    for table in ("influence", "documents", "sources", "spans", "recovery"):
        assert getattr(asked, table).equals(read_influence(exactly.run, "asked", table))
        assert getattr(asked, table) is getattr(asked, table)
    assert asked.to_pandas("sources")["influence"].sum() == pytest.approx(asked.to_pandas()["influence"].sum())
    assert repr(asked).startswith(f"QuerySet('asked', {asked.queries.num_rows} queries, run ")
    frame = asked._repr_html_()
    assert frame.startswith('<iframe title="attribution" sandbox="allow-scripts"')
    inside = html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1])
    assert inside.startswith("<!doctype html>")
    assert "What made the model say this" in inside
    with pytest.raises(StrideError, match="is not finished"):
        _ = QuerySet(exactly.run, "never").influence
