"""Stage curvature: K-FAC preconditioner and scale of every site, once per run, from a sample of the pool.

For the queries' solve, EK-FAC's eigenvalues and the optimiser's damping too (eigenvalues.py). The stage has no units of
work: a rerun starts from the beginning.
"""

import math
import uuid
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.failures import check_failed_blocks, finite_losses, finite_rows
from stride_ray.models.curvature.eigenvalues import (
    BASES,
    EIGENVALUES,
    EKFACSite,
    Squares,
    add_squares,
    complete_sites,
    kronecker_eigenbasis,
    load_ekfac,
    save_ekfac,
)
from stride_ray.models.curvature.moments import (
    KroneckerFactors,
    add_moments,
    distribution,
    kfac_site,
    origin_weight,
)
from stride_ray.models.curvature.sketch import sketch_sites, sketched_gradients, whole_shape
from stride_ray.models.linear_algebra.rotation import Rotation
from stride_ray.models.linear_algebra.vocabulary import TokenSide
from stride_ray.models.loading import load_measured_model
from stride_ray.models.pool_worker import (
    ModelWorker,
    counts_of_logits,
    covered_fingerprint,
    map_sample_slices,
    token_counts,
)
from stride_ray.models.sites import HEAD, ORIGIN, Site, find_sites, last_layers
from stride_ray.runtime.actor_pool import ActorPool
from stride_ray.runtime.config import Config
from stride_ray.runtime.costs import record_stage_costs
from stride_ray.runtime.run import Run, Stage
from stride_ray.runtime.storage import Store, tensor_bytes

# Sample sizes: tokens for the second moments and for EK-FAC's eigenvalues, blocks for the sites' scales.
MOMENT_TOKENS, EIGENVALUE_TOKENS, SCALE_BLOCKS = 131_072, 65_536, 256
# Gradient norms are measured in a sketch of this size per side: whitening full gradients would take longer than fit.
NORM_SKETCH_SIZE = 64
TENSORS, TOKENS = ("W_in", "W_out", "unigram"), ("weights", "buckets")
SIDES = ("read", "written")
SITES, UNSCALED = "sites", "unscaled"
# Files that a finished stage does not need.
INTERIM = (UNSCALED, BASES, "moments-", "squares-")


def begin_curvature(run: Run, blocks: Blocks, weights: str) -> Stage:
    """Begin the stage; a finished one is kept when the pool grows, so that the unit of influence stays the same."""
    return run.begin("curvature", corpus=covered_fingerprint(run.stage("curvature"), blocks), weights=weights)


def finish_curvature(config: Config, blocks: Blocks, stage: Stage, actors: ActorPool) -> None:
    """Compute the preconditioner unless the stage is finished."""
    if not stage.is_finished():
        with stage.ignore_errors_if_finished(), record_stage_costs(stage):
            measure_curvature(config, blocks, stage, actors)
    # Only after the stage is finished: a second run of the same command may still read these files.
    stage.clear(INTERIM)


