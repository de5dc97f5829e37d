"""Planning and reading of the input: the same documents with the same ids however it is cut and wherever it lies."""

import bz2
import datetime
import decimal
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
import uuid
import zipfile
from collections import Counter

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stride_ray.contamination.purify import _cleaned_table, _Cleaner
from stride_ray.corpus import readers
from stride_ray.corpus.documents import Document, read, resolve_columns
from stride_ray.corpus.files import SourceFile, list_files
from stride_ray.corpus.readers import Rejected
from stride_ray.corpus.rows.row import has_content
from stride_ray.corpus.rows.turns import content_key
from stride_ray.corpus.splits import InputSplit, plan
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import redact_message, redact_url, redacted_error

TEXT = {"text": "text"}
MANY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_all(inputs, columns=TEXT, shard_bytes=1 << 20):
    return [item for unit in plan(inputs, shard_bytes) for item in read(unit, columns)]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path, texts, group):
    pq.write_table(pa.table({"text": texts, "n": list(range(len(texts)))}), path, row_group_size=group)
    return str(path)


TEXTS = st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=30)


@MANY
@given(texts=TEXTS, shard=st.integers(1, 400), newline=st.booleans(), crlf=st.booleans(), blank=st.booleans())
def test_any_cut_of_json_lines_gives_the_same_documents(tmp_path, texts, shard, newline, crlf, blank):
    end = ("\r\n" if crlf else "\n") * (2 if blank else 1)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    data = (end.join(lines) + (end if newline else "")).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    documents = read_all([str(path)], shard_bytes=shard)
    assert [document.text for document in documents] == texts
    for document, line in zip(documents, lines, strict=True):
        name, _, offset = document.document_id.partition("#")
        assert name == "a.jsonl"
        assert data[int(offset) :].startswith(line.encode())


