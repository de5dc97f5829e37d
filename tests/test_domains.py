"""Closed loops by domain: a benchmark's pool becomes a run, masks are kept, one loop a task, pooled differences."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import documents, run_plainly, write_lines

from stride_ray.attribution.attribute import stored_queries
from stride_ray.corpus.blocks import Blocks
from stride_ray.evaluate.closed_loop.arms import F1, LOSS
from stride_ray.evaluate.closed_loop.domains import SET, attribute_domains, halves, joined
from stride_ray.evaluate.retraining.instructions import read_instructions, write_instruction_benchmark
from stride_ray.evaluate.retraining.retrain import read_array
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store

N, Q = 24, 12


@pytest.fixture(scope="module")
def benchmark(parts, tmp_path_factory):
    """Two tasks: answers on one of the subjects, and the same with the words in reverse."""
    root = tmp_path_factory.mktemp("tasks")
    rows = []
    for i, text in enumerate(documents(40)):
        answer = text.split(". ")[0]
        task, said = ("say", answer) if i % 2 else ("turn", " ".join(reversed(answer.split())))
        rows.append({"question": f"{task}: case {i}?", "answer": said, "task": task})
    file = write_lines(root / "rows.jsonl", rows)
    sizes = (N, Q, 80, {"epochs": 1, "batch": 8})
    return write_instruction_benchmark(file, str(parts.model), str(root / "benchmark"), *sizes, task="task")


def test_a_loop_for_each_task_and_the_differences_over_all(benchmark, monkeypatch, tmp_path, capsys):
    run_plainly(monkeypatch)
    place = Path(__file__).parents[1] / "jobs/select_domains.py"
    spec = importlib.util.spec_from_file_location("select_domains_job", place)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    out = str(tmp_path / "out")
    given = ["--benchmark", benchmark.url, "--out", out, "--seeds", "1", "--share", "0.4", "--set", "solve.steps=0"]
    assert job.main(given) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["measures"] == [LOSS, F1]
    assert set(found["domains"]) == {"say", "turn"}
    for measure, folder in ((LOSS, "losses"), (F1, "f1")):
        differences = []
        for task, each in found["domains"].items():
            store = Store(f"{out}/plain/report/{task}/_retrain/{folder}")
            mine, other = (read_array(store, f"{each['trainings'][arm][0]}.npy") for arm in ("selected", "TF-IDF"))
            differences.append(mine - other)
            assert each["differences"][measure]["TF-IDF"]["value"] == pytest.approx((mine - other).mean(), abs=1e-6)
        assert found["all"][measure]["TF-IDF"]["value"] == pytest.approx(np.concatenate(differences).mean(), abs=1e-6)
    # Blocks are the benchmark's rows with their masks, queries have theirs, and only documents in the pool are chosen.
    run, _ = attribute_domains(benchmark.url, f"{out}/plain", False, {"select.tokens": "0.4", "solve.steps": "0"})
    blocks = Blocks(run.stage("blocks").store)
    batch, width = blocks.batch(np.arange(N)), benchmark.blocks.ids.shape[1]
    kept = {tuple(ids[mask]) for ids, mask in zip(batch.ids, batch.mask, strict=True)}
    assert kept == {tuple(ids[mask]) for ids, mask in zip(benchmark.blocks.ids, benchmark.blocks.mask, strict=True)}
    assert batch.ids.shape[1] == width
    for row, query in enumerate(stored_queries(run, SET).to_pylist()):
        assert query["loss_mask"] == benchmark.queries.mask[row, : len(query["token_ids"])].tolist()


def test_rows_of_a_document_are_joined_in_the_order_of_their_positions():
    rows = [("b", 1, [5], [True]), ("a", 0, [1, 2], [False, True]), ("b", 0, [3, 4], [False, False])]
    table = pa.Table.from_pylist(
        [{"document": d, "position": p, "token_ids": ids, "loss_mask": mask, "domain": "x"} for d, p, ids, mask in rows]
    )
    whole = {each["document"]: (each["token_ids"], each["loss_mask"]) for each in joined(table).to_pylist()}
    assert whole == {"a": ([1, 2], [False, True]), "b": ([3, 4, 5], [False, False, True])}
    plain = joined(table.drop_columns("loss_mask")).to_pylist()
    assert [(each["document"], each["token_ids"]) for each in plain] == [("a", [1, 2]), ("b", [3, 4, 5])]


def test_which_queries_select_and_which_measure():
    rows = [("q0", "x", "report"), ("q1", "x", "development"), ("q2", "x", "development"), ("q3", "y", "development")]
    queries = pa.Table.from_pylist([dict(zip(("query_id", "domain", "part"), row, strict=True)) for row in rows])
    assert halves(queries, "x") == (["q1", "q2"], ["q0"])
    assert halves(queries, "x", development=True) == (["q1"], ["q2"])
    with pytest.raises(StrideError, match="The domain 'y' has too few queries: some must select and others measure"):
        halves(queries, "y")


def test_a_benchmark_without_domains(benchmark, tmp_path):
    table = pq.read_table(f"{benchmark.url}/queries.parquet")
    for name in ("pool", "queries"):
        pq.write_table(pq.read_table(f"{benchmark.url}/{name}.parquet"), tmp_path / f"{name}.parquet")
    pq.write_table(table.drop_columns("domain"), tmp_path / "queries.parquet")
    with pytest.raises(StrideError, match=r"queries\.parquet has no column 'domain'; selection by domains needs"):
        attribute_domains(str(tmp_path), str(tmp_path / "out"), False, {})


def test_instructions_without_a_task(parts, tmp_path, capsys):
    rows = [{"question": "a?", "answer": "b", "task": "x"}, {"question": "c?", "answer": "d", "task": None}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    assert [each.source for each in read_instructions(file, task="task")] == ["x"]
    assert "1 of 2 rows of" in (told := capsys.readouterr().err)
    assert "task" in told
    with pytest.raises(StrideError, match=r"2 of 2 rows of .* are left out; the first: .*'tusk'"):
        write_instruction_benchmark(file, str(parts.model), str(tmp_path / "b"), 1, 2, task="tusk")