def measure_curvature(config: Config, blocks: Blocks, stage: Stage, actors: ActorPool) -> None:
    """Compute and publish the sites and a manifest.

    Blocks of the sample whose losses or gradients are not finite are left out and counted (``not_finite``).

    Raises:
        StrideError: as check_failed_blocks.
    """
    counts = token_counts(blocks, actors)
    sample = blocks.sample(max(32, MOMENT_TOKENS // blocks.block_tokens), config.seed)
    given = (config, blocks, actors.device)
    attempt = uuid.uuid4().hex[:8]  # in names of files that are removed once read
    sums = SliceSums(stage.store, torch.float64)
    found = map_sample_slices(actors, MomentWorker, (*given, stage.store, attempt), sample, "precondition", sums.add)
    failed = not_finite(found)
    check_failed_blocks(sorted(failed), len(sample))
    positions = max(1, sum(each["positions"] for each in found))
    counted = torch.from_numpy(counts_of_logits(counts, found[0]["vocabulary"]))
    sites, bases = kfac_sites(config, found[0]["sites"], sums, positions, counted)
    save_sites(stage.store, UNSCALED, sites)
    sound = np.setdiff1d(sample, sorted(failed))
    each = positions / max(1, len(sound))
    failed |= measure_eigenvalues(given, sites, bases, sound, each, stage.store, attempt, actors)
    few = np.sort(np.random.default_rng(config.seed).permutation(sample)[:SCALE_BLOCKS])
    scales = map_sample_slices(actors, ScaleWorker, (*given, stage.store), few, "scale")
    spoilt = not_finite(scales)
    check_failed_blocks(sorted(failed | spoilt), len(sample))
    shares, scaled = scale(sites, scales, len(few) - len(spoilt), found[0]["layers"], counted)
    save_sites(stage.store, SITES, scaled)
    bytes_of_one = 4 * sum(math.prod(whole_shape(site)) for site in sites)
    facts = {"blocks": len(blocks), "sample": len(sample), "not_finite": len(failed | spoilt)}
    stage.finish({"sites": shares, **facts, "gradient_bytes": bytes_of_one})


def kfac_sites(
    config: Config, names: list[str], sums: "SliceSums", positions: int, counts: torch.Tensor
) -> tuple[list[Site], list[EKFACSite]]:
    """Return the sites with their preconditioners, and the eigenbases of their factors.

    Args:
        config: of the run.
        names: the sites, in the model's order.
        sums: the moments by site and side; each is released once it is used.
        positions: number of positions that the moments are sums over.
        counts: (V,) how often each token is a target.
    """
    sites, bases = [], list[EKFACSite]()
    for name in names:
        moments = KroneckerFactors.of(*(sums.totals.pop(f"{name}.{side}") for side in SIDES)) / positions
        bases.append(kronecker_eigenbasis(name, moments))
        sites.append(kfac_site(name, moments, counts, config.seed))
        if name == HEAD and not config.model.start:
            sites.append(kfac_site(ORIGIN, moments, counts, config.seed))
    return sites, bases


def scale(
    sites: list[Site], found: list[dict[str, Any]], blocks: int, layers: float, counts: torch.Tensor
) -> tuple[dict[str, float], list[Site]]:
    """Scale the sites so that a block's influence on itself is 1 on average over the pool.

    Args:
        sites: unscaled.
        found: results of the ScaleWorkers.
        blocks: number of finite blocks in these results.
        layers: number of layers with sites, for the origin's weight.
        counts: (V,) how often each token is a target.

    Returns:
        Each site's share of the influence, and the scaled sites.
    """
    loss = sum(each["loss"] for each in found) / max(1, sum(each["targets"] for each in found))
    weights = {site.name: 1.0 for site in sites}
    if ORIGIN in weights:
        weights[ORIGIN] = origin_weight(layers, loss, distribution(counts))
    squares = {name: sum(each["squares"][name] for each in found) / max(1, blocks) for name in weights}
    total = max(1e-30, sum(weight * squares[name] for name, weight in weights.items()))
    shares = {name: weight * squares[name] / total for name, weight in weights.items()}
    return shares, [replace(site, scale=total / weights[site.name]) for site in sites]


class SliceSums:
    """Sums of the tensors that workers write to files, one file per slice of the sample.

    Ray's object store would keep the tensors of all slices in memory: 0.4 GB per slice at 135 million parameters.

    Attributes:
        totals: the sums by name.
    """

    def __init__(self, store: Store, dtype: torch.dtype) -> None:
        self.store, self.dtype = store, dtype
        self.totals = dict[str, torch.Tensor]()

    def add(self, found: dict[str, Any]) -> dict[str, Any]:
        """Add the tensors of the file that a worker's result names, and remove the file."""
        for name, each in self.store.read_tensors(found["file"]).items():
            self.totals[name] = self.totals[name].add_(each) if name in self.totals else each.to(self.dtype)
        self.store.remove(found["file"])
        return found


def not_finite(found: list[dict[str, Any]]) -> set[int]:
    """Return the ordinals of blocks that are not finite, from the workers' results."""
    return {ordinal for each in found for ordinal in each["not_finite"]}


def measure_eigenvalues(
    given: tuple[Any, ...],
    sites: list[Site],
    bases: list[EKFACSite],
    sample: np.ndarray,
    positions: float,
    store: Store,
    attempt: str,
    actors: ActorPool,
) -> set[int]:
    """Measure and publish EK-FAC's eigenvalues and the damping at all sites, over some of the sample.

    Args:
        given: configuration, blocks and device.
        sites: unscaled.
        bases: of all sites but the origin.
        sample: ordinals of finite blocks.
        positions: mean positions per block.
        store: of the curvature.
        attempt: in the names of interim files.
        actors: the actor pool.

    Returns:
        Ordinals of blocks whose gradient is not finite at some site; that site's sums leave the block out.
    """
    save_ekfac(store, BASES, bases)
    size = max(32, EIGENVALUE_TOKENS // given[1].block_tokens)
    few = np.sort(np.random.default_rng(given[0].seed).permutation(sample)[:size])
    sums = SliceSums(store, torch.float32)
    results = map_sample_slices(actors, EigenvalueWorker, (*given, store, attempt), few, "eigenvalues", sums.add)
    means = dict[str, Squares]()
    for basis, count in zip(bases, np.sum([each["counts"] for each in results], axis=0).tolist(), strict=True):
        totals = (sums.totals.pop(f"{basis.name}.{part}") for part in Squares._fields)
        means[basis.name] = Squares(*(total / max(1, count) for total in totals))
    save_ekfac(store, EIGENVALUES, complete_sites(bases, {site.name: site for site in sites}, means, positions))
    return not_finite(results)


def save_sites(store: Store, name: str, sites: list[Site]) -> None:
    """Publish sites as ``name``.safetensors and ``name``.json."""
    tensors = dict[str, torch.Tensor]()
    for i, site in enumerate(sites):
        parts = {part: getattr(site, part) for part in TENSORS} | {part: getattr(site.tokens, part) for part in TOKENS}
        if site.rotation is not None:
            parts |= {f"rotation.{each.name}": getattr(site.rotation, each.name) for each in fields(Rotation)}
        tensors |= {f"{i}.{part}": x.cpu() for part, x in parts.items()}
    store.write(f"{name}.safetensors", tensor_bytes(tensors))
    facts = [{key: getattr(site, key) for key in ("name", "scale")} for site in sites]
    store.write_json(f"{name}.json", {"sites": facts})


def load_sites(store: Store, name: str, device: Any, whitening: bool = True) -> tuple[Site, ...]:
    """Read the sites that save_sites wrote, onto a device.

    Without ``whitening``, W_in and W_out are empty: they are as large as the model, and gradients do not take them.
    """
    tensors = store.read_tensors(f"{name}.safetensors")
    if not whitening:
        tensors |= {key: torch.empty(0) for key in tensors if key.endswith((".W_in", ".W_out"))}
    facts = store.read_json(f"{name}.json")["sites"]
    sites = []
    for i, each in enumerate(facts):
        parts = {part: tensors[f"{i}.{part}"] for part in TENSORS}
        tokens = TokenSide(*(tensors[f"{i}.{part}"] for part in TOKENS))
        names = [f"{i}.rotation.{part.name}" for part in fields(Rotation)]
        rotation = Rotation(*(tensors[part] for part in names)) if names[0] in tensors else None
        sites.append(Site(**each, **parts, tokens=tokens, rotation=rotation).to(device))
    return tuple(sites)


class MomentWorker(ModelWorker):
    """Publishes the second moments of all sites over a slice of the sample."""

    load = staticmethod(load_measured_model)

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store, attempt: str) -> None:
        super().__init__(config, blocks, device)
        self.store, self.attempt = curvature, attempt
        self.names = find_sites(self.model, config.operators.layers, config.operators.sites == "all")
        self.layers = last_layers(config.operators.layers, self.model.n_layers)

    def __call__(self, unit: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Process one unit; returns the name of the file with its sums, its counts and the names of the sites."""
        index, ordinals = unit
        totals, positions, failed = dict[str, tuple[torch.Tensor, torch.Tensor]](), 0, list[int]()
        for batch in self.batches_at(ordinals):
            count, good = add_moments(totals, self.model, self.names, *self.trimmed(batch))
            positions += count
            failed += batch.ordinals[~good.cpu().numpy()].tolist()
        file = f"moments-{self.attempt}-{index:02d}.safetensors"
        sides = {f"{name}.{side}": x for name, both in totals.items() for side, x in zip(SIDES, both, strict=True)}
        self.store.write(file, tensor_bytes({name: x.cpu() for name, x in sides.items()}))
        facts = {"index": index, "blocks": len(ordinals), "positions": positions, "not_finite": failed}
        return {
            **facts,
            "layers": self.layers,
            "file": file,
            "sites": list(totals),
            "vocabulary": self.model.vocabulary,
        }


class EigenvalueWorker(ModelWorker):
    """Publishes the sums of squared gradients in the eigenbases over a slice of the sample."""

    load = staticmethod(load_measured_model)

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store, attempt: str) -> None:
        super().__init__(config, blocks, device)
        self.store, self.attempt = curvature, attempt
        self.sites = load_sites(curvature, UNSCALED, self.model.device, whitening=False)
        self.bases = {basis.name: basis for basis in load_ekfac(curvature, BASES, self.model.device)}

    def __call__(self, unit: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Process one unit; returns the name of its file, and the number of blocks in it by site."""
        index, ordinals = unit
        totals, counts, failed = dict[str, Squares](), np.zeros(len(self.bases), np.int64), list[int]()
        for batch in self.batches_at(ordinals):
            good = add_squares(totals, self.model, self.sites, self.bases, *self.trimmed(batch)).cpu().numpy()
            counts += good.sum(1)
            failed += batch.ordinals[~good.all(0)].tolist()
        file = f"squares-{self.attempt}-{index:02d}.safetensors"
        named = {f"{name}.{part}": x for name, each in totals.items() for part, x in each._asdict().items()}
        self.store.write(file, tensor_bytes({name: x.cpu() for name, x in named.items()}))
        return {"index": index, "blocks": len(ordinals), "counts": counts, "file": file, "not_finite": failed}


class ScaleWorker(ModelWorker):
    """Measures Σ |H^-½ J|² by site, in a random sketch, and the loss over a slice of the sample."""

    load = staticmethod(load_measured_model)

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store) -> None:
        super().__init__(config, blocks, device)
        sites = load_sites(curvature, UNSCALED, "cpu")
        shapes = [(min(F, NORM_SKETCH_SIZE), min(D, NORM_SKETCH_SIZE)) for F, D in map(whole_shape, sites)]
        self.sketches = [site.to(self.model.device) for site in sketch_sites(sites, shapes, config.seed)]

    def __call__(self, unit: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Process one unit; returns its sums."""
        index, ordinals = unit
        squares, loss, targets = dict.fromkeys((site.name for site in self.sketches), 0.0), 0.0, 0
        failed = list[int]()
        for batch in self.batches_at(ordinals):
            ids, mask = self.trimmed(batch)
            found, losses = sketched_gradients(self.model, self.sketches, ids, mask)
            good = finite_rows(found) & finite_losses(losses, mask)
            failed += batch.ordinals[~good.cpu().numpy()].tolist()
            for site, Z in zip(self.sketches, found, strict=True):
                squares[site.name] += float(Z[good].double().square().sum()) / site.scale
            counted = mask[good, 1:].sum(1).cpu()
            loss += float((losses[good].nan_to_num().cpu().double() * counted).sum())
            targets += int(counted.sum())
        facts = {"index": index, "blocks": len(ordinals), "not_finite": failed}
        return {**facts, "squares": squares, "loss": loss, "targets": targets}
