"""Blocks and queries whose numbers are not finite fail alone, in every stage; too many of them end it in a sentence."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import documents, settings, write_lines

from stride_ray.attribution.attribute import attribute, read_influence
from stride_ray.attribution.recover import recover_estimates
from stride_ray.attribution.rescore import rescore
from stride_ray.attribution.respond import ModeComparison, Responder
from stride_ray.attribution.responses import read_responses
from stride_ray.cli.main import main
from stride_ray.contamination.influence.channel import _finite
from stride_ray.contamination.influence.significance import p_values, standardised
from stride_ray.contamination.items import read_set
from stride_ray.contamination.nightly import scan
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.failures import (
    FAILED_BLOCKS,
    LOSS_NOT_FINITE,
    NOT_FINITE,
    RESPONSE_NOT_FINITE,
    check_failed_blocks,
    check_failed_queries,
    finite_losses,
    finite_rows,
)
from stride_ray.models import loading
from stride_ray.operators.fit import fit
from stride_ray.operators.membership import membership_of
from stride_ray.operators.row_store import RowStore, write_rows
from stride_ray.operators.stored import load_operators
from stride_ray.operators.validation import validate
from stride_ray.report.page import embedded
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run

NAN, INF = float("nan"), float("inf")
SITES = {"operators__form": "sites", "attribute__candidates": 5}
SUBSETS = {"operators__form": "sites", "operators__rows": "subsets"}
EXACT = {"attribute__exact": True}


class _SpoiltGradient(torch.autograd.Function):
    """The identity, whose gradient has a value where ``hit``."""

    @staticmethod
    def forward(context, x, hit, value):
        context.hit, context.value = hit, value
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient.masked_fill(context.hit, context.value), None, None


@pytest.fixture
def spoil(monkeypatch):
    """A function that spoils models from now on: one token's embedding, or the gradient at its places in layer 1."""
    real = loading.load_model

    def start(token, value, gradient=False):
        def load(path, **options):
            model = real(path, **options)
            if not gradient:
                model.model.get_input_embeddings().weight.data[token] = value
                return model
            seen = {}

            def before(module, given, options):
                seen["ids"] = options.get("input_ids", given[0] if given else None)

            def after(module, given, output):
                hit = (seen["ids"] == token).unsqueeze(-1).expand_as(output)
                return _SpoiltGradient.apply(output, hit, value) if output.requires_grad else output

            model.model.register_forward_pre_hook(before, with_kwargs=True)
            model.model.model.layers[1].mlp.register_forward_hook(after)
            return model

        loading._load_cached.cache_clear()
        monkeypatch.setattr(loading, "load_model", load)

    yield start
    loading._load_cached.cache_clear()


@pytest.fixture(scope="module")
def rare(finished):
    """A token of the query "script" that is in three blocks, and these blocks."""
    blocks = Blocks(finished.run.stage("blocks").store)
    ids = blocks.batch(np.arange(len(blocks))).ids
    (query,) = (
        row
        for row in finished.run.stage("responses", "asked").store.read_table("queries.parquet").to_pylist()
        if row["query_id"] == "script"
    )
    where = {token: np.flatnonzero((ids == token).any(1)) for token in query["token_ids"]}
    token = min(token for token in where if len(where[token]) == 3)
    return token, where[token].tolist()


def answer(folder, parts, **more):
    run, out = Run(str(folder), changes=settings(parts, **more)), io.StringIO()
    return run, attribute(run, parts.queries, "asked", out), out.getvalue()


def test_a_number_is_finite_if_its_square_can_be_summed():
    rows = torch.tensor([[1.0, 2.0], [NAN, 0.0], [0.0, -INF], [1e20, 0.0], [1e14, 0.0]])
    assert finite_rows([rows, torch.ones(5, 2, 2)]).tolist() == [True, False, False, False, True]
    losses, mask = torch.tensor([1.0, NAN, NAN, INF]), torch.ones(4, 3, dtype=torch.bool)
    mask[2] = False  # no target, so there is no loss that could be finite
    assert finite_losses(losses, mask).tolist() == [True, False, True, False]


