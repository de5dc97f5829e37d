"""The paper's loop: it learns, it goes on where it stopped with the same bits, and ranks agree."""

import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
import torch
import transformers as hf
from ray.cluster_utils import Cluster

from stride_ray.corpus import failures
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.packing import block_schema
from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.loading import load_run_model
from stride_ray.operators.fit import fit
from stride_ray.operators.membership import membership_of
from stride_ray.operators.stored import load_operators
from stride_ray.operators.training.batches import SeededShuffle, plan_step, sample_pairs
from stride_ray.operators.training.optimizers import RowAdam
from stride_ray.operators.training.ray_trainer import train_distributed, train_rank
from stride_ray.operators.training.trainer import Loop, Ranks, run_loop
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run, Stage
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import WorkerAllocation

V, N, T = 50, 48, 16


def write_blocks(store, ids, mask=None, parts=2):
    """A finished ``blocks/`` folder."""
    made = []
    for part, rows in enumerate(np.array_split(np.arange(len(ids)), parts)):
        spans = [
            [{"document_id": str(row), "source": "x", "place": row, "start": 0, "length": ids.shape[1]}] for row in rows
        ]
        masks = [None if mask is None else mask[row].tolist() for row in rows]
        columns = [rows.astype(np.uint64), rows, ["x"] * len(rows), spans, list(ids[rows]), masks]
        store.write_table(f"part-{part:05d}.parquet", pa.table(columns, schema=block_schema(ids.shape[1])))
        made.append({"name": f"part-{part:05d}.parquet", "blocks": len(rows)})
    manifest = {"block_tokens": ids.shape[1], "parts": made, "fingerprint": "f", "max_token_id": int(ids.max())}
    store.write_json("manifest.json", manifest)
    return Blocks(store)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny random model and a pool of random texts: what a subset's operator can only know by its members."""
    root = tmp_path_factory.mktemp("train")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=V, max_position_embeddings=32, **sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.15)
    model.save_pretrained(root / "model")
    ids = np.random.default_rng(0).integers(0, V, (N, T)).astype(np.int32)
    mask = np.ones((N, T), dtype=bool)
    mask[::3, :5] = False
    write_blocks(Store(str(root / "blocks")), ids, mask)
    return root


def config_of(made, **changes):
    options = {
        "model.path": str(made / "model"),
        "model.split": 0.5,
        "membership.subsets": 12,
        "membership.degree": 3,
        "operators.form": "matrix",
        "operators.rank": 8,
        "operators.sketch": 16,
        "fit.method": "train",
        "fit.steps": 10,
        "fit.blocks_per_step": 6,
        "fit.top_m": 8,
        "compute.batch_tokens": 64,
    }
    return Config().updated({**options, **{key.replace("__", "."): value for key, value in changes.items()}})


def loop_of(made, config, start=None):
    blocks = Blocks(Store(str(made / "blocks")))
    return Loop(config, load_run_model(config, "cpu"), blocks, membership_of(config), start)


def stage_of(folder):
    return Stage(Store(str(folder)), "0" * 16)


