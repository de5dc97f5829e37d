"""Instruction tuning end to end: prompts carry no loss anywhere, instructions are whole, near copies are found."""

import contextlib
import dataclasses
import io
import json
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SUBJECTS, run_plainly, sentence, write_lines
from transformers import AutoModelForCausalLM

from stride_ray.attribution.attribute import read_influence, stored_queries
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.evaluate import instruction_tuning
from stride_ray.evaluate.instruction_tuning import (
    CHANCE,
    COPIES,
    HARMING,
    HELD_OUT,
    HELPING,
    NAME,
    PLANTED,
    QUERIES,
    TOP,
    TRAIN,
    UNSEEN,
    Options,
    answers_only,
    attribute_instructions,
    near_copies_found,
    near_copy,
    print_taught,
    publish,
    sample_rows,
    saveable_copy,
    top_instructions,
)
from stride_ray.evaluate.retraining.finetune import IGNORE_INDEX, FineTune
from stride_ray.evaluate.tailpatch import INFLUENCE, LEXICAL
from stride_ray.runtime.actor_pool import map_actors
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run, Stage
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import WorkerAllocation

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
import sft as job

OPTIONS = Options(examples=30, queries=4, held_out=3, epochs=2, learning_rate=5e-3)
CHANGES = {
    "corpus.block_tokens": 32,
    "corpus.shard_mb": 0.001,
    "compute.batch_tokens": 128,
    "compute.workers": 2,
    "membership.subsets": 16,
    "membership.degree": 4,
    "operators.rank": 8,
    "operators.sketch": 16,
}


def counted(monkeypatch):
    """The labels that the recipe's steps see while patched."""
    seen, step = [], FineTune._step

    def spied(recipe, model, optimizer, ids, labels, *weight):
        seen.extend(labels[:, 1:][labels[:, 1:] != IGNORE_INDEX].tolist())
        step(recipe, model, optimizer, ids, labels, *weight)

    monkeypatch.setattr(FineTune, "_step", spied)
    return seen


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A file of questions and answers on the subjects; every fifth answer is longer than a block."""
    rng = random.Random(1)
    rows = []
    for number in range(60):
        subject = sorted(SUBJECTS)[number % len(SUBJECTS)]
        answer = "".join(sentence(subject, rng) for _ in range(6 if number % 5 == 0 else 1)).strip()
        words = SUBJECTS[subject].split()
        question = f"after {rng.randint(2, 9)} of each {rng.choice(words)} what met the {rng.choice(words)}?"
        rows.append({"question": question, "answer": f"{answer} {rng.randint(2, 9)}"})
    return write_lines(tmp_path_factory.mktemp("asked") / "asked.jsonl", rows)


@pytest.fixture(scope="module")
def done(parts, asked, tmp_path_factory):
    """The whole of it; tests only read it."""
    out, told = tmp_path_factory.mktemp("sft") / "out", io.StringIO()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        run_plainly(patch)
        outcome = attribute_instructions(asked, str(parts.model), str(out), OPTIONS, CHANGES)
    return SimpleNamespace(out=out, outcome=outcome, told=told.getvalue(), run=Run(str(out / "run")))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(done, name):
    """Per id, prompt and answer tokens of a file's rows, encoded by hand."""
    tokenizer = load_tokenizer(str(done.out / "run/blocks/tokenizer"))
    found = {}
    for row in lines(done.out / name):
        prompt, answer = (
            tokenizer(row[part], add_special_tokens=False)["input_ids"] for part in ("question", "answer")
        )
        found[row["id"]] = (prompt, [*answer, tokenizer.eos_token_id])
    return found


