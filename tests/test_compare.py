"""The comparison for real: baselines in Ray tasks, STRIDE through its pipeline, killed and run again."""

import contextlib
import importlib.util
import io
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TOKENS, documents, run_plainly
from test_faults import await_markers, kill_family

from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.evaluate.comparison import compare as comparison
from stride_ray.evaluate.comparison import stride_variants
from stride_ray.evaluate.comparison import units as methods
from stride_ray.evaluate.comparison.compare import compare
from stride_ray.evaluate.comparison.units import (
    BASELINE_SOURCES,
    STRIDE_SOURCES,
    chosen_methods,
    code_version,
    known_units,
    method_names,
)
from stride_ray.evaluate.retraining.benchmark import read_benchmark
from stride_ray.evaluate.retraining.lds import subset_sums
from stride_ray.evaluate.retraining.results import RetrainingResults, read_scores, write_truth
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import WorkerAllocation

N, Q, S = 40, 6, 24
JOB = Path(__file__).parent.parent / "jobs" / "evaluate.py"
METHODS = ["tfidf", "airrep", "stride", "stride-tf-idf"]
ONE = ComputeConfig(workers=1)


def write_benchmark(folder, model):
    """A pool of 40 blocks of several lengths, and losses that fall where a block shares its query's subject."""
    rng = np.random.default_rng(0)
    tokenizer = load_tokenizer(str(model))
    shutil.copytree(model, folder / "model")
    texts = [tokenizer(text)["input_ids"] for text in documents(N + Q, seed=3)]
    ids = [text[: int(rng.integers(16, TOKENS + 1))] for text in texts]
    parts, kinds = ["development", "report"] * (Q // 2), ["near"] * 4 + ["far"] * 2
    pq.write_table(pa.table({"token_ids": ids[:N], "document": [str(i) for i in range(N)]}), folder / "pool.parquet")
    pq.write_table(pa.table({"token_ids": ids[N:], "part": parts, "kind": kinds}), folder / "queries.parquet")
    subsets = tuple(np.sort(rng.choice(N, N // 2, replace=False)) for _ in range(S))
    same = (np.arange(N, N + Q)[:, None] % 4 == np.arange(N) % 4).astype(float)
    losses = 4 - subset_sums(same, subsets).T + 0.5 * rng.normal(size=(2, S, Q))
    write_truth(
        Store(str(folder)), RetrainingResults(subsets, losses.astype(np.float32), ("seed0", "seed1")), np.arange(N)
    )
    return str(folder)


def run_job(*arguments):
    """The job's exit status and what it printed."""
    spec = importlib.util.spec_from_file_location("evaluate_job", JOB)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = job.main(list(arguments))
    return status, out.getvalue(), err.getvalue()


def scores_of(out):
    """Name and bytes of the published scores."""
    return {path.name: path.read_bytes() for path in sorted((out / "scores").glob("*.npz"))}


def in_this_process(monkeypatch):
    """Have baselines scored by the same function without Ray."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(comparison, "connected", lambda compute: contextlib.nullcontext())
    monkeypatch.setattr(comparison, "_machine", lambda compute: (1, "cpu"))

    def scored(shelf, unit):
        facts = comparison._in_worker(*shelf._worker_arguments(unit, 1, "cpu"))
        if "failed" in facts:
            raise StrideError(facts["failed"])
        return facts

    monkeypatch.setattr(comparison._ScoreCache, "_in_fresh_process", scored)


@pytest.fixture(scope="module")
def made(parts, tmp_path_factory):
    """The benchmark's folder."""
    folder = tmp_path_factory.mktemp("compare") / "made"
    folder.mkdir()
    return write_benchmark(folder, parts.model)


@pytest.fixture(scope="module")
def compared(made, one_ray, tmp_path_factory):
    """The job's output, undisturbed."""
    out = tmp_path_factory.mktemp("compared") / "out"
    given = ["--benchmark", made, "--out", str(out), "--methods", ",".join(METHODS), "--workers", "1"]
    status, told, progress = run_job(*given)
    assert status == 0, progress
    return SimpleNamespace(out=out, told=told, progress=progress, given=given)


def test_tables_hold_every_method_with_its_flags(compared):
    names = {path.name for path in compared.out.iterdir()}
    assert {"lds.parquet", "lds.md", "lds.png", "lds.svg", "statistics.parquet", "scores", "runs"} <= names
    rows = {row["method"]: row for row in pq.read_table(compared.out / "lds.parquet").to_pylist()}
    assert list(rows) == ["TF-IDF", "AirRep", "STRIDE", "STRIDE + TF-IDF"]
    flags = {name: (row["ours"], row["default"], row["paper"], row["lexical"]) for name, row in rows.items()}
    assert flags["AirRep"] == (False, False, False, False)
    assert flags["TF-IDF"] == (False, False, False, True)
    assert flags["STRIDE"] == (True, True, False, False)
    assert flags["STRIDE + TF-IDF"] == (True, False, False, True)
    assert rows["AirRep"]["lds"] is None
    assert rows["AirRep"]["note"].startswith("AirRep needs its trained encoder")
    for name in flags.keys() - {"AirRep"}:
        assert rows[name]["seconds"] > 0
        assert rows[name]["peak_mb"] > 50
    assert rows["STRIDE"]["lds"] > 0.3
    alone, lexical, both = (rows[name]["seconds"] for name in ("STRIDE", "TF-IDF", "STRIDE + TF-IDF"))
    assert both == pytest.approx(alone + lexical)
    pool = json.loads((compared.out / "scores/_done/pool.json").read_text())
    assert alone > pool["seconds"]  # cutting the pool counts
    statistics = pq.read_table(compared.out / "statistics.parquet").to_pylist()
    assert [row["method"] for row in statistics] == [name for name in rows if name != "AirRep"]
    assert statistics[-1]["active_mean"] == N


def test_scores_are_the_methods_own(made, compared, one_ray):
    benchmark, store = read_benchmark(made), Store(str(compared.out / "scores"))
    lexical = comparison.METHODS["tfidf"].run(benchmark.problem())
    np.testing.assert_allclose(read_scores(store, "tfidf.npz"), lexical, atol=1e-6)
    name = known_units(benchmark)["stride"].slug
    exact = stride_variants.dense(
        stride_variants.read_influence(Run(str(compared.out / "runs" / name)), stride_variants.QUERIES), Q, N
    )
    np.testing.assert_array_equal(read_scores(store, f"{name}.npz"), exact)
    both = read_scores(store, "stride-tf-idf.npz")
    standard = [(each - each.mean(1, keepdims=True)) / each.std(1, keepdims=True) for each in (exact, lexical)]
    np.testing.assert_allclose(both, sum(standard), atol=1e-4)


def test_the_job_tells_of_the_report_part_at_the_end_alone(compared):
    *lines, last = compared.told.strip().splitlines()
    titles = [line for line in lines if line.startswith("## ")]
    assert titles == ["## far queries, report", "## near queries, report", "## all queries, report", "## Failed"]
    assert "\n- TF-IDF: cosine over token" in compared.told
    for fact in ("made: pool of 40 blocks", "1 core(s), cpu", "Nothing was chosen on the report part"):
        assert fact in compared.told
    result = json.loads(last)
    assert (result["benchmark"], result["part"], result["method"]) == ("made", "report", "STRIDE")
    assert "1 of 4: TF-IDF" in compared.progress
    assert compared.progress.count("on development queries") == 3
    assert "report" not in compared.progress


def test_run_again_nothing_is_scored_and_the_default_is_held_against_the_best_rival(made, compared, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in compared.out.glob("scores/**/*") if path.is_file()}
    monkeypatch.setenv("STRIDE_RAY_AIRREP", "/nowhere")
    kept = [name for name in METHODS if name != "airrep"]
    done = compare(made, str(compared.out), kept, compute=ONE)
    assert (done["scored"], done["failed"]) == ([], {})
    assert next(iter(done["scores"].items())) == ("STRIDE", "scores/stride.npz")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    result = json.loads(json.dumps(done["result"]))
    assert (result["method"], sorted(result["kinds"])) == ("STRIDE", ["all", "far", "near"])
    table = {
        (row["method"], row["kind"]): row
        for row in pq.read_table(compared.out / "lds.parquet").to_pylist()
        if (row["part"], row["target"]) == ("report", "raw")
    }
    for kind, figures in result["kinds"].items():
        assert figures["rival"] == "TF-IDF"
        assert figures["lds"][0] == pytest.approx(table["STRIDE", kind]["lds"], abs=1e-4)
        assert figures["rival_lds"][0] == pytest.approx(table["TF-IDF", kind]["lds"], abs=1e-4)
        gap = table["STRIDE", kind]["lds"] - table["TF-IDF", kind]["lds"]
        assert figures["difference"][0] == pytest.approx(gap, abs=2e-4)
        assert len(figures["ratio"]) == 3


@pytest.mark.cluster
def test_killed_and_run_again_gives_the_same_scores(made, compared, tmp_path, monkeypatch):
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, str(JOB), "--benchmark", made, "--out", str(out), "--methods", "random,tfidf"]
    with open(log, "w") as file:
        driver = subprocess.Popen([*command, "--workers", "1"], stdout=file, stderr=file, start_new_session=True)
    try:
        await_markers(out / "scores/_done", 1, driver, log)
        driver.send_signal(signal.SIGKILL)
    finally:
        kill_family(driver)
    assert not (out / "lds.md").exists()
    there = [path.name for path in (out / "scores/_done").glob("*.json")]
    assert there == ["random.json"]
    kept = (out / "scores/_done/random.json").read_bytes()
    in_this_process(monkeypatch)
    assert compare(made, str(out), ["random", "tfidf"])["scored"] == ["TF-IDF"]
    assert (out / "scores/_done/random.json").read_bytes() == kept
    assert scores_of(out)["tfidf.npz"] == scores_of(compared.out)["tfidf.npz"]
    chance = comparison.METHODS["random"].run(read_benchmark(made).problem())
    np.testing.assert_array_equal(read_scores(Store(str(out / "scores")), "random.npz"), chance)


def test_scores_of_other_code_are_made_again_and_another_benchmark_is_refused(made, compared, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(compared.out, out)
    in_this_process(monkeypatch)
    monkeypatch.setattr(methods, "code_version", lambda *patterns: "another")
    assert compare(made, str(out), ["tfidf"])["scored"] == ["TF-IDF"]
    assert scores_of(out) == scores_of(compared.out)
    assert json.loads((out / "scores/_done/tfidf.json").read_text())["keys"]["code"] == "another"
    other = tmp_path / "other"
    shutil.copytree(made, other)
    pool = pq.read_table(other / "pool.parquet")
    pq.write_table(pa.concat_tables([pool.slice(1), pool.slice(0, 1)]), other / "pool.parquet")
    with pytest.raises(StrideError, match="was made from another benchmark, or this one before it changed"):
        compare(str(other), str(out), ["random"])
    assert run_job("--benchmark", str(other), "--out", str(out))[0] == 1


def test_checkpoints_are_made_once_and_datamodels_read_the_truth(made, tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    out = tmp_path / "out"
    done = compare(made, str(out), ["datamodels", "tracin", "trak"])
    assert done["failed"] == {}
    assert sorted(path.name for path in (out / "checkpoints").glob("epoch-*")) == ["epoch-1", "epoch-2", "epoch-3"]
    assert "Training once more for checkpoints took" in done["summary"]
    assert "not counted (TracIn, TRAK)" in done["summary"]
    assert read_scores(Store(str(out)), "sums/datamodels.npz").shape == (Q, S)
    assert sorted(scores_of(out)) == ["tracin.npz", "trak.npz"]
    benchmark = read_benchmark(made)
    folders = tuple(str(out / f"checkpoints/epoch-{epoch}") for epoch in (1, 2, 3))
    rates = json.loads((out / "scores/_done/checkpoints.json").read_text())["rates"]
    expected = comparison.METHODS["tracin"].run(benchmark.problem(folders, tuple(rates)))
    np.testing.assert_array_equal(read_scores(Store(str(out)), "scores/tracin.npz"), expected)
    truth = benchmark.retrained()
    again = known_units(replace(benchmark, truth=replace(truth, losses=truth.losses[:1])))["datamodels"]
    marker = json.loads((out / "scores/_done/datamodels.json").read_text())
    assert marker["keys"] == known_units(benchmark)["datamodels"].keys != again.keys
    told = "Checkpoints need a local folder, not memory://compare-out/checkpoints."
    assert compare(made, "memory://compare-out", ["tracin", "trak"])["failed"] == {"TracIn": told, "TRAK": told}


def test_whatever_a_method_does_is_a_reason(made, tmp_path, monkeypatch):
    in_this_process(monkeypatch)

    def broken(problem):
        raise RuntimeError("shapes\ndo not fit")

    for run, told in (
        (broken, "RuntimeError: shapes"),
        (lambda problem: np.zeros((Q, N - 1)), r"It gave scores of shape (6, 39), finite: True; not (6, 40)."),
        (lambda problem: np.full((Q, N), np.nan), r"It gave scores of shape (6, 40), finite: False; not (6, 40)."),
    ):
        monkeypatch.setitem(comparison.METHODS, "random", replace(comparison.METHODS["random"], run=run))
        done = compare(made, str(tmp_path / "out"), ["random", "tfidf"])
        assert done["failed"] == {"random": told}
        assert f"- random: {told}" in done["summary"]
    assert not (tmp_path / "out/scores/_done/random.json").exists()


def test_variants_of_one_configuration_run_once(made, tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    calls = []

    def scored(benchmark, variant, runs, compute, checkpoints):
        calls.append(variant.name)
        return np.random.default_rng(0).random((Q, N), dtype=np.float32), 7, "a remark"

    monkeypatch.setattr(stride_variants, "shard_pool", lambda *given: None)
    monkeypatch.setattr(stride_variants, "score", scored)
    exact = Config().attribute.exact
    again = stride_variants.Variant("STRIDE again", {"attribute.exact": exact})
    both = stride_variants.Variant("STRIDE again + TF-IDF", {"attribute.exact": exact}, plus="tfidf")
    monkeypatch.setattr(stride_variants, "VARIANTS", (stride_variants.VARIANTS[0], again, both))
    compare(made, str(tmp_path / "out"), ["stride", "stride-again", "stride-again-tf-idf"])
    assert calls == ["STRIDE"]
    rows = {row["method"]: row for row in pq.read_table(tmp_path / "out/lds.parquet").to_pylist()}
    assert rows["STRIDE again"]["note"] == "the same configuration as STRIDE; a remark"
    assert rows["STRIDE"]["lds"] == rows["STRIDE again"]["lds"] != rows["STRIDE again + TF-IDF"]["lds"]
    assert "TF-IDF" not in rows  # made for the sum, not asked for
    assert sorted(scores_of(tmp_path / "out")) == ["stride-again-tf-idf.npz", "stride.npz", "tfidf.npz"]


def test_the_job_has_a_column_of_removals(made, tmp_path, monkeypatch):
    run_plainly(monkeypatch)
    in_this_process(monkeypatch)
    out = tmp_path / "out"
    given = ["--benchmark", made, "--out", str(out), "--methods", "tfidf,bm25,datamodels"]
    status, told, progress = run_job(*given, "--removal", "0.1")
    assert status == 0, progress
    assert "| without its first 0.1 |" in told
    assert "after training without the 4 of 40 blocks" in told
    rows = pq.read_table(out / "lds.parquet").to_pylist()
    filled = {(row["method"], row["kind"], row["part"]) for row in rows if row["removal"] is not None}
    assert filled == {("TF-IDF", "all", "report"), ("BM25", "all", "report")}
    assert json.loads(told.splitlines()[-1])["part"] == "report"


def test_methods_are_known_by_name():
    with pytest.raises(StrideError, match=r"Unknown method 'tdidf'; known are random, tfidf, .* stride"):
        chosen_methods(["random", "tdidf"], False)
    everything = chosen_methods(None, False)
    assert everything[:3] == ["random", "tfidf", "bm25"]
    assert {"datamodels", "stride", "stride-as-published"} <= set(everything)
    extra = [slug for slug, each in comparison.METHODS.items() if each.ablation]
    assert "trak_damped100" in extra
    extra += [each.slug for each in stride_variants.VARIANTS if each.ablation]
    assert {"stride-trained-base", "stride-exact-last-half-of-the-layers", "stride-logit-exact-responses"} < set(extra)
    assert not set(extra) & set(everything)
    assert chosen_methods(["random", "random"], True) == ["random", *extra]
    assert chosen_methods(None, True) == everything + extra
    assert {slug for slug, each in comparison.METHODS.items() if each.checkpoints and not each.ablation} == {
        "tracin",
        "trak",
        "less",
        "ekfac_stages",
    }
    assert len(set(method_names())) == len(method_names())
    assert (
        len({code_version(*STRIDE_SOURCES), code_version(*BASELINE_SOURCES), code_version("models/causal_lm.py")}) == 3
    )
    assert [each.default for each in stride_variants.VARIANTS] == [True] + [False] * (len(stride_variants.VARIANTS) - 1)
    assert not stride_variants.VARIANTS[0].changes
    assert all(
        each.identity for each in stride_variants.VARIANTS
    )  # every key and value is one that the configuration knows


def test_the_default_runs_on_a_pool_smaller_than_its_subsets_and_without_a_tokenizer(
    made, tmp_path, plain, monkeypatch, capsys
):
    monkeypatch.setattr(stride_variants, "allocate_workers", lambda compute, units: WorkerAllocation(3, "cpu"))
    bare = tmp_path / "bare"
    shutil.copytree(made, bare)
    for path in (bare / "model").glob("*token*"):
        path.unlink()
    benchmark, runs = read_benchmark(str(bare)), Store(str(tmp_path / "runs"))
    changes = {"membership.degree": 4, "operators.rank": 8, "operators.sketch": 16}
    variant = replace(stride_variants.VARIANTS[0], changes={**changes, **stride_variants.SUBSETS})
    stride_variants.shard_pool(benchmark, runs, ComputeConfig())
    assert "has no tokenizer that knows token" in capsys.readouterr().err
    found, peak, remark = stride_variants.score(benchmark, variant, runs, ComputeConfig())
    assert (found.shape, found.dtype) == ((Q, N), np.float32)
    assert found.any(axis=1).all()
    assert peak % 3 == 0
    assert peak > 3 * 50
    assert remark.startswith("40 subsets, as many as blocks")
    assert Run(f"{runs.url}/stride").config.corpus.tokenizer == f"{runs.url}/tokenizer"
    # What an interrupted run of the variant left behind must not reach its scores.
    (tmp_path / "runs/stride/run.toml").write_text("seed = 7\n")
    np.testing.assert_array_equal(stride_variants.score(benchmark, variant, runs, ComputeConfig())[0], found)
    few = replace(benchmark.queries, mask=benchmark.queries.mask.copy())
    few.mask[2, 1:] = False
    _, _, remark = stride_variants.score(replace(benchmark, queries=few), variant, runs, ComputeConfig())
    assert "1 queries failed and count as zeros: has 1 token(s)" in remark


def test_blocks_that_are_not_the_pool_are_told(made, compared):
    benchmark = read_benchmark(made)
    blocks = Blocks(Store(str(compared.out / "runs/blocks/blocks")))
    stride_variants.check_blocks(blocks, benchmark)
    ids = benchmark.blocks.ids.copy()
    ids[7, 3] += 1
    with pytest.raises(StrideError, match="block 7 does not hold the tokens of that row"):
        stride_variants.check_blocks(blocks, replace(benchmark, blocks=replace(benchmark.blocks, ids=ids)))
    mask = benchmark.blocks.mask.copy()
    mask[4, mask[4].sum() - 1] = False
    with pytest.raises(StrideError, match="block 4 does not hold the tokens"):
        stride_variants.check_blocks(blocks, replace(benchmark, blocks=replace(benchmark.blocks, mask=mask)))
    fewer = type(benchmark.blocks)(ids[1:], benchmark.blocks.mask[1:])
    with pytest.raises(StrideError, match="has 40 blocks, and the pool has 39 rows"):
        stride_variants.check_blocks(blocks, replace(benchmark, blocks=fewer))


def test_another_encoder_is_another_method(made, monkeypatch):
    benchmark = read_benchmark(made)
    before = known_units(benchmark)
    monkeypatch.setenv("STRIDE_RAY_ENCODER", "somewhere/else")
    after = known_units(benchmark)
    changed = {slug for slug in before if before[slug].keys != after[slug].keys}
    assert changed == {"embedding", "airrep_fitted"}
