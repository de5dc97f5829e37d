"""Batches that follow from a stated budget of memory, and that a pass keeps what was counted."""

import pytest
import torch
from test_sites import llama

from stride_ray.models import batch_size
from stride_ray.models.batch_size import linearised_at_once, linearised_kept, rows_at_once, saved_activation_bytes
from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.sites import find_sites, forward_with_activations
from stride_ray.runtime import memory, tasks
from stride_ray.runtime.config import Config
from stride_ray.runtime.memory import peak_bytes, resident_bytes, restart_peak
from stride_ray.runtime.options import ComputeConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SplitModel(llama(), split=1)


def config(**compute):
    return Config().updated({f"compute.{name}": value for name, value in compute.items()})


def test_what_is_kept_grows_with_the_text_and_does_not_depend_on_the_moment(model):
    short, long = saved_activation_bytes(model, 8), saved_activation_bytes(model, 64)
    assert 6 < long / short < 12
    again = SplitModel(model.model, split=1)
    assert saved_activation_bytes(again, 64) == long


def test_a_stated_number_of_tokens_wins(model):
    assert rows_at_once(config(batch_tokens=100), model, 32) == 3
    assert rows_at_once(config(batch_tokens=10), model, 32) == 1


def test_a_small_model_gets_the_largest_batch_and_a_small_budget_one_text(model):
    assert rows_at_once(config(), model, 32) == batch_size.MAX_BATCH_TOKENS // 32
    assert rows_at_once(config(worker_gb=0.1), model, 32) == 1


def test_batches_grow_with_the_budget(model, monkeypatch):
    monkeypatch.setattr(batch_size, "LIBRARY_BYTES", 0)
    each = batch_size.PASS_MEMORY_FACTOR * saved_activation_bytes(model, 64)
    weights = batch_size.WEIGHT_MEMORY_FACTOR * sum(p.numel() * p.element_size() for p in model.model.parameters())
    monkeypatch.setitem(batch_size._activation_bytes[model], 64, 2**30)
    for rows in (1, 3, 7):
        room = (weights + (rows + 0.5) * batch_size.PASS_MEMORY_FACTOR * 2**30) / 2**30
        assert rows_at_once(config(worker_gb=room, query_gb=0), model, 64) == rows
    assert each > 0


def test_a_text_that_does_not_fit_is_linearised_in_halves(model, monkeypatch):
    monkeypatch.setattr(batch_size, "LIBRARY_BYTES", 0)
    monkeypatch.setitem(batch_size._activation_bytes, model, {512: 2**30, 256: 2**28, 128: 2**26, 64: 2**24})
    weights = batch_size.WEIGHT_MEMORY_FACTOR * sum(p.numel() * p.element_size() for p in model.model.parameters())
    for free, expected in ((12, (1, 512)), (3.9, (1, 256)), (0.9, (1, 128)), (0.2, (1, 64))):
        room = config(worker_gb=free + weights / 2**30, query_gb=0)
        assert linearised_at_once(room, model, 512) == expected
    monkeypatch.setitem(batch_size._activation_bytes, model, {100: 2**20})
    assert linearised_at_once(config(batch_tokens=1800), model, 100) == (2, 100)  # a pass takes 18
    assert linearised_at_once(config(batch_tokens=10), model, 100) == (1, 100)


def test_linearised_batches_stay_as_far_as_the_budget_goes(model, monkeypatch):
    monkeypatch.setattr(batch_size, "LIBRARY_BYTES", 0)
    monkeypatch.setitem(batch_size._activation_bytes, model, {64: 2**26})
    weights = batch_size.WEIGHT_MEMORY_FACTOR * sum(p.numel() * p.element_size() for p in model.model.parameters())
    one = 2 * batch_size.LINEARISED_MEMORY_FACTOR * 2**26  # two texts
    for batches, kept in ((0.5, 0), (1.5, 0), (2.5, 1), (9.5, 8)):
        room = config(worker_gb=(batches * one + weights) / 2**30, query_gb=0)
        assert linearised_kept(room, model, 2, 64) == kept


def test_a_pass_takes_about_what_was_counted():
    """A model large enough for its activations to be seen in the process's memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    big = SplitModel(LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)), split=1)
    rows, tokens = 64, 128
    ids, names = torch.zeros(rows, tokens, dtype=torch.long), find_sites(big)
    counted = rows * saved_activation_bytes(big, tokens)
    held = forward_with_activations(big, names, ids)  # so that libraries have loaded what they load
    del held
    restart_peak()
    before = resident_bytes()
    z, _, wrote = forward_with_activations(big, names, ids)
    torch.autograd.grad(z.sum(), list(wrote.values()))
    grown = peak_bytes() - before
    assert 0.5 * counted < grown < 2 * batch_size.PASS_MEMORY_FACTOR * counted


def test_workers_are_no_more_than_memory_holds(monkeypatch, parts):
    cluster = {"CPU": 8.0, "memory": 17.0 * 2**30}
    monkeypatch.setattr(tasks.ray, "cluster_resources", lambda: cluster)
    monkeypatch.setattr(tasks.ray_state.state, "get_max_resources_from_cluster_config", lambda: {"CPU": 8})

    def workers(worker_gb, units=100, **compute):
        return tasks.allocate_workers(ComputeConfig(device="cpu", **compute), units, worker_gb).workers

    assert (workers(4.0), workers(0.0), workers(1.0), workers(100.0)) == (4, 8, 8, 1)
    assert workers(4.0, workers=8) == 8  # who asks for eight gets eight
    assert workers(4.0, units=3) == 3
    cluster["memory"] /= 4
    cluster["CPU"] /= 4  # a quarter of the nodes is there, and the rest can come
    assert workers(4.0) == 4
    small = Config().updated({"model.path": str(parts.model), "compute.worker_gb": 6.0})
    assert memory.expected_gb(small) == memory.SMALL_MODEL_GB
    assert memory.expected_gb(small.updated({"compute.worker_gb": 1.0})) == 1.0
    assert memory.expected_gb(small.updated({"model.path": "a/hub-id"})) == 6.0