@MANY
@given(texts=TEXTS, shard=st.integers(1, 300), bad=st.sets(st.integers(0, 29)))
def test_rejected_lines_are_numbered_in_the_whole_file(tmp_path, texts, shard, bad):
    lines = ["{broken" if i in bad else json.dumps({"text": text}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    items = read_all([str(tmp_path / "a.jsonl")], shard_bytes=shard)
    assert [item.row for item in items if isinstance(item, Rejected)] == sorted(i + 1 for i in bad if i < len(texts))
    assert [i.text for i in items if isinstance(i, Document)] == [t for i, t in enumerate(texts) if i not in bad]


@MANY
@given(texts=TEXTS, group=st.integers(1, 10), shard=st.integers(1, 2000))
def test_any_cut_of_parquet_gives_the_same_documents(tmp_path, texts, group, shard):
    path = write_parquet(tmp_path / "a.parquet", texts, group)
    documents = read_all([path], shard_bytes=shard)
    assert [(d.document_id, d.text) for d in documents] == [(f"a.parquet#{i}", t) for i, t in enumerate(texts)]


@MANY
@given(texts=TEXTS, shard=st.integers(50, 3000), batch=st.integers(1, 9))
def test_any_cut_of_arrow_gives_the_same_documents(tmp_path, texts, shard, batch):
    table = pa.table({"text": texts, "kind": pa.array(texts).dictionary_encode()})
    for name, opener in (("s.arrow", pa.ipc.new_stream), ("f.arrow", pa.ipc.new_file)):
        with opener(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=batch)
        documents = read_all([str(tmp_path / name)], {"text": "text", "source": "kind"}, shard)
        assert [(d.document_id, d.text, d.source) for d in documents] == [
            (f"{name}#{i}", text, text) for i, text in enumerate(texts)
        ]


def test_units_respect_the_size_and_row_groups_stay_together(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x" * 100] * 40, 10)
    size = pq.read_metadata(path).row_group(0).total_byte_size
    assert [(u.start, u.stop) for u in plan([path], 2 * size + size // 2)] == [(0, 2), (2, 4)]
    assert [(u.start, u.stop) for u in plan([path], 1)] == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_text_files_are_grouped_in_sorted_order_and_hidden_ones_skipped(tmp_path):
    for name, size in {"b.txt": 60, "a/z.md": 50, "c.py": 30, "d": 200, ".git/x": 9, "__pycache__/y": 9}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("t" * size)
    for skip, groups in (
        ([], [["a/z.md", "b.txt"], ["c.py"], ["d"]]),
        (["b.txt"], [["a/z.md", "c.py"], ["d"]]),
        (["a/z.md", "b.txt", "c.py", "d"], []),
    ):
        assert [[file.name for file in unit.files] for unit in plan([str(tmp_path)], 110, skip)] == groups
    assert read_all([str(tmp_path)], {})[0] == Document("a/z.md", "a/z.md", "t" * 50)


def test_more_text_files_than_are_fetched_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_FETCH_FILES", 3)
    for i in range(8):
        (tmp_path / f"{i}[a]*.txt").write_text(f"text {i}")
    assert [d.text for d in read_all([str(tmp_path)])] == [f"text {i}" for i in range(8)]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
def test_compressed_lines_are_read_whole_and_truncation_is_told(tmp_path, pack):
    rows = [{"text": f"{i} " + os.urandom(200).hex()} for i in range(2000)]
    lines = [json.dumps(row) + "\n" for row in rows]
    half = "".join(lines[:1000]).encode(), "".join(lines[1000:]).encode()
    path = tmp_path / f"a.jsonl.{'gz' if pack is gzip.compress else 'zst'}"
    path.write_bytes(pack(half[0]) + pack(half[1]))  # two streams, as concatenated files have
    documents = read_all([str(path)], shard_bytes=100)
    assert [d.text for d in documents] == [row["text"] for row in rows]
    assert documents[1500].document_id == f"{path.name}#{sum(map(len, lines[:1500]))}"
    path.write_bytes(path.read_bytes()[:-50_000])
    items = read_all([str(path)])
    good = items[:-1]
    assert [d.text for d in good] == [row["text"] for row in rows[: len(good)]]
    assert 500 < len(good) < 2000
    assert isinstance(items[-1], Rejected)
    assert items[-1].row == len(good) + 1
    assert "too early" in items[-1].reason


def test_each_kind_of_bad_line_is_rejected_with_its_reason(tmp_path):
    lines = {
        b'{"text": "good"}': None,
        b"": None,
        b'{"text": "cut': "not a line of JSON",
        b'["text"]': "JSON list",
        b'{"body": "x"}': "no column 'text'",
        b'{"text": 3}': "a number, not a string",
        b'{"text": null}': "null, not a string",
        b'{"text": " \\n"}': "is empty",
        b'{"text": "\xff\xfe"}': "not UTF-8",
        b'{"text": "\\ud800"}': "surrogate",
        b"[" * 100_000: "nested too deeply",
        b'{"text": "last"}': None,
    }
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    items = read_all([str(tmp_path / "a.jsonl")])
    assert [i.text for i in items if isinstance(i, Document)] == ["good", "last"]
    expected = [(i + 1, reason) for i, reason in enumerate(lines.values()) if reason]
    for reject, (row, reason) in zip([i for i in items if isinstance(i, Rejected)], expected, strict=True):
        assert (reject.file, reject.row) == ("a.jsonl", row)
        assert reason in reject.reason


def test_a_corrupt_parquet_file_or_row_group_is_rejected_and_the_rest_goes_on(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is no Parquet PAR1")
    path = tmp_path / "good.parquet"
    table = pa.table({"text": [os.urandom(50).hex() for _ in range(30)]})
    pq.write_table(table, path, row_group_size=10, use_dictionary=False, compression="snappy")
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + 60 : column.data_page_offset + 200] = b"\xff" * 140
    path.write_bytes(data)
    items = read_all([str(tmp_path)])
    assert [i.file for i in items if isinstance(i, Rejected)] == ["bad.parquet", "good.parquet"]
    assert items[-11].row == 10
    kept = [int(i.document_id.partition("#")[2]) for i in items if isinstance(i, Document)]
    assert kept == [*range(10), *range(20, 30)]


def test_parquet_strings_that_are_not_utf8_are_rejected_one_by_one(tmp_path):
    raw = pa.array([b"one", b"\xff\xff", b"three"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    items = read_all([str(tmp_path)])
    assert [getattr(item, "row", "good") for item in items] == ["good", 1, "good"]


def test_undecodable_and_empty_text_files_are_rejected(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"good")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"packed"))
    items = read_all([str(tmp_path)])
    assert [getattr(item, "text", None) for item in items] == [None, None, "good", "packed"]


@pytest.mark.parametrize(
    "files",
    ["train.csv", "train.tsv.gz LICENSE", "README.md data/train.csv dataset_infos.json", "a.txt x.xlsx", "a.py b.csv"],
)
def test_tables_without_data_files_are_refused_by_name(tmp_path, files):
    for name in files.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    table = re.search(r"\S+\.(csv|tsv.gz|xlsx)", files)[0]
    with pytest.raises(StrideError, match=f"has tables that are not read: {table}; make it Parquet"):
        plan([str(tmp_path)], 100)


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.txt", "hello".encode("utf-16-le"), "NUL characters"),
        ("a.md", b"a\0b", "NUL characters"),
        ("a.txt", "hello".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a.txt", "hello".encode("utf-32"), "is UTF-32; save it as UTF-8"),
        ("a.txt", b"\xfe\xff" + "hello".encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
        ("part-00000", b'{"text": "a"}\n{"text": "b"}\n', "holds JSON Lines; let its name end in .jsonl"),
        ("part-00000.gz", gzip.compress(b'\n{"text": "a"}', mtime=0), "holds JSON Lines"),
        ("part-00000", b"PAR1\xff\0PAR1", "holds Parquet; let its name end in .parquet"),
        ("cache-1", b"\xff\xff\xff\xff\0\0", "holds Arrow"),
        ("notes", b"{a} set", None),
        ("a.txt", b'{"text": "a"}', None),
    ],
)
def test_what_is_no_text_by_its_content_is_rejected_with_its_name(tmp_path, name, data, told):
    (tmp_path / name).write_bytes(data)
    (item,) = read_all([str(tmp_path)])
    assert isinstance(item, Document) if told is None else told in item.reason


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", ["hello", "привет"])
def test_lines_of_another_encoding_are_told_so(tmp_path, encoding, text):
    (tmp_path / "a.jsonl").write_bytes(f'{{"text": "{text}"}}\r\n{{"text": "b"}}\r\n'.encode(encoding))
    units = plan([str(tmp_path)], 1 << 20)
    with pytest.raises(
        StrideError, match=r"the first fault: a.jsonl, row 1: (is|contains NUL.*) UTF-(16|32).*; save it as UTF-8"
    ):
        resolve_columns(units)
    assert all("save it as UTF-8" in item.reason for unit in units for item in read(unit, {}))


@pytest.mark.parametrize("form", ["one line", "a line each", "indented", "byte order mark", "gzip"])
@pytest.mark.parametrize("shard", [16, 1 << 20])
def test_a_json_array_is_read_as_its_elements(tmp_path, form, shard):
    rows = [{"text": 'a, ] } \\ " [', "n": [1, {"b": 2}]}, {"text": "é\n"}, {"n": 3}, {"text": "c"}]
    data = json.dumps(rows, indent=2 if form == "indented" else None, ensure_ascii=False).encode()
    if form == "a line each":
        data = b"[\n" + b",\n".join(json.dumps(row).encode() for row in rows) + b"\n]\n"
    if form == "byte order mark":
        data = b"\xef\xbb\xbf" + data
    path = tmp_path / ("a.json.gz" if form == "gzip" else "a.json")
    path.write_bytes(gzip.compress(data) if form == "gzip" else data)
    first, second, bad, last = read_all([str(path)], shard_bytes=shard)
    assert [first.text, second.text, last.text] == [row["text"] for row in rows if "text" in row]
    assert (bad.row, bad.reason) == (3, "no column 'text'")
    assert data[last.place :].startswith(b"{")
    assert last.document_id == f"a.json{'.gz' * (form == 'gzip')}#{last.place}"
    unit = InputSplit("", "jsonl", plan([str(path)], 1 << 20)[0].files, 0, -1)
    lines = [line for _, line in readers.raw_lines(unit) if line]
    assert list(map(json.loads, lines)) == rows
    assert b"\n" not in b"".join(lines)


@pytest.mark.parametrize(
    ("data", "texts", "told"),
    [
        ('[{"text": "a"}, {"text": "b"}', ["a", "b"], ["cut short"]),
        ('[{"text": "a"}, {"text": "b', ["a"], ["not a line", "cut short"]),
        ('[{"text": "a"}]\n{"text": "b"}\n', ["a", "b"], []),
        ('[{"text": "a"},\n{"text": bad},\n{"text": "c"},]', ["a", "c"], ["not a line"]),
        ('[\n]\n{"text": "b"}', ["b"], []),
        ('["a"]\n{"text": "b"}', ["b"], ["holds a JSON list"]),
        ('[\n{"text": "a\nb"},\n{"text":\r\n"c"}]', ["c"], ["Invalid control character"]),
        ('[{"text": "a\rb", "n": "\\""},{"te\nxt": "c"},\n{"text": "d"}]', ["d"], ["Invalid control"] * 2),
        ('[{"text": "' + "a" * 100 + '"}]', [], ["write one JSON object a line"]),
    ],
)
def test_what_is_wrong_in_a_json_array_is_told(tmp_path, monkeypatch, data, texts, told):
    monkeypatch.setattr(readers, "_ARRAY_BYTES", 100)
    (tmp_path / "a.json").write_text(data)
    items = read_all([str(tmp_path)])
    assert [item.text for item in items if isinstance(item, Document)] == texts
    reasons = [item.reason for item in items if isinstance(item, Rejected)]
    assert len(reasons) == len(told)
    assert all(words in reason for words, reason in zip(told, reasons, strict=True))


def test_files_packed_in_other_ways_are_named_so(tmp_path):
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(b'{"text": "a"}'))
    (item,) = read_all([str(tmp_path)])
    assert item.sentence() == ("a.jsonl.bz2: packed in a way that is not read; unpack it, or pack it with gzip or zstd")


def tar(data):
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        (entry := tarfile.TarInfo("a.jsonl")).size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return target.getvalue()


PACKS = {
    "gzip data": gzip.compress,
    "zstd data": zstandard.ZstdCompressor().compress,
    "bzip2 data": bz2.compress,
    "xz data": lzma.compress,
    "a tar archive": tar,
}


@pytest.mark.parametrize("what", PACKS)
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.txt.gz", "a.json", "a.jsonl.gzip", "a.jsonl.zstd"]
)
def test_packed_data_of_another_name_is_told_once(tmp_path, what, name):
    rows = [{"text": random.Random(i).randbytes(400).hex()} for i in range(5)]
    data = PACKS[what](b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (item,) = read_all([str(tmp_path)], shard_bytes=700)
    assert item.sentence() == f"{name}: holds {what}, not text; {readers._UNPACK}"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("name", ["text", "other"])
def test_two_columns_of_one_name_are_refused(tmp_path, kind, name):
    table = pa.table([["a", "b"], ["c", "d"], ["e", "f"]], names=["text" if name != "text" else "z", name, name])
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
    (item,) = read_all([str(tmp_path)])
    assert f"it has two columns named '{name}'; rename one" in item.reason


def test_text_that_begins_as_packed_data_might_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("BZh is short for it; PK too.")
    assert [item.text for item in read_all([str(tmp_path)])] == ["BZh is short for it; PK too."]


def test_a_broken_arrow_file_keeps_its_whole_batches_and_is_told_once(tmp_path):
    table = pa.table({"text": [f"row {i} " + "x" * 100 for i in range(20)]})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    data = (tmp_path / "a.arrow").read_bytes()
    garbage = data.index(b"row 10") - 20
    for broken in (data[: len(data) // 2], data[: garbage - 300] + b"\x07" * 900):
        (tmp_path / "a.arrow").write_bytes(broken)
        for shard in (1 << 20, 100):
            items = read_all([str(tmp_path)], shard_bytes=shard)
            assert [isinstance(i, Rejected) for i in items].count(True) == 1
            assert items[-1].row in (5, 10)
            assert len(items) == items[-1].row + 1


def test_a_saved_dataset_and_a_dictionary_of_them(tmp_path):
    one = datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(10)])
    one.save_to_disk(str(tmp_path / "one"), num_shards=2)
    shutil.copy(tmp_path / "one/data-00000-of-00002.arrow", tmp_path / "one/cache-123.arrow")
    documents = read_all([str(tmp_path / "one")])
    assert [d.text for d in documents] == [f"row {i}" for i in range(10)]
    assert documents[5].document_id == "data-00001-of-00002.arrow#0"
    splits = datasets.DatasetDict({"train": one, "test": one.select(range(3))})
    splits.save_to_disk(str(tmp_path / "both"))
    assert {d.source for d in read_all([str(tmp_path / "both")])} == {
        "train/data-00000-of-00001.arrow",
        "test/data-00000-of-00001.arrow",
    }
    (tmp_path / "one/data-00001-of-00002.arrow").unlink()
    with pytest.raises(StrideError, match="data-00001-of-00002"):
        plan([str(tmp_path / "one")], 100)
    (tmp_path / "one/state.json").write_text("[" * 100_000)
    with pytest.raises(StrideError, match=r"state.json does not list a dataset's files \(RecursionError\)"):
        plan([str(tmp_path / "one")], 100)


def test_identity_does_not_depend_on_the_place(tmp_path):
    for place in ("here", "there/deep"):
        write_lines(tmp_path / place / "x/a.jsonl", [{"text": f"row {i}"} for i in range(9)])
        (tmp_path / place / "t.txt").write_text("text")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "here"), "/corpus", recursive=True)
    cases = [str(tmp_path / "here"), str(tmp_path / "there/deep"), "memory://corpus", f"{tmp_path}/here/**"]
    seen = {
        (tuple(u.key for u in plan([case], 40)), tuple(d.document_id for d in read_all([case], shard_bytes=40)))
        for case in cases
    }
    assert len(seen) == 1
    assert "x/a.jsonl#0" in next(iter(seen))[1]


def test_names_are_relative_to_the_input(tmp_path):
    path = write_lines(tmp_path / "data/en/a.jsonl", [{"text": "x"}])
    for case, name in (
        (path, "a.jsonl"),
        (f"{tmp_path}/data", "en/a.jsonl"),
        (f"{tmp_path}/data/*/a.jsonl", "en/a.jsonl"),
        (f"{tmp_path}/data/en/*.jsonl", "a.jsonl"),
        (f"file://{path}", "a.jsonl"),
        (os.path.relpath(path), "a.jsonl"),
    ):
        assert plan([case], 100)[0].files[0].name == name


def test_archives_caches_and_odd_names_can_be_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/one.txt", "first")
        archive.writestr("in/two.txt", "second")
    documents = read_all([f"zip://in/*.txt::file://{tmp_path}/a.zip"])
    assert [(d.document_id, d.text) for d in documents] == [("one.txt", "first"), ("two.txt", "second")]
    (tmp_path / "t").mkdir()
    (tmp_path / "t/List::Util[1].txt").write_text("perl")
    assert [d.text for d in read_all([str(tmp_path / "t")])] == ["perl"]
    assert [d.text for d in read_all([str(tmp_path / "t/List::Util[1].txt")])] == ["perl"]
    fsspec.filesystem("memory").pipe_file("/c/a.txt", b"cached")
    assert [d.text for d in read_all(["simplecache::memory://c/a.txt"])] == ["cached"]


def test_units_travel_as_json_and_tell_changes_by_version(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    before = plan([path], 10)
    assert [InputSplit.from_dict(json.loads(json.dumps(unit.to_dict()))) for unit in before] == before
    assert len({unit.key for unit in before}) == len(before) > 1
    os.utime(path, (1, 1))
    after = plan([path], 10)
    assert [unit.key for unit in after] == [unit.key for unit in before]
    assert after[0].files[0].version != before[0].files[0].version
    os.remove(path)
    with pytest.raises(StrideError, match="gone"):  # raised, not rejected: it says nothing of the content
        list(read(after[0], TEXT))


def test_inputs_that_cannot_be_planned_are_told_in_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    a, b = (write_lines(tmp_path / f"{x}/same.jsonl", [{"text": "x"}]) for x in "ab")
    for inputs, words in (
        ([], "No input"),
        ([""], "An input's name is empty"),
        ([a, " "], "An input's name is empty"),
        ([str(tmp_path / "missing")], "does not exist"),
        ([str(tmp_path / "*.parquet")], "matches no file"),
        ([str(tmp_path / "empty")], "matches no file"),
        ([str(tmp_path / "empty.jsonl")], "every file is empty"),
        (["nosuch://bucket/x"], "nosuch"),
        ([a, b], f"{a} and file://{b}".replace(a, f"file://{a}", 1)),
    ):
        with pytest.raises(StrideError) as told:
            plan(inputs, 100)
        assert words in str(told.value)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("s3://key:secret@bucket/a.jsonl", "s3://bucket/a.jsonl"),
        ("https://h/a.jsonl?X-Sig=secret&b=1", "https://h/a.jsonl"),
        ("zip://*::ftp://me:secret@h/a.zip", "zip://*::ftp://h/a.zip"),
        ("s3://b/part-?.jsonl", "s3://b/part-?.jsonl"),
        ("s3://b/my dir/x?token=secret", "s3://b/my dir/x"),
        ("s3://k:se cret@b/x", "s3://b/x"),
        ("filecache::s3://k:secret@b/x", "filecache::s3://b/x"),
        ("http://u:secret@[x/y", "http://[x/y"),
        ("https://h/a.jsonl#access_token=secret&x=1", "https://h/a.jsonl"),
        ("https://h/a.jsonl?a=b#secret", "https://h/a.jsonl"),
        ("s3://b/a.jsonl#state=1&access_token=secret", "s3://b/a.jsonl"),
        ("s3://b/day#=1/a#2.jsonl", "s3://b/day#=1/a#2.jsonl"),
        ("s3://key:sec/ret@b/a.jsonl", "s3://b/a.jsonl"),
        ("http://h:80/a@b.jsonl", "http://h:80/a@b.jsonl"),
        ("/a b?c=d::e@f", "/a b?c=d::e@f"),
    ],
)
def test_no_credentials_in_what_is_shown(text, safe):
    assert redact_url(text) == safe
    if " " not in text:
        assert redact_message(f"not found: {text} or so") == f"not found: {safe} or so"


# Error texts of object stores, web clients and hubs, with "secret" where they have one.
TOLD = """
403, message='Forbidden', url=URL('https://acct.blob.core.windows.net/c/b?sv=2020-10-02&sig=secret%3D&se=1')
Max retries exceeded with url: /b/k?X-Amz-Credential=secret%2F2026&X-Amz-Signature=secret (Caused by OSError('x'))
PUT /v1/AUTH_x/c/o?temp_url_sig=secret&temp_url_expires=1 gave 401; temp_url_sig=secret
request sv=2020-10-02&sig=secret&se=1 and sig=secret
GoogleAccessId=secret&Signature=secret; X-Goog-Signature=secret
AWSAccessKeyId=secret aws_secret_access_key=secret, aws_session_token="secret"
{'Authorization': 'Bearer secret', 'Cookie': 'a=secret; b=secret'}
{"authorization": "Basic c2VjcmV0", "client_secret": "secret", "refresh_token":"secret", "private_key": "secret"}
Authorization: Bearer secret was refused: the Bearer secret has expired
Authorization=Basic secret; Proxy-Authorization: Basic secret; x-api-key: secret
Authorization: AWS4-HMAC-SHA256 Credential=secret/20261129/us, SignedHeaders=host, Signature=secret
Authorization: SharedKey secret; x-ms-copy-source-authorization: secret; x-amz-security-token: secret
AccountName=me;AccountKey=secret==;EndpointSuffix=core.windows.net and SharedAccessSignature=sv=1&sig=secret
<Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>secret</AWSAccessKeyId><SignatureProvided>secret</SignatureProvided>
X-Auth-Token: secret; X-Subject-Token: x; password=secret, PGPASSWORD='secret'; accessKeyId: secret, apikey: secret
Invalid user token hf_secretsecretsecret; HF_TOKEN=secret; token=secret; ghp_secretsecretsecret; glpat-secretsecretse
The key AKIASECRETSECRETSECR does not exist; eyJhbGciOisecret.eyJzdWIiOisecret.secret has expired
-----BEGIN RSA PRIVATE KEY-----secret
{"token": "secret"} and token: secret and X-Token: secret and {'token': 'secret'} and {\\"token\\": \\"secret\\"}
Authorization: ApiKey secret was refused; X-Api-Authorization: Hawk secret
GET ?key=secret&a=1 auth=secret pass=secret; {"auth": "secret", "pass" : "secret"}
run --password secret --api-key secret --token secret --client-password "secret"
"password"  :  "secret", <Token>secret</Token> and <pass>secret</pass>
no host in //me:secret@h/x; to=s3%3A%2F%2Fkey%3Asecret%40b%2Fa; to=https%3A%2F%2Fh%2Fa%3Fsig%3Dsecret%26token%3Dsecret
npm_secretsecretsecretsecret pypi-secretsecretsecretsecret sk_live_secretsecret xapp-1-secretsecret
to https://hooks.slack.com/services/secret/secret or hooks.slack.com/services/secret
""".strip().splitlines()


@pytest.mark.parametrize("text", TOLD)
def test_no_credentials_in_messages(text):
    shown = redact_message(text)
    assert "secret" not in shown.lower().replace("secret_access_key", "").replace("client_secret", "")
    assert "c2VjcmV0" not in shown
    assert redact_message(shown) == shown
    assert shown in redacted_error(OSError(text), "s3://b/x")


@pytest.mark.parametrize(
    "text",
    [
        "eos_token: </s>, pad_token=<pad>, token id 2048 is outside the vocabulary, 'token_ids' holds null",
        "token: 3, token ids, the key 'text', token_ids = 3, key=3 'token': null, tokens: 9, token=None, eos_token: x",
        "give --token or --password to log in, npm_config_registry, pypi-simple, pass: 3, <token> is no word, auth: ok",
        "//comment: a b@c, unexpected token 'x', expected token ':', got '}', per token: 12, bypass=1, author=me",
        "a.jsonl#1024: Bearer authentication is required; the signature does not match: check the key",
        "no file /data/part-?/lang=en/x.jsonl, [Errno 2] No such file or directory: '/a/b?c'",
        "Unable to locate credentials; Basic authentication, key: 3, https://huggingface.co/gpt2/resolve/main/a.json",
    ],
)
def test_messages_without_credentials_stay(text):
    assert redact_message(text) == text


def test_what_follows_a_credential_stays():
    shown = redact_message(
        '{"secret": "a\\"S", "file": "x"} and //me:S@h/x and <Token>S</Token> of s3%3A%2F%2Fk%3AS%40b'
    )
    assert shown == '{"secret": …, "file": "x"} and //h/x and <Token>…</Token> of s3%3A%2F%2Fb'


@pytest.mark.parametrize(
    "unit",
    [
        "%3A%2F%2F",
        "//a:",
        "--token ",
        "%3Ftoken%3D",
        "<token>",
        "x-",
        "://a:",
        "https://",
        "a-",
        "a:b@",
        'password="',
        "/a?",
    ],
)
def test_messages_of_any_length_are_redacted_at_once(unit):
    started = time.process_time()
    assert len(redact_message(unit * 10**6)) < 10_000
    assert time.process_time() - started < 1


@pytest.mark.parametrize("url", ["ftp://me:secret@localhost:1/x.jsonl", "memory://me:secret@x/a.jsonl?sig=secret"])
def test_no_credentials_in_errors(url):
    with pytest.raises(StrideError) as told:
        plan([url], 100)
    unit = InputSplit("k", "jsonl", (SourceFile("a", url, 1, ""),), 0, 1)
    with pytest.raises(StrideError) as told_too:
        list(read(unit, TEXT))
    assert "secret" not in str(told.value) + str(told_too.value)
    assert "secret" not in redacted_error(OSError("/me:secret@x sig=secret secret"), url)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "t", "messages": []}, {"text": "t"}),
        *(({"text": "t", "conversations": none}, {"text": "t"}) for none in ("[]", "null", " {} ", '""')),
        ({"text": "null", "messages": "[]"}, {"text": "null"}),
        ({"prompt": "p", "completion": "c", "text": "t"}, {"prompt": "p", "answer": "c"}),
        ({"question": "q", "answer": "a"}, {"prompt": "q", "answer": "a"}),
        ({"instruction": "q", "input": "", "output": "a"}, {"prompt": "q", "answer": "a"}),
        ({"instruction": "q", "input": "i", "output": "a"}, {"prompt": "q\ni", "answer": "a"}),
        ({"instruction": "q", "context": "i", "response": "a", "category": "c"}, {"prompt": "q\ni", "answer": "a"}),
        ({"prompt": None, "completion": None, "text": "t"}, {"text": "t"}),
        ({"messages": float("nan"), "prompt": float("nan"), "answer": "a", "text": "t"}, {"text": "t"}),
        ({"input_ids": [1], "loss_mask": [1]}, {"token_ids": [1], "loss_mask": [True]}),
        ({"content": "t", "title": "x"}, {"text": "t"}),
    ],
)
def test_columns_are_detected(tmp_path, row, expected):
    (tmp_path / "0.txt").write_text("a text file has no columns")
    (tmp_path / "a.jsonl").write_text("{broken\n" + json.dumps({**row, "k": "x"}))
    found = plan([str(tmp_path)], 5)
    assert resolve_columns(found) == {}
    assert resolve_columns(found, {"id": "k"}) == {"id": "k"}
    documents = [item for unit in found[1:] for item in read(unit, {"id": "k"}) if isinstance(item, Document)]
    assert documents == [Document("x", "a.jsonl", **expected, place=documents[0].place)]


