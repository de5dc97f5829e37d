"""Operators at every site through the pipeline: rows, responses, estimates, rescoring; resume, bytes and bad stores."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
from conftest import QUERIES, documents, killed_at_write, settings, write_lines

from stride_ray.attribution import rescore, site_responses
from stride_ray.attribution.attribute import attribute, read_influence
from stride_ray.cli.main import main
from stride_ray.cli.status import status
from stride_ray.corpus import failures
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.failures import NOT_FINITE
from stride_ray.corpus.shard import shard
from stride_ray.operators import site_fit, sketched_rows
from stride_ray.operators.fit import fit
from stride_ray.operators.row_store import RowStore
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store

CANDIDATES = 5
FIRST = "rows-000000000"


def options(parts, **more):
    """The options of a tiny run with operators at every site."""
    chosen = {"operators__form": "sites", "attribute__candidates": CANDIDATES, "recover__nonnegative": True}
    return settings(parts, **{**chosen, **more})


def asked(folder, parts, queries=None, **more):
    """A run's answer: fit, respond, recover, rescore."""
    run = Run(str(folder), changes=options(parts, **more))
    out = io.StringIO()
    summary = attribute(run, queries or parts.queries, "asked", out)
    return run, summary, out.getvalue()


def data(folder):
    """Bytes of all that an answer leaves."""
    patterns = ("operators/*.safetensors", *(f"{stage}/asked/*.parquet" for stage in ("responses", "estimates")))
    paths = (path for pattern in (*patterns, "influence/asked/*.parquet") for path in sorted(folder.glob(pattern)))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def by_block(table):
    return {(row["query_id"], row["ordinal"]): row for row in table.to_pylist()}


@pytest.fixture(scope="module")
def estimated(parts, sharded):
    """An answer through Ray with two workers; tests only read it."""
    folder = sharded("estimated")
    return (folder, *asked(folder, parts))


def test_candidates_are_exact_and_the_rest_close_to_it(estimated, exactly):
    _, run, summary, out = estimated
    table, exact = read_influence(run, "asked"), by_block(read_influence(exactly.run, "asked"))
    for query in ("sea", "kitchen", "script"):
        rows = [row for row in table.to_pylist() if row["query_id"] == query]
        scored = [row for row in rows if row["exact"]]
        assert len(scored) == CANDIDATES
        for row in scored:
            assert row["influence"] == pytest.approx(exact[query, row["ordinal"]]["influence"], rel=1e-4, abs=1e-6)
        mine = np.array([row["influence"] for row in rows])
        true = np.array([exact[query, row["ordinal"]]["influence"] for row in rows])
        assert np.corrcoef(mine, true)[0, 1] > 0.97
        rest = [not row["exact"] for row in rows]
        assert (mine[rest] @ true[rest]) / (true[rest] @ true[rest]) == pytest.approx(1, abs=0.4)
        best = max((key for key in exact if key[0] == query), key=lambda key: exact[key]["influence"])
        assert best[1] in {row["ordinal"] for row in scored}
    assert (summary["queries"], summary["failed"], summary["exact"]) == (5, 2, 3 * CANDIDATES)
    assert summary["mode"] == "estimated"
    assert (
        f"{3 * CANDIDATES} of them are exact; the others are estimates; over all blocks, estimates correlate with"
        in out
    )
    recovery = read_influence(run, "asked", "recovery").to_pylist()
    assert [row["exact"] for row in recovery] == [CANDIDATES, None, CANDIDATES, None, CANDIDATES]
    assert all(0.9 < row["reliability"] <= 1 for row in recovery if row["status"] == "ok")
    assert not list((estimated[0]).glob("*/asked/*.safetensors"))


def test_the_store_is_what_its_page_says(estimated):
    _, run, _, _ = estimated
    store = RowStore(run.store.child("operators"))
    blocks = Blocks(run.stage("blocks").store)
    assert len(store) == len(blocks) == store.facts["blocks"]
    assert store.of_blocks
    assert sum(part["count"] for part in store.facts["parts"]) == len(blocks)
    rows = store.read(store.facts["parts"][0])
    assert rows.bits.shape[1] == store.starts[-1]
    assert rows.scales.shape[1] == len(store.facts["sites"]) == 7
    assert rows.bits[0].nbytes + rows.scales[0].nbytes == store.facts["row_bytes"] <= site_fit.MAX_BLOCK_ROW_BYTES
    whole = store.take(np.arange(len(store)))
    some = store.take(np.array([0, 5, len(store) - 1]))
    assert np.array_equal(some.bits, whole.bits[[0, 5, -1]])
    assert fit(run)["learned"]
    told = status(run)
    assert f"{len(blocks)} operators of blocks at 7 sites, {store.facts['row_bytes'] / 1024:.1f} KiB each" in told
    assert "linear; over all blocks, estimates correlate with exact influence at about 0.9" in told
    assert "directions" not in told
    assert f"({3 * CANDIDATES} of them exact)" in told


