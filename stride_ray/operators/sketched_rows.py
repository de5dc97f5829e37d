"""Rows of operators at every site: a block's sketched gradient, or the mean over the blocks of a subset.

A subset's mean needs the whole pool, and its float32 sum is many times larger than its row. The pool is therefore
processed in waves of up to WAVE work units. Each unit writes the sums of its blocks to disk; after a wave these are
added to the totals of the earlier waves, unit by unit, and deleted. Units and waves depend only on the pool, so the
order of summation is the same for any number of workers and after a restart.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stride_ray.corpus.blocks import Batch, Blocks
from stride_ray.corpus.failures import finite_losses, finite_rows
from stride_ray.models.curvature.kfac import load_sites
from stride_ray.models.curvature.sketch import sketched_gradients
from stride_ray.models.loading import load_measured_model
from stride_ray.models.pool_worker import ModelWorker
from stride_ray.operators.closed_form import add_to_subsets
from stride_ray.operators.membership import membership_of
from stride_ray.operators.one_bit import Rows, pack_rows
from stride_ray.operators.row_store import write_rows
from stride_ray.runtime.actor_pool import ActorPool
from stride_ray.runtime.config import Config
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Stage
from stride_ray.runtime.storage import tensor_bytes

# Subsets' sums: maximum blocks per unit, minimum number of units (if the pool has as many shards), units per wave,
# rows per file.
MAX_BLOCKS_PER_UNIT, MIN_UNITS, WAVE, ROWS = 65_536, 16, 64, 128
SKETCH, LAYOUT = "sketch", "layout.json"


def subset_rows(given: tuple[Any, ...], subsets: int, actors: ActorPool) -> tuple[list[str], list[str]]:
    """Publish the rows of all subsets; returns the names of the units over the pool and of the parts of rows."""
    config, blocks, stage, _ = given
    ranges = blocks.cut(max(min(MIN_UNITS, len(blocks.shards())), -(-len(blocks) // MAX_BLOCKS_PER_UNIT)))
    names = [f"sum-{index:05d}" for index in range(len(ranges))]
    starts = list(range(0, subsets, ROWS))
    parts = [f"rows-{index:05d}" for index in range(len(starts))]
    waves = [slice(at, at + WAVE) for at in range(0, len(names), WAVE)]

    def sum_and_reduce(wave: int, left: list[Any]) -> Iterator[dict[str, Any]]:
        map_block_ranges(SumWorker, names[waves[wave]], ranges[waves[wave]], given, stage, actors)
        return reduce_wave(wave, left)

    def reduce_wave(wave: int, left: list[Any]) -> Iterator[dict[str, Any]]:
        arguments = (config, blocks, stage, names[waves[wave]], wave, waves[wave] == waves[-1])
        yield from actors.map_function(add_sums, arguments, left)
        # Later waves have not started, so only this wave's sums exist.
        stage.clear_tensors("sum-")
        stage.clear_tensors(f"total-{wave - 1:05d}-")

    for wave, units in enumerate(waves):
        added = parts if units == waves[-1] else [total_name(wave, index) for index in range(len(starts))]
        run_missing(
            stage, dict(zip(added, enumerate(starts), strict=True)), partial(sum_and_reduce, wave), "reduce", "parts"
        )
    for name in ("sum-", "total-"):  # a killed run may have left some
        stage.clear_tensors(name)
    return names, parts


def total_name(wave: int, part: int) -> str:
    """File name of one part's sums over all waves up to ``wave``."""
    return f"total-{wave:05d}-{part:05d}"


def map_block_ranges(
    make: Any, names: list[str], ranges: list[tuple[int, int]], given: tuple[Any, ...], stage: Stage, actors: ActorPool
) -> None:
    """Run ``make(*given)`` on the ordinal ranges whose unit in ``names`` has no done marker yet."""
    units = {name: (name, *ordinals) for name, ordinals in zip(names, ranges, strict=True)}
    run_missing(stage, units, partial(actors.map, make, given), "fit", "blocks", lambda unit: unit[2] - unit[1])


