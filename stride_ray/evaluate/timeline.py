"""When was it learnt? Losses and influence of a query set's blocks at every checkpoint of a training.

At each of ``model.checkpoints`` (in the order of training) a query and its blocks have a loss, and the blocks an
influence on the query: that of ``solve.steps = 0``, with gradients of the checkpoint and the preconditioner of the
trained model. A block is *learnt at* the checkpoint at which its loss falls most steeply, compared with the mean loss
of a sample of the pool, since early in training every loss falls; a query likewise.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stride_ray.attribution.attribute import TIMELINE_FILE, table_stage, write_page
from stride_ray.attribution.directions import DirectionSolver, gradient_bytes, queries_per_unit
from stride_ray.attribution.scoring import BlockScorer, precondition
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.documents import shown_name
from stride_ray.corpus.queries import fingerprint
from stride_ray.evaluate.tailpatch import successful_queries, top_rows
from stride_ray.models.causal_lm import masked_mean
from stride_ray.models.curvature.kfac import SITES, load_sites
from stride_ray.models.download import model_fingerprint
from stride_ray.runtime.actor_pool import shared_actor_pool
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Run, Stage, claim
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import redact_url

# The folder in a run; one folder per query set in it.
FOLDER = "timeline"
# Most helpful blocks of each query that are followed, and blocks of the pool that they are compared with.
FOLLOWED, COMPARED = 5, 64
TIMELINE = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("checkpoint", pa.int32(), nullable=False),
        pa.field("query_loss", pa.float32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("block_loss", pa.float32(), nullable=False),
        pa.field("influence", pa.float32(), nullable=False),
        pa.field("pool_loss", pa.float32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Learnt:
    """When a query and one of its blocks were learnt.

    Attributes:
        query_id: of the query. ``rank``: of the block among its most helpful.
        document_id, source: of the block.
        query_at, block_at: index of the checkpoint at which each was learnt.
        query_losses, block_losses, influences: by checkpoint.
    """

    query_id: str
    rank: int
    document_id: str
    source: str
    query_at: int
    block_at: int
    query_losses: NDArray[np.float64]
    block_losses: NDArray[np.float64]
    influences: NDArray[np.float64]


def timeline(run: Run, name: str, out: TextIO | None = None) -> list[Learnt]:
    """Follow each query's FOLLOWED most helpful blocks through ``model.checkpoints``.

    Writes ``timeline/NAME/timeline-*.parquet`` (TIMELINE), a file per checkpoint and part of the queries; interrupted,
    it resumes there. Then the query set's page shows the curves.

    Args:
        run: with finished influence for ``name``, and ``model.checkpoints``.
        name: the query set.
        out: stream for a sentence on what it will cost, before it begins; None: none is printed.

    Raises:
        StrideError: influence is not finished, every query failed, or there are fewer than two checkpoints.
    """
    checkpoints = run.config.model.checkpoints
    if len(checkpoints) < 2:
        raise StrideError(
            f"A timeline needs at least two checkpoints and has {len(checkpoints)}; name their folders in the order of "
            "training: --checkpoints step-100 --checkpoints step-200."
        )
    queries = successful_queries(run, name)
    run.require(table_stage(run), name)
    blocks, curvature = Blocks(run.stage("blocks").store), run.stage("curvature").store
    keys = {
        "corpus": blocks.manifest["fingerprint"],
        "queries": fingerprint(pa.Table.from_pylist(queries)),
        "checkpoints": [model_fingerprint(each) for each in checkpoints],
    }
    stage = claim(run.store.child(f"{FOLDER}/{name}"), FOLDER, keys)
    tops = top_rows(run, name, FOLLOWED)
    if out is not None:
        followed = len({row["ordinal"] for rows in tops.values() for row in rows})
        print(
            f"{len(checkpoints)} checkpoints, at each a forward and backward pass of {len(queries)} queries and "
            f"{followed} blocks, and a forward pass of {COMPARED} more.",
            file=out,
            flush=True,
        )
    size = queries_per_unit(gradient_bytes(curvature))
    parts = [queries[at : at + size] for at in range(0, len(queries), size)]
    units = {
        f"{checkpoint:03d}-{part:05d}": (checkpoint, part, rows, [tops.get(row["query_id"], []) for row in rows])
        for checkpoint in range(len(checkpoints))
        for part, rows in enumerate(parts)
    }
    with shared_actor_pool(run.config, len(units)) as actors:
        given = (run.config, blocks, actors.device, curvature, stage)
        run_missing(stage, units, partial(actors.map, CheckpointWorker, given), "timeline", "passes")
    stage.finish({"checkpoints": [redact_url(each) for each in checkpoints], "queries": len(queries)})
    found = _learnt(pa.concat_tables([stage.store.read_table(f"timeline-{unit}.parquet") for unit in units]))
    run.stage(table_stage(run), name).store.write_json(TIMELINE_FILE, _for_page(found, checkpoints))
    write_page(run, name)
    return found


class CheckpointWorker:
    """Writes losses and influences of some queries and their blocks at a checkpoint."""

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store, stage: Stage) -> None:
        self.config, self.given, self.stage = config, (blocks, device, curvature), stage
        self.sites, self.checkpoint = load_sites(curvature, SITES, device), -1

    def __call__(self, unit: tuple[int, int, list[dict[str, Any]], list[list[dict[str, Any]]]]) -> dict[str, Any]:
        """Process a unit: the checkpoint, the part, its queries and their rows of the influence table."""
        started = time.monotonic()
        checkpoint, part, queries, tops = unit
        if checkpoint != self.checkpoint:
            self._load(checkpoint)
        answers, directions = self.solver.directions(queries)
        found = precondition(self.sites, answers, directions, [None] * len(queries))
        failed = next((answer for answer in answers if answer["status"] != "ok"), None)
        if failed is not None:
            where = redact_url(self.config.model.checkpoints[checkpoint])
            raise StrideError(f"At the checkpoint {where}, query {failed['query_id']!r} fails: {failed['error']}.")
        ordinals = np.array(sorted({row["ordinal"] for rows in tops for row in rows}), dtype=np.int64)
        device = self.scorer.model.device
        scores = self.scorer.scores({name: x.to(device) for name, x in found.items()}, self.scorer.batches_at(ordinals))
        rows = []
        for number, (answer, followed) in enumerate(zip(answers, tops, strict=True)):
            for row in followed:
                at = int(np.searchsorted(ordinals, row["ordinal"]))
                kept = {key: row[key] for key in ("query_id", "rank", "ordinal", "document_id", "source")}
                losses = {"query_loss": answer["base_loss"], "block_loss": float(scores.losses[at])}
                influence = float(scores.influence[number, at])
                rows.append(
                    {**kept, **losses, "pool_loss": self.pool_loss, "checkpoint": checkpoint, "influence": influence}
                )
        name = f"{checkpoint:03d}-{part:05d}"
        digest = self.stage.store.write_table(f"timeline-{name}.parquet", pa.Table.from_pylist(rows, TIMELINE))
        return self.stage.mark(name, started, queries=len(queries), sha256=digest)

    def _load(self, checkpoint: int) -> None:
        blocks, device, curvature = self.given
        there = {"model.path": self.config.model.checkpoints[checkpoint], "model.start": "", "solve.steps": 0}
        config = self.config.updated(there)
        self.scorer = BlockScorer(config, blocks, device, curvature, self.sites)
        self.solver = DirectionSolver(config, blocks, device, curvature, self.sites)
        self.checkpoint = checkpoint
        losses = self._losses(blocks.sample(COMPARED, self.config.seed))
        self.pool_loss = float(np.mean(losses[np.isfinite(losses)]))

    def _losses(self, ordinals: np.ndarray) -> np.ndarray:
        """Mean loss of each block's targets, nats."""
        found, model = [np.zeros(0)], self.scorer.model
        for batch in self.scorer.batches_at(ordinals):
            ids, mask = self.scorer.trimmed(batch)
            found.append(masked_mean(model.token_losses(model.read(ids), ids, mask), mask).cpu().numpy())
        return np.concatenate(found)