def test_a_plain_loop_gives_the_same_bytes(estimated, parts, sharded, plain):
    other = sharded("plain")
    asked(other, parts)
    assert data(other) == data(estimated[0])


@pytest.mark.parametrize("at", [1, 4, 9, 14, 19, 24, 29])
def test_an_interrupted_answer_goes_on_where_it_stopped(at, estimated, parts, sharded, plain):
    broken = sharded(f"broken{at}")
    with killed_at_write(2 * at):
        asked(broken, parts)
    asked(broken, parts)
    assert data(broken) == data(estimated[0])
    assert not list(broken.glob("*/asked/*.safetensors"))


def test_a_query_gets_the_same_rows_alone_and_in_company(estimated, parts, sharded, tmp_path, plain):
    alone = write_lines(tmp_path / "one.jsonl", [query for query in QUERIES if query["id"] == "kitchen"])
    run, _, _ = asked(sharded("alone"), parts, alone)
    mine = by_block(read_influence(run, "asked"))
    others = {key: row for key, row in by_block(read_influence(estimated[1], "asked")).items() if key[0] == "kitchen"}
    assert mine.keys() == others.keys()
    for key, row in mine.items():  # padding to another query's length rounds otherwise
        assert row["influence"] == pytest.approx(others[key]["influence"], rel=0.02, abs=1e-3)
        assert row["exact"] == others[key]["exact"]


def test_units_and_slices_decide_nothing(estimated, parts, sharded, plain, monkeypatch):
    monkeypatch.setattr(site_responses, "SLICES", 3)
    monkeypatch.setattr(rescore, "MAX_CANDIDATES_PER_UNIT", 4)
    run, _, _ = asked(sharded("slices"), parts)
    mine, others = (by_block(read_influence(each, "asked")) for each in (run, estimated[1]))
    assert {key: row["exact"] for key, row in mine.items()} == {key: row["exact"] for key, row in others.items()}
    for key, row in mine.items():
        assert row["influence"] == pytest.approx(others[key]["influence"], rel=1e-4, abs=1e-5)


def test_more_candidates_than_blocks_make_all_exact(parts, sharded, exactly, plain):
    run, summary, out = asked(sharded("everything"), parts, attribute__candidates=10_000)
    table, exact = by_block(read_influence(run, "asked")), by_block(read_influence(exactly.run, "asked"))
    assert summary["exact"] == summary["rows"] == len(exact)
    assert table.keys() == exact.keys()
    for key, row in table.items():
        assert row["influence"] == pytest.approx(exact[key]["influence"], rel=1e-4, abs=1e-6)
    assert "the others are estimates" not in out


def test_no_candidates_need_no_gradients_of_queries(parts, sharded, plain):
    run, summary, _ = asked(sharded("estimates"), parts, attribute__candidates=0)
    assert summary["exact"] == 0
    assert not any(read_influence(run, "asked")["exact"].to_pylist())
    assert "0 of" in run_verb("rescore", run.url, "--name", "asked")[1]


def test_rows_of_subsets_go_through_the_lasso(parts, sharded, exactly, plain):
    more = {"operators__rows": "subsets", "membership__subsets": 40, "attribute__candidates": 3}
    run, summary, _ = asked(sharded("subsets"), parts, **more)
    facts = run.stage("operators").store.read_json("manifest.json")
    assert (facts["rows"], facts["subsets"], facts["learned"]) == ("subsets", 40, True)
    assert summary["largest_gap"] < 1e-8
    assert summary["exact"] == 9
    assert not [name for name in run.store.names("operators") if name.startswith("sum-")]
    exact = by_block(read_influence(exactly.run, "asked"))
    rows = [row for row in read_influence(run, "asked").to_pylist() if not row["exact"]]
    assert all(row["influence"] > 0 for row in rows)
    mine = np.array([row["influence"] for row in rows])
    true = np.array([exact[row["query_id"], row["ordinal"]]["influence"] for row in rows])
    # Estimates of subsets are in the unit of exact influence as well.
    assert 0.4 < (mine @ true) / (mine @ mine) < 2.5


