"""Fit of operators at every site: one pass over the pool that writes one-bit rows of sketched, whitened gradients.

The best operator of a subset is the mean of its members' whitened gradients (docs/method.md), here at all sites,
projected to a sketch (sketch.py) and stored with one bit per coordinate (one_bit.py). If the budget allows, every block
is its own subset and the rows are a gradient index of the pool; otherwise there is a row per subset.

Example: 1,600 blocks and ``operators.budget_gb = 2``. The budget allows 1.3 MB per block, but accuracy gains little
beyond 64 KiB: rows are of blocks, 64 KiB each, and the store takes 105 MB. With ``budget_gb = 0.023`` and ``rows =
"subsets"`` the same pool gets 1,000 rows of 24 KiB.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from stride_ray.corpus.blocks import Blocks, unit_count
from stride_ray.corpus.failures import check_failed_blocks, failed_ordinals, write_failed_blocks
from stride_ray.models.curvature.eigenvalues import EIGENVALUES, load_ekfac
from stride_ray.models.curvature.kfac import SITES, load_sites, save_sites
from stride_ray.models.curvature.principal_axes import SiteAxes, principal_axes
from stride_ray.models.curvature.sketch import sketch_shapes, sketch_sites, whole_shape
from stride_ray.models.sites import Site
from stride_ray.operators.membership import membership_of
from stride_ray.operators.one_bit import Rows, estimate_inner_products, quantise_queries, row_bytes, word_starts
from stride_ray.operators.row_store import FORMAT, RowStore
from stride_ray.operators.sketched_rows import LAYOUT, SKETCH, RowWorker, SketchWorker, map_block_ranges, subset_rows
from stride_ray.operators.validation import SAMPLE, gap, membership_matrix, with_targets
from stride_ray.runtime.actor_pool import ActorPool
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.progress import progress
from stride_ray.runtime.run import Stage
from stride_ray.runtime.storage import Store

# Maximum bytes per row: accuracy gains little beyond them, and subsets' sums are accumulated in float32. Below the
# minimum, rows are of subsets (RESULTS.md, Operators at every site).
MAX_BLOCK_ROW_BYTES, MAX_SUBSET_ROW_BYTES, MIN_BLOCK_ROW_BYTES = 64 * 1024, 24 * 1024, 1024


@dataclass(frozen=True)
class Layout:
    """Number and kind of rows, and the coordinates of each site.

    Attributes:
        rows: "blocks" or "subsets". ``subsets``: K, the number of rows.
        sites: names. ``shapes``: a and b of each site's sketch. ``sizes``: their products.
        row_bytes: bytes per row.
    """

    rows: str
    subsets: int
    sites: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]
    row_bytes: int


def rows_for(config: Config, n_blocks: int) -> tuple[bool, int, float]:
    """Return whether rows are of blocks (else of subsets), the number of rows, and the maximum bytes per row."""
    options, budget = config.operators, config.operators.budget_gb * 2**30
    if options.rows == "blocks" or (options.rows == "auto" and budget / n_blocks >= MIN_BLOCK_ROW_BYTES):
        return True, n_blocks, min(budget / n_blocks, MAX_BLOCK_ROW_BYTES)
    K = config.membership.subsets
    return False, K, min(budget / K, MAX_SUBSET_ROW_BYTES)


def layout_of(
    config: Config,
    n_blocks: int,
    sites: tuple[Site, ...],
    axes: list[SiteAxes],
    shares: dict[str, float],
) -> Layout:
    """Return the layout of rows within the budget.

    Args:
        config: the run's configuration.
        n_blocks: blocks in the pool.
        sites: the sites, unsketched.
        axes: their principal axes.
        shares: site name to the site's share of the pool's influence.

    Raises:
        StrideError: the budget is below one coordinate per site, or there are fewer blocks than subsets.
    """
    of_blocks, K, room = rows_for(config, n_blocks)
    if n_blocks < K:
        raise StrideError(
            f"The pool has {n_blocks} blocks, fewer than membership.subsets = {K}; lower --subsets or shard more text."
        )
    coordinates = coordinates_in(room, len(sites))
    if coordinates < len(sites):
        fewer = "" if of_blocks else ", or lower membership.subsets"
        raise StrideError(
            f"operators.budget_gb = {config.operators.budget_gb:g} leaves {room:.0f} bytes for each of {K} rows, but a "
            f"row needs at least {row_bytes([1] * len(sites))} (one coordinate at each of {len(sites)} sites): raise "
            f"operators.budget_gb{fewer}."
        )
    shapes = shapes_of(sites, axes, shares, coordinates)
    sizes = tuple(a * b for a, b in shapes)
    names = tuple(site.name for site in sites)
    return Layout("blocks" if of_blocks else "subsets", K, names, tuple(shapes), sizes, row_bytes(sizes))


def coordinates_in(room: float, sites: int) -> int:
    """Return how many coordinates fit in ``room`` bytes; a site also takes a 4-byte scale and 8 bytes of padding."""
    return int(8 * (room - (8 + 4) * sites))


def shapes_of(
    sites: tuple[Site, ...], axes: list[SiteAxes], shares: dict[str, float], coordinates: int
) -> list[tuple[int, int]]:
    """Return (a, b) of each site's sketch for a total number of coordinates (sketch.sketch_shapes)."""
    return sketch_shapes(
        [whole_shape(each) for each in sites], axes, [shares[each.name] for each in sites], coordinates
    )


