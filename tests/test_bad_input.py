"""Whatever a person may hand over by mistake ends in one sentence that names it, status 1 and no traceback."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import documents, flags, save_tokenizer, settings, write_lines
from transformers import LlamaConfig, LlamaForCausalLM

from stride_ray.cli.main import main
from stride_ray.corpus.blocks import Blocks
from stride_ray.runtime.actor_pool import ActorPool
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import WorkerAllocation, allocate_workers, map_dataset, map_tasks

JOBS = Path(__file__).parent.parent / "jobs"


def shard_flags(parts, *inputs, **more):
    return flags(settings(parts, corpus__input=[str(path) for path in inputs], **more))


def test_no_such_path(parts, tmp_path, told):
    missing = tmp_path / "nowhere"
    assert f"{missing} does not exist" in told("shard", tmp_path / "run", *shard_flags(parts, missing))
    assert str(missing) in told("shard", tmp_path / "run", *shard_flags(parts, parts.corpus, corpus__tokenizer=missing))
    assert not (tmp_path / "run").exists()
    assert "--input" in told("shard", tmp_path / "run")
    assert "--tokenizer" in told("shard", tmp_path / "run", "--input", parts.corpus)
    assert str(missing) in told("fit", tmp_path / "run", "--config", missing)
    assert "run.toml" in told("status", missing)


def test_stages_out_of_order(copied, parts, tmp_path, told):
    assert "run 'stride-ray shard' first" in told("fit", tmp_path / "new")
    folder = copied("blocks")
    assert "run 'stride-ray fit' first" in told("respond", folder, "--queries", parts.queries)
    assert "run 'stride-ray recover --name queries' first" in told("rescore", folder)
    assert "run 'stride-ray shard' first" in told("attribute", tmp_path / "new", "--queries", parts.queries)
    assert "run 'stride-ray respond --name queries' first" in told("recover", folder)


def test_another_model_under_the_same_name(copied, parts, tmp_path, told, plain):
    folder, model = copied("blocks"), tmp_path / "model"
    shutil.copytree(parts.model, model)
    given = flags(settings(parts, model__path=model, corpus__tokenizer=parts.model))
    asked = ["--queries", parts.queries, "--name", "asked"]
    told("fit", folder, *given, code=0)
    told("attribute", folder, "--exact", *asked, code=0)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(model)).save_pretrained(model)
    for verb, stage in (("fit", "operators"), ("respond", "operators"), ("attribute", "curvature")):
        mode = ["--exact"] if verb == "attribute" else []
        sentence = told(verb, folder, *mode, *(asked if verb != "fit" else []))
        assert f"{stage} was made from another model than now lies at model.path" in sentence


def test_unreadable_file(parts, tmp_path, told, plain):
    folder = tmp_path / "corpus"
    write_lines(folder / "good.jsonl", [{"text": "fine"}])
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    sentence = told("shard", tmp_path / "run", *shard_flags(parts, folder))
    assert "loop.jsonl is a link to nothing" in sentence
    (folder / "loop.jsonl").unlink()
    if os.getuid():  # permissions do not bind root
        (folder / "good.jsonl").chmod(0)
        assert "permission denied" in told("shard", tmp_path / "run", *shard_flags(parts, folder))


def test_empty_corpus(parts, tmp_path, told, plain):
    (tmp_path / "empty").mkdir()
    assert "matches no file" in told("shard", tmp_path / "run", *shard_flags(parts, tmp_path / "empty"))
    (tmp_path / "empty/a.jsonl").write_text("")
    assert "every file is empty" in told("shard", tmp_path / "run", *shard_flags(parts, tmp_path / "empty"))
    write_lines(tmp_path / "blank/a.jsonl", [{"text": " "}, {"text": ""}])
    sentence = told("shard", tmp_path / "run", *shard_flags(parts, tmp_path / "blank"))
    assert not list((tmp_path / "run").glob("blocks/*"))
    assert "produced no blocks; 2 rejected, the first: a.jsonl, row 1: 'text' is empty" in sentence


def test_corrupt_files_beside_good_ones(parts, tmp_path, told, one_ray):
    folder = tmp_path / "corpus"
    write_lines(folder / "a.jsonl", [{"text": text, "url": "u"} for text in documents(4)])
    for name in ("README.md", "_SUCCESS"):
        (folder / name).write_text("no document")
    with open(folder / "a.jsonl", "a") as file:
        file.write('{"text": "broken\n')
    pq.write_table(pa.table({"text": documents(4, seed=1)}), folder / "good.parquet")
    data = (folder / "good.parquet").read_bytes()
    (folder / "bad.parquet").write_bytes(data[: len(data) // 2])
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    told_all = told("shard", tmp_path / "run", *shard_flags(parts, folder, compute__workers=1), code=0)
    assert "8 documents became" in told_all
    assert "3 rows were rejected" in told_all
    assert "bad.parquet: not readable as Parquet" in told_all
    assert "a.jsonl, row 5: not a line of JSON Lines" in told_all
    assert "latin.txt: not UTF-8 text" in told_all
    assert "Columns that are in no document: 'url'; --columns would map them." in told_all
    assert "Files left out, since they hold no documents: README.md, _SUCCESS." in told_all
    manifest = json.loads((tmp_path / "run/blocks/manifest.json").read_text())
    assert (manifest["unused"], manifest["left_out"]) == (["url"], ["README.md", "_SUCCESS"])
    assert {reject["file"] for reject in manifest["rejects"]} == {"bad.parquet", "a.jsonl", "latin.txt"}


def test_wrong_columns(parts, tmp_path, told):
    rows = write_lines(tmp_path / "rows.jsonl", [{"body": "text"}])
    assert "'body'" in told("shard", tmp_path / "run", *shard_flags(parts, rows))
    assert "'content'" in told("shard", tmp_path / "run", *shard_flags(parts, rows), "--columns", "text=content")
    assert "'txt' is no role" in told("shard", tmp_path / "run", *shard_flags(parts, rows), "--columns", "txt=body")


def test_tables_that_are_not_read(copied, parts, tmp_path, told):
    table = tmp_path / "rows.csv"
    table.write_text("text\nhello\n")
    assert "rows.csv is a table that is not read" in told("shard", tmp_path / "run", *shard_flags(parts, table))
    assert "has tables that are not read: rows.csv" in told(
        "shard", tmp_path / "run", *shard_flags(parts, tmp_path / "*.csv")
    )
    assert "rows.csv is a table" in told("attribute", copied("blocks"), "--queries", table, "--name", "asked")


def test_a_pipe_and_a_run_directory_in_the_input(parts, tmp_path, told):
    shutil.copytree(parts.corpus, tmp_path / "corpus")
    assert "lies in the input" in told("shard", tmp_path / "corpus/run", *shard_flags(parts, tmp_path / "corpus"))
    os.mkfifo(tmp_path / "corpus/pipe.jsonl")
    given = shard_flags(parts, tmp_path / "corpus")
    assert "pipe.jsonl is not a regular file" in told("shard", tmp_path / "run", *given)


def test_a_mistyped_model_leaves_nothing_behind(copied, parts, tmp_path, told, plain):
    folder = copied("blocks", "operators")
    before = (folder / "run.toml").read_bytes()
    keep = ["--set", f"corpus.tokenizer={parts.model}", "--queries", parts.queries, "--name", "asked", "--exact"]
    assert "does not exist" in told("attribute", folder, *keep, "--model", tmp_path / "nowhere")
    assert "does not exist" in told("attribute", folder, *keep, "--set", f"model.start={tmp_path}/nowhere")
    assert (folder / "run.toml").read_bytes() == before
    told("attribute", folder, *keep, code=0)


def test_a_tokenizer_that_does_not_do_can_be_replaced(parts, tmp_path, told, plain):
    other = tmp_path / "other"
    shutil.copytree(parts.tokenizer, other)
    settings_file = other / "tokenizer_config.json"
    settings_file.write_text(settings_file.read_text().replace('"eos_token"', '"no_token"'))
    options = [*shard_flags(parts, parts.corpus), "--set"]
    assert "end-of-text" in told("shard", tmp_path / "run", *options, f"corpus.tokenizer={other}")
    told("shard", tmp_path / "run", *options, f"corpus.tokenizer={parts.tokenizer}", code=0)


def test_blocks_that_are_lost_are_told_and_not_waited_for(finished, tmp_path):
    shutil.copytree(finished.folder / "blocks", tmp_path / "blocks")
    part = tmp_path / "blocks" / finished.manifest["parts"][0]["name"]
    pq.write_table(pq.read_table(part).slice(0, 1), part)
    with pytest.raises(StrideError, match="fewer blocks than its manifest says"):
        Blocks(Store(str(tmp_path / "blocks"))).take(range(finished.manifest["blocks"]), ["block_id"])


def test_a_tokenizer_that_is_not_the_models(copied, parts, tmp_path, told):
    other = tmp_path / "model"
    shutil.copytree(parts.model, other)
    save_tokenizer(other, ["entirely different words, zebra zigzag fuzz buzz"] * 9)
    folder = copied("blocks")
    sentence = told("fit", folder, "--model", other, "--set", f"corpus.tokenizer={parts.model}")
    assert "with the model's own tokenizer" in sentence
    assert str(other) in sentence
    assert not (folder / "operators").exists()


def test_ids_beyond_the_models_vocabulary(copied, parts, tmp_path, told, one_ray):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "small")
    options = ["--model", tmp_path / "small", "--set", f"corpus.tokenizer={parts.model}", "--workers", 1]
    assert "the model's vocabulary has 300 ids" in told("fit", copied("blocks"), *options)


def test_a_model_that_is_none(copied, parts, tmp_path, told, plain):
    folder = copied("blocks")
    keep = ["--set", f"corpus.tokenizer={parts.model}"]
    assert "does not exist" in told("fit", folder, "--model", tmp_path / "nowhere", *keep)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in told("fit", folder, "--model", tmp_path / "empty", *keep)
    sentence = told("fit", folder, "--model", parts.model, "--set", "model.split=9", "--form", "matrix", *keep)
    assert "layer 9 is outside the model's 1..2" in sentence


def test_queries_that_cannot_be_asked(copied, parts, tmp_path, told, plain):
    folder = copied("blocks", "operators")
    assert "does not exist" in told("attribute", folder, "--queries", tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text("not json\n")
    assert "bad.jsonl" in told("attribute", folder, "--queries", tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in told("attribute", folder, "--queries", tmp_path / "empty.jsonl")
    twice = write_lines(tmp_path / "twice.jsonl", [{"id": "x", "text": "the comet"}, {"id": "x", "text": "the tide"}])
    assert "more than one query with the id 'x' (twice.jsonl, row 1; twice.jsonl, row 2)" in told(
        "attribute", folder, "--queries", twice
    )
    typo = write_lines(tmp_path / "typo.jsonl", [{"id": "x", "promt": "the comet", "completion": " met"}])
    sentence = told("attribute", folder, "--queries", typo)
    assert "'completion', 'id', 'promt'. 'completion' stands without 'prompt'. A query has text" in sentence
    assert "not a valid name for a query set" in told("attribute", folder, "--queries", parts.queries, "--name", "a/b")
    few = [{"id": "one", "text": "a"}, {"id": "long", "text": "the comet met the tide. " * 60}]
    out = told("attribute", folder, "--queries", write_lines(tmp_path / "few.jsonl", few), code=0)
    assert "has 1 token(s)" in out
    assert "the model's context is 128" in out
    assert "2 queries (2 failed)" in out


def test_another_query_set_of_that_name(finished, parts, tmp_path, told):
    shutil.copytree(finished.folder, tmp_path / "run")
    other = write_lines(tmp_path / "other.jsonl", [{"text": "the comet met the tide"}])
    sentence = told("respond", tmp_path / "run", "--queries", other, "--name", "asked")
    assert "was made from other queries" in sentence


def test_sizes_that_do_not_fit(copied, told, plain):
    folder = copied("blocks")
    assert "99 blocks, fewer than membership.subsets = 100" in told("fit", folder, "--subsets", 100)
    assert "degree is 20 with 16 subsets" in told("fit", folder, "--degree", 20)
    assert not (folder / "operators").exists()


def test_another_configuration_in_the_directory(copied, parts, told):
    folder = copied("blocks", "operators")
    assert "made with operators.rank = 8, and this command has 9" in told("fit", folder, "--set", "operators.rank=9")
    sentence = told("shard", folder, "--input", parts.corpus, "--block-tokens", 64)
    assert "made with corpus.block_tokens = 32, and this command has 64" in sentence
    sentence = told("respond", folder, "--queries", parts.queries, "--set", "seed=5")
    assert "made with seed = 0, and this command has 5" in sentence


def test_options_that_are_none(tmp_path, told, capfd):
    run = tmp_path / "run"
    assert "did you mean 'fit.steps'" in told("fit", run, "--set", "fit.stepz=3")
    assert "--set section.key=value" in told("fit", run, "--set", "fit.steps")
    assert "at least 2" in told("fit", run, "--subsets", "1")
    assert "must be a whole number" in told("fit", run, "--subsets", "many")
    (tmp_path / "c.toml").write_text("[fit]\nmethod = 'magic'\n")
    assert "one of closed_form, train" in told("fit", run, "--config", tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text("[fit\n")
    assert "is not valid TOML" in told("fit", run, "--config", tmp_path / "c.toml")
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in told("fit", run, "--config", tmp_path / "c.toml")
    for arguments in (["fit", str(run), "--frobnicate"], ["frobnicate"], ["fit", str(run), "--dtype", "int3"], []):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert "usage: stride-ray" in capfd.readouterr().err


def test_more_workers_than_there_are(copied, parts, told, one_ray):
    began = time.monotonic()
    folder = copied("blocks")
    sentence = told("fit", folder, "--workers", 64)
    assert "asks for 64 worker(s) with a CPU each; the Ray cluster has 2 CPUs" in sentence
    sentence = told("fit", folder, "--device", "cuda", "--workers", 3)
    assert "asks for 3 worker(s) with a GPU each; the Ray cluster has 0 GPUs" in sentence
    assert time.monotonic() - began < 60
    with pytest.raises(StrideError, match="64"):
        allocate_workers(ComputeConfig(workers=64), 100)


def test_a_workers_sentence_survives_the_way_back(one_ray):
    def fail(unit):
        raise StrideError("one sentence")

    one = WorkerAllocation(1, "cpu")
    with pytest.raises(StrideError, match=r"^one sentence$"):
        list(map_tasks(fail, (), [1], one))
    with ActorPool(one) as actors, pytest.raises(StrideError, match=r"^one sentence$"):
        list(actors.map(lambda: fail, (), [1]))
    with pytest.raises(StrideError, match=r"^one sentence$"):
        list(map_dataset(lambda: fail, (), [{"unit": 1}], one))


@pytest.mark.parametrize("kind", ["closed", "silent", "nonsense"])
def test_a_ray_that_does_not_answer(kind, copied, tmp_path):
    """In a process of its own: here a Ray is open already, and it is the one that would be taken."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if kind == "silent":
            listening.listen()
        address = "here and there" if kind == "nonsense" else f"127.0.0.1:{listening.getsockname()[1]}"
        command = [sys.executable, JOBS / "fit.py", copied("blocks"), "--address", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert address in done.stderr
    assert done.stderr.count("stride-ray: ") == 1