def test_subsets_fitted_in_pieces_are_those_fitted_at_once(parts, sharded, plain, monkeypatch):
    more = {"operators__rows": "subsets", "membership__subsets": 16}
    runs = []
    for name, shards, rows in (("few", 2, 5), ("many", 16, 128)):
        monkeypatch.setattr(sketched_rows, "MIN_UNITS", shards)
        monkeypatch.setattr(sketched_rows, "ROWS", rows)
        runs.append(Run(str(sharded(name)), changes=options(parts, **more)))
        fit(runs[-1])
    one, two = (RowStore(run.store.child("operators")).take(np.arange(16)) for run in runs)
    np.testing.assert_allclose(one.scales, two.scales, rtol=1e-4)
    differing = np.unpackbits((one.bits ^ two.bits).view(np.uint8)).mean()
    assert differing < 1e-3


def test_the_budget_decides_between_blocks_and_subsets(parts, sharded, plain):
    run = Run(str(sharded("budget")), changes=options(parts))
    n = len(Blocks(run.stage("blocks").store))
    for share, rows in ((1.01, "blocks"), (0.99, "subsets")):
        config = run.config.updated({"operators.budget_gb": share * n * site_fit.MIN_BLOCK_ROW_BYTES / 2**30})
        of_blocks, K, room = site_fit.rows_for(config, n)
        assert (of_blocks, K) == ((True, n) if rows == "blocks" else (False, 16))
        assert room <= site_fit.MAX_BLOCK_ROW_BYTES


def run_verb(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(each) for each in arguments])
    return code, out.getvalue(), err.getvalue()


def spoil(name, change):
    def spoiled(folder):
        path = next(iter(sorted((folder / "operators").glob(name))))
        path.write_bytes(change(path.read_bytes()))

    return spoiled


def flipped(content):
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def of_another_format(folder):
    store = Store(f"{folder}/operators")
    store.write_json("manifest.json", {**store.read_json("manifest.json"), "format": 99})


def curvature_flipped(folder):
    path = folder / "curvature/sites.safetensors"
    path.write_bytes(flipped(path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (spoil(f"{FIRST}*", flipped), rf"{FIRST}-\d+.safetensors \(\d+ bytes\) differs in its hash"),
        (spoil("rows-*", lambda content: content[:100]), "truncated or modified; restore it"),
        (spoil("rows-*", lambda content: b""), r"\(0 bytes\) differs in its hash"),
        (of_another_format, "has format 99, but this version of stride_ray reads format 1"),
        (curvature_flipped, r"curvature/sites.safetensors was damaged or changed: its checksum differs"),
        (lambda folder: next((folder / "operators").glob("rows-*")).unlink(), "no such file"),
    ],
)
def test_a_damaged_store_is_told_in_a_sentence(damage, sentence, estimated, parts, tmp_path, plain):
    folder = tmp_path / "run"
    shutil.copytree(estimated[0], folder)
    for stage in ("responses", "estimates", "influence"):
        shutil.rmtree(folder / stage)
    damage(folder)
    with pytest.raises(StrideError, match=sentence):
        attribute(Run(str(folder)), parts.queries, "asked", io.StringIO())


def test_a_budget_without_a_coordinate_a_site_is_refused(parts, sharded, told, plain):
    folder = sharded("poor")
    changes = [f"--set={key}={value}" for key, value in {**options(parts), "operators.rows": "blocks"}.items() if value]
    changes = [each for each in changes if "corpus.input" not in each]
    sentence = told("fit", folder, *changes, "--set", "operators.budget_gb=1e-7")
    assert (
        "leaves 1 bytes for each of 99 rows, but a row needs at least 84 (one coordinate at each of 7 sites)"
        in sentence
    )
    code, _, err = run_verb("fit", folder, *changes, "--set", "operators.budget_gb=1")
    assert code == 0, err  # nothing refuses the corrected command


def test_blocks_that_overflow_are_counted_and_too_many_end_the_fit(parts, sharded, plain, monkeypatch):
    real, spoiled = sketched_rows.sketched_gradients, {"share": 0.0}

    def overflowing(model, sketches, ids, mask):
        pieces, losses = real(model, sketches, ids, mask)
        for row in range(int(np.ceil(spoiled["share"] * len(ids)))):
            pieces[0][row, 0] = float("nan")
        return pieces, losses

    monkeypatch.setattr(sketched_rows, "sketched_gradients", overflowing)
    spoiled["share"] = 0.01
    folder = sharded("overflow")
    run = Run(str(folder), changes=options(parts, compute__batch_tokens=10**6, attribute__candidates=0))
    with monkeypatch.context() as patch:
        patch.setattr(failures, "MAX_FAILED_BLOCKS", 0.9)
        fit(run)
    facts = run.stage("operators").store.read_json("manifest.json")
    assert 0 < facts["not_finite"] < facts["blocks"]
    spoiled["share"] = 1.0
    with pytest.raises(StrideError, match=r"gradients of \d+ of \d+ blocks are not finite \(the first: block 0\)"):
        fit(Run(str(sharded("worse")), changes=options(parts)))