def test_blocks_and_queries_count_answers_only(done):
    blocks = Blocks(done.run.stage("blocks").store)
    batch = blocks.batch(np.arange(len(blocks)))
    pieces, rest = {}, np.ones(batch.mask.shape, bool)
    spans = blocks.take(batch.ordinals, ["spans"])["spans"].to_pylist()
    for row, (ids, mask, found) in enumerate(zip(batch.ids, batch.mask, spans, strict=True)):
        (span,) = found  # layout split: one instruction a block
        tokens = slice(0, span["length"])
        pieces.setdefault(span["document_id"], []).append((span["start"], ids[tokens], mask[tokens]))
        rest[row, tokens] = False
    assert not batch.mask[rest].any()  # padding
    wanted = expected(done, TRAIN)
    assert pieces.keys() == wanted.keys()
    assert any(len(each) > 1 for each in pieces.values())
    for name, (prompt, answer) in wanted.items():
        parts = sorted(pieces[name], key=lambda piece: piece[0])
        assert np.concatenate([ids for _, ids, _ in parts]).tolist() == [*prompt, *answer]
        assert np.concatenate([mask for *_, mask in parts]).tolist() == [False] * len(prompt) + [True] * len(answer)
    for row in stored_queries(done.run, NAME).to_pylist():
        prompt, answer = expected(done, QUERIES)[row["query_id"]]
        assert row["token_ids"] == [*prompt, *answer]
        assert row["loss_mask"] == [False] * len(prompt) + [True] * len(answer)
    total = sum(len(answer) for _, answer in wanted.values())
    assert (done.outcome.answer_tokens, done.outcome.blocks) == (total, len(blocks))
    assert done.outcome.tokens == sum(len(prompt) + len(answer) for prompt, answer in wanted.values())