def test_too_many_end_the_stage():
    assert check_failed_blocks([], 0) == 0
    assert check_failed_blocks([7], 10) == 1  # one is allowed in any pool
    assert check_failed_blocks(list(range(5)), 100) == 5
    for failed, total in (([3, 2], 10), (list(range(6)), 100), ([0], 1)):
        with pytest.raises(
            StrideError, match=rf"of {len(failed)} of {total} blocks are not finite .*block {min(failed)}"
        ):
            check_failed_blocks(failed, total)
    rows = [{"query_id": f"q{i}", "error": (NOT_FINITE, LOSS_NOT_FINITE, "is empty", None)[i % 4]} for i in range(12)]
    check_failed_queries(rows)  # half
    check_failed_queries([{"query_id": "q", "error": NOT_FINITE}] * 9)  # few may all fail
    with pytest.raises(StrideError, match=r"of 7 of 12 queries are not finite \(the first: 'q0'\)"):
        check_failed_queries([*rows[:-1], {"query_id": "q", "error": RESPONSE_NOT_FINITE}])


@pytest.mark.parametrize(
    ("value", "gradient", "more"),
    [
        (NAN, False, EXACT),
        (NAN, True, EXACT),
        (INF, False, SITES),
        (3e38, True, SITES),
        (3e38, False, SUBSETS),
        (NAN, False, {"operators__form": "matrix"}),
        (1e20, False, {"operators__form": "logit", "membership__form": "bernoulli"}),
    ],
)
def test_blocks_and_queries_fail_alone(value, gradient, more, spoil, rare, parts, sharded, finished, plain):
    token, failed = rare
    spoil(token, value, gradient)
    run, summary, out = answer(sharded("spoilt"), parts, **more)
    recovery = {row["query_id"]: row for row in read_influence(run, "asked", "recovery").to_pylist()}
    assert [recovery[name]["status"] for name in ("sea", "script", "kitchen")] == ["ok", "failed", "ok"]
    assert "not finite" in recovery["script"]["error"]
    assert (summary["failed"], summary["not_finite"], summary["unsolved"]) == (3, 3, 0)
    assert "3 blocks have no influence: losses or gradients are not finite" in out
    store = run.stage("exact" if run.config.attribute.exact else "influence", "asked").store
    table = store.read_table("failed-blocks.parquet")
    assert table.schema.equals(FAILED_BLOCKS)
    assert table["ordinal"].to_pylist() == failed
    assert set(table["status"].to_pylist()) == {"failed"}
    rows = read_influence(run, "asked")
    assert np.isfinite(rows["influence"].to_numpy()).all()
    assert not set(rows["ordinal"].to_pylist()) & set(failed)
    assert {row["query_id"] for row in rows.to_pylist()} == {"sea", "kitchen"}
    assert store.exists("page.html")
    if not run.config.attribute.exact:
        facts = run.stage("operators").store.read_json("manifest.json")
        assert facts["learned"]
        assert facts["not_finite"] == 3


def test_the_others_are_as_without_them(spoil, rare, parts, sharded, exactly, plain):
    spoil(rare[0], NAN)
    run, _, _ = answer(sharded("others"), parts, **EXACT)
    before, after = (
        {(row["query_id"], row["ordinal"]): row["influence"] for row in read_influence(each, "asked").to_pylist()}
        for each in (exactly.run, run)
    )
    same = sorted(before.keys() & after.keys())
    assert len(same) == 2 * 96
    assert np.corrcoef([[each[key] for key in same] for each in (before, after)])[0, 1] > 0.999


@pytest.mark.parametrize("more", [EXACT, SITES, {"operators__form": "matrix"}, {"operators__form": "logit"}])
def test_a_model_that_overflows_on_the_pool_is_told(more, spoil, parts, sharded, plain, pool_of):
    ids = pool_of.batch(np.arange(len(pool_of))).ids
    tokens, counts = np.unique(np.concatenate([np.unique(row) for row in ids]), return_counts=True)
    spoil(int(tokens[np.argmax(counts)]), NAN)
    with pytest.raises(StrideError, match=r"losses or gradients of \d+ of \d+ blocks are not finite .*more than 5%"):
        answer(sharded("overflow"), parts, **more)