def learnt_at(losses: NDArray[np.float64], pool: NDArray[np.float64]) -> int:
    """Index of the checkpoint at which a loss fell most steeply, compared with the pool's mean loss.

    Example: losses 5, 4, 1 and 1 beside the pool's 5, 4, 3 and 2 fell by 2 more than the pool's at checkpoint 2.

    Args:
        losses: (C,) by checkpoint.
        pool: (C,) mean loss of a sample of the pool.
    """
    return int(np.argmin(np.diff(losses - pool))) + 1


def _learnt(table: pa.Table) -> list[Learnt]:
    """Each query's blocks, in order of the table's first checkpoint."""
    found = []
    for (query, _), rows in table.to_pandas().groupby(["query_id", "ordinal"], sort=False):
        rows = rows.sort_values("checkpoint")
        columns = {
            name: rows[name].to_numpy(np.float64) for name in ("query_loss", "block_loss", "influence", "pool_loss")
        }
        query_losses, block_losses, influences, pool = columns.values()
        first = rows.iloc[0]
        found.append(
            Learnt(
                query_id=query,
                rank=int(first["rank"]),
                document_id=first["document_id"],
                source=first["source"],
                query_at=learnt_at(query_losses, pool),
                block_at=learnt_at(block_losses, pool),
                query_losses=query_losses,
                block_losses=block_losses,
                influences=influences,
            )
        )
    return sorted(found, key=lambda each: (each.query_id, each.rank))


def _for_page(found: list[Learnt], checkpoints: Sequence[str]) -> dict[str, Any]:
    """``checkpoints``, their names; and ``queries``: by id, where it was learnt, its losses, and so for its blocks."""
    queries: dict[str, dict[str, Any]] = {}
    for each in found:
        fresh = {"at": each.query_at, "losses": each.query_losses.tolist(), "blocks": []}
        queries.setdefault(each.query_id, fresh)["blocks"].append(
            {
                "document_id": each.document_id,
                "source": each.source,
                "at": each.block_at,
                "losses": each.block_losses.tolist(),
                "influences": each.influences.tolist(),
            }
        )
    return {"checkpoints": _names(checkpoints), "queries": queries}


def _names(checkpoints: Sequence[str]) -> list[str]:
    """The last part of each checkpoint's path."""
    return [redact_url(each).rstrip("/").rpartition("/")[2] for each in checkpoints]


def as_text(found: list[Learnt], checkpoints: Sequence[str]) -> str:
    """A table of queries and blocks: losses at each checkpoint, and where each was learnt."""
    names = _names(checkpoints)
    lines = [f"| | learnt at | {' | '.join(f'loss at {name}' for name in names)} |", "|---" * (2 + len(names)) + "|"]
    last = ""
    for each in found:
        if each.query_id != last:
            last = each.query_id
            lines.append(_line(f"**{each.query_id}**", names[each.query_at], each.query_losses))
        lines.append(_line(shown_name(each.source, each.document_id), names[each.block_at], each.block_losses))
    return "\n".join(lines)


def _line(what: str, at: str, losses: NDArray[np.float64]) -> str:
    return f"| {what} | {at} | {' | '.join(f'{loss:.3f}' for loss in losses)} |"