@pytest.fixture(scope="module")
def smaller(parts, sharded, tmp_path_factory):
    """A function: a run fitted on a pool that has grown since, and how many blocks it had."""
    text = write_lines(
        tmp_path_factory.mktemp("more") / "more.jsonl", [{"text": each} for each in documents(12, seed=9)]
    )

    def made(name, **more):
        folder = sharded(name)
        run = Run(str(folder), changes=options(parts, **more))
        fit(run)
        before = len(Blocks(run.stage("blocks").store))
        shard(Run(str(folder), changes={"corpus.input": [parts.corpus, text]}), io.StringIO())
        assert len(Blocks(run.stage("blocks").store)) > before
        return folder, before

    return made


def test_a_grown_pool_is_told_and_its_new_blocks_are_added(parts, smaller, told, plain):
    folder, before = smaller("grown")
    old = {path.name: path.read_bytes() for path in (folder / "operators").glob("rows-*")}
    sketch = (folder / "operators/sketch.safetensors").read_bytes()
    now = len(Blocks(Run(str(folder)).stage("blocks").store))
    sentence = f"Blocks {before} to {now - 1} were sharded after the fit and are not in "
    assert sentence in told("attribute", folder, "--queries", parts.queries, "--name", "asked")
    assert f"{now - before} blocks were sharded since and are not in it" in status(Run(str(folder)))
    fit(Run(str(folder)))
    for name, content in old.items():
        assert (folder / "operators" / name).read_bytes() == content
    assert (folder / "operators/sketch.safetensors").read_bytes() == sketch
    store = RowStore(Run(str(folder)).store.child("operators"))
    assert len(store) == store.facts["blocks"] == sum(part["count"] for part in store.facts["parts"]) == now
    attribute(Run(str(folder)), parts.queries, "asked", io.StringIO())
    named = read_influence(Run(str(folder)), "asked")["ordinal"].to_pylist()
    assert before <= max(named) < now
    # Exact influence is in the same unit, over all blocks.
    attribute(Run(str(folder), changes={"attribute.exact": True}), parts.queries, "asked", io.StringIO())
    exact = by_block(read_influence(Run(str(folder)), "asked"))
    mine = read_influence(Run(str(folder), changes={"attribute.exact": False}), "asked").to_pylist()
    new = [row for row in mine if row["ordinal"] >= before]
    true = np.array([exact[row["query_id"], row["ordinal"]]["influence"] for row in new])
    assert np.corrcoef([row["influence"] for row in new], true)[0, 1] > 0.97


def test_an_interrupted_addition_goes_on_where_it_stopped(parts, smaller, plain):
    whole, _ = smaller("whole")
    fit(Run(str(whole)))
    broken, _ = smaller("halved")
    with killed_at_write(9):
        fit(Run(str(broken)))
    fit(Run(str(broken)))
    rows = "rows-*.safetensors"
    wanted = {path.name: path.read_bytes() for path in (whole / "operators").glob(rows)}
    assert {path.name: path.read_bytes() for path in (broken / "operators").glob(rows)} == wanted
    facts = [json.loads((folder / "operators/manifest.json").read_text()) for folder in (whole, broken)]
    assert facts[0] == facts[1]


def test_operators_of_subsets_answer_for_their_own_blocks_and_are_not_added_to(parts, smaller, plain, capsys):
    folder, before = smaller("grown-subsets", operators__rows="subsets", membership__subsets=20)
    attribute(Run(str(folder)), parts.queries, "asked", io.StringIO())
    assert max(read_influence(Run(str(folder)), "asked")["ordinal"].to_pylist()) < before
    assert f"Blocks {before} to" in capsys.readouterr().err
    with pytest.raises(StrideError, match=f"fitted on the first {before} blocks.*cannot be extended"):
        fit(Run(str(folder)))


