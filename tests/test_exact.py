"""The exact stage: its tables, its resume, and that neither workers, passes nor batches of queries decide anything."""

import contextlib
import io
import shutil

import numpy as np
import pytest
import torch
from conftest import QUERIES, VOCABULARY, answered, settings, write_lines
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stride_ray.attribution import directions, rescore
from stride_ray.attribution.attribute import read_influence, shown_queries
from stride_ray.attribution.tables import DOCUMENTS, INFLUENCE, RECOVERY, TOKENS
from stride_ray.cli.main import main
from stride_ray.cli.status import status
from stride_ray.corpus.blocks import Blocks, unit_count
from stride_ray.corpus.shard import shard
from stride_ray.corpus.tokenization.decoding import unpadded
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.models.loading import load_measured_model, load_run_model
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store


def tables(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "exact/asked").glob("*.parquet"))}


def test_tables_have_the_form_of_estimated_ones(exactly):
    run, summary, out = exactly.run, exactly.summary, exactly.out
    influence, documents, recovery = (read_influence(run, "asked", t) for t in ("influence", "documents", "recovery"))
    for table, schema in ((influence, INFLUENCE), (documents, DOCUMENTS), (recovery, RECOVERY)):
        assert table.schema.equals(schema)
    assert recovery["query_id"].to_pylist() == [query["id"] for query in QUERIES]
    assert recovery["status"].to_pylist() == ["ok", "failed", "ok", "failed", "ok"]
    assert (summary["queries"], summary["failed"], summary["rows"]) == (5, 2, influence.num_rows)
    for query in recovery.to_pylist():
        mine = [row for row in influence.to_pylist() if row["query_id"] == query["query_id"]]
        assert len(mine) == (query["nonzeros"] or 0)
        assert [row["influence"] for row in mine] == sorted((row["influence"] for row in mine), reverse=True)
    assert "anchor met the tide" in out
    assert "at least two" in out


def test_tokens_add_up_to_their_blocks_and_their_texts_to_the_blocks_text(exactly):
    table = exactly.run.store.child("exact/asked").read_table("tokens-00000.parquet")
    assert table.schema == TOKENS
    listed = {
        (row["query_id"], row["ordinal"]): row["influence"] for row in read_influence(exactly.run, "asked").to_pylist()
    }
    tokens = {(row["query_id"], row["ordinal"]): row["influence"] for row in table.to_pylist()}
    assert len(tokens) == table.num_rows > 0
    for key, values in tokens.items():
        assert sum(values) == pytest.approx(listed[key], rel=1e-3, abs=1e-5)
    for name in {query for query, _ in listed}:
        mine = sorted((value, ordinal) for (query, ordinal), value in listed.items() if query == name)
        ends = {ordinal for value, ordinal in mine[:3] if value < 0} | {o for v, o in mine[-3:] if v > 0}
        assert {ordinal for query, ordinal in tokens if query == name} == ends
    for query in shown_queries(exactly.run, "asked", 10, 8):
        for row in (*query["helping"][:3], *query["harming"][:3]):
            assert "".join(row["pieces"]) == row["text"]
            assert not any(row["tokens"][len(row["pieces"]) :])  # padding
        assert all(row["tokens"] is None for row in query["helping"][3:])


def test_the_most_helpful_blocks_are_on_the_query_s_subject(exactly):
    run = exactly.run
    words = {"sea": {"wave", "harbour", "anchor", "gull", "tide", "keel"}, "kitchen": {"butter", "oven", "dough"}}
    top = read_influence(run, "asked").to_pylist()
    blocks = run.stage("blocks").store
    tokenizer = load_tokenizer(blocks.child("tokenizer").url)
    for query, wanted in words.items():
        first = [row["ordinal"] for row in top if row["query_id"] == query and row["rank"] <= 3]
        assert all(
            wanted & set(tokenizer.decode(unpadded(block)).replace(".", "").split())
            for block in Blocks(blocks).take(first, ["token_ids", "spans"]).to_pylist()
        )