class SketchWorker(ModelWorker):
    """A worker that computes sketches of per-example gradients."""

    load = staticmethod(load_measured_model)

    def __init__(self, config: Config, blocks: Blocks, stage: Stage, device: str) -> None:
        super().__init__(config, blocks, device)
        self.stage = stage
        self.sketches = load_sites(stage.store, SKETCH, self.model.device)

    def sections(self, batch: Batch) -> tuple[list[Tensor], np.ndarray]:
        """Return the sketches (B, a·b) by site, zero for non-finite blocks, and which blocks are finite, (B,) bool."""
        ids, mask = self.trimmed(batch)
        found, losses = sketched_gradients(self.model, self.sketches, ids, mask)
        good = finite_rows(found) & finite_losses(losses, mask)
        for section in found:
            section[~good] = 0.0
        return found, good.cpu().numpy()


class RowWorker(SketchWorker):
    """Publishes a row for every block of a range."""

    def __call__(self, unit: tuple[str, int, int]) -> dict[str, Any]:
        """Process one range; returns its done marker."""
        started = time.monotonic()
        name, start, stop = unit
        pieces, failed = [], list[int]()
        for batch in self.blocks.batches(start, stop, self.rows):
            sections, good = self.sections(batch)
            failed += batch.ordinals[~good].tolist()
            pieces.append(pack_rows([section.cpu().numpy() for section in sections]))
        rows = Rows(np.concatenate([p.bits for p in pieces]), np.concatenate([p.scales for p in pieces]))
        facts = {"hash": write_rows(self.stage.store, name, rows), "first": start, "count": len(rows)}
        return self.stage.mark(name, started, blocks=stop - start, not_finite=failed, **facts)


class SumWorker(SketchWorker):
    """Publishes the sums of the sketches of a range's blocks by subset, ROWS subsets per file."""

    def __call__(self, unit: tuple[str, int, int]) -> dict[str, Any]:
        """Process one range; returns its done marker."""
        started = time.monotonic()
        name, start, stop = unit
        membership, failed = membership_of(self.config), list[int]()
        sums = torch.zeros(membership.subsets + 1, sum(self.stage.store.read_json(LAYOUT)["sizes"]))
        for batch in self.blocks.batches(start, stop, self.rows):
            sections, good = self.sections(batch)
            failed += batch.ordinals[~good].tolist()
            add_to_subsets(sums, torch.cat(sections, 1).cpu(), membership.columns_at(batch.ordinals))
        for index, rows in enumerate(sums[:-1].split(ROWS)):
            self.stage.store.write(f"{name}-{index:05d}.safetensors", tensor_bytes({"sums": rows}))
        return self.stage.mark(name, started, blocks=stop - start, not_finite=failed)


def add_sums(
    config: Config, blocks: Blocks, stage: Stage, units: list[str], wave: int, last: bool, part: tuple[int, int]
) -> dict[str, Any]:
    """Add a wave's sums for ROWS subsets, in unit order, to the earlier total; for the last wave, publish the rows."""
    started = time.monotonic()
    index, first = part
    before = [f"{total_name(wave - 1, index)}.safetensors"] if wave else []
    total: Any = 0.0
    for file in (*before, *(f"{unit}-{index:05d}.safetensors" for unit in units)):
        total = total + stage.store.read_tensors(file)["sums"]
    if not last:
        stage.store.write(f"{total_name(wave, index)}.safetensors", tensor_bytes({"sums": total}))
        return stage.mark(total_name(wave, index), started)
    sizes = membership_of(config).sizes(len(blocks))[first : first + ROWS]
    means = total.numpy() / np.maximum(sizes, 1)[:, None].astype(np.float32)
    ends = np.cumsum(stage.store.read_json(LAYOUT)["sizes"])[:-1]
    rows, name = pack_rows(np.split(means, ends, axis=1)), f"rows-{index:05d}"
    facts = {"hash": write_rows(stage.store, name, rows), "first": first, "count": len(rows)}
    return stage.mark(name, started, **facts)