def test_columns_that_are_wrong_are_told(tmp_path):
    rows = read_all([write_parquet(tmp_path / "a.parquet", ["x", "y"], 1)], {"text": "body"})
    assert [row.reason for row in rows] == ["no column 'body'"] * 2
    os.remove(tmp_path / "a.parquet")
    found = plan([write_lines(tmp_path / "a.jsonl", [{"body": "x", "title": "y"}])], 100)
    with pytest.raises(StrideError, match=r"'body', 'title'.*--columns text=body"):
        resolve_columns(found)
    typo = plan([write_lines(tmp_path / "typo.jsonl", [{"prompt": "x", "completoin": "y"}])], 100)
    with pytest.raises(StrideError, match="'prompt' stands without 'completion'"):
        resolve_columns(typo)
    os.remove(tmp_path / "typo.jsonl")
    for columns, words in (
        ({"text": "txt"}, "no column 'txt'.*'body', 'title'"),
        ({"body": "text"}, "no role"),
        ({"prompt": "body"}, "do not make a document"),
        ({"text": "body", "messages": "m"}, "do not make a document"),
        ({"text": "body", "loss_mask": "m"}, "token_ids only"),
    ):
        with pytest.raises(StrideError, match=words):
            resolve_columns(found, columns)
    assert "none of its columns is known to hold a text; found: 'body', 'title'" in next(read(found[0], {})).reason
    (tmp_path / "a.jsonl").write_text("{broken")
    with pytest.raises(StrideError, match="not a line of JSON"):
        resolve_columns(plan([str(tmp_path)], 100))


