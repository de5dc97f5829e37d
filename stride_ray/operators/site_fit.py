"""Fit of operators at every site: the preconditioner, then one pass over the pool that leaves one-bit rows.

The best operator of a subset is the mean of its members' whitened gradients (method.md, measured point 1), at every
site at once (point 6), seen through a sketch (sketch.py) and kept in one bit a coordinate (one_bit.py). Where the
budget has room for it each block is a subset of its own and the rows are an index of the pool; else a row is a
subset's.

Example: 1,600 blocks and ``operators.budget_gb = 2``. A block could take 1.3 MB, but beyond 64 KiB accuracy gains
little: rows are of blocks, 64 KiB each, and the store takes 105 MB. With ``budget_gb = 0.023`` and ``rows = "subsets"``
the same pool gets 1,000 rows of 24 KiB.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from stride_ray.corpus.blocks import Blocks, unit_count
from stride_ray.models.curvature.kfac import SITES, load_sites, save_sites
from stride_ray.models.curvature.sketch import largest_shape, sketch_shapes, sketched
from stride_ray.models.sites import Site
from stride_ray.operators.membership import membership_of
from stride_ray.operators.one_bit import Rows, packed_queries, products, row_bytes, word_starts
from stride_ray.operators.row_store import FORMAT, RowStore
from stride_ray.operators.sketched_rows import LAYOUT, SKETCH, RowWorker, SketchWorker, map_block_ranges, subset_rows
from stride_ray.operators.validation import SAMPLE, gap, members, with_targets
from stride_ray.runtime.actor_pool import ActorPool
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Stage
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import progress

# Bytes of a row beyond which accuracy gains little, for blocks and for subsets, whose sums are held in float32 while
# they are added up; and below which rows are of subsets (RESULTS.md, Operators).
MAX_BLOCK_ROW_BYTES, MAX_SUBSET_ROW_BYTES, MIN_BLOCK_ROW_BYTES = 64 * 1024, 24 * 1024, 1024
# Share of blocks whose gradients are not finite from which on the fit is refused.
MAX_NONFINITE_SHARE = 0.05


@dataclass(frozen=True)
class Layout:
    """What rows there are and how their coordinates are spread.

    Attributes:
        rows: "blocks" or "subsets". ``subsets``: K, how many rows.
        sites: their names. ``shapes``: a and b of each one's sketch. ``sizes``: their products.
        row_bytes: bytes of a row.
    """

    rows: str
    subsets: int
    sites: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]
    row_bytes: int


def rows_for(config: Config, n_blocks: int) -> tuple[bool, int, float]:
    """Whether rows are of blocks, how many there are, and the bytes that each may take."""
    options, budget = config.operators, config.operators.budget_gb * 2**30
    if options.rows == "blocks" or (options.rows == "auto" and budget / n_blocks >= MIN_BLOCK_ROW_BYTES):
        return True, n_blocks, min(budget / n_blocks, MAX_BLOCK_ROW_BYTES)
    K = config.membership.subsets
    return False, K, min(budget / K, MAX_SUBSET_ROW_BYTES)


def layout_of(config: Config, n_blocks: int, sites: tuple[Site, ...], shares: dict[str, float]) -> Layout:
    """The rows that the budget has room for.

    Raises:
        StrideError: for a budget that gives a site not even one coordinate, or fewer blocks than subsets.
    """
    of_blocks, K, room = rows_for(config, n_blocks)
    if n_blocks < K:
        raise StrideError(
            f"The pool has {n_blocks} blocks and membership.subsets asks for {K} subsets; there must be at least as "
            "many blocks as subsets: lower --subsets or shard more text."
        )
    coordinates = coordinates_in(room, len(sites))
    if coordinates < len(sites):
        fewer = "" if of_blocks else ", or lower membership.subsets"
        raise StrideError(
            f"operators.budget_gb = {config.operators.budget_gb:g} leaves {room:.0f} bytes to each of {K} rows, and a "
            f"row takes at least {row_bytes([1] * len(sites))}, a coordinate for each of {len(sites)} sites: "
            f"raise it{fewer}."
        )
    shapes = shapes_of(sites, shares, coordinates)
    sizes = tuple(a * b for a, b in shapes)
    names = tuple(site.name for site in sites)
    return Layout("blocks" if of_blocks else "subsets", K, names, tuple(shapes), sizes, row_bytes(sizes))


def coordinates_in(room: float, sites: int) -> int:
    """How many coordinates a row of so many bytes has: a site's section ends at a whole word, and has a scale."""
    return int(8 * (room - (8 + 4) * sites))


def shapes_of(sites: tuple[Site, ...], shares: dict[str, float], coordinates: int) -> list[tuple[int, int]]:
    """a and b of each site's sketch that so many coordinates are spread over (sketch.sketch_shapes)."""
    return sketch_shapes([largest_shape(site) for site in sites], [shares[site.name] for site in sites], coordinates)


