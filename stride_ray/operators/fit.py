"""Stage fit: blocks to operators.

The default, operators at every site, is in site_fit.py. For the paper's forms the closed form is a map–reduce over a
fixed partition of the pool: token counts and second moments give the basis, each shard adds its blocks' J to their
subsets' sums, and the sums are reduced in shard order, so the result does not depend on the number of workers. The
paper's training loop (``training/``) writes the same files. Each fit ends with a check that the operators learned
something: the mean response on members minus that on non-members.
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from stride_ray.corpus.blocks import Blocks, unit_count
from stride_ray.corpus.failures import check_failed_blocks, failed_ordinals, finite_rows, write_failed_blocks
from stride_ray.models.curvature.kfac import begin_curvature, finish_curvature
from stride_ray.models.loading import measured_model_fingerprint
from stride_ray.models.pool_worker import (
    ModelWorker,
    check_tokenizer,
    counts_of_logits,
    covered_fingerprint,
    map_sample_slices,
    token_counts,
)
from stride_ray.operators.closed_form import add_to_subsets, operators_from_sums, preconditioned_basis, stream_moments
from stride_ray.operators.forms import Basis, Operators, gradients
from stride_ray.operators.membership import membership_of
from stride_ray.operators.site_fit import fit_sites
from stride_ray.operators.stored import load_basis, load_operators, save_basis, save_operators
from stride_ray.operators.validation import validate
from stride_ray.runtime.actor_pool import ActorPool, shared_actor_pool
from stride_ray.runtime.config import Config
from stride_ray.runtime.costs import record_separately, record_stage_costs
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.memory import expected_gb
from stride_ray.runtime.progress import progress, run_missing
from stride_ray.runtime.run import Run, Stage
from stride_ray.runtime.storage import tensor_bytes
from stride_ray.runtime.tasks import allocate_workers, connected

# Tokens in the sample for the second moments.
MOMENT_TOKENS = 32_768


def fit(run: Run) -> dict[str, Any]:
    """Fit the run's operators, resume an interrupted fit, or extend a finished one to blocks sharded since.

    Example:
        >>> from stride_ray import Run, fit
        >>> facts = fit(Run("mine"))
        >>> facts["form"], facts["rows"], facts["learned"]
        ('sites', 'blocks', True)

    Args:
        run: with a finished ``blocks/``.

    Returns:
        The manifest, with sizes; ``gap`` and ``gap_error``, its standard error; ``learned``, whether the operators
        respond to their members; and ``verdict``, a sentence.

    Raises:
        StrideError: a stage is missing or was made with other settings, the model does not match the tokens, the pool
            has fewer blocks than subsets, or the cluster lacks the requested resources.
    """
    config = run.config
    blocks = Blocks(run.require("blocks").store)
    at_sites = config.operators.form == "sites"
    if not at_sites and len(blocks) < config.membership.subsets:
        raise StrideError(
            f"The pool has {len(blocks)} blocks, fewer than membership.subsets = {config.membership.subsets}; lower "
            "--subsets or shard more text."
        )
    membership_of(config)  # fail early on a degree above the number of subsets
    check_tokenizer(config, blocks)
    # Both stages are identified by the fingerprints of the weights and of the blocks that they cover.
    weights = measured_model_fingerprint(config)
    curvature = begin_curvature(run, blocks, weights) if at_sites else None
    corpus = covered_fingerprint(run.stage("operators"), blocks)
    stage = run.begin("operators", corpus=corpus, weights=weights)
    finished = stage.is_finished()
    if finished and not _pool_has_grown(stage.manifest(), blocks):
        _remove_interim_files(stage)
        return stage.manifest()
    # A finished stage that is extended keeps its manifest throughout, so its errors are never ignored.
    with nullcontext() if finished else stage.ignore_errors_if_finished(), connected(config.compute):
        if curvature is not None:
            _fit_sites(config, blocks, curvature, stage)
        else:
            with record_stage_costs(stage):
                _fit_paper_form(config, blocks, stage)
    return stage.manifest()


def _pool_has_grown(manifest: dict[str, Any], blocks: Blocks) -> bool:
    """Whether the pool has blocks that operators with this manifest do not cover yet, and that can be added.

    Raises:
        StrideError: the pool has such blocks, but rows are of subsets and cannot be extended.
    """
    covered = manifest["blocks"]
    if covered == len(blocks):
        return False
    if manifest.get("rows") != "blocks":
        raise StrideError(
            f"Operators were fitted on the first {covered:,} blocks, and the pool now has {len(blocks):,}; an operator "
            "is a mean over its subset and cannot be extended: fit into a new run directory, or delete operators/."
        )
    return True


def _fit_sites(config: Config, blocks: Blocks, curvature: Stage, stage: Stage) -> None:
    """Fit at every site: the preconditioner, then the rows."""
    with shared_actor_pool(config, unit_count(len(blocks))) as actors:
        finish_curvature(config, blocks, curvature, actors)
        with record_stage_costs(stage):
            fit_sites(config, blocks, curvature.store, stage, actors)


def _fit_paper_form(config: Config, blocks: Blocks, stage: Stage) -> None:
    """Fit the paper's form by the configured method, validate and publish."""
    if config.fit.method == "closed_form":
        with ActorPool(allocate_workers(config.compute, len(blocks.shards()), expected_gb(config))) as actors:
            _fit_closed_form(config, blocks, stage, actors)
            _validate_and_publish(config, blocks, stage, actors)
        return
    from stride_ray.operators.training.ray_trainer import train_distributed

    if config.fit.start == "closed_form":
        with ActorPool(allocate_workers(config.compute, len(blocks.shards()), expected_gb(config))) as actors:
            _fit_closed_form(config, blocks, stage, actors)
    train_distributed(config, blocks, stage, allocate_workers(config.compute, config.fit.blocks_per_step))
    with ActorPool(allocate_workers(config.compute, 1, expected_gb(config))) as actors:
        _validate_and_publish(config, blocks, stage, actors)


