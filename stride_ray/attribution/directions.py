"""Query directions: each query's gradient at all sites, refined by a Gauss–Newton solve (conjugate_gradients.py).

The gradient of a contrast is that of one completion's loss minus that of the other's.

``directions/<name>/gradients-*.safetensors`` hold the directions by site, for the queries that did not fail. The files
are removed once the influence tables are written.
"""

import time
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.failures import (
    LOSS_NOT_FINITE,
    NOT_FINITE,
    check_failed_blocks,
    fail,
    finite_losses,
    finite_rows,
)
from stride_ray.corpus.queries import fingerprint
from stride_ray.models.batch_size import linearised_at_once, linearised_kept
from stride_ray.models.causal_lm import masked_mean
from stride_ray.models.curvature.conjugate_gradients import Gradient, curvature_scale, solve
from stride_ray.models.curvature.eigenvalues import EIGENVALUES, DampedSite, load_ekfac
from stride_ray.models.curvature.gauss_newton import GaussNewton, cut_texts
from stride_ray.models.curvature.kfac import SITES, load_sites
from stride_ray.models.loading import load_measured_model, load_run_model
from stride_ray.models.pool_worker import ModelWorker
from stride_ray.models.query_batches import batches, padded, signed_texts, validate_query
from stride_ray.models.sites import Site, site_gradients
from stride_ray.runtime.actor_pool import ActorPool
from stride_ray.runtime.config import Config
from stride_ray.runtime.costs import record_stage_costs
from stride_ray.runtime.memory import release_freed_memory
from stride_ray.runtime.progress import progress
from stride_ray.runtime.run import Run, Stage
from stride_ray.runtime.storage import Store, tensor_bytes

# Maximum queries per work unit, and maximum bytes of their gradients; a solve holds five times as much.
MAX_QUERIES_PER_UNIT, UNIT_BYTES = 16, 2**27


def begin_directions(run: Run, table: pa.Table, name: str) -> Stage:
    """Open ``directions/<name>`` and store the queries in it.

    Identified by the corpus and weights of the curvature stage, so blocks sharded later do not invalidate it.
    """
    keys = run.stage("curvature").store.read_json("stage.json")["keys"]
    about = {key: keys[key] for key in ("corpus", "weights")}
    stage = run.begin("directions", name, queries=fingerprint(table), **about)
    if not stage.store.exists("queries.parquet"):
        stage.store.write_table("queries.parquet", table)
    return stage