def test_ids_sources_and_every_sort_of_document(tmp_path):
    rows = [
        {
            "k": 7,
            "s": "web",
            "m": [{"role": "user", "content": "hi", "tool_calls": None}],
            "q": "",
            "a": "yes",
            "t": [3],
        },
        {"k": "x", "s": "", "m": [{"content": "hi"}], "q": 1, "a": "", "t": [1, 2.5]},
        {"k": None, "s": "web", "m": "hi", "q": "?", "a": None, "t": [True]},
        {"s": "web", "m": [], "q": "?", "a": "!", "t": []},
    ]
    found = plan([write_lines(tmp_path / "a.jsonl", rows)], 1 << 20)
    for columns, content in (
        ({"messages": "m", "id": "k", "source": "s"}, {"messages": [{"role": "user", "content": "hi"}]}),
        ({"prompt": "q", "answer": "a", "id": "k", "source": "s"}, {"prompt": "", "answer": "yes"}),
        ({"token_ids": "t", "id": "k", "source": "s"}, {"token_ids": [3]}),
    ):
        items = list(read(found[0], columns))
        assert items[0] == Document("7", "web", **content)
        assert [type(item) for item in items[1:]] == [Rejected] * 3
        without = list(read(found[0], {k: v for k, v in columns.items() if k not in ("id", "source")}))
        assert without[0].document_id == "a.jsonl#0"
        assert {type(item) for item in without[1:3]} == {Rejected}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_an_id_is_text_whatever_its_type(tmp_path, kind):
    ids = {
        "number": [1, 2**62, -3, None],
        "text": ["1", "01", "1 ", "é", "e\u0301", None, ""],
        "gap": [1.0, 2.0, 2.5, 1e17, None],  # what pandas makes of integers with a gap
    }
    told = {
        "number": ["1", str(2**62), "-3", "'id' is null, not a string"],
        "text": ["1", "01", "1 ", "é", "e\u0301", "'id' is null, not a string", "'id' is empty"],
        "gap": ["1", "2", *["'id' is a number with a point, not a string"] * 2, "'id' is null, not a string"],
    }
    for name, values in ids.items():
        table = pa.table({"id": values, "text": ["a text"] * len(values)})
        path = tmp_path / f"{name}.{kind}"
        if kind == "jsonl":
            write_lines(path, table.to_pylist())
        elif kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(str(path), table.schema) as file:
                file.write_table(table)
        items = read_all([str(path)], {"text": "text", "id": "id"})
        assert [getattr(item, "reason", item.document_id) for item in items] == told[name]