def test_the_walk_meets_every_block_once_an_epoch_and_needs_no_history(made, monkeypatch):
    monkeypatch.setattr("stride_ray.operators.training.batches.SLICE", 5)
    monkeypatch.setattr("stride_ray.operators.training.batches.HELD_SLICES", 3)
    blocks = Blocks(Store(str(made / "blocks")))
    shuffle = SeededShuffle(blocks, 3, 7)
    batches = [shuffle.batch(step) for step in range(2 * N // 7)]
    ordinals = np.concatenate([batch.ordinals for batch in batches])
    assert sorted(ordinals[:N]) == list(range(N))
    assert list(ordinals[:N]) != list(range(N))
    assert sorted(ordinals[:N]) != sorted(ordinals[N : 2 * N - 6])
    later = SeededShuffle(blocks, 3, 7).batch(9)
    for array, again, read in zip(batches[9], later, blocks.batch(later.ordinals), strict=True):
        assert np.array_equal(array, again)
        assert np.array_equal(again, read)
    assert len(SeededShuffle(blocks, 3, 1000).batch(0).ordinals) == N


@pytest.mark.parametrize("form", ["regular", "bernoulli"])
def test_a_step_pairs_blocks_with_their_own_subsets_and_with_others(made, form):
    config = config_of(made, membership__form=form)
    membership, shuffle = membership_of(config), SeededShuffle(Blocks(Store(str(made / "blocks"))), 0, 6)
    plan = plan_step(shuffle, membership, 0, 4)
    columns = membership.columns_at(plan.batch.ordinals)
    assert len(plan.fidelity) > 4
    assert all(plan.subsets[k] in columns[b] for b, k in plan.fidelity)
    assert all(plan.subsets[k] not in columns[b] for b, k in plan.stability)
    assert len(set(map(tuple, plan.fidelity))) == len(plan.fidelity)
    assert sorted(plan.linearity[:, 1]) == list(range(len(plan.subsets)))
    members, others = sample_pairs(membership, np.arange(5), 0, 2)
    assert all(k in membership.columns_at(np.array([b]))[0] for b, k in members)
    assert all(k not in membership.columns_at(np.array([b]))[0] for b, k in others)


def test_rows_move_as_under_adam_and_only_in_their_steps():
    generator = torch.Generator().manual_seed(0)
    stack, mine = torch.zeros(4, 3), torch.zeros(3, requires_grad=True)
    rows, plain = RowAdam(stack), torch.optim.Adam([mine], lr=0.1, betas=(0.9, 0.99), eps=1e-12)
    for step in range(6):
        gradient = torch.randn(1, 3, generator=generator)
        if step % 2:  # row 2 rests
            rows.update(stack, torch.tensor([0]), gradient, 0.1)
            continue
        rows.update(stack, torch.tensor([2]), gradient, 0.1)
        mine.grad = gradient[0]
        plain.step()
    torch.testing.assert_close(stack[2], mine.detach())
    assert stack[0].abs().min() > 0
    assert not stack[[1, 3]].any()


@pytest.mark.parametrize("form", ["gate", "matrix", "logit"])
def test_from_a_random_start_members_come_to_be_told_from_others(made, form):
    loop = loop_of(made, config_of(made, operators__form=form, fit__steps=60, fit__learning_rate=0.1))
    before = {name: p.detach().clone() for name, p in loop.model.model.named_parameters()}
    first = loop.operators()
    assert loop.evaluate()["gap"] == 0
    for _ in range(60):
        losses = loop.step()
    found = loop.evaluate()
    assert found["gap"] > 3 * found["gap_error"] > 0
    assert found["steering"] > 0.01
    assert all(np.isfinite(value) and value > 0 for value in losses.values())
    assert all(torch.equal(p, before[name]) for name, p in loop.model.model.named_parameters())
    assert not torch.equal(loop.operators().basis.W_in, first.basis.W_in)
    assert torch.equal(loop.operators().basis.W_out, first.basis.W_out) == (form != "gate")


def test_the_closed_form_is_a_start_at_the_strength_that_helps_members(made):
    config = config_of(made)
    trained = loop_of(made, config_of(made, fit__steps=30))
    for _ in range(30):
        trained.step()
    operators = trained.operators()
    scaled = type(operators)(operators.basis, 1e4 * operators.A)
    begun = loop_of(made, config, scaled)
    assert begun.evaluate()["gap"] > 0
    assert 0.005 < begun.evaluate()["steering"] < 4
    ratio = begun.A / operators.A
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("form", "optimizer"), [("gate", "muon"), ("matrix", "adamw")])
def test_stopped_and_resumed_gives_the_same_bits(made, tmp_path, form, optimizer):
    config = config_of(made, operators__form=form, fit__optimizer=optimizer)
    whole = loop_of(made, config)
    log = run_loop(whole, Store(str(tmp_path / "whole")))
    assert [entry["step"] for entry in log] == list(range(1, 11))

    def stop(found):
        if found["step"] == 6:
            raise KeyboardInterrupt

    store = Store(str(tmp_path / "halves"))
    with pytest.raises(KeyboardInterrupt):
        run_loop(loop_of(made, config), store, stop)
    assert store.names("", ".safetensors") == ["step-0000005.safetensors"]
    resumed = loop_of(made, config)
    assert run_loop(resumed, store) == log
    state, again = whole.state(), resumed.state()
    assert state.keys() == again.keys()
    assert [name for name in state if not torch.equal(state[name], again[name])] == []


def _rank(rank, world, config, root, address):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    train_rank(config, Blocks(Store(f"{root}/blocks")), Store(f"{root}/ranks"), "cpu", Ranks(rank, world))
    torch.distributed.destroy_process_group()


def test_two_ranks_take_the_steps_of_one(made, tmp_path):
    config = config_of(made, operators__form="gate", fit__steps=6)
    alone = loop_of(made, config)
    log = run_loop(alone, Store(str(tmp_path / "alone")))
    os.symlink(made / "blocks", tmp_path / "blocks")
    spawn = multiprocessing.get_context("spawn")
    given = (2, config, str(tmp_path), f"file://{tmp_path}/meeting")
    ranks = [spawn.Process(target=_rank, args=(rank, *given)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    together, _ = load_operators(Store(str(tmp_path / "ranks/trained")))
    # Muon orthogonalises in bfloat16, which makes more of a difference in the last digits than other sums do.
    torch.testing.assert_close(together.A, alone.operators().A, atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(together.basis.W_in, alone.operators().basis.W_in, atol=2e-3, rtol=2e-2)
    losses = [[entry[name] for name in ("fidelity", "stability", "linearity")] for entry in log]
    entries = Store(str(tmp_path / "ranks")).read_json("training.json")["evaluations"]
    found = [[entry[name] for name in ("fidelity", "stability", "linearity")] for entry in entries]
    np.testing.assert_allclose(found, losses, rtol=0.05, atol=1e-5)
    np.testing.assert_allclose(found[0], losses[0], rtol=1e-4, atol=1e-7)


@pytest.fixture
def some_ray():
    """Whatever Ray is running, else one of this test's own."""
    ours = not ray.is_initialized()
    if ours:
        ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    if ours:
        ray.shutdown()


def _title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _kill_a_worker(store, killed, over):
    """SIGKILL the training worker once the loop has left a checkpoint."""
    while not over.wait(0.05) and not killed:
        workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in _title(p)]
        if workers and store.names("", ".safetensors"):
            workers[0].send_signal(signal.SIGKILL)
            killed.append(workers[0].pid)


@pytest.mark.cluster
def test_a_killed_worker_is_replaced_and_the_result_is_the_same(made, tmp_path, some_ray, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")  # how long a report may wait to be heard
    config = config_of(made, fit__steps=60)
    alone = loop_of(made, config)
    for _ in range(60):
        alone.step()
    stage, killed, over = stage_of(tmp_path), [], threading.Event()
    killer = threading.Thread(target=_kill_a_worker, args=(stage.store.child("loop"), killed, over), daemon=True)
    killer.start()
    train_distributed(config, Blocks(Store(str(made / "blocks"))), stage, WorkerAllocation(1, "cpu"))
    over.set()
    assert killed
    found, _ = load_operators(stage.store.child("trained"))
    assert torch.equal(found.A, alone.operators().A)
    assert torch.equal(found.basis.W_in, alone.operators().basis.W_in)
    assert not stage.store.names("loop")
    assert [entry["step"] for entry in stage.store.read_json("training.json")["evaluations"]] == list(range(6, 61, 6))
    # Finished is finished: without blocks or workers there is nothing to run.
    train_distributed(config, None, stage, None)

    broken = config_of(made, model__path=str(tmp_path / "nowhere"))
    with pytest.raises(StrideError, match="nowhere"):
        train_distributed(
            broken, Blocks(Store(str(made / "blocks"))), stage_of(tmp_path / "other"), WorkerAllocation(1, "cpu")
        )


@pytest.mark.cluster
def test_a_node_that_never_comes_back_ends_the_loop_and_fewer_workers_finish_it(made, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    monkeypatch.setattr("stride_ray.operators.training.ray_trainer.MAX_STARTUP_RETRIES", 2)
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    config, blocks = config_of(made, fit__steps=60), Blocks(Store(str(made / "blocks")))
    stage, over = stage_of(tmp_path), threading.Event()

    def lose_a_node():
        while not over.wait(0.05) and not stage.store.child("loop").names("", ".safetensors"):
            pass
        cluster.remove_node(nodes[0], allow_graceful=False)

    try:
        ray.init(cluster.address, logging_level="ERROR")
        killer = threading.Thread(target=lose_a_node, daemon=True)
        killer.start()
        started = time.monotonic()
        with pytest.raises(StrideError, match=r"no room for 2 worker\(s\) with a CPU each, 3 times"):
            train_distributed(config, blocks, stage, WorkerAllocation(2, "cpu"))
        assert time.monotonic() - started < 120
        assert stage.store.child("loop").names("", ".safetensors")
        train_distributed(config, blocks, stage, WorkerAllocation(1, "cpu"))
        alone = loop_of(made, config)
        for _ in range(60):
            alone.step()
        found, _ = load_operators(stage.store.child("trained"))
        torch.testing.assert_close(found.A, alone.operators().A, atol=2e-3, rtol=2e-2)
    finally:
        over.set()
        ray.shutdown()
        cluster.shutdown()


def test_losses_that_are_not_finite_are_told(made):
    loop = loop_of(made, config_of(made))
    loop.A[:] = float("nan")
    with pytest.raises(StrideError, match="not finite at step 0"):
        loop.step()


@pytest.mark.parametrize("form", ["matrix", "logit"])
def test_a_block_that_is_not_finite_leaves_the_loop_to_the_others(form, made, monkeypatch):
    config = config_of(made, operators__form=form, fit__steps=8)
    blocks = Blocks(Store(str(made / "blocks")))
    ids = blocks.batch(range(N)).ids
    token, where = min(((t, np.flatnonzero((ids == t).any(1))) for t in range(V)), key=lambda each: len(each[1]))
    where = where.tolist()
    model, real = load_run_model(config, "cpu"), SplitModel.trunk

    def trunk(self, ids, *given):
        return real(self, ids, *given).masked_fill((ids == token).cumsum(1).bool().unsqueeze(2), float("nan"))

    monkeypatch.setattr(SplitModel, "trunk", trunk)
    monkeypatch.setattr(failures, "MAX_FAILED_BLOCKS", 1.0)
    loop = Loop(config, model, blocks, membership_of(config))
    losses = [loop.step() for _ in range(8)]  # a whole epoch
    assert sorted(loop.failed) == where
    assert all(np.isfinite(list(each.values())).all() for each in losses)
    assert loop.operators().A.isfinite().all()
    assert np.isfinite(list(loop.evaluate().values())).all()
    again = Loop(config, model, blocks, membership_of(config))
    again.load(loop.state())
    assert again.failed == loop.failed
    monkeypatch.setattr(failures, "MAX_FAILED_BLOCKS", 0.05)
    again = Loop(config, model, blocks, membership_of(config))
    with pytest.raises(StrideError, match=r"of \d of 48 blocks are not finite"):
        [again.step() for _ in range(8)]


def test_fit_trains_from_the_closed_form_on_two_workers(made, tmp_path, some_ray):
    config = config_of(made, fit__start="closed_form", fit__steps=4, compute__workers=2)
    run = Run(str(tmp_path / "run"), config)
    blocks = Blocks(Store(str(made / "blocks")))
    write_blocks(run.begin("blocks").store, blocks.batch(range(N)).ids.astype(np.int32))
    facts = fit(run)
    assert facts["method"] == "train"
    assert facts["scale"] == 1.0
    assert facts["learned"]
    assert fit(run) == facts
    names = run.stage("operators").store.names()
    assert not {"fitted", "trained", "loop", "basis.json"} & set(names)
    operators, _ = load_operators(run.stage("operators").store)
    assert operators.A.shape == (12, 8, 16)