def test_a_plain_loop_gives_the_same_bytes_and_passes_the_same_numbers(exactly, parts, sharded, plain, monkeypatch):
    folder = exactly.folder
    one = sharded("plain")
    answered(one, parts)
    assert tables(one) == tables(folder)
    monkeypatch.setattr(directions, "MAX_QUERIES_PER_UNIT", 2)  # three units of queries ...
    two = sharded("passes")
    several, _, _ = answered(two, parts, compute__query_gb=1e-9)  # ... each in a pass of its own
    single = Run(str(one), changes={"attribute.exact": True})
    assert len(Store(str(two / "exact/asked/_done")).names()) > len(Store(str(one / "exact/asked/_done")).names())
    # Other batches round otherwise, in the last digits of float32.
    first, second = (
        {(row["query_id"], row["ordinal"]): row["influence"] for row in read_influence(run, "asked").to_pylist()}
        for run in (several, single)
    )
    assert first == pytest.approx(second, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("at", [1, 3, 5, 7, 9, 11])
def test_an_interrupted_stage_goes_on_where_it_stopped(at, exactly, parts, sharded, plain, monkeypatch):
    folder = exactly.folder
    broken, writes, write = sharded(f"broken{at}"), [], Store.write

    def failing(store, name, data):
        if any(stage in store.url for stage in ("/exact", "/curvature", "/directions")):
            writes.append(name)
            if len(writes) == 2 * at:
                raise KeyboardInterrupt
        return write(store, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", failing)
        with contextlib.suppress(KeyboardInterrupt):
            answered(broken, parts)
    answered(broken, parts)
    assert tables(broken) == tables(folder)
    assert not list(broken.glob("exact/asked/*.safetensors"))
    assert not list(broken.glob("curvature/*unscaled*"))


def test_only_the_largest_are_kept(exactly, parts, sharded, plain):
    run = exactly.run
    few, _, _ = answered(sharded("few"), parts, attribute__top=5)
    kept = read_influence(few, "asked").to_pylist()
    assert len(kept) == 15
    everything = [row for row in read_influence(run, "asked").to_pylist() if row["query_id"] == "sea"]
    largest = sorted(everything, key=lambda row: -abs(row["influence"]))[:5]
    mine = [row for row in kept if row["query_id"] == "sea"]
    assert {row["ordinal"] for row in mine} == {row["ordinal"] for row in largest}
    np.testing.assert_allclose(
        sorted(row["influence"] for row in mine), sorted(row["influence"] for row in largest), rtol=1e-12
    )


def test_where_training_began_is_where_it_is_measured_from(exactly, parts, sharded, plain):
    folder = exactly.folder
    same, _, _ = answered(sharded("same"), parts, model__start=str(parts.model))
    facts = same.stage("curvature").store.read_json("manifest.json")["sites"]
    before = Run(str(folder), changes={"attribute.exact": True})
    without = before.stage("curvature").store.read_json("manifest.json")["sites"]
    assert sum(facts.values()) == pytest.approx(1)
    assert sum(without.values()) == pytest.approx(1)
    rest = 1 - without.pop("origin")
    assert facts == pytest.approx({name: share / rest for name, share in without.items()}, rel=1e-4)
    rows = read_influence(same, "asked").to_pylist()
    assert len(rows) == read_influence(before, "asked").num_rows
    assert [row["influence"] for row in rows] != read_influence(before, "asked")["influence"].to_pylist()


def test_the_last_layers_alone_are_another_answer_of_the_same_form(exactly, parts, sharded, plain):
    last, _, _ = answered(sharded("last"), parts, operators__layers=0.5)
    facts = last.stage("curvature").store.read_json("manifest.json")["sites"]
    assert {name.partition("layers.1.")[1] for name in facts if "." in name} == {"layers.1."}
    assert "embedding" not in facts
    assert sum(facts.values()) == pytest.approx(1)
    found, whole = (read_influence(run, "asked") for run in (last, exactly.run))
    assert found.schema.equals(whole.schema)
    tops = [{(row["query_id"], row["ordinal"]) for row in t.to_pylist() if row["rank"] <= 5} for t in (found, whole)]
    assert len(tops[0] & tops[1]) >= 5
    assert found["influence"].to_pylist() != whole["influence"].to_pylist()
    with pytest.raises(StrideError, match=r"operators\.layers"):
        Run(last.url, changes={"operators.layers": 1}).begin("curvature")


def test_the_command_line_needs_no_operators(exactly, parts, sharded, plain):
    folder = sharded("verb")
    shutil.copy(exactly.folder / "run.toml", folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["attribute", str(folder), "--exact", "--queries", parts.queries, "--name", "asked"]) == 0
    assert tables(folder) == tables(exactly.folder)
    page = (folder / "exact/asked/page.html").read_text()
    assert "every block scored at 7 sites" in page
    assert "exact/asked" in out.getvalue()
    told = status(exactly.run)
    assert "curvature" in told
    assert "7 sites" in told
    assert "operators                    missing" in told


def test_the_measured_model_lies_on_the_way_from_start_to_end(parts, tmp_path):
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_pretrained(parts.model)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(torch.randn_like(parameter))
    start.save_pretrained(tmp_path / "start")
    config = Config().updated({"model.path": str(parts.model), "model.start": str(tmp_path / "start")})
    found = dict(load_measured_model(config, "cpu").model.named_parameters())
    ends = dict(AutoModelForCausalLM.from_pretrained(parts.model).named_parameters())
    for name, parameter in start.named_parameters():
        torch.testing.assert_close(found[name], 0.25 * parameter + 0.75 * ends[name], rtol=1e-4, atol=1e-6)
    trained = load_run_model(config, "cpu").model
    assert all(torch.equal(parameter, ends[name]) for name, parameter in trained.named_parameters())


@pytest.mark.parametrize(("split", "layer"), [("1.0", 2), ("1", 2), ("2", 2), ("0.5", 1), ("0.01", 1)])
def test_a_split_up_to_one_is_a_share_of_the_depth(split, layer, parts):
    changes = {"model.path": str(parts.model), "operators.form": "matrix", "model.split": split}
    assert load_run_model(Config().updated(changes), "cpu").split_layer == layer


def test_a_split_between_layers_is_refused(parts):
    changes = {"model.path": str(parts.model), "operators.form": "matrix", "model.split": 1.5}
    with pytest.raises(StrideError, match=r"model\.split is 1\.5, neither a share of the depth, up to 1, nor a number"):
        load_run_model(Config().updated(changes), "cpu")


def test_what_is_shown_is_read_part_by_part(exactly, parts, sharded, plain, monkeypatch):
    monkeypatch.setattr(directions, "MAX_QUERIES_PER_UNIT", 2)
    run, _, _ = answered(sharded("shown"), parts)
    whole, several = (shown_queries(each, "asked", 5, 3) for each in (exactly.run, run))
    for one, two in zip(whole, several, strict=True):
        assert [one[key] for key in ("query_id", "error", "prompt", "nonzeros")] == [
            two[key] for key in ("query_id", "error", "prompt", "nonzeros")
        ]
        assert [row["ordinal"] for row in one["helping"]] == [row["ordinal"] for row in two["helping"]]
    read, real = [], Store.read_table
    monkeypatch.setattr(Store, "read_table", lambda self, name, *given: read.append(name) or real(self, name, *given))
    assert len(shown_queries(run, "asked", 1, 3)) == 1
    assert [name for name in read if name.startswith("influence")] == ["influence-00000.parquet"]
    units = run.stage("exact", "asked").store.read_table("influence-00000.parquet").schema.field("influence").metadata
    assert units[b"negative"].startswith(b"multiplied by 0.5")


def test_a_start_of_another_shape_is_refused(parts, tmp_path):
    other = AutoConfig.from_pretrained(parts.model)
    other.num_hidden_layers += 1
    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "start")
    config = Config().updated({"model.path": str(parts.model), "model.start": str(tmp_path / "start")})
    with pytest.raises(StrideError, match=r"model\.start .*start and the model .* do not have the same parameters"):
        load_measured_model(config, "cpu")


@given(st.integers(1, 10**10))
def test_units_are_of_a_thousand_to_eight_thousand_blocks_however_large_the_pool(n):
    count = unit_count(n)
    assert count == min(n, 8) or (n / count <= 8192 and n / (count - 1) >= 1024)
    assert unit_count(10**9) > 100_000


def test_passes_follow_from_room_and_from_the_most_queries_of_one():
    assert rescore.passes_over(2**25, 64, 1.0) == 2  # 2 GiB, 32 at a time
    assert rescore.passes_over(2**23, 64, 1e-9) == 4  # no pass is for less than a unit of 16 queries
    assert rescore.passes_over(2**26, 64, 1e-9) == 32  # ... or of the two that a unit has room for
    assert rescore.passes_over(40, 600, 1.0) == 3  # at most 256 queries in one
    assert rescore.passes_over(40, 0, 0.0) == 1
    assert [directions.queries_per_unit(size) for size in (1, 2**25, 2**27, 2**40)] == [16, 4, 1, 1]


def test_padding_never_counts_whatever_the_tokenizer_pads_with(parts, plain, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(parts.tokenizer)
    tokenizer.add_tokens([f"<{i}>" for i in range(VOCABULARY - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # a token of the tokenizer and not of the model
    assert tokenizer.pad_token_id == VOCABULARY
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = []
    for name, path in (("plain", parts.tokenizer), ("padded", tmp_path / "tokenizer")):
        (tmp_path / name).mkdir()
        more = {"corpus__layout": "split", "corpus__tokenizer": str(path)}
        shard(Run(str(tmp_path / name), changes=settings(parts, **more)))
        answered(tmp_path / name, parts, **more)
        found.append(tables(tmp_path / name))
    assert found[0] == found[1]
    assert found[0]
    corpus = write_lines(tmp_path / "real.jsonl", [{"text": "the comet met [PAD] the tide"}])
    shard(Run(str(tmp_path / "real"), changes=settings(parts, **more, corpus__input=[corpus])))
    with pytest.raises(StrideError, match=f"largest token id is {VOCABULARY}, and the model's vocabulary has"):
        answered(tmp_path / "real", parts, **more, corpus__input=[corpus])
