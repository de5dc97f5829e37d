"""Tail-patch: its sign on the tiny run, that a step leaves no trace, and that workers do not matter."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_plainly

from stride_ray.corpus.blocks import Blocks
from stride_ray.evaluate import tailpatch
from stride_ray.evaluate.retraining.lds import Interval, mean_interval
from stride_ray.evaluate.tailpatch import TailPatchWorker, tail_patch, top_blocks
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
import tailpatch as job


@pytest.fixture(scope="module")
def found(exactly):
    """Measured through Ray."""
    return tail_patch(Run(exactly.run.url, exactly.run.config, {"compute.workers": 1}), "asked")


def test_a_step_on_the_top_blocks_helps_more_than_one_on_random_ones(found):
    assert found.query_ids == ("sea", "script", "kitchen")
    mine, lexical = found.lifts
    subjects = np.array(mine.values)[[0, 2]]
    assert (subjects < 0).all()
    assert (np.array(lexical.values)[[0, 2]] < 0).all()
    assert mine.mean.value == pytest.approx(np.mean(mine.values))
    assert mine.mean.low <= mine.mean.value <= mine.mean.high
    assert np.array(mine.values) == pytest.approx(np.array(mine.changes) - found.random)


def test_a_plain_loop_in_other_units_gives_the_same_numbers(found, exactly, monkeypatch):
    run_plainly(monkeypatch)
    monkeypatch.setattr(tailpatch, "UNIT", 1)
    assert tail_patch(exactly.run, "asked") == found


def test_a_step_is_plain_sgd_and_leaves_the_model_as_it_was(exactly):
    blocks = Blocks(exactly.run.stage("blocks").store)
    worker = TailPatchWorker(exactly.run.config, blocks, "cpu", 0.05)
    worker.rows = 3  # a step's blocks in several passes
    batch = blocks.batch(np.arange(8))
    ids, mask = worker.tensors(batch.ids), worker.tensors(batch.mask)
    query = {"token_ids": batch.ids[0].tolist(), "loss_mask": batch.mask[0].tolist()}
    model = worker.model.model
    before = worker.model.losses(worker.model.trunk(ids), ids, mask)
    kept = [parameter.clone() for parameter in model.parameters()]
    base = worker._loss(query)
    change = worker._change(query, base, np.arange(8))
    assert change < 0
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
    assert torch.equal(worker.model.losses(worker.model.trunk(ids), ids, mask), before)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    # By hand: the slope of the query's loss along the blocks' gradient, times the learning rate.
    model.requires_grad_(True)
    slopes = []
    for rows, counts in ((ids, mask), (ids[:1], mask[:1])):
        loss = worker.model.token_losses(worker.model.read(rows), rows, counts).sum() / counts[:, 1:].sum()
        slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    model.requires_grad_(False)
    worker.learning_rate = 1e-3
    expected = -1e-3 * float(slopes[0] @ slopes[1])
    assert worker._change(query, base, np.arange(8)) == pytest.approx(expected, rel=0.05)
    assert np.isnan(worker._change(query, base, np.zeros(0, int)))


def test_the_estimated_answer_the_job_and_what_is_refused(finished, exactly, monkeypatch, capsys):
    run_plainly(monkeypatch)
    tops = top_blocks(finished.run, "asked", 3)
    assert all(len(top) <= 3 for top in tops.values())
    assert job.main([finished.run.url, "--name", "asked", "--k", "3", "--set", "attribute.exact=false"]) == 0
    out = capsys.readouterr().out
    told = json.loads(out.splitlines()[-1])
    assert out.startswith("| top blocks by | lift")
    assert [each["method"] for each in told["lifts"]] == ["influence", "TF-IDF"]
    assert job.main([finished.run.url, "--name", "nothing"]) == 1
    assert "is not finished" in capsys.readouterr().err
    with pytest.raises(StrideError, match="must be positive"):
        tail_patch(exactly.run, "asked", k=0)


def test_queries_without_a_helpful_block_are_left_out(found):
    lift = tailpatch._lift("influence", np.array([np.nan, -2.0]), np.array([0.0, -1.0]))
    assert (lift.queries, lift.mean) == (1, Interval(-1.0, -1.0, -1.0))
    empty = tailpatch._lift("influence", np.array([np.nan]), np.zeros(1))
    assert "nan" not in dataclasses.replace(found, lifts=(empty,)).as_table()
    values = np.random.default_rng(0).normal(0, 1, 400)
    mean = mean_interval(values)
    assert mean.low < mean.value < mean.high
    assert mean.high - mean.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