def scanned(place, parts, folder, **more):
    """A scan of two items, with controls."""
    run = Run(str(folder), changes=settings(parts, **more))
    rows = [{"id": "leaked", "question": documents(48)[1]}, {"id": "fresh", "question": "Did the keel meet the dough?"}]
    controls = [{"text": text} for text in documents(24, seed=5)]
    sets = [read_set(write_lines(place / f"{name}.jsonl", each), name) for name, each in (("a", rows), ("c", controls))]
    return scan(run, sets[:1], str(place / "scans"), sets[1:], "n1")


@pytest.mark.parametrize("more", [EXACT, SITES])
def test_a_scan_with_a_model_that_is_not_numbers_is_told(more, spoil, parts, sharded, plain, tmp_path):
    spoil(slice(None), NAN)
    with pytest.raises(StrideError, match=r"of (\d+) of \1 blocks are not finite .*see whether the model's weights"):
        scanned(tmp_path, parts, sharded("spoilt"), **more)


def damaged_rows(run, number):
    """Give a row of the store scales that are not finite, under the hash that it then has."""
    store = RowStore(run.store.child("operators"))
    part = next(part for part in store.facts["parts"] if part["first"] <= number < part["first"] + part["count"])
    rows = store.read(part)
    rows = type(rows)(rows.bits, rows.scales.copy())
    rows.scales[number - part["first"]] = NAN
    part["hash"] = write_rows(store.store, part["name"], rows)
    store.store.write_json("manifest.json", store.facts)


def test_a_row_that_is_not_finite_is_a_block_without_influence(parts, sharded, plain):
    run = Run(str(sharded("row")), changes=settings(parts, **SITES))
    fit(run)
    damaged_rows(run, 7)
    run, summary, out = answer(run.url, parts, **SITES)
    assert (summary["failed"], summary["not_finite"]) == (2, 1)
    assert "1 block has no influence" in out
    assert 7 not in read_influence(run, "asked")["ordinal"].to_pylist()
    assert run.stage("responses", "asked").store.read_json("manifest.json")["not_finite"] == 1
    other = Run(str(sharded("subset row")), changes=settings(parts, **SUBSETS))
    fit(other)
    damaged_rows(other, 7)
    with pytest.raises(StrideError, match=r"Row 7 in .*rows-00000.safetensors is not finite; delete"):
        answer(other.url, parts, **SUBSETS)


@pytest.mark.parametrize("value", [NAN, INF, 3e38])
def test_a_stored_response_that_is_not_finite_fails_its_query(value, finished, tmp_path, plain):
    shutil.copytree(finished.folder, tmp_path / "run")
    for stage in ("estimates", "influence"):
        shutil.rmtree(tmp_path / "run" / stage)
    run = Run(str(tmp_path / "run"))
    store = run.stage("responses", "asked").store
    rows = store.read_table("part-00000.parquet")
    values = rows.to_pylist()
    values[0]["response"][3] = value
    store.write_table("part-00000.parquet", type(rows).from_pylist(values, rows.schema))
    told, responses = read_responses(store, 0)
    assert (told[0]["status"], told[0]["error"]) == ("failed", RESPONSE_NOT_FINITE)
    assert not responses[0].any()
    assert recover_estimates(run, "asked")["failed"] == 3
    assert rescore(run, "asked")["failed"] == 3
    after, before = (read_influence(each, "asked").to_pylist() for each in (run, finished.run))
    assert after == [row for row in before if row["query_id"] != values[0]["query_id"]]


def test_operators_that_are_not_finite_have_learned_nothing(finished):
    run = finished.run
    operators, _ = load_operators(run.store.child("operators"))
    operators.A[:14] = NAN
    model, blocks = loading.load_run_model(run.config, "cpu"), Blocks(run.stage("blocks").store)
    with pytest.raises(StrideError, match=r"14 of 16 operators are not finite \(the first: operator 0\)"):
        validate(model, operators, blocks, membership_of(run.config), run.config)


