"""One query at a time, from memory: the same answer as ``attribute`` writes into files."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_plainly, settings, write_lines

from stride_ray.attribution.attribute import attribute, read_influence, stored_queries, token_influences
from stride_ray.corpus.queries import query_row
from stride_ray.corpus.shard import shard
from stride_ray.corpus.tokenization.decoding import unpadded
from stride_ray.corpus.tokenization.tokenizer import load_saved_tokenizer
from stride_ray.models.query_batches import padded, texts_of
from stride_ray.models.sites import ORIGIN, influence, site_gradients
from stride_ray.operators.fit import fit
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.serve import lexical
from stride_ray.serve.attributor import Attributor
from stride_ray.serve.format import format_attribution
from stride_ray.serve.lexical import LexicalIndex
from stride_ray.serve.service import InvalidQueryError, Service

PROMPT, ONE, OTHER = "the anchor met", " the tide and the gull", " a butter and an oven"
ASKED = [
    {"id": "one", "prompt": PROMPT, "completion": ONE},
    {"id": "contrast", "prompt": PROMPT, "completion": ONE, "contrast": OTHER},
    {"id": "itself", "prompt": PROMPT, "completion": ONE, "contrast": ONE},
    {"id": "text", "text": "the sailor saw the harbour"},
]
FORM = {"operators__form": "sites", "solve__tokens": 64, "attribute__candidates": 12, "compute__worker_gb": 1.0}


@pytest.fixture(scope="module", params=["blocks", "subsets"])
def fitted(request, parts, sharded, tmp_path_factory):
    """A run with operators at all sites, each query attributed by itself, so that no batch has two."""
    patch = pytest.MonkeyPatch()
    run_plainly(patch)
    try:
        run = Run(str(sharded(request.param)), changes=settings(parts, operators__rows=request.param, **FORM))
        fit(run)
        for row in ASKED:
            queries = write_lines(tmp_path_factory.mktemp("asked") / "q.jsonl", [row])
            attribute(run, queries, row["id"], io.StringIO())
    finally:
        patch.undo()
    return run


@pytest.fixture(scope="module")
def attributor(fitted):
    return Attributor(fitted)


@pytest.fixture(scope="module")
def service(fitted):
    return Service(fitted.url)


@pytest.mark.parametrize("asked", ASKED, ids=lambda row: row["id"])
def test_the_answer_is_attributes_to_the_bit(fitted, attributor, asked):
    (query,) = stored_queries(fitted, asked["id"]).to_pylist()
    found = attributor.attribute(query)
    for table in ("influence", "documents"):
        assert getattr(found, table).equals(read_influence(fitted, asked["id"], table)), table
    (recovery,) = read_influence(fitted, asked["id"], "recovery").to_pylist()
    # Moments of half products are summed by slice there, at once here.
    assert found.query.pop("reliability") == pytest.approx(recovery.pop("reliability"), abs=1e-5)
    assert {**found.query, "gap": 0} == {**recovery, "gap": 0, "base_loss": pytest.approx(recovery["base_loss"])}
    split = token_influences(fitted, asked["id"], [asked["id"]])
    assert split.keys() == {(asked["id"], ordinal) for ordinal in found.block_tokens}
    for (_, ordinal), values in split.items():
        assert np.array_equal(found.block_tokens[ordinal], np.array(values, np.float32))


def test_a_row_is_that_of_a_file(fitted):
    tokenizer = load_saved_tokenizer(fitted.store.child("blocks"))
    for asked in ASKED:
        (stored,) = stored_queries(fitted, asked["id"]).to_pylist()
        assert query_row(asked, tokenizer, asked["id"]) == stored
    chosen = {"prompt": PROMPT, "chosen": ONE, "rejected": OTHER}
    (stored,) = stored_queries(fitted, "contrast").to_pylist()
    assert query_row(chosen, tokenizer, "contrast") == stored


def test_a_contrast_with_itself_is_zero(attributor, fitted):
    (query,) = stored_queries(fitted, "itself").to_pylist()
    assert attributor.attribute(query).influence.num_rows == 0


@pytest.mark.parametrize("name", ["one", "contrast"])
def test_what_a_querys_tokens_lean_on_adds_up_to_the_unsolved_influence(attributor, fitted, name):
    (query,) = stored_queries(fitted, name).to_pylist()
    found = attributor.attribute(query)
    helpful = [ordinal for ordinal, values in found.block_tokens.items() if values.sum() > 0]
    scorer = attributor.scorer
    ids, mask = scorer.trimmed(scorer.blocks.batch(helpful))
    blocks = {site.name: J for site, J in site_gradients(scorer.model, scorer.sites, ids, mask)[0]}
    for (text, _), leans in zip(texts_of(query), found.query_tokens, strict=True):
        gradients, _ = site_gradients(scorer.model, scorer.sites, *padded([text], "cpu"))
        queries = {site.name: site.precondition(J).flatten(1) for site, J in gradients}
        without_origin = ((site, blocks[site.name]) for site in scorer.sites if site.name != ORIGIN)
        whole = float(influence(queries, without_origin).sum())
        assert leans.sum() == pytest.approx(whole, rel=1e-3)
        assert len(leans) == len(text["token_ids"])
        assert not leans[~np.array(text["loss_mask"])].any()


def test_blocks_of_the_same_words_have_their_exact_influence_beside(attributor, fitted):
    blocks = attributor.blocks.take(np.arange(attributor.facts["blocks"]), ["token_ids", "spans"]).to_pylist()
    (asked,) = stored_queries(fitted, "one").to_pylist()
    plain = attributor.attribute(asked)
    everything = attributor.attribute(asked, candidates=1000)  # of a Lasso: of the blocks that it chose
    found = attributor.attribute(asked, matches=4)
    assert found.influence.equals(plain.influence)
    ids = [row["ordinal"] for row in found.matches]
    exact = {row["ordinal"]: row["influence"] for row in everything.influence.to_pylist()}
    ranks = {row["ordinal"]: row["rank"] for row in plain.influence.to_pylist()}
    assert len(set(ids)) == 4
    assert exact.keys() & ids
    for row in found.matches:
        assert row["exact"]
        if row["ordinal"] in exact:
            assert row["influence"] == pytest.approx(exact[row["ordinal"]], rel=1e-3)
        assert row["rank"] == ranks.get(row["ordinal"])
        assert found.block_tokens[row["ordinal"]].sum() == pytest.approx(row["influence"], rel=1e-3, abs=1e-6)
    # A block's own text finds the block.
    for ordinal in (0, 7):
        assert attributor.lexical.nearest(unpadded(blocks[ordinal]), 1) == [ordinal]
    assert attributor.lexical.nearest([10**6], 3) == []


def test_blocks_that_failed_and_blocks_after_the_fit_are_not_found(attributor, fitted, monkeypatch):
    (asked,) = stored_queries(fitted, "one").to_pylist()
    first, second, *_ = (row["ordinal"] for row in attributor.attribute(asked, matches=3).matches)
    monkeypatch.setattr(attributor, "failed", {first})
    assert attributor.attribute(asked, matches=1).matches[0]["ordinal"] == second
    few = LexicalIndex(attributor.blocks, 5)
    assert set(few.nearest(range(2000), 100)) == set(range(5))
    monkeypatch.setattr(lexical, "POSTINGS", 1)  # the rarest token alone
    (block,) = attributor.blocks.take([4], ["token_ids", "spans"]).to_pylist()
    assert len(few.nearest(unpadded(block), 100)) < 5


def test_candidates_are_as_many_as_asked(attributor, fitted):
    (query,) = stored_queries(fitted, "one").to_pylist()
    none, some = (attributor.attribute(query, candidates=count) for count in (0, 3))
    assert (none.query["exact"], some.query["exact"], len(none.block_tokens)) == (0, 3, 0)
    assert none.query_tokens == []


def test_a_response_shows_both_ends_and_only_the_sources_asked_for(attributor, fitted):
    tokenizer = load_saved_tokenizer(fitted.store.child("blocks"))
    (query,) = stored_queries(fitted, "contrast").to_pylist()
    found = attributor.attribute(query, candidates=1000)
    body = format_attribution(query, found, attributor.blocks, tokenizer, 3)
    ranked = found.influence.to_pylist()
    assert [row["ordinal"] for row in body["helping"]] == [row["ordinal"] for row in ranked[:3]]
    assert [row["ordinal"] for row in body["harming"]] == [row["ordinal"] for row in ranked[-3:][::-1]]
    for row in body["helping"] + body["harming"]:
        assert row["block_id"].isdigit()
        assert "".join(text for text, _ in row["tokens"]) == row["text"]
        assert sum(value for _, value in row["tokens"]) == pytest.approx(row["influence"], rel=0.02)
        assert row["span"]["text"] in row["text"]
    assert "".join(text for text, _ in body["query"]).startswith(PROMPT)
    assert [text for text, value in body["query"] if value is None]
    assert OTHER.split()[1] in "".join(text for text, _ in body["contrast"])
    for end in (0, -1):
        source = ranked[end]["source"]
        only = format_attribution(query, found, attributor.blocks, tokenizer, 3, [source])
        side = only["harming" if end else "helping"]
        assert side[0]["ordinal"] == ranked[end]["ordinal"]
        assert {row["source"] for row in only["helping"] + only["harming"] + only["documents"]} == {source}
        theirs = [row["rank"] for row in ranked if row["source"] == source and row["influence"] > 0]
        assert [row["rank"] for row in only["helping"]] == theirs[: len(only["helping"])]
    nowhere = format_attribution(query, found, attributor.blocks, tokenizer, 3, ["nowhere"])
    assert (nowhere["helping"], nowhere["harming"], nowhere["documents"]) == ([], [], [])


def test_values_of_a_query_that_overflow_are_shown_as_nothing(attributor, fitted):
    tokenizer = load_saved_tokenizer(fitted.store.child("blocks"))
    (query,) = stored_queries(fitted, "one").to_pylist()
    found = attributor.attribute(query)
    spoilt = replace(found, query_tokens=[np.full_like(found.query_tokens[0], np.inf)])
    body = format_attribution(query, spoilt, attributor.blocks, tokenizer, 3)
    assert {value for _, value in body["query"]} == {None, 0.0}


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"text": "the"}, "has 1 token"),
        ({"prompt": "the", "completion": " "}, "'completion' is empty"),
        ({"text": "the tide " * 200}, "the model's context is"),
    ],
)
def test_a_query_at_fault_is_told_so(service, request_, says):
    with pytest.raises(InvalidQueryError, match=says):
        service.answer({**request_, "blocks": 3})


def test_a_run_that_is_fitted_again_is_loaded_again(parts, sharded, plain, monkeypatch, caplog):
    run = Run(str(sharded("again")), changes=settings(parts, operators__rows="blocks", **FORM))
    fit(run)
    for name in ("CHECK_SECONDS", "RETRY_SECONDS"):
        monkeypatch.setattr(f"stride_ray.serve.service.{name}", 0.0)
    service, request = Service(run.url), {"text": "the tide and the gull", "blocks": 2}
    before = service.answer(request)

    def answered_as_before():
        service.follow_run()
        return service.answer(request)["helping"] == before["helping"] and service.attributor is loaded

    loaded = service.attributor
    assert answered_as_before()
    run.stage("operators").store.remove("")  # it is being fitted again
    assert answered_as_before()
    fit(Run(run.url, changes={"operators.budget_gb": 0.0001}))
    with monkeypatch.context() as broken:  # a reload that fails is tried again
        broken.setattr("stride_ray.serve.service.load_saved_tokenizer", lambda store: 1 / 0)
        assert answered_as_before()
        assert "reloading" in caplog.text
    service.follow_run()
    after = service.answer(request)
    assert service.attributor is not loaded
    assert after["reliability"] != before["reliability"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "is not finished; run 'stride-ray fit' first"),
        ({"operators__form": "logit"}, "only operators at all sites"),
    ],
)
def test_a_run_that_cannot_be_served_says_why(parts, sharded, changes, says):
    run = Run(str(sharded("unfitted")), changes=settings(parts, **{**FORM, **changes}))
    with pytest.raises(StrideError, match=says):
        Attributor(run)


def test_blocks_that_came_after_the_fit_are_not_passed_over(parts, sharded, plain, tmp_path):
    run = Run(str(sharded("grown")), changes=settings(parts, operators__rows="blocks", **FORM))
    fit(run)
    more = write_lines(tmp_path / "more.jsonl", [{"text": "the gull and the tide " * 9}])
    shard(Run(run.url, changes={"corpus.input": [str(parts.corpus), more]}))
    with pytest.raises(StrideError, match="were sharded after the fit"):
        Attributor(Run(run.url))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