def test_loss_masks_are_checked(tmp_path):
    rows = [{"t": [1, 2], "m": m} for m in ([1, 0], [True, False], [1], [2, 0], None)]
    items = read_all([write_lines(tmp_path / "a.jsonl", rows)], {"token_ids": "t", "loss_mask": "m"})
    assert [getattr(item, "loss_mask", None) for item in items] == [[True, False]] * 2 + [None] * 3
    assert "1 values in 'm' for 2 in 't'" in items[2].reason


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
HOLE = {"begin_offset": 0, "end_offset": 2, "train": False}


def one(tmp_path, row, columns=None):
    """The document or reject of a row, and the columns that it does not use."""
    unused = set()
    units = plan([write_lines(tmp_path / "a.jsonl", [row])], 1 << 20)
    (item,) = read(units[0], resolve_columns(units, columns), unused)
    return item, unused


@pytest.mark.parametrize(
    ("row", "ids", "mask", "unused"),
    [
        ({"attention_mask": [0, 1, 1, 1], "labels": [-100, -100, 7, 8]}, [6, 7, 8], [0, 1, 1], set()),
        ({"attention_mask": [True, True, False, False], "labels": [5, -100, 0, 0]}, [5, 6], [1, 0], set()),
        ({"labels": [-100, -100, 7, 8], "length": 4}, [5, 6, 7, 8], [0, 0, 1, 1], {"length"}),
        ({"labels": None, "attention_mask": [1, 1, 1, 1]}, [5, 6, 7, 8], None, set()),
        ({"assistant_masks": [0, 1, 0, 1]}, [5, 6, 7, 8], [0, 1, 0, 1], set()),
        ({"completion_mask": [0.0, 0.0, 1.0, 1.0]}, [5, 6, 7, 8], [0, 0, 1, 1], set()),
        ({"assistant_masks": [0, 1, 0, 1], "completion_mask": [0, 0, 1, 1]}, [5, 6, 7, 8], [0, 0, 0, 1], set()),
        ({"labels": [6, 7, 8, -100]}, "'labels' has 6 at position 0, where 'input_ids' has 5", None, set()),
        ({"labels": [5, 6, 0, -100]}, "'labels' has 0 at position 2, where 'input_ids' has 7", None, set()),
        ({"labels": [5, 6, 7]}, "3 values in 'labels' for 4 in 'input_ids'", None, set()),
        ({"attention_mask": [0, 0, 0, 0]}, "'attention_mask' is 0 throughout", None, set()),
    ],
)
def test_ready_ids_count_where_masks_and_labels_let_them(tmp_path, row, ids, mask, unused):
    item, rest = one(tmp_path, {"input_ids": [5, 6, 7, 8], **row})
    if isinstance(ids, str):
        assert ids in item.reason
    else:
        assert (item.token_ids, item.loss_mask, rest) == (ids, mask and list(map(bool, mask)), unused)


@pytest.mark.parametrize(
    ("turn", "learned"),
    [
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": None}, True),
        ({"train": False}, False),
        ({"training": False}, False),
        ({"loss": False}, False),
        ({"loss_mask": 0}, False),
        ({"loss_mask": 1, "step_loss_mask": 0}, False),
        ({"step_loss_mask": 0.5}, "whose step_loss_mask is 0.5; only 0 and 1"),
        ({"train_detail": [HOLE]}, "holds a message with train_detail"),
        ({"weight": 0.5}, "whose weight is 0.5; only 0 and 1"),
        ({"weight": float("nan"), "name": float("nan")}, True),
    ],
)
def test_turns_may_be_marked_as_not_to_be_learned(tmp_path, turn, learned):
    told = {"from": "gpt", "value": "yes", **turn}
    for row in ({"messages": [*CHAT, {**CHAT[1], **turn}]}, {"conversations": [*CHAT, told]}):
        item, _ = one(tmp_path, row)
        if isinstance(learned, str):
            assert learned in item.reason
        else:
            assert item.messages == [*CHAT, CHAT[1]]
            assert item.learned == (None if learned else [True, True, False])


PRINTED = {"type": "text", "text": "yes"}


@pytest.mark.parametrize(
    ("turn", "read"),
    [
        ({"from": "gpt", "value": "yes", "content": ""}, "yes"),
        ({"from": "gpt", "value": "yes", "content": None}, "yes"),
        ({"from": "gpt", "value": " ", "content": "yes"}, "yes"),
        ({"from": "gpt", "content": "yes"}, "yes"),
        ({"from": "gpt", "value": "yes", "content": "no"}, "holds a message with a value and a content; keep one"),
        ({"role": "assistant", "content": [PRINTED, "so"]}, [PRINTED, "so"]),
        ({"role": "assistant", "content": float("nan")}, "whose content is NaN, neither a string nor a list of parts"),
        ({"role": "assistant", "content": 4}, "whose content is a number, neither a string nor"),
        ({"role": "assistant", "content": True}, "whose content is a boolean, neither a string nor"),
        ({"role": "assistant", "content": {"text": "hi"}}, "whose content is an object, neither a string nor"),
        ({"from": "gpt", "value": {"text": "hi"}}, "whose content is an object, neither a string nor"),
        (
            {"role": "assistant", "content": ["a", None]},
            "a part of its content that is null, not a string or an object",
        ),
        ({"role": "assistant", "content": [{**PRINTED, "text": 3}]}, "whose text is a number, not a string"),
        ({"role": "assistant", "content": "yes", "tool_calls": 5}, "whose tool_calls are a number, not a list"),
    ],
)
def test_what_a_turn_says_is_a_string_or_parts(tmp_path, turn, read):
    item, _ = one(tmp_path, {"messages": [CHAT[0], turn]})
    if isinstance(read, str) and " " in read:
        assert read in item.reason
    else:
        assert item.messages == [CHAT[0], {"role": "assistant", "content": read}]
        assert turn[content_key(turn)] == read


@pytest.mark.parametrize(
    ("calls", "read"),
    [
        ([], None),
        (None, None),
        ("[]", None),
        ('[{"name": "f"}]', [{"name": "f"}]),
        ('[{"name": "f", "id": null}]', [{"name": "f"}]),
        (['{"name": "f"}', {"name": "g"}], [{"name": "f"}, {"name": "g"}]),
        (["f()"], "holds a message whose tool_calls are a string that is not JSON"),
        ([{"name": "f", "id": None}], [{"name": "f"}]),
        ("f()", "holds a message whose tool_calls are a string that is not JSON"),
    ],
)
def test_calls_of_tools_may_be_empty_or_json(tmp_path, calls, read):
    item, _ = one(tmp_path, {"messages": [CHAT[0], {**CHAT[1], "tool_calls": calls}]})
    if isinstance(read, str):
        assert read in item.reason
    else:
        assert item.messages[1] == {**CHAT[1], **({"tool_calls": read} if read else {})}


