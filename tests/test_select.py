"""Selection end to end: through real Ray on the tiny run, every form of input, resume, rounds, and what is refused."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import documents, run_plainly, settings, write_lines
from test_faults import await_markers, kill_family

from stride_ray.attribution import rescore
from stride_ray.attribution.attribute import read_influence
from stride_ray.cli.main import main
from stride_ray.corpus import shard
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store
from stride_ray.selection import select as selecting
from stride_ray.selection.select import select

DRIVER = """
import sys
import ray
from stride_ray.cli.main import main

ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
sys.exit(main(["select", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def selected(exactly, tmp_path_factory):
    """A selection through Ray; tests only read it."""
    out = tmp_path_factory.mktemp("selected") / "out"
    return out, select(with_options(exactly.run, tokens=0.3), ["asked"], str(out))


def with_options(run, **options):
    return Run(run.url, run.config, {f"select.{name}": value for name, value in options.items()})


def data_of(out):
    """Name and bytes of everything but markers, which hold seconds."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and "_done" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def manifest_of(out):
    return pq.read_table(out / "manifest.parquet").to_pandas()


def lines_of(folder):
    return [line for path in sorted(folder.glob("part-*")) for line in path.read_bytes().splitlines()]


def test_every_document_of_the_pool_has_a_row_that_says_why(exactly, selected):
    out, summary = selected
    manifest = manifest_of(out)
    blocks = exactly.run.stage("blocks").store.read_json("manifest.json")
    assert (len(manifest), manifest["tokens"].sum()) == (blocks["documents"], blocks["tokens"])
    assert manifest["document_id"].is_unique
    assert list(manifest["rank"]) == list(range(1, len(manifest) + 1))
    assert set(manifest[manifest["kept"]]["reason"].str.partition(",")[0]) == {"taken by best rank"}
    assert set(manifest[~manifest["kept"]]["reason"]) == {
        "no room left for it in the 30 % of the pool's tokens asked for"
    }
    kept = manifest[manifest["kept"]]
    assert summary["kept"]["tokens"] == kept["tokens"].sum() <= 0.3 * blocks["tokens"]
    taken = [count for why, count in summary["kept"]["reasons"].items() if why.startswith("taken by best rank")]
    assert summary["kept"]["documents"] == len(kept) == sum(taken)
    assert summary["pool"] == {"documents": 49, "tokens": blocks["tokens"], "named": 49}
    assert summary["targets"] == {"asked": 3}  # two of the five failed
    # Against the tables that attribution leaves.
    table = read_influence(exactly.run, "asked", "documents").to_pandas()
    best = table[table["influence"] > 0].groupby("document_id")["rank"].min()
    named = manifest.set_index("document_id")
    np.testing.assert_array_equal(named.loc[best.index, "score"], best)
    mean = table.groupby("document_id")["influence"].sum() / 3
    np.testing.assert_allclose(named.loc[mean.index, "mean_influence"], mean, rtol=1e-9, atol=1e-12)
    sources = {document: document.partition("#")[0] for document in manifest["document_id"]}
    assert dict(zip(manifest["document_id"], manifest["source"], strict=True)) == sources


def test_lines_come_out_as_they_went_in_and_text_files_as_lines(parts, selected):
    out, summary = selected
    originals = [line for name in ("a.jsonl", "b.jsonl") for line in (parts.corpus / name).read_bytes().splitlines()]
    manifest = manifest_of(out)
    lines = lines_of(out / "data")
    notes = {"id": "notes.txt", "text": (parts.corpus / "notes.txt").read_text(), "source": "notes.txt"}
    assert json.dumps(notes).encode() in lines
    assert len(lines) == manifest["kept"].sum()
    assert all(line in originals or json.loads(line) == notes for line in lines)
    kept = manifest[manifest["kept"] & (manifest["source"] == "a.jsonl")]
    text = (parts.corpus / "a.jsonl").read_bytes()
    assert {text[place : text.index(b"\n", place)] for place in kept["place"]} <= set(lines)
    assert [file["name"] for file in summary["kept"]["files"]] == sorted(
        f"data/{path.name}" for path in (out / "data").iterdir()
    )
    assert not (out / "_pool").exists()


def test_the_random_arm_is_as_large_and_of_the_same_sources(selected):
    out, summary = selected
    manifest, random = manifest_of(out), manifest_of(out / "random")
    assert set(random["document_id"]) == set(manifest["document_id"])
    ours, theirs = (each[each["kept"]].groupby("source")["tokens"].sum() for each in (manifest, random))
    smallest = manifest.groupby("source")["tokens"].min()
    assert set(ours.index) == set(theirs.index)
    assert ((ours - theirs >= 0) & (ours - theirs < smallest)).all()
    assert len(lines_of(out / "random/data")) == random["kept"].sum() == summary["random"]["documents"]
    drawn, taken = (set(each[each["kept"]]["document_id"]) for each in (random, manifest))
    assert summary["random"]["selected"] == len(drawn & taken) < len(drawn)


def test_a_plain_loop_gives_the_same_bytes_and_a_rerun_changes_nothing(exactly, selected, tmp_path, monkeypatch):
    out, summary = selected
    run_plainly(monkeypatch)
    again = select(with_options(exactly.run, tokens=0.3), ["asked"], str(tmp_path / "out"))
    assert again == summary
    assert data_of(tmp_path / "out") == data_of(out)
    monkeypatch.setattr(selecting, "_choose", None)  # nothing is done again
    assert select(with_options(exactly.run, tokens=0.3), ["asked", "asked"], str(tmp_path / "out")) == summary
    assert data_of(tmp_path / "out") == data_of(out)


def test_a_killed_driver_goes_on_where_it_was(exactly, selected, tmp_path):
    undisturbed, _ = selected
    out, log = tmp_path / "out", tmp_path / "log"
    url = exactly.run.url
    command = [url, "--name", "asked", "--out", str(out), "--tokens", "0.3", "--set", "attribute.exact=true"]
    with open(log, "w") as file:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *command], stdout=file, stderr=file, start_new_session=True
        )
    try:
        await_markers(out / "_done", 4, driver, log)
        driver.send_signal(signal.SIGKILL)
    finally:
        kill_family(driver)
    there = {path.name for path in (out / "_done").iterdir()}
    assert len(there) >= 4
    assert not (out / "selection.json").exists()
    before = {name: (out / "_done" / name).stat().st_mtime_ns for name in there if name.endswith(".json")}
    assert main(["select", *command]) == 0
    assert data_of(out) == data_of(undisturbed)
    assert all((out / "_done" / name).stat().st_mtime_ns == when for name, when in before.items())


def test_blocks_hold_the_kept_documents_whole(exactly, selected, tmp_path, monkeypatch, capsys):
    run_plainly(monkeypatch)
    out = str(tmp_path / "out")
    assert main(["select", exactly.run.url, "--name", "asked", "--out", out, "--tokens", "0.3", "--blocks"]) == 0
    assert "taken by best rank" in capsys.readouterr().out
    manifest = manifest_of(tmp_path / "out")
    rows = manifest_of(selected[0])
    assert list(manifest["document_id"]) == list(rows["document_id"])
    assert list(manifest["source"]) == list(rows["source"])
    assert (manifest["kept"] == rows["kept"]).all()
    tokenizer = load_tokenizer(exactly.run.stage("blocks").store.child("tokenizer").url)
    found = {}
    for path in sorted((tmp_path / "out/data").iterdir()):
        table = pq.read_table(path)
        assert table.schema.equals(shard_schema(exactly.run))
        for row in table.to_pylist():
            offset = 0
            for span in row["spans"]:
                found.setdefault(span["document_id"], []).extend(row["token_ids"][offset : offset + span["length"]])
                offset += span["length"]
            assert row["loss_mask"] is None or not any(row["loss_mask"][offset:])
    kept = manifest[manifest["kept"]]
    assert {name: len(ids) for name, ids in found.items()} == dict(
        zip(kept["document_id"], kept["tokens"], strict=True)
    )
    texts = {json.loads(line)["text"] + "<|endoftext|>" for line in lines_of(selected[0] / "data")}
    assert {tokenizer.decode(ids) for ids in found.values()} == texts


def shard_schema(run):
    from stride_ray.corpus.packing import block_schema

    return block_schema(run.config.corpus.block_tokens, ordinals=False)


def test_rounds_take_what_is_left_and_other_settings_are_refused(exactly, selected, tmp_path, monkeypatch):
    run_plainly(monkeypatch)
    out, first = selected
    options = with_options(exactly.run, tokens=0.3, earlier=[str(out)])
    second = select(options, ["asked"], str(tmp_path / "second"))
    one, two = manifest_of(out), manifest_of(tmp_path / "second")
    assert (first["round"], second["round"]) == (1, 2)
    assert not set(one[one["kept"]]["document_id"]) & set(two[two["kept"]]["document_id"])
    assert set(two[two["reason"] == "taken by an earlier selection"]["document_id"]) == set(
        one[one["kept"]]["document_id"]
    )
    assert dict(two["round"].value_counts()) == {1.0: one["kept"].sum(), 2.0: two["kept"].sum()}
    random = manifest_of(tmp_path / "second/random")
    assert not set(random[random["kept"]]["document_id"]) & set(one[one["kept"]]["document_id"])
    third = with_options(exactly.run, tokens=0.3, earlier=[str(out), str(tmp_path / "second")])
    assert select(third, ["asked"], str(tmp_path / "third"))["round"] == 3
    for changes, told in (
        ({"tokens": 0.4}, r"select.tokens = 0.3, and this command has 0.4"),
        ({"tokens": 0.3, "by": "mean"}, "select.by = 'rank', and this command has 'mean'"),
    ):
        with pytest.raises(StrideError, match=told):
            select(with_options(exactly.run, **changes), ["asked"], str(out))
    with pytest.raises(StrideError, match="was made with targets = "):
        select(with_options(exactly.run, tokens=0.3), ["asked"], str(out), queries={"asked": ["sea"]})
    with pytest.raises(StrideError, match="was made with blocks = False"):
        select(with_options(exactly.run, tokens=0.3), ["asked"], str(out), blocks=True)


def test_what_cannot_be_done_is_told(exactly, tmp_path, monkeypatch, capsys):
    run_plainly(monkeypatch)
    out = str(tmp_path / "out")
    for options, names, queries, told in (
        ({}, ["asked"], None, "Say how much to take"),
        ({"tokens": 9}, ["nothing"], None, "is not finished; run 'stride-ray attribute"),
        ({"tokens": 9}, [], None, "No target is given"),
        ({"tokens": 9}, ["asked"], {"asked": ["short", "blank"]}, "Every query of 'asked' failed"),
        ({"tokens": 9}, ["asked"], {"asked": ["who"]}, "has no query 'who'"),
        ({"tokens": 9, "quotas": {"nowhere": "0.5"}}, ["asked"], None, "quota for the source 'nowhere'"),
        ({"tokens": 9, "earlier": [str(tmp_path)]}, ["asked"], None, "is not a finished selection"),
    ):
        with pytest.raises(StrideError, match=told):
            select(with_options(exactly.run, **options), names, out, queries=queries)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("a year's work")
    for mine in (str(tmp_path / "mine"), exactly.run.url):
        with pytest.raises(StrideError, match="is not a folder of stride_ray's select"):
            select(with_options(exactly.run, tokens=9, quotas={"nowhere": "0.5"}), ["asked"], mine)
    assert (tmp_path / "mine/thesis.txt").read_text() == "a year's work"
    # What failed leaves nothing that would refuse the corrected command.
    assert main(["select", exactly.run.url, "--name", "asked", "--out", out, "--documents", "1"]) == 0
    assert "1 of 49 documents" in capsys.readouterr().out
    assert main(["select", exactly.run.url, "--name", "asked", "--out", out, "--documents", "2"]) == 1
    assert "select.documents = 1.0, and this command has 2.0" in capsys.readouterr().err
    other = ["--out", str(tmp_path / "other"), "--documents", "1", "--no-exact"]
    assert main(["select", exactly.run.url, "--name", "asked", *other]) == 1
    told = capsys.readouterr().err
    assert "Query set 'asked' has only exact influence" in told
    assert "add --exact" in told


@pytest.fixture(scope="module")
def formats(parts, tmp_path_factory):
    """A run on Parquet, compressed lines and a saved data set, with ids that repeat, sources and rows that are none."""
    root = tmp_path_factory.mktemp("formats")
    texts = documents(36, seed=4)
    about = [{"text": text, "id": f"n{i // 2}", "source": f"s{i % 3}", "extra": [i]} for i, text in enumerate(texts)]
    (root / "corpus").mkdir()
    table = pa.Table.from_pylist(about[:12]).replace_schema_metadata({"made": "by hand"})
    table = table.append_column("when", pa.array(np.arange(12), pa.timestamp("ms")))
    pq.write_table(table, root / "corpus/a.parquet", row_group_size=5)
    table = pq.read_table(root / "corpus/a.parquet")  # Parquet has names of its own for the items of a list
    lines = [json.dumps(row, indent=None, separators=(" ,", " :")) for row in about[12:24]]
    lines.insert(3, "no JSON")
    lines.insert(5, json.dumps({"text": " ", "id": "blank", "source": "s0"}))
    (root / "corpus/b.jsonl.gz").write_bytes(gzip.compress("\r\n".join(lines).encode()))
    import datasets

    datasets.Dataset.from_list(about[24:]).save_to_disk(root / "corpus/saved")
    queries = write_lines(root / "queries.jsonl", [{"id": "sea", "text": "the anchor met the tide and the gull"}])
    more = {"corpus__input": [str(root / "corpus")], "corpus__shard_mb": 0.001, "attribute__exact": True}
    columns = {"corpus__columns": {"text": "text", "id": "id", "source": "source"}}
    run = Run(str(root / "run"), changes=settings(parts, **more, **columns))
    patch = pytest.MonkeyPatch()
    run_plainly(patch)
    try:
        from stride_ray.corpus.queries import read_queries

        shard.shard(run)
        asked = read_queries(queries, load_tokenizer(run.stage("blocks").store.child("tokenizer").url))
        rescore.exact_influence(run, asked, "asked")
    finally:
        patch.undo()
    return run, root, about, table, lines


def test_rows_keep_their_schema_whatever_they_come_from(formats, tmp_path, monkeypatch):
    run, _, about, table, lines = formats
    run_plainly(monkeypatch)
    select(with_options(run, documents=24), ["asked"], str(tmp_path / "out"))
    manifest = manifest_of(tmp_path / "out")
    assert len(manifest) == 36
    assert manifest["kept"].sum() == 24
    assert set(manifest["source"]) == {"s0", "s1", "s2"}
    found = {}
    for path in sorted((tmp_path / "out/data").iterdir()):
        if path.suffix == ".gz":
            kept = gzip.decompress(path.read_bytes()).decode().removesuffix("\n").split("\n")
            assert all(line.rstrip("\r") in lines for line in kept)
            assert path.read_bytes()[4:8] == bytes(4)  # no time in it
            rows = [json.loads(line) for line in kept]
        else:
            piece = pq.read_table(path)
            if "when" in piece.column_names:
                assert piece.schema.equals(table.schema, check_metadata=True)
            else:
                assert piece.column_names == list(about[0])
            rows = piece.to_pylist()
        found |= {row["extra"][0]: row for row in rows}
    assert len(found) == 24
    for number, row in found.items():
        assert {key: row[key] for key in about[number]} == about[number]
        mine = manifest[manifest["kept"] & (manifest["document_id"].str.partition("~")[0] == row["id"])]
        assert row["source"] in set(mine["source"])
    assert {number // 12 for number in found} == {0, 1, 2}


def test_every_row_is_a_document_whatever_ids_the_input_has(parts, tmp_path, monkeypatch, capsys):
    """Ids start again in every file, come twice in a file and a source, as numbers and strings, and after a reject."""
    run_plainly(monkeypatch)
    ids = [row_ids.tolist() for row_ids in np.random.default_rng(0).integers(10, 300, (8, 40))]
    files = {
        "a.jsonl": [("x", ids[0], "a"), (1, [10**6], "a"), (1, ids[1], "a"), ("1", ids[2], "a"), (2, ids[3], "w")],
        "b.jsonl": [(1, ids[4], "b"), (1, ids[5], "a"), (2, ids[6], "w"), (None, ids[7], "b")],
    }
    for name, rows in files.items():
        lines = [{"id": own, "token_ids": tokens, "source": source} for own, tokens, source in rows]
        write_lines(tmp_path / "corpus" / name, lines)
    columns = "token_ids=token_ids,id=id,source=source"
    where = [str(tmp_path / "run"), "--model", str(parts.model)]
    shape = ["--layout", "split", "--block-tokens", "16", "--columns", columns]
    assert main(["shard", *where, "--input", str(tmp_path / "corpus/a.jsonl"), *shape]) == 0
    told = capsys.readouterr().out
    assert "Documents with the id of an earlier one of their source: 1;" in told
    assert "documents on average" not in told
    packed = ["--block-tokens", "64", "--columns", columns, "--model", str(parts.model)]
    assert main(["shard", str(tmp_path / "packed"), "--input", str(tmp_path / "corpus/a.jsonl"), *packed]) == 0
    assert re.search(r"A block has \d\.\d documents on average, .*--layout split", capsys.readouterr().out)
    assert main(["shard", where[0], "--input", str(tmp_path / "corpus")]) == 0  # input added later
    told = capsys.readouterr().out
    assert "7 documents became" in told
    assert "Documents with the id of an earlier one of their source: 3;" in told
    assert "the first '1~a.jsonl#" in told
    assert "(source 'a')" in told
    assert "Ids in several sources: 1;" in told
    queries = write_lines(tmp_path / "q.jsonl", [{"id": "sea", "text": "the anchor met the tide and the gull"}])
    assert main(["attribute", *where, "--queries", queries, "--name", "asked", "--exact"]) == 0
    assert " a: 1 " in capsys.readouterr().out
    run = Run(where[0])
    pool = pa.concat_tables(
        [run.stage("blocks").store.read_table(part["name"]) for part in shard.shard(run)["parts"]]
    ).to_pylist()
    assert len({row["block_id"] for row in pool}) == len(pool) == 21
    tokens = {tuple(each): i for i, each in enumerate(ids)}
    rows = {}  # ordinal to the row that the block was cut from
    for first in range(0, len(pool), 3):
        whole = [i for row in pool[first : first + 3] for i in row["token_ids"]][:40]
        rows |= {first + k: tokens[tuple(whole)] for k in range(3)}
    sums = dict.fromkeys(range(7), 0.0)
    for row in read_influence(run, "asked").to_pylist():
        sums[rows[row["ordinal"]]] += row["influence"]
    documents = read_influence(run, "asked", "documents").to_pylist()
    assert len({(row["source"], row["document_id"]) for row in documents}) == 7
    assert sorted(row["influence"] for row in documents) == pytest.approx(sorted(sums.values()))
    for form in ([], ["--blocks"]):
        out = tmp_path / f"out{len(form)}"
        chosen = ["--name", "asked", "--out", str(out), "--by", "mean", "--documents", "3"]
        assert main(["select", where[0], *chosen, *form]) == 0
        best = sorted(sums, key=lambda i: -sums[i])[:3]
        if form:
            spans = [row for path in (out / "data").iterdir() for row in pq.read_table(path)["spans"].to_pylist()]
            assert len({(span["source"], span["document_id"]) for row in spans for span in row}) == 3
        else:
            assert {tokens[tuple(json.loads(line)["token_ids"])] for line in lines_of(out / "data")} == set(best)
        manifest = manifest_of(out)
        assert sorted(manifest["mean_influence"]) == pytest.approx(sorted(sums.values()))


def test_blocks_need_no_input_unless_a_packed_blocks_source_is_mapped(formats, tmp_path, monkeypatch, sharded, parts):
    run, root, *_ = formats
    run_plainly(monkeypatch)
    moved = tmp_path / "moved"
    shutil.move(root / "corpus/b.jsonl.gz", moved)
    try:
        with pytest.raises(StrideError, match=r"b.jsonl.gz \(it is gone\)"):
            select(with_options(run, documents=24), ["asked"], str(tmp_path / "out"))
    finally:
        shutil.move(moved, root / "corpus/b.jsonl.gz")
    file = root / "corpus/b.jsonl.gz"
    before, times = file.read_bytes(), file.stat()
    edited = gzip.compress(gzip.decompress(before).replace(b"the", b"The"))
    other = gzip.compress(b'{"text": "other", "id": "x", "source": "s0"}\n')
    for content in (edited, other):
        file.write_bytes(content)
        with pytest.raises(StrideError, match="was changed since it was sharded"):
            select(with_options(run, documents=24), ["asked"], str(tmp_path / "out"))
    file.write_bytes(before)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    select(with_options(run, documents=24), ["asked"], str(tmp_path / "out"))


def test_near_duplicates_and_any_store(formats, monkeypatch):
    run, *_ = formats
    run_plainly(monkeypatch)
    out = "memory://selected/out"
    summary = select(with_options(run, documents=30, near_duplicates=0.3), ["asked"], out, blocks=True)
    manifest = Store(out).read_table("manifest.parquet").to_pandas()
    alike = manifest[manifest["near_duplicate_of"].notna()]
    assert len(alike)
    assert not alike["kept"].any()
    assert set(alike["reason"]) == {"near-duplicate of a document taken before"}
    assert set(alike["near_duplicate_of"]) <= set(manifest[manifest["kept"]]["document_id"])
    assert summary["kept"]["documents"] == manifest["kept"].sum()
    assert Store(f"{out}/data").names()
