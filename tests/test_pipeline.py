"""The stages one after the other: what they leave on disk, and that nothing but the input decides it."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import QUERIES, data_files, documents, flags, settings, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from stride_ray.attribution.attribute import attribute, read_influence
from stride_ray.attribution.recover import recover_estimates
from stride_ray.attribution.rescore import rescore
from stride_ray.attribution.respond import respond
from stride_ray.attribution.responses import read_responses, response_schema
from stride_ray.attribution.tables import DOCUMENTS, INFLUENCE, RECOVERY
from stride_ray.cli.main import main
from stride_ray.cli.status import status
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.queries import read_queries
from stride_ray.corpus.shard import shard
from stride_ray.corpus.tokenization.tokenizer import load_saved_tokenizer
from stride_ray.operators.fit import fit
from stride_ray.operators.stored import load_operators
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run, Stage
from stride_ray.runtime.storage import Store

JOBS = Path(__file__).parent.parent / "jobs"


def all_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_main(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def test_tables_rank_blocks_and_documents(finished):
    asked = finished.run.stage("responses", "asked").store.read_table("part-00000.parquet")
    assert asked.schema.equals(response_schema(16))
    influence, found, recovery = (
        read_influence(finished.run, "asked", t) for t in ("influence", "documents", "recovery")
    )
    for table, schema in ((influence, INFLUENCE), (found, DOCUMENTS), (recovery, RECOVERY)):
        assert table.schema.equals(schema)
    assert recovery["query_id"].to_pylist() == [query["id"] for query in QUERIES]
    blocks = finished.run.stage("blocks").store
    pool = {
        row["ordinal"]: row
        for part in finished.manifest["parts"]
        for row in blocks.read_table(part["name"]).to_pylist()
    }
    assert len(pool) == finished.manifest["blocks"]
    for query in recovery.to_pylist():
        mine = [row for row in influence.to_pylist() if row["query_id"] == query["query_id"]]
        assert [row["rank"] for row in mine] == list(range(1, len(mine) + 1))
        values = [row["influence"] for row in mine]
        assert values == sorted(values, reverse=True)
        assert 0 not in values
        assert len(mine) == (query["nonzeros"] or 0)
        sums = {}
        for row in mine:
            spans = pool[row["ordinal"]]["spans"]
            assert row["block_id"] == pool[row["ordinal"]]["block_id"]
            assert row["document_id"] == max(spans, key=lambda span: span["length"])["document_id"]
            for span in spans:
                share = span["length"] / sum(each["length"] for each in spans)
                sums[span["document_id"]] = sums.get(span["document_id"], 0) + share * row["influence"]
        theirs = [row for row in found.to_pylist() if row["query_id"] == query["query_id"]]
        assert {row["document_id"]: pytest.approx(row["influence"]) for row in theirs} == sums
        assert [row["influence"] for row in theirs] == sorted((row["influence"] for row in theirs), reverse=True)
        assert [row["rank"] for row in theirs] == list(range(1, len(theirs) + 1))
    assert influence.num_rows > 10


def test_failed_queries_carry_their_error(finished):
    rows = {row["query_id"]: row for row in read_influence(finished.run, "asked", "recovery").to_pylist()}
    assert (rows["short"]["status"], rows["sea"]["status"]) == ("failed", "ok")
    assert "at least two" in rows["short"]["error"]
    assert "empty" in rows["blank"]["error"]
    assert "None" not in rows["blank"]["error"]
    assert rows["short"]["base_loss"] is None
    assert finished.summary["failed"] == 2
    answers, vectors = read_responses(finished.run.stage("responses", "asked").store, 0)
    assert not vectors[[row["status"] == "failed" for row in answers]].any()
    assert np.isfinite(vectors).all()


def test_page_shows_every_query_and_runs_nothing(finished):
    page = (finished.folder / "influence/asked/page.html").read_text()
    assert page.count("<script") == 2  # its data and its own
    shown = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert any("<script>alert(" in query["prompt"] + query["completion"] for query in shown["queries"])
    assert [query["query_id"] for query in shown["queries"]] == [query["id"] for query in QUERIES]
    assert "at least two" in page


def test_status_says_what_is_done(finished, tmp_path):
    told = status(finished.run)
    assert "whose answers are estimated" in told
    assert f"{finished.manifest['blocks']} blocks" in told
    assert "16 operators, closed_form" in told
    assert "responses/asked" in told
    assert "5 queries, 2 failed, linear" in told
    shutil.copytree(finished.folder / "blocks", tmp_path / "blocks")
    shutil.copy(finished.folder / "run.toml", tmp_path)
    assert main(["status", str(tmp_path)]) == 0
    assert "missing" in status(Run(str(tmp_path)))
    (tmp_path / "blocks/manifest.json").unlink()
    assert "interrupted" in status(Run(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("blocks/tokenizer/tokenizer.json", lambda run: load_saved_tokenizer(run.stage("blocks").store)),
        ("blocks/manifest.json", status),
        ("operators/operators.safetensors", lambda run: load_operators(run.stage("operators").store)),
        ("operators/manifest.json", status),
        ("responses/asked/_done/part-00000.json", status),
        ("estimates/asked/manifest.json", status),
        ("influence/asked/influence-00000.parquet", lambda run: read_influence(run, "asked")),
    ],
)
def test_a_file_that_was_changed_is_refused_by_name(finished, tmp_path, name, read):
    shutil.copytree(finished.folder, tmp_path / "run")
    run, path = Run(str(tmp_path / "run")), tmp_path / "run" / name
    read(run)
    data = path.read_bytes()
    digit = next(i for i in range(len(data) // 2, len(data)) if data[i : i + 1] in (b"4", b"5", b"6", b"7"))
    path.write_bytes(data[:digit] + bytes([data[digit] ^ 1]) + data[digit + 1 :])  # another digit
    with pytest.raises(
        StrideError, match=re.escape(str(path)) + r" (was|cannot be read.*) damaged or (changed|edited)"
    ):
        read(run)


def test_a_rerun_changes_no_byte(finished, parts):
    before = all_of(finished.folder)
    code, out, _ = run_main("shard", finished.folder)
    assert (code, "99 blocks" in out) == (0, True)
    assert run_main("fit", finished.folder)[0] == 0
    code, out, _ = run_main("attribute", finished.folder, "--queries", parts.queries, "--name", "asked")
    assert (code, "5 queries (2 failed)" in out) == (0, True)
    assert all_of(finished.folder) == before


@pytest.mark.parametrize("how", ["plain", pytest.param("one_ray", marks=pytest.mark.cluster)])
def test_the_command_line_on_one_worker_gives_the_same_bytes(how, finished, parts, tmp_path, request):
    request.getfixturevalue(how)
    folder = tmp_path / "run"
    options = settings(parts, compute__workers=1, compute__batch_tokens=8192)
    assert run_main("shard", folder, *flags(options))[0] == 0
    code, out, _ = run_main("fit", folder)
    assert (code, "respond to their members" in out) == (0, True)
    assert run_main("respond", folder, "--queries", parts.queries, "--name", "asked")[0] == 0
    code, out, _ = run_main("recover", folder, "--name", "asked")
    assert (code, "5 queries, 2 failed" in out) == (0, True)
    assert "0 of " in run_main("rescore", folder, "--name", "asked")[1]
    assert data_files(folder) == data_files(finished.folder)


def test_a_plain_loop_gives_the_same_bytes(finished, parts, tmp_path, plain):
    run = Run(str(tmp_path / "run"), changes=settings(parts))
    shard(run)
    fit(run)
    attribute(run, parts.queries, "asked", io.StringIO())
    assert data_files(tmp_path / "run") == data_files(finished.folder)


def test_new_files_continue_the_numbering(finished, parts, tmp_path, plain):
    shutil.copytree(parts.corpus, tmp_path / "corpus")
    shutil.copytree(finished.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/influence")
    # Named to come first in a listing.
    write_lines(tmp_path / "corpus/0.jsonl", [{"text": text} for text in documents(9, seed=7)])
    run = Run(str(tmp_path / "run"), changes=settings(parts, corpus__input=[str(tmp_path / "corpus")]))
    manifest = shard(run)
    old, new = data_files(finished.folder), data_files(tmp_path / "run")
    assert {name: new[name] for name in old if name.startswith("blocks/")} == {
        name: data for name, data in old.items() if name.startswith("blocks/")
    }
    assert (manifest["documents"], manifest["blocks"] > finished.manifest["blocks"]) == (49 + 9, True)
    table = pa.concat_tables([run.stage("blocks").store.read_table(part["name"]) for part in manifest["parts"]])
    assert table["ordinal"].to_pylist() == list(range(manifest["blocks"]))
    assert len(set(table["block_id"].to_pylist())) == manifest["blocks"]
    # Operators that were fitted before go on speaking of the blocks that they were fitted on.
    recover_estimates(run, "asked")
    rescore(run, "asked")
    assert data_files(tmp_path / "run") == {**new, **old}
    with pytest.raises(StrideError, match=r"fitted on the first 99 blocks.* cannot be extended"):
        fit(run)


def test_blocks_that_are_added_while_a_fit_is_under_way_are_no_part_of_it(
    finished, parts, tmp_path, plain, monkeypatch
):
    shutil.copytree(parts.corpus, tmp_path / "corpus")
    shutil.copytree(finished.folder / "blocks", tmp_path / "run/blocks")
    run = Run(str(tmp_path / "run"), changes=settings(parts, corpus__input=[str(tmp_path / "corpus")]))

    def add(config, blocks):
        write_lines(tmp_path / "corpus/0.jsonl", [{"text": text} for text in documents(9, seed=7)])
        assert shard(run)["blocks"] > len(blocks)

    monkeypatch.setattr("stride_ray.operators.fit.check_tokenizer", add)
    assert fit(run)["blocks"] == finished.manifest["blocks"]
    old, new = data_files(finished.folder), data_files(tmp_path / "run")
    assert new["operators/operators.safetensors"] == old["operators/operators.safetensors"]


def test_the_same_command_twice_at_once_ends_well_for_the_slower_too(finished, parts, tmp_path, plain, monkeypatch):
    shutil.copytree(finished.folder / "blocks", tmp_path / "run/blocks")
    module = sys.modules["stride_ray.operators.fit"]
    reduce = module.reduce_sums

    def overtaken(*given):
        monkeypatch.setattr(module, "reduce_sums", reduce)
        fit(Run(str(tmp_path / "run")))  # the other one, which clears away the sums
        return reduce(*given)

    monkeypatch.setattr(module, "reduce_sums", overtaken)
    facts = fit(Run(str(tmp_path / "run"), changes=settings(parts)))
    assert facts == finished.facts
    assert not list((tmp_path / "run/operators").glob("sum-*"))
    operators = finished.run.stage("operators")
    unfinished = Stage(operators.store, operators.identity, "no.json")
    with pytest.raises(StrideError, match="sum-000"), unfinished.ignore_errors_if_finished():
        reduce(finished.run.config, operators, 1, 1)


def test_a_changed_file_is_refused(finished, parts, tmp_path):
    shutil.copytree(parts.corpus, tmp_path / "corpus")
    shutil.copytree(finished.folder / "blocks", tmp_path / "run/blocks")
    write_lines(tmp_path / "corpus/b.jsonl", [{"text": "other words"}])
    command = ["shard", tmp_path / "run", *flags(settings(parts, corpus__input=[str(tmp_path / "corpus")]))]
    code, _, err = run_main(*command)
    assert code == 1
    assert f"{tmp_path}/corpus/b.jsonl is not the 'b.jsonl' that was sharded, file://{parts.corpus}/b.jsonl" in err
    blocks = Store(f"{tmp_path}/run/blocks")
    record = json.dumps(blocks.read_json("plan.json")).replace(str(parts.corpus), str(tmp_path / "corpus"))
    blocks.write_json("plan.json", json.loads(record))
    code, _, err = run_main(*command)
    assert code == 1
    assert "b.jsonl was changed since it was sharded" in err


@pytest.mark.parametrize(
    ("form", "target"), [("gate", "model"), ("matrix", "model"), ("logit", "model"), ("logit", "unigram")]
)
def test_exact_responses_agree_with_linear_ones(form, target, finished, parts, tmp_path, plain):
    shutil.copytree(finished.folder / "blocks", tmp_path / "blocks")
    more = {"operators__form": form, "operators__target": target, "model__split": 1}
    run = Run(str(tmp_path), changes=settings(parts, **more))
    assert fit(run)["learned"]
    found = {}
    for mode in ("exact", "linear"):
        each = Run(str(tmp_path), changes={"respond.mode": mode})
        respond(each, parts.queries, mode)
        rows, vectors = read_responses(each.stage("responses", mode).store, 0)
        found[mode] = vectors[[row["status"] == "ok" for row in rows]]
        losses = [row["base_loss"] for row in rows if row["status"] == "ok"]
        assert np.all(np.array(losses) > 0)
    for exact, linear in zip(found["exact"], found["linear"], strict=True):
        # Against unigrams, J is not the loss's own gradient: a likeness, no equality.
        assert np.corrcoef(exact, linear)[0, 1] > (0.7 if target == "model" else 0.1)
        assert exact.std() > 0


@pytest.mark.parametrize(("alike", "mode"), [(-1.0, "linear"), (1.0, "exact")])
def test_auto_measures_whether_linear_responses_stand_for_steered_ones(
    alike, mode, finished, parts, tmp_path, plain, monkeypatch
):
    for stage in ("blocks", "operators"):
        shutil.copytree(finished.folder / stage, tmp_path / stage)
    shutil.copy(finished.folder / "run.toml", tmp_path)
    operators = Store(f"{tmp_path}/operators")
    operators.write_json("manifest.json", {**operators.read_json("manifest.json"), "method": "train"})
    monkeypatch.setattr("stride_ray.attribution.respond.MIN_CORRELATION", alike)
    found = respond(Run(str(tmp_path)), parts.queries, "auto")
    assert found["mode"] == mode
    assert 0 < found["correlation"] < 1
    respond(Run(str(tmp_path), changes={"respond.mode": mode}), parts.queries, "told")
    one, other = ((tmp_path / f"responses/{name}/part-00000.parquet").read_bytes() for name in ("auto", "told"))
    assert one == other
    monkeypatch.setattr(
        "stride_ray.attribution.respond.ModeComparison", None
    )  # what was measured is not measured again
    (tmp_path / "responses/auto/_done/part-00000.json").unlink()
    assert respond(Run(str(tmp_path), changes={"respond.mode": "auto"}), parts.queries, "auto") == found


def test_a_completion_alone_has_loss(finished, parts, tmp_path, plain):
    prompt, completion = "the comet met the", " planet and the lens"
    queries = write_lines(tmp_path / "q.jsonl", [{"prompt": prompt, "completion": completion, "query_id": 7}])
    tokenizer = AutoTokenizer.from_pretrained(parts.tokenizer)
    (row,) = read_queries(queries, tokenizer).to_pylist()
    asked, answered = (tokenizer(text)["input_ids"] for text in (prompt, completion))
    assert row["query_id"] == "7"
    assert row["token_ids"] == [*asked, *answered, tokenizer.eos_token_id]
    assert row["loss_mask"] == [False] * len(asked) + [True] * (len(answered) + 1)
    shutil.copytree(finished.folder, tmp_path / "run")
    run = Run(str(tmp_path / "run"))
    respond(run, queries, "one")
    model = AutoModelForCausalLM.from_pretrained(parts.model)
    ids = torch.tensor([row["token_ids"]])
    labels = ids.masked_fill(~torch.tensor([row["loss_mask"]]), -100)
    (answer,), _ = read_responses(run.stage("responses", "one").store, 0)
    assert answer["base_loss"] == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-4)


def test_prompts_longer_than_a_block_give_no_nan(parts, tmp_path, plain):
    texts = documents(40, seed=3)
    rows = [{"prompt": text * (3 if i % 4 == 0 else 1), "answer": "the comet."} for i, text in enumerate(texts)]
    corpus = write_lines(tmp_path / "pairs.jsonl", rows)
    for form in ("logit", "matrix"):
        folder = tmp_path / form
        options = settings(parts, corpus__input=[corpus], corpus__layout="split", operators__form=form)
        code, out, _ = run_main("shard", folder, *flags(options))
        # The prompt ends with a space, which is in one token with the answer's first word.
        assert (code, "⟦ the comet.<|endoftext|>⟧" in out) == (0, True)
        run = Run(str(folder))
        mask = Blocks(run.stage("blocks").store).batch(np.arange(fit(run)["blocks"])).mask
        assert 0.1 < mask[:, 1:].any(1).mean() < 0.9
        facts = fit(run)
        assert all(np.isfinite(value) for value in facts.values() if isinstance(value, float))
        assert facts["learned"]
        operators, _ = load_operators(run.store.child("operators"))
        assert torch.isfinite(operators.A).all()
        attribute(run, parts.queries, "asked", io.StringIO())
        assert np.isfinite(read_influence(run, "asked")["influence"].to_numpy()).all()


def test_a_conversation_shows_its_mask(parts, tmp_path, plain):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the tide met the gull."}]
    corpus = write_lines(tmp_path / "chat.jsonl", [{"messages": turns}] * 3)
    code, out, _ = run_main("shard", tmp_path / "run", *flags(settings(parts, corpus__input=[corpus])))
    assert code == 0
    assert "<|user|>hello<|endoftext|><|assistant|>⟦the tide met the gull.<|endoftext|>⟧" in out
    assert "3 documents" in out


@pytest.mark.parametrize("name", ["shard", "fit", "respond", "recover", "attribute", "quickstart"])
def test_jobs_explain_themselves(name):
    done = subprocess.run([sys.executable, JOBS / f"{name}.py", "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "usage: stride-ray" in done.stdout) == (0, True)


def test_a_job_exits_with_the_stages_status(finished, tmp_path):
    done = subprocess.run(
        [sys.executable, JOBS / "fit.py", finished.folder], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, "respond to their members" in done.stdout) == (0, True)
    done = subprocess.run([sys.executable, JOBS / "fit.py", tmp_path], capture_output=True, text=True, timeout=120)
    assert (done.returncode, "stride-ray shard" in done.stderr) == (1, True)
    assert "Traceback" not in done.stderr


def test_older_readers_of_parquet_can_read_every_table(finished):
    """A null in a list of fixed size can be written by any Arrow, and read by none before 26."""
    tables = sorted(Path(finished.run.url).rglob("*.parquet"))
    assert len(tables) > 4
    for path in tables:
        for field in pq.read_schema(path):
            assert not (pa.types.is_fixed_size_list(field.type) and field.nullable), f"{path.name}: {field.name}"