def test_a_query_that_failed_once_stays_failed(parts, sharded, plain, monkeypatch):
    """Its sketch overflows, its whole gradient does not: influence of the others must not slip into its place."""
    real = site_responses.finite_rows

    def overflowing(sections):
        good = real(sections)
        good[0] = False  # the first of a batch of queries
        return good

    monkeypatch.setattr(site_responses, "finite_rows", overflowing)
    folder = sharded("once")
    run, summary, _ = asked(folder, parts)
    recovery = {row["query_id"]: row for row in read_influence(run, "asked", "recovery").to_pylist()}
    assert (recovery["sea"]["status"], recovery["sea"]["error"]) == ("failed", NOT_FINITE)
    assert recovery["kitchen"]["status"] == "ok"
    assert summary["failed"] == 3
    rows = [row for row in read_influence(run, "asked").to_pylist() if row["query_id"] == "kitchen"]
    monkeypatch.setattr(site_responses, "finite_rows", real)
    other, _, _ = asked(sharded("twice"), parts)
    assert rows == [row for row in read_influence(other, "asked").to_pylist() if row["query_id"] == "kitchen"]


@pytest.mark.parametrize(
    ("blocks", "row_bytes", "rows", "count"),
    [
        (1_600, 64 * 1024, 1_600, 13),
        (115_465, 18_599, 115_465, 42),
        (10**6, 8 * 1024, 10**6, 275),
        (10**6, 4 * 1024, 10**6, 896),
        (10**9, 24 * 1024, 1_000, 1_600),  # rows of subsets
    ],
)
def test_the_fewer_bytes_a_block_the_more_candidates(blocks, row_bytes, rows, count):
    facts = {"row_bytes": row_bytes, "subsets": rows, "blocks": blocks}
    assert rescore.candidate_count(Config(), facts) == count
    assert rescore.candidate_count(Config().updated({"attribute.candidates": 7}), facts) == 7
    assert rescore.candidate_count(Config().updated({"attribute.candidates": 0}), facts) == 0
    assert rescore.candidate_count(Config(), {"blocks": blocks, "subsets": rows}) == 100  # the paper's forms


def test_sums_of_many_units_are_added_in_waves(parts, sharded, plain, monkeypatch):
    more = {"operators__rows": "subsets", "membership__subsets": 40}

    def rows(name, stop=0):
        folder = sharded(name)
        with killed_at_write(stop) as writes:
            fit(Run(str(folder), changes=options(parts, **more)))
        fit(Run(str(folder)))
        left = {path.name for path in (folder / "operators").glob("*.safetensors")}
        assert not [each for each in left if each.startswith(("sum-", "total-"))]
        store = RowStore(Store(str(folder / "operators")))
        return store.take(np.arange(len(store))), writes

    once, _ = rows("one-wave")
    monkeypatch.setattr(
        sketched_rows, "MAX_BLOCKS_PER_UNIT", 9
    )  # 11 units of 9 blocks, in waves of three, 16 subsets a file
    monkeypatch.setattr(sketched_rows, "WAVE", 3)
    monkeypatch.setattr(sketched_rows, "ROWS", 16)
    waves, writes = rows("waves")
    np.testing.assert_allclose(waves.scales, once.scales, rtol=1e-4)
    assert np.unpackbits((waves.bits ^ once.bits).view(np.uint8)).mean() < 1e-3
    totals = [at for at, path in enumerate(writes, 1) if path.startswith("total-")]
    assert len(totals) == 3 * 3
    for stop in (totals[0] - 2, totals[1], totals[4] + 1, len(writes) - 3):
        again, _ = rows(f"waves{stop}", stop)
        assert np.array_equal(again.bits, waves.bits)
        assert np.array_equal(again.scales, waves.scales)


@pytest.mark.parametrize("more", [{}, {"operators__rows": "subsets", "membership__subsets": 40}])
def test_a_few_long_gradients_do_not_decide_whether_operators_answer(more, parts, sharded, plain, monkeypatch):
    real = sketched_rows.sketched_gradients

    def uneven(model, sketches, ids, mask):
        pieces, losses = real(model, sketches, ids, mask)
        longer = (1 + 99 * (ids.sum(1) % 16 == 0)).float().unsqueeze(1)  # one in sixteen
        return [piece * longer for piece in pieces], losses

    monkeypatch.setattr(sketched_rows, "sketched_gradients", uneven)
    facts = fit(Run(str(sharded("uneven")), changes=options(parts, **more)))
    assert facts["learned"]
    assert "mean cosine with their own blocks minus that with others +" in facts["verdict"]
    assert 5 * facts["gap_error"] < facts["gap"] < 1