def test_nesting_that_is_too_deep_costs_its_row_alone(tmp_path):
    deep = "x"
    for _ in range(900):
        deep = {"a": deep}
    assert one(tmp_path, {"text": "t", "meta": deep})[0].text == "t"
    item, _ = one(tmp_path, {"messages": [{**CHAT[1], "tool_calls": deep}]})
    assert item.reason == "nested too deeply"


def test_a_conversation_in_two_columns_counts_its_second_alone(tmp_path):
    item, _ = one(tmp_path, {"prompt": [*CHAT, CHAT[0]], "completion": CHAT[1:], "tools": "[]"})
    assert (item.messages, item.learned) == ([*CHAT, *CHAT], [False, False, False, True])
    assert "'completion' is a string, not a list" in one(tmp_path, {"prompt": CHAT, "completion": "x"})[0].reason


@pytest.mark.parametrize(
    ("row", "arguments"),
    [
        ({"tools": [{"name": "f", "strict": None}]}, {"tools": [{"name": "f"}]}),
        ({"tools": json.dumps([{"name": "f"}])}, {"tools": [{"name": "f"}]}),
        ({"tools": [json.dumps({"name": "f"})]}, {"tools": [{"name": "f"}]}),
        ({"chat_template_kwargs": {"thinking": False, "x": None}}, {"thinking": False}),
        ({"tools": []}, None),
        ({"tools": ""}, None),
        ({"tools": "[{broken"}, "'tools' is a string that is not JSON"),
        ({"tools": {"name": "f"}}, "'tools' is not a list of objects"),
    ],
)
def test_tools_go_to_the_chat_template(tmp_path, row, arguments):
    item, unused = one(tmp_path, {"messages": CHAT, **row})
    assert arguments in item.reason if isinstance(arguments, str) else item.template_arguments == arguments
    assert not unused
    assert one(tmp_path, {"prompt": "a", "answer": "b", "tools": "[1]"})[1] == {"tools"}


def test_each_row_of_a_merged_data_set_takes_what_it_fills(tmp_path):
    rows = [
        {"messages": CHAT, "text": None, "id": "1"},
        {"messages": None, "text": "plain", "id": "2"},
        {"messages": [], "text": "other", "id": None},
        {"messages": CHAT, "text": "both", "id": "4"},
        {"messages": None, "text": None, "id": "5"},
    ]
    pq.write_table(pa.Table.from_pylist([{**row, "nothing": None} for row in rows]), tmp_path / "a.parquet")
    datasets.Dataset.from_list([{**row, "nothing": None} for row in rows]).save_to_disk(str(tmp_path / "saved"))
    for place in (str(tmp_path / "a.parquet"), write_lines(tmp_path / "b.jsonl", rows), str(tmp_path / "saved")):
        unused = set()
        units = plan([place], 1 << 20)
        items = list(read(units[0], resolve_columns(units), unused))
        assert [getattr(item, "text", None) or getattr(item, "messages", None) for item in items] == [
            *(CHAT, "plain", "other", CHAT),
            None,
        ]
        assert "'messages' is null" in items[4].reason
        assert unused == {"id", "text"}


def test_several_columns_may_make_a_prompt(tmp_path):
    row = {"task": "do", "data": "this", "blank": " ", "reply": "done", "a+b": "x"}
    for prompt, expected in (("task+data", "do\nthis"), ("data+blank+task", "this\ndo"), ("a+b", "x")):
        item, unused = one(tmp_path, row, {"prompt": prompt, "answer": "reply"})
        assert (item.prompt, item.answer) == (expected, "done")
        assert unused == {"task", "data", "a+b"} - {prompt} - set(prompt.split("+"))
    for prompt, words in (("task+date", "no column 'date' to take as prompt"), ("task+", "prompt is given no column")):
        with pytest.raises(StrideError, match=words):
            one(tmp_path, row, {"prompt": prompt, "answer": "reply"})


def test_a_conversation_is_the_same_from_json_lines_and_parquet(tmp_path):
    calls = [{"id": None, "function": {"name": name, "arguments": {name: 1}}} for name in "fg"]
    turns = [CHAT[0], *({"role": "assistant", "content": None, "tool_calls": [call]} for call in calls), CHAT[1]]
    tools = [{"name": name, "parameters": {name: {"type": "number"}}} for name in "fg"]
    rows = [{"messages": turns, "tools": tools}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    (lines,), (parquet,) = (
        read_all([x], {}) for x in (write_lines(tmp_path / "a.jsonl", rows), tmp_path / "b.parquet")
    )
    assert (lines.messages, lines.template_arguments) == (parquet.messages, parquet.template_arguments)
    assert lines.messages[1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"f": 1}}}]


def as_json(part):
    """An array of values stored as JSON, as the library datasets stores what has no fixed type."""
    return pa.array(list(map(json.dumps, part)), pa.json_())


def listed(*parts):
    """A list of such arrays as the only row of a column."""
    return pa.ListArray.from_arrays([0, len(parts[0])], parts[0] if len(parts) == 1 else pa.concat_arrays(parts))


CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"q": ["x", 1]}}}]
JSON_CHAT = [CHAT[0], {**CHAT[1], "tool_calls": CALLS}]


def typed_messages(stored):
    """A column with JSON_CHAT, of whose turns the given part is stored as JSON."""
    if stored == "turns":
        return listed(as_json(JSON_CHAT))
    if stored == "column":
        return as_json([JSON_CHAT])
    roles, contents = pa.array(["user", "assistant"]), pa.array([turn["content"] for turn in CHAT])
    called = as_json(CALLS)
    if stored == "arguments":
        function = pa.StructArray.from_arrays(
            [pa.array(["f"]), as_json([CALLS[0]["function"]["arguments"]])], ["name", "arguments"]
        )
        called = pa.StructArray.from_arrays([pa.array(["function"]), function], ["type", "function"])
    if stored == "contents":
        contents = as_json([turn["content"] for turn in CHAT])
    calls = pa.ListArray.from_arrays(pa.array([None, 0, 1], pa.int32()), called)
    return listed(pa.StructArray.from_arrays([roles, contents, calls], ["role", "content", "tool_calls"]))


@pytest.mark.parametrize("stored", ["column", "turns", "contents", "calls", "arguments"])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_values_stored_as_json_are_read_at_any_depth(tmp_path, kind, stored):
    table = pa.table({"messages": typed_messages(stored), "note": as_json([""])})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    unused = set()
    (unit,) = plan([str(path)], 1 << 20)
    (item,) = read(unit, {}, unused)
    assert (item.messages, unused) == (JSON_CHAT, set())


def test_what_is_not_json_among_values_stored_as_json(tmp_path):
    values = ['"a"', "{broken", '{"a": 1}', "7", "[" * 100_000]
    pq.write_table(pa.table({"text": pa.array(values, pa.json_())}), tmp_path / "a.parquet")
    first, *others = read_all([str(tmp_path / "a.parquet")], {})
    assert first.text == "a"
    assert [other.reason.partition(":")[0] for other in others] == [
        "'text' is unreadable",
        "'text' is an object, not a string",
        "'text' is a number, not a string",
        "'text' is unreadable",
    ]


def test_turns_may_be_json_in_strings(tmp_path):
    item, _ = one(tmp_path, {"messages": [json.dumps(CHAT[0]), json.dumps({**CHAT[1], "name": None})]})
    assert item.messages == CHAT
    assert "that is not an object with a role" in one(tmp_path, {"messages": ["hi"]})[0].reason


def corrupted(path, table, column, group=1):
    """Write a file with checksums, then damage the first page of a column's chunk in a way that still decodes."""
    pq.write_table(table, path, 10, use_dictionary=False, compression=None, write_page_checksum=True)
    facts = pq.read_metadata(path).row_group(group)
    (chunk,) = (facts.column(i) for i in range(facts.num_columns) if facts.column(i).path_in_schema == column)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 1
    path.write_bytes(data)


def test_a_page_whose_checksum_does_not_fit_is_lost_with_its_rows(tmp_path):
    table = pa.table({"text": [f"the number is {i:03d}" for i in range(30)]})
    corrupted(tmp_path / "a.parquet", table, "text")
    items = read_all([str(tmp_path)])
    assert [item.text for item in items if isinstance(item, Document)] == table["text"].to_pylist()[:10] + table[
        "text"
    ].to_pylist()[20:]
    (lost,) = (item for item in items if isinstance(item, Rejected))
    assert (lost.row, lost.rows) == (10, 10)
    assert "rows 10 to 19: row group 1 is unreadable" in lost.sentence()
    assert "CRC checksum verification failed" in lost.sentence()