def make_sketch(config: Config, curvature: Store, stage: Stage, n_blocks: int) -> dict[str, Any]:
    """Publish the sketch and the layout of rows."""
    sites = load_sites(curvature, SITES, "cpu")
    layout = layout_of(config, n_blocks, sites, curvature.read_json("manifest.json")["sites"])
    save_sites(stage.store, SKETCH, list(sketched(sites, layout.shapes, config.seed)))
    stage.store.write_json(LAYOUT, asdict(layout))
    return {"row_bytes": layout.row_bytes}


def fit_sites(config: Config, blocks: Blocks, curvature: Store, stage: Stage, actors: ActorPool) -> None:
    """Publish the rows and, last, ``metadata.json``; where that is there, add the rows of blocks that came since.

    Args:
        config: of the run.
        blocks: the pool.
        curvature: of the finished stage.
        stage: ``operators``, begun.
        actors: that do it.

    Raises:
        StrideError: as layout_of, or where too many blocks' gradients are not finite.
    """
    if not stage.store.exists(LAYOUT):
        progress(actors.map(partial, (make_sketch, config, curvature, stage), [len(blocks)]), "sketch", 1, "", _one)
    layout = stage.store.read_json(LAYOUT)
    known = stage.store.read_json("metadata.json") if stage.store.exists("metadata.json") else {}
    given, first = (config, blocks, stage, actors.device), known.get("blocks", 0)
    if layout["rows"] == "blocks":
        layout["subsets"] = len(blocks)
        ranges = blocks.cut(unit_count(len(blocks) - first), first)
        # A name says which blocks: were the pool to grow meanwhile, it would be cut elsewhere.
        names = [f"rows-{start:09d}-{stop:09d}" for start, stop in ranges]
        map_block_ranges(RowWorker, names, ranges, given, stage, actors)
        parts = names
    else:
        names, parts = subset_rows(given, layout["subsets"], actors)
    done = stage.done()
    failed = sum(done[name]["not_finite"] for name in names)
    if failed > MAX_NONFINITE_SHARE * (len(blocks) - first):
        raise StrideError(
            f"The gradients of {failed} of {len(blocks) - first} blocks are not finite (the first: block "
            f"{min(done[name]['spoilt'] for name in names if done[name]['not_finite'])}): the model overflows on this "
            "text; use model.dtype = float32 or bfloat16, or look at these blocks."
        )
    facts = {
        "format": FORMAT,
        "form": "sites",
        **layout,
        "method": "closed_form",
        "blocks": len(blocks),
        "corpus": blocks.manifest["fingerprint"],
        "not_finite": failed + known.get("not_finite", 0),
        "parts": known.get("parts", [])
        + [{"name": name, **{key: done[name][key] for key in ("first", "count", "hash")}} for name in parts],
    }
    judged = actors.map(FitValidator, given, [facts])
    progress(judged, "judge", 1, "fit", _one)


def _one(_: Any) -> int:
    return 1


class FitValidator(SketchWorker):
    """Measures whether rows answer to their own blocks, and publishes the store's metadata.

    Products are divided by both lengths: blocks' lengths differ a hundredfold, and a few would make up the whole mean.
    """

    def __call__(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Do it; returns the metadata."""
        sample = with_targets(self.blocks, self.blocks.sample(SAMPLE, self.config.seed + 1))
        pieces = [self.sections(*self.trimmed(batch)) for batch in self.batches_at(sample)]
        sections = [torch.cat(each).cpu().numpy() for each in zip(*pieces, strict=True)]
        good = np.stack([np.isfinite(each).all(1) for each in sections]).all(0)
        sections = [each[good] for each in sections]
        scales = [site.scale for site in self.sketches]
        queries = packed_queries([(z / scale).astype(np.float32) for z, scale in zip(sections, scales, strict=True)])
        rows, inside = self._rows(facts, sample[good])
        asked = sum(np.square(z, dtype=np.float64).sum(1) / scale for z, scale in zip(sections, scales, strict=True))
        held = np.square(rows.scales, dtype=np.float64) @ (np.array(facts["sizes"]) / np.array(scales))
        lengths = np.sqrt(np.multiply.outer(asked, held))
        answers = products(rows, queries, word_starts(facts["sizes"])).sum(2)
        found, error = gap(answers / np.maximum(lengths, 1e-300), inside)
        learned = bool(found > 2 * error)
        told = f"mean cosine with their own blocks minus that with others {found:+.3g} ± {error:.1g}"
        verdict = (
            f"The operators answer to their own blocks: {told}."
            if learned
            else f"WARNING: these operators do not tell their own blocks from others; estimates mean nothing: {told}."
        )
        judged = {"gap": found, "gap_error": error, "learned": learned, "verdict": verdict, "model": self.model.name}
        self.stage.store.write_json("metadata.json", {**facts, **judged})
        return {**facts, **judged}

    def _rows(self, facts: dict[str, Any], sample: np.ndarray) -> tuple[Rows, np.ndarray]:
        """The sample's own rows or all subsets', and which row is whose: (n, rows) bool."""
        store = RowStore(self.stage.store, facts)
        if store.of_blocks:
            return store.take(sample), np.eye(len(sample), dtype=bool)
        return store.take(np.arange(len(store))), members(membership_of(self.config), sample)