def make_sketch(config: Config, curvature: Store, stage: Stage, n_blocks: int) -> dict[str, Any]:
    """Publish the sketched sites and the layout of rows."""
    sites = load_sites(curvature, SITES, "cpu")
    axes = principal_axes(sites, load_ekfac(curvature, EIGENVALUES, "cpu"))
    layout = layout_of(config, n_blocks, sites, axes, curvature.read_json("manifest.json")["sites"])
    save_sites(stage.store, SKETCH, list(sketch_sites(sites, layout.shapes, config.seed, axes)))
    stage.store.write_json(LAYOUT, asdict(layout))
    return {"row_bytes": layout.row_bytes}


def fit_sites(config: Config, blocks: Blocks, curvature: Store, stage: Stage, actors: ActorPool) -> None:
    """Publish the rows and, last, ``manifest.json``; if that exists, append the rows of blocks added since.

    Args:
        config: the run's configuration.
        blocks: the pool.
        curvature: store of the finished curvature stage.
        stage: the ``operators`` stage, begun.
        actors: the actor pool to run on.

    Raises:
        StrideError: as layout_of, or if too many blocks have non-finite gradients.
    """
    if not stage.store.exists(LAYOUT):
        progress(actors.map_function(make_sketch, (config, curvature, stage), [len(blocks)]), "sketch", 1, "")
    layout = stage.store.read_json(LAYOUT)
    worker_arguments = (config, blocks, stage, actors.device)
    extended = stage.manifest() if stage.is_finished() else {}
    first = extended.get("blocks", 0)
    # The rows: units are the passes over the pool, parts the files of rows.
    if layout["rows"] == "blocks":
        layout["subsets"] = len(blocks)  # the file has the number of blocks of the first fit
        ranges = blocks.cut(unit_count(len(blocks) - first), first)
        # Names contain the range: if the pool grows in the meantime, the ranges change.
        units = [f"rows-{start:09d}-{stop:09d}" for start, stop in ranges]
        map_block_ranges(RowWorker, units, ranges, worker_arguments, stage, actors)
        parts = units
    else:
        units, parts = subset_rows(worker_arguments, layout["subsets"], actors)
    markers = stage.done()
    failed = [ordinal for unit in units for ordinal in markers[unit]["not_finite"]]
    check_failed_blocks(failed, len(blocks) - first)
    failed = sorted({*failed, *failed_ordinals(stage.store)})
    write_failed_blocks(stage.store, blocks, failed)
    fitted_parts = [{"name": name, **{key: markers[name][key] for key in ("first", "count", "hash")}} for name in parts]
    facts = {
        "format": FORMAT,
        "form": "sites",
        **layout,
        "method": "closed_form",
        "blocks": len(blocks),
        "corpus": blocks.manifest["fingerprint"],
        "not_finite": len(failed),
        "parts": extended.get("parts", []) + fitted_parts,
    }
    validated = actors.map(FitValidator, worker_arguments, [facts])
    progress(validated, "judge", 1, "fit")


class FitValidator(SketchWorker):
    """Validates that rows respond to their own blocks, and publishes the store's metadata.

    Compares cosines, because gradient norms differ a hundredfold between blocks: a few would dominate mean products.
    """

    def __call__(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Validate the rows described by ``facts``; returns the metadata."""
        sample, sections = self._sample_sketches()
        rows, member = self._rows_and_members(facts, sample)
        mean, error = gap(self._cosines(facts, sections, rows), member)
        learned = bool(mean > 2 * error)
        verdict = _verdict(learned, mean, error)
        validation = {"gap": mean, "gap_error": error, "learned": learned, "verdict": verdict, "model": self.model.name}
        self.stage.finish({**facts, **validation})
        return {**facts, **validation}

    def _sample_sketches(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the ordinals of sampled blocks with finite gradients, and their sketches by site, (n, a·b) each."""
        sample = with_targets(self.blocks, self.blocks.sample(SAMPLE, self.config.seed + 1))
        pieces, good = zip(*(self.sections(batch) for batch in self.batches_at(sample)), strict=True)
        sections = [torch.cat(each).cpu().numpy() for each in zip(*pieces, strict=True)]
        finite = np.concatenate(good)
        if not finite.any():
            check_failed_blocks(sample.tolist(), len(sample))
        return sample[finite], [each[finite] for each in sections]

    def _rows_and_members(self, facts: dict[str, Any], sample: np.ndarray) -> tuple[Rows, np.ndarray]:
        """Return the sampled blocks' rows, or those of all subsets, and which block is in which row: (n, rows) bool."""
        store = RowStore(self.stage.store, facts)
        if store.of_blocks:
            return store.take(sample), np.eye(len(sample), dtype=bool)
        return store.take(np.arange(len(store))), membership_matrix(membership_of(self.config), sample)

    def _cosines(self, facts: dict[str, Any], sections: list[np.ndarray], rows: Rows) -> np.ndarray:
        """Estimate the cosines of the sketches with the rows: (n, rows)."""
        scales = [site.scale for site in self.sketches]
        scaled = [(z / scale).astype(np.float32) for z, scale in zip(sections, scales, strict=True)]
        products = estimate_inner_products(rows, quantise_queries(scaled), word_starts(facts["sizes"])).sum(2)
        squares = zip(sections, scales, strict=True)
        sketch_norms_sq = sum(np.square(z, dtype=np.float64).sum(1) / scale for z, scale in squares)
        row_norms_sq = np.square(rows.scales, dtype=np.float64) @ (np.array(facts["sizes"]) / np.array(scales))
        return products / np.maximum(np.sqrt(np.multiply.outer(sketch_norms_sq, row_norms_sq)), 1e-300)


def _verdict(learned: bool, mean: float, error: float) -> str:
    measured = f"mean cosine with their own blocks minus that with others {mean:+.3g} ± {error:.1g}."
    if learned:
        return f"The operators respond to their own blocks: {measured}"
    return (
        "WARNING: these operators do not distinguish their own blocks from others; estimates are meaningless: "
        f"{measured}"
    )