def test_an_unreadable_column_costs_only_the_rows_that_use_it(tmp_path):
    chats = [CHAT if i < 15 else None for i in range(30)]
    columns = {"messages": chats, "text": [f"text {i}" for i in range(30)], "url": ["u"] * 30}
    for column, lost in (("url", []), ("text", [*range(15, 20)])):
        corrupted(tmp_path / "a.parquet", pa.table(columns), column)
        items = read_all([str(tmp_path)], {})
        assert [item.row for item in items if isinstance(item, Rejected)] == lost
        assert len(items) == 30
    assert "'text' is unreadable: could not verify page integrity" in items[15].reason


READ_WITH_FLIPPED_FOOTERS = """
import sys
from stride_ray.corpus.documents import read
from stride_ray.corpus.splits import plan
whole = open(sys.argv[1], "rb").read()
for place in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole) - 8):
    open(sys.argv[1], "wb").write(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
    for unit in plan([sys.argv[1]], 1 << 20):
        assert list(read(unit, {}, set()))
"""


def test_a_footer_that_describes_columns_wrongly_does_not_end_the_process(tmp_path):
    table = pa.table({"text": ["a", "b"], "n": [1, None], "url": ["u", "v"]})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
    command = [sys.executable, "-c", READ_WITH_FLIPPED_FOOTERS, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_columns_of_nulls_are_not_unused_in_parquet(tmp_path):
    rows = [
        {"text": str(i), "s": None, "st": {"k": None}, "l": [], "late": {"k": "x"} if i > 98 else None}
        for i in range(99)
    ]
    kinds = {"text": pa.string(), "s": pa.string(), "st": pa.struct({"k": pa.int8()}), "l": pa.list_(pa.int8())}
    for last, found in ([], set()), ([{"text": "z", "late": {"k": "x"}}], {"late"}), ([{"text": "z", "l": [1]}], {"l"}):
        schema = pa.schema({**kinds, "late": pa.struct({"k": pa.string()})})
        pq.write_table(pa.Table.from_pylist([*rows, *last], schema), tmp_path / "a.parquet", 40)
        (unit,) = plan([str(tmp_path / "a.parquet")], 1 << 20)
        unused = set()
        assert len(list(read(unit, {}, unused))) == len(rows) + len(last)
        assert unused == found


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *((blank, pa.string()) for blank in ("", " \n")),
        *((float("nan"), pa.float32()), ([], pa.list_(pa.int8())), ([None, None], pa.list_(pa.string()))),
        *(({"k": None}, pa.struct({"k": pa.int8()})), ({"k": ""}, pa.struct({"k": pa.string()}))),
        *(([{"k": None}], pa.list_(pa.struct({"k": pa.int8()}))), (0, pa.int8()), ("x", pa.string())),
    ],
)
def test_a_column_is_unused_by_one_rule_in_every_format(value, kind, tmp_path):
    rows = [{"text": str(i), "c": value if i % 2 else None} for i in range(70)]
    table = pa.table({"text": [row["text"] for row in rows], "c": pa.array([row["c"] for row in rows], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name in ("a.parquet", "a.arrow", "a.jsonl"):
        (unit,) = plan([str(tmp_path / name)], 1 << 20)
        found.append(set())
        assert len(list(read(unit, {}, found[-1]))) == len(rows)
    assert found == [{"c"} if has_content(value) else set()] * 3


def test_an_arrow_column_that_is_not_used_may_be_unreadable(tmp_path):
    table = pa.table({"text": [f"text {i}" * 9 for i in range(20)], "url": ["a url" * 9] * 20})
    with pa.ipc.new_stream(
        str(tmp_path / "a.arrow"), table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")
    ) as writer:
        writer.write_table(table, max_chunksize=10)
    whole = (tmp_path / "a.arrow").read_bytes()
    frames = [match.start() for match in re.finditer(b"\x04\x22\x4d\x18", whole)]  # offsets and strings, by column
    for frame, lost in ((frames[7], []), (frames[5], [(10, 10)])):
        (tmp_path / "a.arrow").write_bytes(whole[:frame] + b"\xff" * 8 + whole[frame + 8 :])
        items = read_all([str(tmp_path)])
        assert [(item.row, item.rows) for item in items if isinstance(item, Rejected)] == lost
        assert sum(isinstance(item, Document) for item in items) == 20 - 10 * len(lost)


def test_values_that_python_has_no_type_for_are_no_matter_if_not_used(tmp_path):
    when = pa.array([2**60, 1], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": ["a", "b"], "messages": when}), tmp_path / "a.parquet")
    assert [item.text for item in read_all([str(tmp_path)], TEXT)] == ["a", "b"]
    (first, second) = read_all([str(tmp_path)], {"text": "text", "id": "messages"})
    assert "'messages' is unreadable" in first.reason
    assert second.document_id == "1970-01-01T00:00:00.001000"


def test_a_record_batch_that_is_gone_from_an_arrow_file_is_told(tmp_path):
    table = pa.table({"text": [f"text {i}" for i in range(9)]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    whole = (tmp_path / "a.arrow").read_bytes()
    assert len(read_all([str(tmp_path)])) == 9
    starts = [match.start() for match in re.finditer(b"\xff\xff\xff\xff", whole)]  # schema, three batches, the end
    one, two = whole[starts[2] : starts[3]], whole[starts[1] : starts[2]]
    assert len(starts) == 5
    for middle, count, told in ((b"", 6, "has 2 record batches"), (one + two, 12, "has 4 record batches")):
        (tmp_path / "a.arrow").write_bytes(whole[: starts[2]] + middle + whole[starts[3] :])
        for shard in (1 << 20, 300):
            items = read_all([str(tmp_path)], shard_bytes=shard)
            assert len(items) == count + 1
            (lost,) = (item for item in items if isinstance(item, Rejected))
            assert f"row {count}: the file {told} up to here, and its footer states 3" in lost.sentence()


def test_columns_of_nulls_are_not_unused_in_arrow(tmp_path):
    nulls, late = pa.array([None, None], pa.string()), pa.array([None, "x"])
    for name, column in (("a", nulls), ("b", late)):
        table = pa.table(
            {"text": ["a", "b"], "s": nulls, "st": pa.nulls(2, pa.struct([("k", pa.int8())])), "u": column}
        )
        with pa.ipc.new_stream(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        (unit,) = plan([str(tmp_path / f"{name}.arrow")], 1 << 20)
        unused = set()
        assert [item.text for item in read(unit, {}, unused)] == ["a", "b"]
        assert unused == ({"u"} if column is late else set())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([decimal.Decimal("7.00")], "7"),
        ([uuid.UUID(int=5)], "00000000-0000-0000-0000-000000000005"),
        ([datetime.date(2026, 1, 31)], "2026-01-31"),
        ([datetime.datetime(2026, 1, 31, 12)], "2026-01-31T12:00:00"),
        ([decimal.Decimal("7.5")], "'id' is a decimal number with a fraction, not a string"),
        ([uuid.UUID(int=5).bytes], "'id' is bytes, not a string"),
    ],
)
def test_ids_of_parquet_types_are_their_text(tmp_path, values, told):
    column = pa.array(values, pa.uuid()) if isinstance(values[0], uuid.UUID) else pa.array(values)
    pq.write_table(pa.table({"text": ["a"], "id": column}), tmp_path / "a.parquet")
    (item,) = read_all([str(tmp_path)], {"id": "id"})
    assert (item.document_id if isinstance(item, Document) else item.reason) == told


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"messages": [{"role": "Human", "content": "a"}, {"role": "GPT", "content": "b"}]}, "user assistant"),
        ({"messages": [{"role": "model", "content": "a"}, {"role": "ipython", "content": "b"}]}, "assistant ipython"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "b"}]},
            "user assistant",
        ),
        ({"messages": '[{"role": "user", "content": "a"}]', "tools": "null"}, "user"),
        ({"messages": "hello"}, "'messages' is a string, not a list of messages"),
        ({"messages": '{"role": "user"}'}, "'messages' is an object, not a list of messages"),
        ({"question": "q", "answer": ["a"]}, "'answer' is a list and 'question' is a string"),
        ({"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]}, "'completion' is a list and 'prompt'"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "a"}, "'completion' is a string, not a list"),
    ],
)
def test_turns_have_the_roles_of_templates_and_the_odd_column_is_named(tmp_path, row, roles):
    (item,) = read_all([write_lines(tmp_path / "a.jsonl", [row])], {})
    if isinstance(item, Rejected):
        assert item.reason.startswith(roles)
    else:
        assert [turn["role"] for turn in item.messages] == roles.split()
        assert item.template_arguments is None