def test_training_teaches_answers_only_and_is_what_was_published(done, parts, monkeypatch):
    blocks = Blocks(done.run.stage("blocks").store)
    answers = [row for row in stored_queries(done.run, NAME).to_pylist() if row["status"] == "ok"]
    seen = counted(monkeypatch)
    torch.set_num_threads(1)
    recipe = FineTune(answers_only(blocks, answers, str(parts.model)), epochs=2, batch=4, learning_rate=5e-3)
    trained = recipe.train(np.arange(len(blocks)), 0)
    batch = blocks.batch(np.arange(len(blocks)))
    # A block's first token has nothing before it to be predicted from.
    wanted = batch.ids[:, 1:][batch.mask[:, 1:]].tolist()
    assert Counter(seen) == Counter(wanted * 2)
    published = AutoModelForCausalLM.from_pretrained(done.out / "model")
    for (name, mine), theirs in zip(trained.named_parameters(), published.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    # The loss of an answer is the model's own, given the prompt.
    losses = json.loads((done.out / "_done/model.json").read_text())["losses"]["after"]
    for name, (prompt, answer) in {**expected(done, QUERIES), **expected(done, HELD_OUT)}.items():
        labels = torch.tensor([[IGNORE_INDEX] * len(prompt) + answer])
        with torch.no_grad():
            mine = published(input_ids=torch.tensor([[*prompt, *answer]]), labels=labels).loss
        assert losses[name] == pytest.approx(float(mine), abs=1e-4)


def test_influence_is_summed_to_whole_instructions(done):
    influence = read_influence(done.run, NAME).to_pylist()
    sums = Counter()
    for row in influence:
        sums[row["query_id"], row["document_id"]] += row["influence"]
    found = top_instructions(done.run)
    documents = {(each["query_id"], row["document_id"]): row for each in found for row in each["documents"]}
    assert documents.keys() == sums.keys()
    assert any(row["blocks"] > 1 for row in documents.values())
    for key, row in documents.items():
        assert row["influence"] == pytest.approx(sums[key], abs=1e-9)
    for each in found:
        shares = np.array([row["share"] for row in each["documents"]])
        assert [row["rank"] for row in each["documents"]] == list(range(1, len(shares) + 1))
        helping = np.array([row["influence"] for row in each["documents"]]) > 0
        assert shares[helping].sum() == pytest.approx(1)
        assert shares.min() >= 0


def ranks_of_copies(done):
    """Ranks of the near copies of the planted queries among all instructions."""
    found = []
    for each in top_instructions(done.run)[: OPTIONS.queries // 2]:
        ranks = {row["document_id"]: row["rank"] for row in each["documents"]}
        found += [ranks[f"{each['query_id']}-copy-{copy}"] for copy in range(COPIES)]
    return found


def test_the_outcome(done, parts):
    outcome, half = done.outcome, OPTIONS.queries // 2
    assert (outcome.instructions, outcome.planted) == (OPTIONS.examples + 2 * half, 2 * half)
    assert outcome.measured == {PLANTED: half, UNSEEN: half + OPTIONS.held_out}
    for group in (PLANTED, UNSEEN):
        before, after, change = (outcome.loss[moment][group] for moment in ("before", "after", "change"))
        assert change.value == pytest.approx(after.value - before.value, abs=1e-6)
        assert change.high < 0
        assert {method: np.isfinite(each[group].value) for method, each in outcome.lift.items()} == {
            INFLUENCE: True,
            LEXICAL: True,
        }
    assert outcome.found[INFLUENCE].value == outcome.found[LEXICAL].value == 1
    assert 0 < outcome.found[CHANCE].value < 1
    assert json.loads((done.out / "outcome.json").read_text())["planted"] == 2 * half
    # Of all 34, on four subjects; how far ahead depends on the model, which another processor trains otherwise.
    assert np.mean(ranks_of_copies(done)) < 0.4 * (OPTIONS.examples + 2 * half)
    assert done.run.config.model.start == str(parts.model)


def test_the_table_of_which_instructions_taught_an_answer(done, monkeypatch, capsys):
    assert "⟦" in done.told  # shard shows an example with its loss
    table = done.told[done.told.index("\nplanted-0: after") :]
    assert table.count("rank   influence   share") == OPTIONS.queries
    rows = [line.split() for line in table.splitlines() if " -> " in line]
    assert len(rows) == OPTIONS.queries * (HELPING + HARMING)
    for query in range(OPTIONS.queries):
        mine = rows[query * (HELPING + HARMING) :][: HELPING + HARMING]
        assert [int(row[0]) for row in mine[:HELPING]] == [1, 2, 3]
        assert [float(row[1]) > 0 for row in mine] == [True, True, True, False]
    assert table.count("near copy: ") == sum(rank <= HELPING for rank in ranks_of_copies(done))
    monkeypatch.setattr(instruction_tuning, "HELPING", TOP)
    print_taught(done.run, lines(done.out / TRAIN))
    marked = sum(rank <= TOP for rank in ranks_of_copies(done))
    assert capsys.readouterr().out.count("near copy: ") == marked >= 2


def test_a_rerun_goes_on_and_other_settings_are_refused(done, asked, parts, monkeypatch):
    run_plainly(monkeypatch)
    monkeypatch.setattr(instruction_tuning, "fine_tune", None)
    monkeypatch.setattr(instruction_tuning, "tail_patch", None)
    before = {path: path.stat().st_mtime_ns for path in (done.out / "model").iterdir()}
    arguments = (asked, str(parts.model), str(done.out))
    assert attribute_instructions(*arguments, OPTIONS, CHANGES) == done.outcome
    assert before == {path: path.stat().st_mtime_ns for path in (done.out / "model").iterdir()}
    with pytest.raises(StrideError, match="with epochs = 2, and this command has 3"):
        attribute_instructions(*arguments, dataclasses.replace(OPTIONS, epochs=3), CHANGES)
    # What is missing is done again, to the same figures.
    monkeypatch.undo()
    run_plainly(monkeypatch)
    (done.out / "_done/tailpatch-estimated.json").unlink()
    again = attribute_instructions(*arguments, OPTIONS, CHANGES)
    assert again.lift == done.outcome.lift


def test_the_exact_answer_and_the_job(done, asked, parts, monkeypatch, capsys):
    run_plainly(monkeypatch)
    options = [f"--{each.name.replace('_', '-')}={getattr(OPTIONS, each.name)}" for each in dataclasses.fields(Options)]
    command = ["--instructions", asked, "--model", str(parts.model), "--out", str(done.out), *options]
    for name, value in {**CHANGES, "attribute.exact": True}.items():
        command += ["--set", f"{name}={value}"]
    assert job.main(command) == 0
    out = capsys.readouterr().out
    told = json.loads(out.splitlines()[-1])
    assert told["loss"] == dataclasses.asdict(done.outcome)["loss"]
    assert "| planted | " in out
    assert (done.out / "run/exact" / NAME / "page.html").exists()
    assert job.main([*command, "--examples", "1000"]) == 1
    assert "has 60 instructions with a prompt and an answer, not 1007" in capsys.readouterr().err


def test_a_worker_of_ray_trains_the_same_model(done, parts, one_ray, tmp_path):
    blocks, stage = Blocks(done.run.stage("blocks").store), Stage(Store(str(tmp_path)), "same")
    answers = [row for row in stored_queries(done.run, NAME).to_pylist() if row["status"] == "ok"]
    given = (instruction_tuning.fine_tune, stage, blocks.store, answers, OPTIONS, str(parts.model), 0, "cpu")
    (marker,) = map_actors(partial, given, [str(parts.model)], WorkerAllocation(1, "cpu"))
    before = json.loads((done.out / "_done/model.json").read_text())["losses"]
    for moment, losses in marker["losses"].items():
        assert losses == pytest.approx({name: before[moment][name] for name in losses}, abs=1e-5)
    assert (tmp_path / "model/config.json").exists()


def test_the_draw(asked, tmp_path):
    files = sample_rows(asked, OPTIONS, 0)
    assert {name: len(rows) for name, rows in files.items()} == {TRAIN: 34, QUERIES: 4, HELD_OUT: 3}
    assert files == sample_rows(asked, OPTIONS, 0)
    assert files != sample_rows(asked, OPTIONS, 1)
    questions = [row["question"] + row["answer"] for rows in files.values() for row in rows]
    copies = [row for row in files[TRAIN] if "-copy-" in row["id"]]
    assert {row["id"] for row in copies} == {f"planted-{i}-copy-{j}" for i in range(2) for j in range(2)}
    assert len(set(questions)) >= 37  # a copy that meets no rule is its original
    assert [row["id"] for row in files[QUERIES]] == ["planted-0", "planted-1", "unseen-0", "unseen-1"]
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "the anchor met the tide"}] * 60)
    for given, options, told in (
        (texts, OPTIONS, "has no prompts with answers; instructions need both"),
        (asked, Options(), "has 60 instructions with a prompt and an answer, not 240"),
        (asked, dataclasses.replace(OPTIONS, queries=1), "two queries and an epoch at least"),
    ):
        with pytest.raises(StrideError, match=told):
            sample_rows(given, options, 0)