def _fit_closed_form(config: Config, blocks: Blocks, stage: Stage, actors: ActorPool) -> None:
    """Compute the basis and the sums per shard, and reduce them to the operators in ``fitted/``."""
    if stage.store.exists("fitted/manifest.json"):
        return
    if not stage.store.exists("basis.json"):
        save_basis(stage.store, "basis", _compute_basis(config, blocks, actors))
    units = {_sums_name(index): (index, *shard) for index, shard in enumerate(blocks.shards())}
    sum_shards = partial(actors.map, SubsetSumWorker, (config, blocks, stage, actors.device))
    markers = run_missing(stage, units, sum_shards, "fit", "blocks", lambda unit: unit[2] - unit[1])
    failed = sorted(ordinal for marker in markers for ordinal in marker["not_finite"])
    check_failed_blocks(failed, len(blocks))
    write_failed_blocks(stage.store, blocks, failed)
    progress(actors.map_function(reduce_sums, (config, stage, len(units)), [len(blocks)]), "reduce", 1, "")


def _sums_name(shard: int) -> str:
    """Name of the unit that sums a shard's J by subset, and of its file."""
    return f"sum-{shard:03d}"


def _compute_basis(config: Config, blocks: Blocks, actors: ActorPool) -> Basis:
    """Compute the basis from second moments over a sample and, for the logit form, token counts over the pool."""
    options = config.operators
    counts = token_counts(blocks, actors) if options.form == "logit" else np.zeros(0, dtype=np.int64)
    sample = blocks.sample(max(32, MOMENT_TOKENS // blocks.block_tokens), config.seed)
    slices = map_sample_slices(actors, StreamMomentWorker, (config, blocks, actors.device), sample, "precondition")
    check_failed_blocks([ordinal for part in slices for ordinal in part["not_finite"]], len(sample))
    positions = max(1, sum(part["positions"] for part in slices))
    return preconditioned_basis(
        options.form,
        options.rank,
        options.sketch,
        options.target,
        config.seed,
        stream=sum(part["stream"] for part in slices) / positions,
        gradient=sum(part["gradient"] for part in slices) / positions,
        counts=counts_of_logits(counts, slices[0]["vocabulary"]),
    )


class StreamMomentWorker(ModelWorker):
    """Sums the second moments of the stream (and of its gradients) over a slice of the sample."""

    def __call__(self, unit: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Process one slice; returns its sums (closed_form.stream_moments)."""
        index, ordinals = unit
        with_gradients = self.config.operators.form != "logit"
        stream: Any = 0.0
        gradient: Any = 0.0
        positions, failed = 0, list[int]()
        for batch in self.batches_at(ordinals):
            ids, mask = self.tensors(batch.ids), self.tensors(batch.mask)
            batch_stream, batch_gradient, count, good = stream_moments(self.model, ids, mask, with_gradients)
            stream, gradient, positions = stream + batch_stream, gradient + batch_gradient, positions + count
            failed += batch.ordinals[~good].tolist()
        facts = {"index": index, "blocks": len(ordinals), "positions": positions, "not_finite": failed}
        return {**facts, "stream": stream, "gradient": gradient, "vocabulary": self.model.vocabulary}


class SubsetSumWorker(ModelWorker):
    """Publishes, for one shard, the sums of its blocks' J by subset."""

    def __init__(self, config: Config, blocks: Blocks, stage: Stage, device: str) -> None:
        super().__init__(config, blocks, device)
        self.stage = stage
        self.basis = load_basis(stage.store, "basis").to(self.model.device)
        self.membership = membership_of(config)

    def __call__(self, unit: tuple[int, int, int]) -> dict[str, Any]:
        """Process one shard; returns its done marker."""
        started = time.monotonic()
        index, start, stop = unit
        # The last row is for the padding of the membership columns and is dropped (closed_form.add_to_subsets).
        sums = torch.zeros(self.membership.subsets + 1, int(np.prod(self.basis.shape)), device=self.model.device)
        failed = list[int]()
        for batch in self.blocks.batches(start, stop, self.rows):
            J = gradients(self.basis, self.model, self.tensors(batch.ids), self.tensors(batch.mask)).flatten(1)
            good = finite_rows([J])
            failed += batch.ordinals[~good.cpu().numpy()].tolist()
            J[~good] = 0.0
            add_to_subsets(sums, J, self.membership.columns_at(batch.ordinals))
        name = _sums_name(index)
        write_started = time.monotonic()
        self.stage.store.write(f"{name}.safetensors", tensor_bytes({"sums": sums[:-1].cpu()}))
        record_separately("sums", time.monotonic() - write_started)
        return self.stage.mark(name, started, blocks=stop - start, not_finite=failed)


def reduce_sums(config: Config, stage: Stage, shards: int, n_blocks: int) -> dict[str, Any]:
    """Add the shards' sums in order, divide by subset sizes, and publish the operators as ``fitted/``."""
    total: Any = 0.0
    for index in range(shards):
        total = total + stage.store.read_tensors(f"{_sums_name(index)}.safetensors")["sums"]
    basis = load_basis(stage.store, "basis")
    A = operators_from_sums(total, membership_of(config).sizes(n_blocks), basis.shape)
    save_operators(stage.store.child("fitted"), Operators(basis, A), {})
    return {"subsets": len(A)}


def _validate_and_publish(config: Config, blocks: Blocks, stage: Stage, actors: ActorPool) -> None:
    """Validate the fitted operators, publish them as the stage's result, and remove intermediate files."""
    folder = "trained" if config.fit.method == "train" else "fitted"
    validated = actors.map(OperatorValidator, (config, blocks, stage, actors.device), [folder])
    progress(validated, "judge", 1, "fit")
    _remove_interim_files(stage)


class OperatorValidator(ModelWorker):
    """Validates fitted operators and publishes them as the stage's result."""

    def __init__(self, config: Config, blocks: Blocks, stage: Stage, device: str) -> None:
        super().__init__(config, blocks, device)
        self.stage = stage

    def __call__(self, folder: str) -> dict[str, Any]:
        """Validate the operators in ``folder``; returns their metadata."""
        operators, facts = load_operators(self.stage.store.child(folder), self.model.device)
        failed = sorted({*failed_ordinals(self.stage.store), *facts.get("failed", ())})
        write_failed_blocks(self.stage.store, self.blocks, failed)
        validation = validate(self.model, operators, self.blocks, membership_of(self.config), self.config)
        provenance = {
            "method": self.config.fit.method,
            "model": self.model.name,
            "split_layer": self.model.split_layer,
            "blocks": len(self.blocks),
            "not_finite": len(failed),
        }
        save_operators(self.stage.store, replace(operators, scale=validation["scale"]), {**provenance, **validation})
        return self.stage.manifest()


def _remove_interim_files(stage: Stage) -> None:
    """Remove the intermediate files of a finished fit, including those of an interrupted cleanup."""
    stage.clear_tensors("sum-")
    for name in ("fitted", "trained", "loop", "basis.json", "basis.safetensors"):
        stage.store.remove(name)
