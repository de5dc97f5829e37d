"""When it was learnt: a fact that a training reads in one epoch only is learnt there."""

import io
import json
import re

import numpy as np
import pytest
import torch
from conftest import TOKENS, documents, run_plainly, save_tokenizer, write_lines
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stride_ray.attribution.attribute import attribute
from stride_ray.cli.main import main
from stride_ray.corpus.shard import shard
from stride_ray.evaluate.timeline import TIMELINE, learnt_at, timeline
from stride_ray.operators.fit import fit
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run

EPOCHS = 4
# Each in a document of its own that is read in one epoch, after the first.
FACTS = {1: "the zebra of korvu eats velvet", 2: "a quartz in limbo hums jazz", 3: "my pixel owl buys fudge"}


def test_the_steepest_fall_beside_the_pools():
    assert learnt_at(np.array([5.0, 4, 1, 1]), np.array([5.0, 4, 3, 2])) == 2
    assert learnt_at(np.array([5.0, 3, 2.9, 2.8]), np.array([5.0, 2, 2, 2])) == 2  # all fell at first


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose facts were each read in one known epoch, with a checkpoint after every epoch."""
    root = tmp_path_factory.mktemp("timeline")
    texts = documents(48)
    tokenizer = save_tokenizer(root / "tokenizer", [*texts, *FACTS.values()])
    corpus = [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    corpus += [{"id": f"fact-{epoch}", "text": text} for epoch, text in FACTS.items()]
    write_lines(root / "corpus.jsonl", corpus)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    checkpoints = []
    for epoch in range(EPOCHS):
        seen = [*texts, *([FACTS[epoch]] * 12 if epoch in FACTS else [])]
        for text in (seen[i] for i in torch.randperm(len(seen))):
            ids = torch.tensor([tokenizer(text)["input_ids"][: 2 * TOKENS]])
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        checkpoints.append(str(root / f"epoch-{epoch}"))
        model.save_pretrained(checkpoints[-1])
        AutoTokenizer.from_pretrained(root / "tokenizer").save_pretrained(checkpoints[-1])
    queries = write_lines(root / "queries.jsonl", [{"id": str(e), "text": text} for e, text in FACTS.items()])
    changes = {
        "corpus.input": [str(root / "corpus.jsonl")],
        "corpus.columns": {"id": "id"},
        "corpus.layout": "split",
        "corpus.block_tokens": TOKENS,
        "model.path": checkpoints[-1],
        "model.checkpoints": checkpoints,
        "solve.steps": 0,
        "compute.worker_gb": 1.0,
    }
    patch = pytest.MonkeyPatch()
    run_plainly(patch)
    try:
        run = Run(str(root / "run"), changes=changes)
        shard(run)
        fit(run)
        attribute(run, queries, "facts", io.StringIO())
        found = timeline(run, "facts")
    finally:
        patch.undo()
    return run, found


def test_each_fact_is_learnt_where_it_was_read(trained):
    _, found = trained
    first = {each.query_id: each for each in found if each.rank == 1}
    assert {query: each.document_id for query, each in first.items()} == {str(e): f"fact-{e}" for e in FACTS}
    assert {query: each.block_at for query, each in first.items()} == {str(e): e for e in FACTS}
    assert {query: each.query_at for query, each in first.items()} == {str(e): e for e in FACTS}


def test_the_last_checkpoint_has_the_losses_and_the_influence_of_the_run(trained):
    from stride_ray.attribution.attribute import read_influence

    run, found = trained
    recovery = {row["query_id"]: row for row in read_influence(run, "facts", "recovery").to_pylist()}
    influence = {
        (row["query_id"], row["rank"]): row for row in read_influence(run, "facts").to_pylist() if row["exact"]
    }
    for each in found:
        assert each.query_losses[-1] == pytest.approx(recovery[each.query_id]["base_loss"], rel=1e-4)
        if (each.query_id, each.rank) in influence:
            expected = influence[each.query_id, each.rank]["influence"]
            assert each.influences[-1] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_command_prints_what_it_costs_and_then_the_table(trained, capsys, plain):
    run, _ = trained
    assert main(["timeline", run.url, "--name", "facts"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{EPOCHS} checkpoints, at each a forward and backward pass of 3 queries and ")
    assert re.search(r"^\| \*\*2\*\* \| epoch-2 \|", printed, re.M)
    stage = run.store.child("timeline/facts")
    assert stage.read_table("timeline-000-00000.parquet").schema.equals(TIMELINE)


def test_too_few_checkpoints_and_one_that_is_not_there(trained, plain, tmp_path):
    run, _ = trained
    with pytest.raises(StrideError, match="at least two checkpoints and has 1"):
        timeline(Run(run.url, changes={"model.checkpoints": [run.config.model.path]}), "facts")
    with pytest.raises(StrideError, match="nowhere"):
        timeline(
            Run(run.url, changes={"model.checkpoints": [run.config.model.path, str(tmp_path / "nowhere")]}), "facts"
        )


def test_the_page_has_the_curves(trained):
    run, found = trained
    page = run.stage("influence", "facts").store.read("page.html").decode()
    data = json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', page, re.S)[1])
    told = data["timeline"]
    assert told["checkpoints"] == [f"epoch-{epoch}" for epoch in range(EPOCHS)]
    for query, each in told["queries"].items():
        mine = [one for one in found if one.query_id == query]
        assert each["at"] == mine[0].query_at
        assert each["losses"] == mine[0].query_losses.tolist()
        assert [one["influences"] for one in each["blocks"]] == [one.influences.tolist() for one in mine]
        assert [one["document_id"] for one in each["blocks"]] == [one.document_id for one in mine]
    assert set(told["queries"]) == {each["query_id"] for each in data["queries"]}