def queries_per_unit(gradient_bytes: int) -> int:
    """Number of queries per work unit, given the bytes of one query's gradient."""
    return max(1, min(MAX_QUERIES_PER_UNIT, UNIT_BYTES // max(1, gradient_bytes)))


def part_count(curvature: Store, queries: int) -> int:
    """Number of parts that the queries are split into; depends only on their count and the size of a gradient."""
    return -(-queries // queries_per_unit(gradient_bytes(curvature)))


def gradient_bytes(curvature: Store) -> int:
    """Bytes of one query's gradient at all sites."""
    return int(curvature.read_json("manifest.json")["gradient_bytes"])


def gradient_name(part: int) -> str:
    """Name of the file with a part's gradients, and of its done marker."""
    return f"gradients-{part:05d}"


def compute_directions(
    config: Config, blocks: Blocks, curvature: Store, stage: Stage, queries: int, actors: ActorPool
) -> None:
    """Compute and write the query gradients that are missing.

    Args:
        config: of the run.
        blocks: the pool; the Gauss–Newton matrix is taken over a sample of it.
        curvature: the finished ``curvature/`` store, with the sites.
        stage: ``directions/<name>``, begun, with ``queries.parquet``.
        queries: number of queries.
        actors: the actor pool.
    """
    there = set(stage.store.names(ending=".safetensors"))
    parts = range(part_count(curvature, queries))
    missing = [part for part in parts if f"{gradient_name(part)}.safetensors" not in there]
    if missing:
        with record_stage_costs(stage):
            results = actors.map(DirectionWorker, (config, blocks, actors.device, curvature, stage), missing)
            stage.remember(progress(results, "queries", len(missing), "parts"))


def clear_directions(run: Run, name: str) -> None:
    """Remove the gradients, which the finished tables do not need and which may be far larger than the tables."""
    run.stage("directions", name).clear_tensors()


def read_directions(stage: Stage, part: int) -> tuple[list[dict[str, Any]], Gradient]:
    """Read a part's query statuses, and by site the gradients (q, F, D) float32 of the queries that did not fail."""
    answers = stage.store.read_json(f"_done/{gradient_name(part)}.json")["answers"]
    return answers, stage.store.read_tensors(f"{gradient_name(part)}.safetensors")


class DirectionSolver(ModelWorker):
    """Computes query directions.

    Gradients are computed on the measured model (checkpoint interpolation), losses on the run's model.

    Args:
        config: of the run.
        blocks: the pool; the Gauss–Newton matrix is taken over a sample of it.
        device: of the models.
        curvature: the finished ``curvature/`` store.
        sites: its sites on the device; their W_in and W_out are not used.
    """

    load = staticmethod(load_measured_model)

    def __init__(
        self, config: Config, blocks: Blocks, device: str, curvature: Store, sites: tuple[Site, ...] | None = None
    ) -> None:
        super().__init__(config, blocks, device)
        self.sites = load_sites(curvature, SITES, self.model.device, whitening=False) if sites is None else sites
        self.curvature = curvature
        self.covered_blocks = int(curvature.read_json("manifest.json")["blocks"])
        self.trained = load_run_model(config, device)

    def prepare(self) -> None:
        """Load what the first solve would load."""
        if self.config.solve.steps:
            _ = self._damped
            self._gauss_newton.prepare()

    def directions(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Gradient]:
        """Directions of some queries (rows of queries.SCHEMA).

        Returns:
            Per query its id, status, error, ``base_loss`` and ``steps`` of the solve; and by site the directions
            (q, F, D) float32, on the CPU, of the queries that did not fail.
        """
        answers = [{**validate_query(self.model, row), "base_loss": None, "steps": None} for row in rows]
        waiting = [i for i, answer in enumerate(answers) if answer["status"] == "ok"]
        texts, gradients = signed_texts(rows, waiting), dict[int, Gradient]()
        for batch in batches([text for _, text, _ in texts], list(range(len(texts))), self.tokens):
            self._add_gradients([texts[k] for k in batch], answers, gradients)
        answered = [i for i in waiting if answers[i]["status"] == "ok"]
        steps, directions = self.config.solve.steps, [gradients.pop(i) for i in answered]
        solved = solve(directions, self._damped, self._gauss_newton if steps and directions else None, steps)
        release_freed_memory()  # a solve leaves gaps in the heap that larger buffers do not fit into
        for i, direction, result in zip(answered, directions, solved, strict=True):
            answers[i]["steps"] = result.steps if steps else None
            direction.update(self._kfac_preimage(result.direction))
        names = [site.name for site in self.sites] if directions else []
        return answers, {name: torch.stack([each.pop(name) for each in directions]).cpu() for name in names}

    def _add_gradients(
        self,
        texts: list[tuple[int, dict[str, Any], float]],
        answers: list[dict[str, Any]],
        gradients: dict[int, Gradient],
    ) -> None:
        """Add the losses of a batch of texts (query, text, sign) to ``answers``, and J to ``gradients`` by query."""
        ids, mask = padded([text for _, text, _ in texts], self.model.device)
        found, measured = site_gradients(self.model, self.sites, ids, mask)
        J = {site.name: J for site, J in found}
        losses = masked_mean(self.trained.token_losses(self.trained.read(ids), ids, mask), mask)
        sound, good = (losses.isfinite() & measured.isfinite()).tolist(), finite_rows(J.values()).tolist()
        for at, (i, _, sign) in enumerate(texts):
            answers[i]["base_loss"] = (answers[i]["base_loss"] or 0.0) + sign * float(losses[at])
            if not (sound[at] and good[at]):
                fail(answers[i], NOT_FINITE if sound[at] else LOSS_NOT_FINITE)
            elif i in gradients:
                gradients[i] = {name: each.add_(J[name][at], alpha=sign) for name, each in gradients[i].items()}
            else:
                gradients[i] = {name: each[at] for name, each in J.items()}

    @cached_property
    def _damped(self) -> list[DampedSite]:
        ekfac = load_ekfac(self.curvature, EIGENVALUES, self.model.device)
        return [DampedSite(site, self.config.solve.damping) for site in ekfac]

    def _kfac_preimage(self, direction: Gradient) -> Gradient:
        """Return (1 + c) H d, to which H⁻¹ is applied later; it is J(x) if κG + cΓ = (1 + c) H."""
        scale = 1 + self.config.solve.damping
        return {site.name: site.basis.kfac(direction.pop(site.name)).mul_(scale) for site in self._damped}

    @cached_property
    def _gauss_newton(self) -> GaussNewton:
        """The Gauss–Newton matrix over the finite blocks of a sample of the pool, read once per worker."""
        length = self.blocks.block_tokens
        ordinals = self.blocks.sample(-(-self.config.solve.tokens // length), self.config.seed, self.covered_blocks)
        size, tokens = linearised_at_once(self.config, self.model, length)
        good = np.concatenate(
            [self._has_finite_gradients(ordinals[at : at + size]) for at in range(0, len(ordinals), size)]
        )
        check_failed_blocks(ordinals[~good].tolist(), len(ordinals))
        ordinals = ordinals[good]
        found = [self.blocks.batch(ordinals[at : at + size]) for at in range(0, len(ordinals), size)]
        sample = [(self.tensors(batch.ids), self.tensors(batch.mask)) for batch in found]
        scale = curvature_scale([mask for _, mask in sample])  # of whole blocks, as H is
        pieces = [piece for ids, mask in sample for piece in cut_texts(ids, mask, tokens)]
        keep = linearised_kept(self.config, self.model, size, tokens)
        return GaussNewton(self.model, self.sites, pieces, scale, keep)

    def _has_finite_gradients(self, ordinals: np.ndarray) -> np.ndarray:
        """Return which blocks have finite losses and gradients, (n,) bool; a sum over the others would be NaN."""
        ids, mask = self.trimmed(self.blocks.batch(ordinals))
        gradients, losses = site_gradients(self.model, self.sites, ids, mask)
        return (finite_rows(J for _, J in gradients) & finite_losses(losses, mask)).cpu().numpy()


class DirectionWorker(DirectionSolver):
    """Writes the directions of a part's queries; their losses and errors go into the done marker."""

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store, stage: Stage) -> None:
        super().__init__(config, blocks, device, curvature)
        self.stage, self.unit = stage, queries_per_unit(gradient_bytes(curvature))
        self.table = stage.store.read_table("queries.parquet")

    def __call__(self, part: int) -> dict[str, Any]:
        """Process one part; returns its done marker."""
        started = time.monotonic()
        answers, tensors = self.directions(self.table.slice(part * self.unit, self.unit).to_pylist())
        # Marker before file: a part counts as done if its file exists, and clear_directions removes only files.
        marker = self.stage.mark(gradient_name(part), started, answers=answers)
        self.stage.store.write(f"{gradient_name(part)}.safetensors", tensor_bytes(tensors))
        return marker
