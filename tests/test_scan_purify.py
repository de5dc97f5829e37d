"""The purified corpus: same formats, same bytes where nothing leaked, and a scan of it finds nothing."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import run_plainly, write_lines
from test_scan import ITEMS, question

from stride_ray.cli.main import main
from stride_ray.contamination.items import read_set
from stride_ray.contamination.lexical import search
from stride_ray.contamination.nightly import scan
from stride_ray.contamination.purify import purify
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store

LINES = [
    {"text": "one, untouched", "n": 1.50},
    {"text": f"before {question(1)} between {question(2)} after", "n": 2},
    {"text": "thr\u00e9e", "n": 3},
]


def corpus(folder):
    """Every format with leaks in it, and one file of each without."""
    write_lines(folder / "a.jsonl", LINES)
    raw = "".join(json.dumps(row) + "\n" for row in LINES).encode()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(raw))
    table = pa.table({"text": pa.array([row["text"] for row in LINES], pa.large_string()), "n": [1, 2, 3]})
    pq.write_table(table.replace_schema_metadata({"made": "by hand"}), folder / "d.parquet", row_group_size=2)
    (folder / "e.txt").write_text(f"A text.\n{question(3)}\nThe end.")
    with pa.ipc.new_stream(str(folder / "f.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    write_lines(folder / "clean.jsonl", [{"text": "nothing"}])
    (folder / "clean.txt").write_text("nothing either")
    return folder


@pytest.fixture
def scanned(tmp_path, monkeypatch):
    run_plainly(monkeypatch)
    corpus(tmp_path / "corpus")
    write_lines(tmp_path / "items.jsonl", ITEMS)

    def scan_of(folder, night):
        changes = {"corpus.input": str(tmp_path / folder), "scan.influence": False}
        run = Run(str(tmp_path / "run"), changes=changes)
        return run, scan(run, [read_set(str(tmp_path / "items.jsonl"))], str(tmp_path / f"scans-{folder}"), (), night)

    return tmp_path, scan_of


def test_spans_are_cut_and_the_rest_is_kept(scanned):
    root, scan_of = scanned
    run, found = scan_of("corpus", "n1")
    assert found["new"] == 3
    counts = purify(run, str(root / "scans-corpus"), "n1", str(root / "clean"))
    assert (counts["files"], counts["documents"], counts["spans"]) == (8, 6, 11)
    lines = (root / "clean/a.jsonl").read_text().splitlines()
    before = (root / "corpus/a.jsonl").read_text().splitlines()
    assert (lines[0], lines[2]) == (before[0], before[2])
    assert json.loads(lines[1]) == {"text": "before ? between ? after", "n": 2}
    for name in ("clean.jsonl", "clean.txt"):
        assert (root / "clean" / name).read_bytes() == (root / "corpus" / name).read_bytes()
    packed = gzip.decompress((root / "clean/b.jsonl.gz").read_bytes()).decode()
    assert packed.splitlines() == lines
    assert zstandard.ZstdDecompressor().decompressobj().decompress((root / "clean/c.jsonl.zst").read_bytes()) == (
        packed.encode()
    )
    table = pq.ParquetFile(root / "clean/d.parquet")
    assert table.schema_arrow.equals(pq.ParquetFile(root / "corpus/d.parquet").schema_arrow, check_metadata=True)
    assert table.num_row_groups == 2
    assert table.read()["text"].to_pylist() == ["one, untouched", "before ? between ? after", "thr\u00e9e"]
    assert (root / "clean/e.txt").read_text() == "A text.\n?\nThe end."
    with pa.ipc.open_stream(str(root / "clean/f.arrow")) as reader:
        assert reader.read_all()["text"].to_pylist() == table.read()["text"].to_pylist()
    assert json.loads((root / "clean/.purified/stage.json").read_text())["keys"]["run"] == str(root / "run")
    _, again = scan_of("clean", "n1")
    assert [each["verdicts"]["clean"] for each in again["sets"]] == [6]
    assert again["corpus"]["documents"] == found["corpus"]["documents"]


def test_whole_documents_are_left_out(scanned):
    root, scan_of = scanned
    run, _ = scan_of("corpus", "n1")
    counts = purify(run, str(root / "scans-corpus"), "n1", str(root / "clean"), whole=True)
    assert (counts["files"], counts["documents"]) == (7, 6)
    assert not (root / "clean/e.txt").exists()
    for name, lines in (("a.jsonl", 2), ("clean.jsonl", 1)):
        assert len((root / "clean" / name).read_text().splitlines()) == lines
    assert pq.read_table(root / "clean/d.parquet")["n"].to_pylist() == [1, 3]
    with pytest.raises(StrideError, match="made with whole = True, and this command has False"):
        purify(run, str(root / "scans-corpus"), "n1", str(root / "clean"))
    with pytest.raises(StrideError, match="is not empty"):
        purify(run, str(root / "scans-corpus"), "n1", str(root))


@pytest.mark.parametrize("at", [0, 3, 7])
def test_killed_and_run_again_it_ends_with_the_same_files(scanned, monkeypatch, at):
    root, scan_of = scanned
    (root / "corpus" / ("n" * 250 + ".txt")).write_text("a name as long as it may be")
    run, _ = scan_of("corpus", "n1")
    whole = purify(run, str(root / "scans-corpus"), "n1", str(root / "whole"))
    put, calls = Store.put, []

    def killed(store, name, path):
        calls.append(name)
        if len(calls) > at:
            raise KeyboardInterrupt
        return put(store, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            purify(run, str(root / "scans-corpus"), "n1", str(root / "clean"))
    scan_of("corpus", "n2")
    assert purify(run, str(root / "scans-corpus"), "n2", str(root / "clean")) == whole
    names = [path.name for path in (root / "clean").iterdir()]
    assert sorted(names) == sorted(path.name for path in (root / "whole").iterdir())
    for name in names:
        if name != ".purified":
            assert (root / "clean" / name).read_bytes() == (root / "whole" / name).read_bytes()


def test_input_that_changed_since_the_night_is_refused(scanned):
    root, scan_of = scanned
    run, _ = scan_of("corpus", "n1")
    write_lines(root / "corpus/a.jsonl", [{"text": "one more line"}, *LINES])
    with pytest.raises(StrideError, match="has changed since night n1"):
        purify(run, str(root / "scans-corpus"), "n1", str(root / "clean"))
    assert not (root / "clean").exists()
    scan_of("corpus", "n2")
    assert purify(run, str(root / "scans-corpus"), "n2", str(root / "clean"))["spans"] == 11


def test_prompts_and_chats_lose_spans_and_token_ids_are_refused(scanned, parts):
    root, scan_of = scanned
    for path in (root / "corpus").iterdir():
        path.unlink()
    turns = [{"role": "user", "content": f"Hm, {question(1)}"}, {"role": "assistant", "content": "yes"}]
    write_lines(root / "corpus/chat.jsonl", [{"messages": turns}])
    run, found = scan_of("corpus", "n1")
    assert found["new"] == 1
    purify(run, str(root / "scans-corpus"), "n1", str(root / "clean"))
    (line,) = (root / "clean/chat.jsonl").read_text().splitlines()
    assert json.loads(line)["messages"][0] == {"role": "user", "content": "Hm, ?"}

    from stride_ray.corpus.tokenization.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(parts.tokenizer))
    (root / "ids").mkdir()
    write_lines(root / "ids/a.jsonl", [{"token_ids": tokenizer(f"Hm, {question(2)}")["input_ids"]}])
    run = Run(
        str(root / "run2"),
        changes={
            "corpus.input": str(root / "ids"),
            "corpus.tokenizer": str(parts.tokenizer),
            "scan.influence": False,
        },
    )
    sets = [read_set(str(root / "items.jsonl"))]
    assert scan(run, sets, str(root / "scans-ids"), (), "n1")["new"] == 1
    with pytest.raises(StrideError, match="leave out whole documents"):
        purify(run, str(root / "scans-ids"), "n1", str(root / "clean-ids"))
    assert purify(run, str(root / "scans-ids"), "n1", str(root / "clean-ids"), whole=True)["documents"] == 1


def test_rows_of_several_columns_lose_spans_where_they_stand(scanned):
    root, scan_of = scanned
    for path in (root / "corpus").iterdir():
        path.unlink()
    asked = {"role": "user", "content": question(1)}
    rows = [
        {"instruction": "Say:", "input": question(1), "output": "yes"},
        {"conversations": [{"from": "human", "value": question(1)}, {"from": "gpt", "value": "yes"}]},
        {"prompt": [asked], "completion": [{"role": "assistant", "content": f"You said {question(1)}"}]},
    ]
    write_lines(root / "corpus/a.jsonl", rows)
    run, _ = scan_of("corpus", "n1")
    assert purify(run, str(root / "scans-corpus"), "n1", str(root / "clean"))["spans"] == 4
    assert [json.loads(line) for line in (root / "clean/a.jsonl").read_text().splitlines()] == [
        {"instruction": "Say:", "input": "?", "output": "yes"},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "yes"}]},
        {
            "prompt": [{"role": "user", "content": "?"}],
            "completion": [{"role": "assistant", "content": "You said ?"}],
        },
    ]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def chat(content, answer="yes"):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


COPY = question(1).rstrip("?")
# Rows, and what is left of them.
LEFT = {
    "a lone surrogate elsewhere": (
        [{"text": f"x {COPY}", "note": "half \ud800"}],
        [{"text": "x ", "note": "half \ud800"}],
    ),
    "nothing of a text": ([{"text": f" {COPY}\n"}, {"text": "other"}], [{"text": "other"}]),
    "nothing of an answer": (
        [{"prompt": "say", "completion": COPY}, {"prompt": COPY, "completion": "yes"}],
        [{"prompt": "", "completion": "yes"}],
    ),
    "nothing of a chat": ([chat(COPY, question(2).rstrip("?")), chat("a")], [chat("a")]),
    "a part of a message": (
        [chat([{"type": "text", "text": f"x {COPY}"}, {"type": "image", "a.b": COPY}])],
        [chat([{"type": "text", "text": "x "}, {"type": "image", "a.b": ""}])],
    ),
    "beside and below lone surrogates": (
        [chat([{"type": "text", "text": f"\ud800 {COPY}"}, {"type": "image", "\ud800.b": COPY}])],
        [chat([{"type": "text", "text": "\ud800 "}, {"type": "image", "\ud800.b": ""}])],
    ),
    "tools": (
        [
            chat("a") | {"tools": [{"function": {"name": "f", "description": f"x {COPY}"}}]},
            chat("b") | {"tools": json.dumps([{"name": "f", "description": f"x {COPY}"}])},
            chat("c") | {"tools": ['{"name": "f", "more": 1e400, "a.b": ["x", "' + f'{COPY}"]}}']},
            {"prompt": chat("d")["messages"][:1], "completion": chat("d")["messages"][1:], "tools": [{"f": COPY}]},
            chat("e") | {"chat_template_kwargs": {"tools": None, "documents": [None, {"title": "y", "text": COPY}]}},
            chat("f") | {"chat_template_kwargs": json.dumps({"tools": [{"name": COPY}]}), "tools": "null"},
            {"messages": [{"role": "assistant", "content": "g", "tool_calls": f'[{{"f" : "{COPY}"}}]'}]},
        ],
        [
            chat("a") | {"tools": [{"function": {"name": "f", "description": "x "}}]},
            chat("b") | {"tools": json.dumps([{"name": "f", "description": "x "}])},
            chat("c") | {"tools": ['{"name": "f", "more": 1e400, "a.b": ["x", ""]}']},
            {"prompt": chat("d")["messages"][:1], "completion": chat("d")["messages"][1:], "tools": [{"f": ""}]},
            chat("e") | {"chat_template_kwargs": {"tools": None, "documents": [None, {"title": "y", "text": ""}]}},
            chat("f") | {"chat_template_kwargs": json.dumps({"tools": [{"name": ""}]}), "tools": "null"},
            {"messages": [{"role": "assistant", "content": "g", "tool_calls": '[{"f" : ""}]'}]},
        ],
    ),
    "tags and entities": ([{"text": "x <i>" + COPY.replace(" ", "</i>&nbsp;<i>") + "</i>."}], [{"text": "x <i></i>."}]),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_of_documents(name, scanned):
    root, scan_of = scanned
    rows, left = LEFT[name]
    (root / "odd").mkdir()
    (root / "odd/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, _ = scan_of("odd", "n1")
    counts = purify(run, str(root / "scans-odd"), "n1", str(root / "clean"))
    assert rows_of(root / "clean/a.jsonl") == left
    assert counts["left_out"] == len(rows) - len(left)


# What surrounds a text in a line, as no program would write it again.
AROUND = [
    ('{"n": 1e400, "text": ', "}"),
    ('{ "a":[-0.10, 3.14159265358979323846264338327950288],"text" :\t', ' , "m": [NaN, {"k" : 1E+2}], "m":2 }\r'),
    ('{"i": 123456789012345678901234567890, "text": ', ', "s": "\\u00e9\\/\\ud800 é", "t": {"text": 1.0}}'),
    ('{"text": "first", "text": ', "}"),
    ('{"prompt": "", "completion": ', ', "n": 1.50}'),
    (
        '{"messages": [{"role": "user", "x": 1e4, "content": "a"},{"role":"assistant", "content": ',
        ', "weight":1.0}]}',
    ),
    ('{"messages": "[{\\"from\\": \\"gpt\\", \\"n\\": 1.50, \\"value\\": ', '}]", "n": 1.50}'),
]


@pytest.mark.parametrize("array", [False, True])
def test_all_of_a_line_but_what_leaked_keeps_its_bytes(array, scanned):
    root, scan_of = scanned
    (root / "odd").mkdir()

    def lines(text):
        once, twice = json.dumps(text), json.dumps(json.dumps(text))[1:-1]
        texts = [before + (twice if '\\"from' in before else once) + after for before, after in AROUND]
        return "[\n" + ",\n".join(map(str.strip, texts)) + "\n]\n" if array else "".join(f"{each}\n" for each in texts)

    (root / "odd/a.json").write_bytes(lines(f"x é {COPY}\n").encode())
    run, found = scan_of("odd", "n1")
    assert found["corpus"]["documents"] == len(AROUND)
    assert purify(run, str(root / "scans-odd"), "n1", str(root / "clean"))["spans"] == len(AROUND)
    assert (root / "clean/a.json").read_bytes().decode() == lines("x é \n")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_marks_and_ends_of_lines_are_as_they_were(mark, scanned):
    root, scan_of = scanned
    (root / "odd").mkdir()
    kept, leaked = b'{"text": "one"}', json.dumps({"text": f"x {COPY}"}).encode()
    files = {
        "first.jsonl": (leaked + b"\n" + kept, b'{"text": "x "}\n' + kept),
        "last.jsonl": (kept + b"\r\n\n" + leaked, kept + b'\r\n\n{"text": "x "}'),
        "gone.jsonl": (leaked.replace(b"x ", b"") + b"\n" + kept + b"\n", kept + b"\n"),
        "gone last.jsonl": (kept + b"\n" + leaked.replace(b"x ", b""), kept + b"\n"),
        "a.txt": (f"x\r\n{COPY}".encode(), b"x\r\n"),
        "array.json": (b"[\n" + leaked + b",\n" + kept + b"\n]", b'[\n{"text": "x "},\n' + kept + b"\n]"),
        "array gone.json": (b"[\n" + leaked.replace(b"x ", b"") + b"\n]\r\n\n", b"[]\r\n\n"),
    }
    for name, (before, _) in files.items():
        (root / "odd" / name).write_bytes(mark + before)
    run, _ = scan_of("odd", "n1")
    assert purify(run, str(root / "scans-odd"), "n1", str(root / "clean"))["documents"] == len(files)
    for name, (_, after) in files.items():
        assert (root / "clean" / name).read_bytes() == mark + after


def test_more_copies_than_have_excerpts_are_cut_too(scanned, monkeypatch):
    monkeypatch.setattr(search, "MOST", 2)
    root, scan_of = scanned
    write_lines(root / "many/a.jsonl", [{"text": f"{i} {COPY}."} for i in range(7)])
    run, _ = scan_of("many", "n1")
    assert purify(run, str(root / "scans-many"), "n1", str(root / "clean"))["documents"] == 7
    assert [row["text"] for row in rows_of(root / "clean/a.jsonl")] == [f"{i} ." for i in range(7)]


def test_text_files_of_which_nothing_is_left_beside_columns_of_other_names(scanned):
    root, scan_of = scanned
    write_lines(root / "mixed/a.jsonl", [{"content": f"x {COPY}"}])
    (root / "mixed/b.txt").write_text(COPY)
    frames = [zstandard.compress(each.encode()) for each in (f"one {COPY}", ", two")]
    (root / "mixed/c.txt.zst").write_bytes(b"".join(frames))
    run, _ = scan_of("mixed", "n1")
    counts = purify(run, str(root / "scans-mixed"), "n1", str(root / "clean"))
    assert (counts["files"], counts["documents"], counts["left_out"]) == (2, 3, 1)
    assert rows_of(root / "clean/a.jsonl") == [{"content": "x "}]
    packed = zstandard.ZstdDecompressor().decompressobj().decompress((root / "clean/c.txt.zst").read_bytes())
    assert packed == b"one , two"
    assert not (root / "clean/b.txt").exists()


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_columns_of_dictionaries_and_of_what_cannot_be_read(kind, scanned):
    root, scan_of = scanned
    (root / "odd").mkdir()
    texts = pa.array(["a", f"x {COPY}", "b", COPY, f"y {COPY}"]).dictionary_encode()
    buffers = pa.array([b"u", b"\xff", b"v", b"w", b"x"]).buffers()
    table = pa.table({"text": texts, "n": pa.StringArray.from_buffers(5, buffers[1], buffers[2])})
    path = root / f"odd/a.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with getattr(pa.ipc, f"new_{kind}")(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    run, _ = scan_of("odd", "n1")
    purify(run, str(root / "scans-odd"), "n1", str(root / "clean"))
    clean = root / "clean" / path.name
    found = pq.read_table(clean) if kind == "parquet" else getattr(pa.ipc, f"open_{kind}")(str(clean)).read_all()
    assert found.schema.equals(table.schema)
    assert found["text"].to_pylist() == ["a", "x ", "b", "y "]
    assert found["n"].cast(pa.binary()).to_pylist() == [b"u", b"\xff", b"v", b"x"]


def test_parquet_files_keep_their_codecs(scanned):
    root, scan_of = scanned
    (root / "packed").mkdir()
    table = pa.table({"text": ["a", f"x {COPY}"], "n": [1, 2], "s": [{"a": "u"}, {"a": "v"}]})
    codecs = {"text": "zstd", "n": "none", "s.a": "gzip"}
    for name in ("none", "snappy", "mixed"):
        codec = codecs if name == "mixed" else name
        pq.write_table(table, root / f"packed/{name}.parquet", compression=codec)
    run, _ = scan_of("packed", "n1")
    assert purify(run, str(root / "scans-packed"), "n1", str(root / "clean"))["spans"] == 3
    for path in (root / "packed").iterdir():
        before, after = (
            pq.ParquetFile(folder / path.name).metadata.row_group(0) for folder in (path.parent, root / "clean")
        )
        assert [after.column(i).compression for i in range(3)] == [before.column(i).compression for i in range(3)]
        assert pq.read_table(root / "clean" / path.name)["text"].to_pylist() == ["a", "x "]


@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_leaks_in_maps_are_cut(kind, scanned):
    root, scan_of = scanned
    (root / "maps").mkdir()
    arguments = pa.map_(pa.string(), pa.string())
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("arguments", arguments)])
    rows = [
        [
            {"role": "user", "content": "a", "arguments": None},
            {"role": "assistant", "content": "b", "arguments": [("p.q", "kept"), ("r", f"x {COPY}")]},
        ]
    ]
    table = pa.table({"messages": pa.array(rows, pa.list_(turn))})
    path = root / f"maps/a.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    run, _ = scan_of("maps", "n1")
    assert purify(run, str(root / "scans-maps"), "n1", str(root / "clean"))["spans"] == 1
    clean = root / "clean" / path.name
    found = pq.read_table(clean) if kind == "parquet" else pa.ipc.open_stream(str(clean)).read_all()
    rows[0][1]["arguments"][1] = ("r", "x ")
    assert found.schema.equals(table.schema)
    assert found["messages"].to_pylist() == rows


def test_by_the_command_line(scanned, capsys):
    root, _ = scanned
    arguments = ["scan", str(root / "run"), "--out", str(root / "scans"), "--influence", "false"]
    arguments += ["--set", f"corpus.input={root / 'corpus'}", "--evaluation", str(root / "items.jsonl")]
    assert main([*arguments, "--purify", str(root / "clean")]) == 2
    assert "Purified: 6 documents changed, 0 left out, 8 files" in capsys.readouterr().out
