"""Benchmarks of instruction tuning: answers alone carry loss, in training, truth and every method."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import documents, run_plainly, write_lines
from test_compare import in_this_process
from torch.nn.functional import cross_entropy

from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.evaluate.baselines.lexical import tfidf
from stride_ray.evaluate.comparison.stride_variants import check_blocks, query_table
from stride_ray.evaluate.retraining.benchmark import read_benchmark
from stride_ray.evaluate.retraining.finetune import fine_tune
from stride_ray.evaluate.retraining.instructions import write_instruction_benchmark
from stride_ray.models.causal_lm import load_model
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run

N, Q = 24, 6
SIZES = (N, Q, 80, {"epochs": 1, "batch": 8})


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """Forty questions whose answers are on one of the subjects."""
    answers = [". ".join(text.split(". ")[:2]) for text in documents(40)]
    rows = [{"question": f"what met what, case {i}?", "answer": answer} for i, answer in enumerate(answers)]
    return write_lines(tmp_path_factory.mktemp("instructions") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def benchmark(instructions, parts, tmp_path_factory):
    return write_instruction_benchmark(
        instructions, str(parts.model), str(tmp_path_factory.mktemp("tuned") / "benchmark"), *SIZES
    )


def test_answers_alone_are_targets_and_prompts_are_read(benchmark, instructions):
    tokenizer = load_tokenizer(benchmark.model)
    rows = [json.loads(line) for line in Path(instructions).read_text().splitlines()]
    pairs = {row["question"] + row["answer"]: row["answer"] for row in rows}
    for texts in (benchmark.blocks, benchmark.queries):
        for row in range(len(texts)):
            whole = tokenizer.decode(texts.tokens(row), skip_special_tokens=True)
            assert tokenizer.decode(texts.ids[row][texts.mask[row]], skip_special_tokens=True) == pairs[whole]
    assert (len(benchmark.blocks), len(benchmark.queries)) == (N, Q)
    assert benchmark.parts.tolist() == ["development"] * 3 + ["report"] * 3
    texts = [tokenizer.decode(each.tokens(row)) for each in (benchmark.blocks, benchmark.queries) for row in range(Q)]
    assert len(set(texts)) == 2 * Q  # no query was trained on


def test_losses_are_of_answers(benchmark):
    model = load_model(benchmark.model, device="cpu").model
    expected = []
    for row in range(Q):
        tokens = torch.from_numpy(benchmark.queries.tokens(row).astype(np.int64))
        mask = torch.from_numpy(benchmark.queries.mask[row, 1 : len(tokens)])
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        expected.append(cross_entropy(logits[mask], tokens[1:][mask]).item())
    np.testing.assert_allclose(fine_tune(benchmark, device="cpu").losses(model), expected, rtol=1e-4)
    before = fine_tune(benchmark, device="cpu").losses(load_model(benchmark.start, device="cpu").model)
    assert (expected < before).all()  # it was tuned


def test_the_pipeline_and_lexical_methods_see_the_same_tokens(benchmark, monkeypatch, tmp_path):
    from stride_ray.evaluate.comparison.stride_variants import settings, shard_pool
    from stride_ray.runtime.options import ComputeConfig
    from stride_ray.runtime.storage import Store

    run_plainly(monkeypatch)
    runs = Store(str(tmp_path))
    shard_pool(benchmark, runs, ComputeConfig())
    run = Run(f"{tmp_path}/blocks", changes=settings(benchmark, runs, ComputeConfig(), {}))
    blocks = Blocks(run.stage("blocks").store)
    given = benchmark.blocks
    np.testing.assert_array_equal(blocks.batch(np.arange(N)).mask, given.mask)
    prompts = ~given.mask & (given.ids > 9)
    for changed in (replace(given, mask=given.mask | prompts), replace(given, ids=given.ids + prompts)):
        with pytest.raises(StrideError, match="does not hold the tokens of that row"):
            check_blocks(blocks, replace(benchmark, blocks=changed))
    table = query_table(benchmark.queries).to_pylist()
    for row, query in enumerate(table):
        assert query["token_ids"] == benchmark.queries.tokens(row).tolist()
        assert query["loss_mask"] == benchmark.queries.mask[row, : len(query["token_ids"])].tolist()
    real = np.arange(given.ids.shape[1]) < given.lengths[:, None]
    whole = replace(benchmark.problem(), blocks=replace(given, mask=real))
    np.testing.assert_array_equal(tfidf.scores(benchmark.problem()), tfidf.scores(whole))


def test_the_job_goes_from_instructions_to_lds(instructions, parts, monkeypatch, tmp_path, capsys):
    run_plainly(monkeypatch)
    in_this_process(monkeypatch)
    place = Path(__file__).parents[1] / "jobs/instruction_lds.py"
    spec = importlib.util.spec_from_file_location("instruction_lds_job", place)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    run_plainly(monkeypatch)
    given = ["--instructions", instructions, "--model", str(parts.model), "--out", str(tmp_path), "--examples", str(N)]
    given += ["--queries", str(Q), "--tokens", "80", "--subsets", "4", "--seeds", "1", "--epochs", "1"]
    assert job.main([*given, "--methods", "tfidf,graddot,stride-exact"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    rows = {row["method"]: row for row in pq.read_table(tmp_path / "comparison/lds.parquet").to_pylist()}
    assert set(rows) == {"TF-IDF", "GradDot", "STRIDE exact"}
    assert all(np.isfinite(row["lds"]) for row in rows.values())
    assert "α = 0.5" in printed
    assert job.main([*given, "--methods", "tfidf,graddot,stride-exact"]) == 0  # nothing is left to do
    assert "(scored before)" in capsys.readouterr().err


def test_what_cannot_be_a_benchmark(instructions, parts, tmp_path):
    with pytest.raises(
        StrideError, match="has 40 instructions of at most 80 tokens, of 40 with an answer; 38 examples"
    ):
        write_instruction_benchmark(instructions, str(parts.model), str(tmp_path / "a"), 38, 6, 80)
    with pytest.raises(StrideError, match="has 0 instructions of at most 3 tokens, of 40"):
        write_instruction_benchmark(instructions, str(parts.model), str(tmp_path / "a"), 8, 6, 3)
    plain = write_lines(tmp_path / "texts.jsonl", [{"text": "no prompt"}])
    with pytest.raises(StrideError, match="has no prompts with answers"):
        write_instruction_benchmark(plain, str(parts.model), str(tmp_path / "a"), 8, 6)
    with pytest.raises(StrideError, match="1 examples and 1 queries are too few"):
        write_instruction_benchmark(instructions, str(parts.model), str(tmp_path / "a"), 1, 1)


def test_loss_masks_that_fit_no_tokens(benchmark, tmp_path):
    for name in ("pool.parquet", "queries.parquet"):
        pq.write_table(pq.read_table(f"{benchmark.url}/{name}"), tmp_path / name)
    for folder in ("model", "start"):
        (tmp_path / folder).symlink_to(f"{benchmark.url}/{folder}")
    queries = pq.read_table(tmp_path / "queries.parquet")
    masks = queries["loss_mask"].to_pylist()
    at = queries.column_names.index("loss_mask")
    for changed, kind, sentence in (
        ([*masks[:2], masks[2][1:], *masks[3:]], pa.list_(pa.bool_()), "row 2: loss_mask has"),
        ([*masks[:2], None, *masks[3:]], pa.list_(pa.bool_()), "row 2: loss_mask has no value for"),
        ([*masks[:2], [False] * len(masks[2]), *masks[3:]], pa.list_(pa.bool_()), "row 2: loss_mask leaves no token"),
        ([[None, *masks[0][1:]], *masks[1:]], pa.list_(pa.bool_()), "loss_mask has a null"),
        ([[int(each) for each in mask] for mask in masks], pa.list_(pa.int64()), "must be lists of bool, not list"),
    ):
        pq.write_table(queries.set_column(at, "loss_mask", pa.array(changed, kind)), tmp_path / "queries.parquet")
        with pytest.raises(StrideError, match=f"queries.parquet.*{sentence}"):
            read_benchmark(str(tmp_path))


def test_a_pool_row_without_an_answer_is_refused_before_anything_is_trained(benchmark, tmp_path):
    pool = pq.read_table(f"{benchmark.url}/pool.parquet")
    masks = pool["loss_mask"].to_pylist()
    masks[3] = [False] * len(masks[3])
    at = pool.column_names.index("loss_mask")
    pq.write_table(pool.set_column(at, "loss_mask", pa.array(masks, pa.list_(pa.bool_()))), tmp_path / "pool.parquet")
    pq.write_table(pq.read_table(f"{benchmark.url}/queries.parquet"), tmp_path / "queries.parquet")
    (tmp_path / "model").symlink_to(f"{benchmark.url}/model")
    with pytest.raises(StrideError, match=r"pool\.parquet, row 3: loss_mask leaves no token"):
        read_benchmark(str(tmp_path))


def test_texts_longer_than_the_models_context(instructions, benchmark, parts, tmp_path):
    with pytest.raises(StrideError, match="takes 128 tokens, fewer than the 300 of --tokens; lower it"):
        write_instruction_benchmark(instructions, str(parts.model), str(tmp_path / "b"), 8, 4, 300)
    pool = benchmark.blocks
    longest = int(pool.lengths.argmax())
    wider = [np.pad(each, ((0, 0), (0, 200))) for each in (pool.ids, pool.mask)]
    lengths = pool.lengths.copy()
    lengths[longest] = 200
    changed = replace(benchmark, blocks=replace(pool, ids=wider[0], mask=wider[1], lengths=lengths))
    with pytest.raises(StrideError, match=rf"pool\.parquet, row {longest}, has"):
        fine_tune(changed, device="cpu").train(np.arange(8), 0)


def test_conversations_are_instructions(parts, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"case {i}"}], "completion": [{"role": "assistant", "content": text}]}
        for i, text in enumerate(text.split(". ")[0] for text in documents(12))
    ]
    file = write_lines(tmp_path / "chats.jsonl", rows)
    made = write_instruction_benchmark(file, str(parts.model), str(tmp_path / "b"), 8, 4, 100, {"epochs": 1})
    tokenizer = load_tokenizer(made.model)
    answer = tokenizer.decode(made.queries.ids[0][made.queries.mask[0]])
    assert any(row["completion"][0]["content"] in answer for row in rows)
    assert "case" not in answer
    assert "case" in tokenizer.decode(made.queries.tokens(0))