def test_a_conversation_kept_as_json_is_purified(tmp_path):
    turns = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d"}]
    cleaner = _Cleaner({}, {0: {"messages.0.content": [(1, 3)]}}, False, Counter())
    cleaned = cleaner.cleaned(0, {"messages": json.dumps(turns), "n": 1})
    assert json.loads(cleaned["messages"]) == [{"role": "user", "content": "a c"}, turns[1]]
    assert cleaned["n"] == 1
    calls = ['{"name":  "f"}', {"name": "g"}]
    strings = [json.dumps(turns[0]), {**turns[1], "tool_calls": calls}]
    leaks = {"messages.0.content": [(1, 3)], "messages.1.tool_calls.0.name": [(0, 1)]}
    cleaned = _Cleaner({}, {0: leaks}, False, Counter()).cleaned(0, {"messages": strings})
    assert cleaned["messages"] == [
        json.dumps({**turns[0], "content": "a c"}),
        {**turns[1], "tool_calls": ['{"name":  ""}', calls[1]]},
    ]


@pytest.mark.parametrize("stored", ["column", "turns", "contents", "calls", "arguments"])
def test_a_conversation_stored_as_json_is_purified(tmp_path, stored):
    table = pa.table({"messages": typed_messages(stored), "chat_template_kwargs": pa.array(["{broken"], pa.json_())})
    cleaner = _Cleaner({}, {7: {"messages.0.content": [(0, 1)]}}, False, Counter())
    cleaned = _cleaned_table(table, 7, cleaner)
    assert cleaned.schema == table.schema
    pq.write_table(cleaned.drop_columns("chat_template_kwargs"), tmp_path / "a.parquet")
    (item,) = read_all([str(tmp_path / "a.parquet")], {})
    assert item.messages == [{**CHAT[0], "content": "i"}, JSON_CHAT[1]]


CARD = "---\nlicense: mit\nconfigs:\n- config_name: default\n---\n# A data set\n"


@pytest.mark.parametrize(
    ("card", "files", "kept", "left_out"),
    [
        (CARD, "data/a.parquet scripts/x.py scripts/y/z.md", "data/a.parquet", "README.md scripts/"),
        (CARD.replace("\n", "\r\n"), "a.jsonl scripts/x.py", "a.jsonl", "README.md scripts/"),
        ("\ufeff" + CARD, "a.jsonl scripts/x.py texts/b.txt", "a.jsonl texts/b.txt", "README.md scripts/"),
        (CARD, "a.jsonl images/x.png code/x.tar", "a.jsonl code/x.tar", "README.md images/"),  # .tar is told later
        ("# A program\n", "tests/a.jsonl src/x.py", "src/x.py tests/a.jsonl", "README.md"),
        ("---\ntitle: A site\n---\nlicense: mit\n", "a/a.jsonl src/x.py", "a/a.jsonl src/x.py", "README.md"),
        (CARD, "src/x.py", "README.md src/x.py", ""),  # no data
    ],
)
@pytest.mark.parametrize("deep", ["", "hub/"])
def test_below_the_card_of_a_data_set_only_data_and_texts_are_documents(tmp_path, card, files, kept, left_out, deep):
    write = {f"{deep}README.md": card, **{f"{deep}{name}": "x" for name in files.split()}}
    if deep:
        write["other/y.py"] = "x"  # not of this data set
    for name, text in write.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    out = []
    found = [file.name for file in list_files(str(tmp_path), out)]
    assert found == [deep + name for name in kept.split()] + (["other/y.py"] if deep else [])
    assert out == [deep + name for name in left_out.split()]
    assert list_files(str(tmp_path / deep / files.split()[-1]))  # named alone, it is read
    if "x.py" in files:
        assert list_files(f"{tmp_path}/{deep}*/x.py")  # so is what a pattern names


@pytest.mark.parametrize("name", ["README.md", "readme.md", "Readme.MD"])
@pytest.mark.parametrize(
    "line",
    [
        "viewer: false",
        "extra_gated_prompt: x",
        "extra_gated_fields:\n  Name: text",
        "source_datasets:\n- original",
        "licenses:\n- mit",
        "task_ids: []",
        "modalities:\n- text",
        '"language": en',
        "'license' : mit",
        "language_creators:\n- found",
        "multilinguality: monolingual",
        "train-eval-index: []",
    ],
)
def test_any_key_of_the_hub_and_any_case_of_the_name_make_a_card(tmp_path, name, line):
    for each, text in {name: f"---\n{line}\n---\n# Data\n", "data/a.jsonl": "x", "scripts/prep.py": "x"}.items():
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).write_text(text)
    (tmp_path / "top.jsonl").write_text("x")
    assert [file.name for file in list_files(str(tmp_path))] == ["data/a.jsonl", "top.jsonl"]


@pytest.mark.parametrize("name", ["_b.jsonl", ".b.jsonl", "_SUCCESS"])
def test_a_folder_of_which_nothing_is_read_names_what_it_holds(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(StrideError, match=f"matches no file that is read: {name} is left out by its name"):
        list_files(str(tmp_path))


def test_zstd_with_long_windows_is_read(tmp_path):
    data = b"".join(b'{"text": "row %d"}\n' % i for i in range(50))
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(data) + packer.flush())
    assert len(read_all([str(tmp_path)])) == 50


@pytest.mark.parametrize(
    ("files", "kept", "left_out"),
    [
        (
            "README.md LICENSE .gitattributes dataset_infos.json data/a.parquet data/_SUCCESS",
            "data/a.parquet",
            ".gitattributes LICENSE README.md data/_SUCCESS dataset_infos.json",
        ),
        (
            "a.jsonl _metadata _temporary/0/b.jsonl day=1/c.jsonl _delta_log/0.json .git/x .git/y a.jsonl.crc",
            "a.jsonl day=1/c.jsonl",
            ".git/ _delta_log/ _metadata _temporary/ a.jsonl.crc",
        ),
        ("a.json b.json README.md load.py", "a.json b.json", "README.md load.py"),
        ("a.arrow notes.txt sub/README.md", "a.arrow notes.txt sub/README.md", ""),
        ("part-00000 _SUCCESS", "part-00000", "_SUCCESS"),
        ("README.md _notes.txt LICENSE", "LICENSE README.md _notes.txt", ""),
        ("README.md pkg/__init__.py pkg/_x.py package.json", "README.md package.json pkg/__init__.py pkg/_x.py", ""),
        ("src/a.py data/a.jsonl data/__init__.py setup.py", "data/a.jsonl src/a.py", "data/__init__.py setup.py"),
        (
            "a.pq b.jsonlines c.feather d.parquet.snappy e.txt f.txt.gz g.jsonl.xz requirements.txt x.lock x.md5 y.ini",
            "a.pq b.jsonlines c.feather d.parquet.snappy e.txt f.txt.gz g.jsonl.xz",
            "requirements.txt x.lock x.md5 y.ini",
        ),
        ("a.jsonl schema.json stats.json Thumbs.db", "a.jsonl", "Thumbs.db schema.json stats.json"),
        ("data/a.parquet csv/b.csv c.tsv.gz README.md", "data/a.parquet", "README.md c.tsv.gz csv/b.csv"),
    ],
)
def test_what_accompanies_data_files_is_no_document(tmp_path, files, kept, left_out):
    for name in files.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    out = []
    assert [file.name for file in list_files(str(tmp_path), out)] == kept.split()
    assert out == left_out.split()
    assert list_files(str(tmp_path / files.split()[0]))  # named alone, a file is what it is taken for