def test_a_near_copy_is_another_wording():
    question = "If Ann buys 3 pens each day, how many pens does she get?\nShe gets no more."
    answer = "3 pens each day.\n#### 3"
    copies = [near_copy(question, answer, random.Random(seed)) for seed in range(9)]
    assert len(set(copies)) > 3
    for other, said in copies:
        assert (other.count("\n"), said.count("\n")) == (1, 1)
        assert "pens" in other
        assert "pens every" in said or "pens each" in said


def test_near_copies_are_counted_by_query_and_among_the_top():
    train = [{"query_id": f"t{i}", "token_ids": [i, i + 1]} for i in range(40)]
    train += [{"query_id": f"planted-{q}-copy-0", "token_ids": [100 + q, 101 + q, 102 + q]} for q in (1, 11)]
    queries = [{"query_id": "planted-1", "token_ids": [101, 102]}, {"query_id": "planted-11", "token_ids": [200]}]
    ranked = [f"t{i}" for i in range(9)]

    def answer(query, names, value=1.0):
        return {"query_id": query, "documents": [{"document_id": name, "influence": value} for name in names]}

    answers = [answer("planted-1", [*ranked, "planted-1-copy-0"]), answer("planted-11", [*ranked, "planted-1-copy-0"])]
    found = near_copies_found(answers, train, queries)
    assert (found[INFLUENCE].value, found[LEXICAL].value) == (0.5, 0.5)
    assert found[INFLUENCE].low == pytest.approx(0.0126, abs=1e-3)
    assert found[CHANCE].value == pytest.approx(1 - 32 / 42 * 31 / 41)
    late = [
        answer("planted-1", [*ranked, "planted-11-copy-0", "planted-1-copy-0"]),
        answer("planted-11", ["planted-11-copy-0"], -1.0),
    ]
    assert near_copies_found(late, train, queries)[INFLUENCE].value == 0
    assert near_copies_found(late, train, []) == {}


def test_a_model_that_refuses_to_be_saved_is_copied(parts, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(parts.model)
    model.save_pretrained = None  # what a GGUF model's does is to raise, for the sake of this entry
    model.config.quantization_config = {"quant_method": "gguf"}
    publish(Store(str(tmp_path / "start")), saveable_copy(model), load_tokenizer(str(parts.tokenizer)))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters(), strict=True))
    assert not hasattr(found.config, "quantization_config")
    assert load_tokenizer(str(tmp_path / "start")).eos_token == "<|endoftext|>"