def test_a_query_that_overflows_does_not_decide_how_all_are_answered(finished, monkeypatch, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    run = Run(str(tmp_path / "run"))
    compare = ModeComparison(run.config, run.store, run.stage("responses", "asked"), "cpu")
    real, calls = type(compare.operators).linear, []

    def overflowing(self, *given):
        calls.append(1)
        return real(self, *given) * (NAN if len(calls) == 1 else 1)

    monkeypatch.setattr(type(compare.operators), "linear", overflowing)
    marker = compare((0, 0))
    assert (len(calls), marker["queries"]) == (3, 2)
    assert -1 <= marker["correlation"] <= 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no")]
)
def test_queries_that_do_not_fit_in_memory_are_halved_and_then_fail_alone(error, finished, monkeypatch):
    run = finished.run
    work = Responder(run.config, run.store, run.stage("responses", "asked"), "cpu", "linear")
    rows = [
        {"query_id": f"q{n}", "status": "ok", "error": None, "token_ids": [5] * n, "loss_mask": [True] * n}
        for n in (4, 5, 20, 6, 7)
    ]
    real = type(work.operators).linear

    def limited(self, model, ids, mask):
        if ids.numel() > 15:
            raise error
        return real(self, model, ids, mask)

    monkeypatch.setattr(type(work.operators), "linear", limited)
    answers = [{"status": "ok", "error": None} for _ in rows]
    work._linear(rows, answers)
    assert [each["status"] for each in answers] == ["ok", "ok", "failed", "ok", "ok"]
    assert answers[2]["error"].startswith("out of memory: ")
    monkeypatch.setattr(type(work.operators), "linear", lambda *given: exec("raise RuntimeError('a bug')"))
    with pytest.raises(RuntimeError, match="a bug"):
        work._linear(rows, answers)


def test_a_page_has_no_numbers_that_json_does_not_have():
    assert json.loads(embedded({"a": [NAN, (1.5, INF)], "b": "x"})) == {"a": [None, [1.5, None]], "b": "x"}


def test_controls_that_are_not_finite_do_not_spoil_a_scan(exactly):
    values, control = np.array([1.0, 2.0, 3.0, INF, NAN, 4.0]), np.array([True] * 5 + [False])
    assert standardised(values, control)[[0, 5]] == pytest.approx(
        standardised(values[[0, 1, 2, 5]], control[2:])[[0, 3]]
    )
    assert p_values(np.array([2.5]), np.array([1.0, 2.0, 3.0, INF, NAN])) == pytest.approx([0.5])
    table = read_influence(exactly.run, "asked")
    spoilt = table.set_column(6, table.schema.field(6), [[NAN, -INF, *table["influence"].to_pylist()[2:]]])
    assert _finite(spoilt).num_rows == table.num_rows - 2


def test_fit_says_which_blocks(spoil, rare, parts, sharded, plain, capsys):
    spoil(rare[0], NAN)
    folder = sharded("told")
    Run(str(folder), changes=settings(parts, **SITES)).save()
    assert main(["fit", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "3 blocks have no influence: losses or gradients are not finite (" in out
    assert "operators/failed-blocks.parquet)" in out


def test_a_query_without_a_target_fails_before_the_model_sees_it(parts, sharded, tmp_path, plain):
    rows = [
        {"id": "masked", "token_ids": [5, 6, 7], "loss_mask": [True, False, False]},
        {"id": "ok", "token_ids": [5, 6, 7], "loss_mask": [True, True, False]},
    ]
    run = Run(str(sharded("masked")), changes=settings(parts, **EXACT))
    attribute(run, write_lines(tmp_path / "masked.jsonl", rows), "asked", io.StringIO())
    recovery = read_influence(run, "asked", "recovery").to_pylist()
    assert [(row["status"], row["base_loss"] is None) for row in recovery] == [("failed", True), ("ok", False)]
