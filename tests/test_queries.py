"""Queries: every row's own id, whatever the others have, and made ids that no other row has."""

from decimal import Decimal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import documents, save_tokenizer, write_lines

from stride_ray.corpus import documents as module
from stride_ray.corpus import readers
from stride_ray.corpus.queries import read_queries
from stride_ray.runtime.errors import StrideError

TEXT = "the comet met the tide"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), documents(4), chat=False)


def asked(tmp_path, tokenizer, rows):
    """Id and error of each query; ``rows`` are written as JSON Lines, or as Parquet if they are a table."""
    if isinstance(rows, list):
        path = write_lines(tmp_path / "q.jsonl", [{"text": TEXT, **row} for row in rows])
    else:
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pandas(rows)
        path = str(tmp_path / "q.parquet")
        pq.write_table(table.append_column("text", [[TEXT] * len(table)]), path)
    found = read_queries(path, tokenizer).to_pylist()
    assert all((row["status"] == "ok") == (row["error"] is None) for row in found)
    return [(row["query_id"], row["error"]) for row in found]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{}, {"id": "named"}], ["q0", "named"]),
        ([{"id": "named"}, {}], ["named", "q1"]),
        ([{"id": "q1"}, {}], ["q1", "q1~"]),
        ([{}, {"id": "q0"}, {"id": "q0~"}], ["q0~~", "q0", "q0~"]),
        ([{"id": None}, {"id": ""}, {"id": " "}, {"id": "a"}], ["q0", "q1", "q2", "a"]),
        ([{"id": 1}, {"id": 2.0}, {"id": 2.5}, {"id": float("nan")}], ["1", "2", "2.5", "q3"]),
        ([{"id": "a", "query_id": "b"}, {"id": "c"}, {"id": "d", "query_id": None}, {"query_id": "e"}], [*"bcde"]),
        (pd.DataFrame({"id": [1.0, None, 3.0]}), ["1", "q1", "3"]),
        (pa.table({"id": [7.0, float("nan")]}), ["7", "q1"]),
        (pa.table({"query_id": ["a", None, ""]}), ["a", "q1", "q2"]),
        (pa.table({"id": pa.nulls(2)}), ["q0", "q1"]),
        (pa.table({"other": [1, 2]}), ["q0", "q1"]),
        (pa.table({"id": [Decimal("2.00"), Decimal("2.50"), None]}), ["2", "2.50", "q2"]),
        (pd.DataFrame({"id": pd.Categorical(["b", "a"])}), ["b", "a"]),
    ],
)
def test_each_row_has_its_own_id_or_its_number(tmp_path, tokenizer, rows, expected):
    assert asked(tmp_path, tokenizer, rows) == [(name, None) for name in expected]


def test_a_value_that_cannot_be_an_id_fails_its_query_alone(tmp_path, tokenizer):
    rows = [{"id": ["a"]}, {"id": True}, {"id": "\ud800"}, {"id": "ok"}]
    found = asked(tmp_path, tokenizer, rows)
    assert [name for name, _ in found] == ["q0", "q1", "q2", "ok"]
    assert [error for _, error in found] == [
        "q.jsonl, row 1: 'id' is neither a string nor a number",
        "q.jsonl, row 2: 'id' is neither a string nor a number",
        "q.jsonl, row 3: 'id' contains an invalid character (a lone surrogate)",
        None,
    ]


def test_an_invalid_query_keeps_its_id(tmp_path, tokenizer):
    rows = [{"id": "one"}, {"id": "blank", "text": " "}, {"text": None}, {"id": "short", "text": "a"}]
    found = asked(tmp_path, tokenizer, rows)
    assert [name for name, _ in found] == ["one", "blank", "q2", "short"]
    assert [error and error.split(":")[0] for _, error in found[:3]] == [None, "q.jsonl, row 2", "q.jsonl, row 3"]


def test_a_file_is_read_once(tmp_path, tokenizer, monkeypatch):
    opened, real = [], readers.rows
    monkeypatch.setattr(module, "rows", lambda unit, *given, **more: opened.append(unit) or real(unit, *given, **more))
    asked(tmp_path, tokenizer, [{"id": 1}, {}])
    assert len(opened) == 2  # to find the columns, which stops at the first row, and to read


def test_an_id_that_cannot_be_read_fails_its_query_alone(tmp_path, tokenizer):
    when = pa.array([2**60, 1], pa.timestamp("ms"))  # the first is beyond Python's years
    found = asked(tmp_path, tokenizer, pa.table({"id": when}))
    assert found[0][0] == "q0"
    assert "q.parquet, row 0: 'id' is unreadable: " in found[0][1]
    assert found[1] == ("1970-01-01T00:00:00.001000", None)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": "x"}, {}, {"id": "x"}], "the id 'x' (q.jsonl, row 1; q.jsonl, row 3); ids must differ"),
        ([{"id": 1}, {"query_id": "1"}], "the id '1' (q.jsonl, row 1; q.jsonl, row 2)"),
        (pa.table({"id": [5.0, None, 5.0]}), "the id '5' (q.parquet, row 0; q.parquet, row 2)"),
    ],
)
def test_an_id_that_two_rows_have(tmp_path, tokenizer, rows, words):
    with pytest.raises(StrideError) as told:
        asked(tmp_path, tokenizer, rows)
    assert words in str(told.value)
