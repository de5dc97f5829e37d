"""Exact influence of blocks on queries: workers that take whole gradients at all sites and multiply them.

A unit of work is a group of queries and some blocks; the group's H⁻¹J are held, the blocks' J made and let go.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stride_ray.blocks import Batch, Blocks
from stride_ray.config import Config
from stride_ray.curvature import SITES, load_sites
from stride_ray.fitted import load_measured_model, load_run_model
from stride_ray.model import masked_mean
from stride_ray.passes import PoolWorker
from stride_ray.queries import NOT_FINITE, batches, checked, padded
from stride_ray.run import Stage
from stride_ray.sites import Site, influence, site_gradients
from stride_ray.storage import Store, tensor_bytes

# Queries whose H⁻¹J are made in one unit at most, and the bytes of these.
UNIT, UNIT_BYTES = 16, 2**29


@dataclass(frozen=True)
class Scoring:
    """A unit of work.

    Attributes:
        name: of its file and marker.
        group: the parts of queries that it is for.
        start, stop: ordinals of its blocks, where these follow each other; all of them are scored for all queries.
        ordinals: (n,) its blocks, ascending, where they are candidates; else None.
        wanted: (2, pairs) rows of the group's queries and places in ``ordinals`` that are scored.
    """

    name: str
    group: tuple[int, ...]
    start: int = 0
    stop: int = 0
    ordinals: NDArray[np.int64] | None = None
    wanted: NDArray[np.int32] | None = None

    @property
    def blocks(self) -> int:
        """How many blocks it takes gradients of."""
        return self.stop - self.start if self.ordinals is None else len(self.ordinals)


def queries_a_unit(gradient_bytes: int) -> int:
    """How many queries' H⁻¹J of so many bytes each are made in one unit."""
    return max(1, min(UNIT, UNIT_BYTES // max(1, gradient_bytes)))


def query_name(part: int) -> str:
    """The name of some queries' H⁻¹J, and of their marker."""
    return f"queries-{part:05d}"


class Scorer(PoolWorker):
    """A worker that takes J at all sites."""

    load = staticmethod(load_measured_model)

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store, stage: Stage) -> None:
        super().__init__(config, blocks, device)
        self.stage = stage
        self.sites = load_sites(curvature, SITES, self.model.device)

    def gradients(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> Iterator[tuple[Site, torch.Tensor]]:
        """J of each sequence, site by site."""
        return site_gradients(self.model, self.sites, ids_BT, mask_BT)[0]


class QueryWorker(Scorer):
    """Publishes H⁻¹ J of some queries, with their losses and errors."""

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store, stage: Stage) -> None:
        super().__init__(config, blocks, device, curvature, stage)
        self.table = stage.store.read_table("queries.parquet")
        self.trained = load_run_model(config, device)

    def __call__(self, unit: tuple[int, int, int, tuple[str | None, ...]]) -> dict[str, Any]:
        """Do one unit: its number, first query, how many, and the errors of those that failed before, else None."""
        started = time.monotonic()
        index, start, count, errors = unit
        rows = [
            row if error is None else {**row, "status": "failed", "error": error}
            for row, error in zip(self.table.slice(start, count).to_pylist(), errors, strict=True)
        ]
        answers = [{**checked(self.model, row), "base_loss": None} for row in rows]
        found: dict[str, list[torch.Tensor]] = {}
        waiting = [i for i, answer in enumerate(answers) if answer["status"] == "ok"]
        for batch in batches(rows, waiting, self.tokens):
            ids, mask = padded([rows[i] for i in batch], self.model.device)
            for site, J in self.gradients(ids, mask):
                found.setdefault(site.name, []).append(site.solved(J).flatten(1).cpu())
            losses = self.trained.token_losses(self.trained.read(ids), ids, mask)
            for i, loss in zip(batch, masked_mean(losses, mask).tolist(), strict=True):
                answers[i]["base_loss"] = loss
        tensors = {name: torch.cat(pieces) for name, pieces in found.items()}
        finite = torch.ones(len(waiting), dtype=torch.bool)
        for J in tensors.values():
            finite &= J.isfinite().all(1)
        for i, good in zip(waiting, finite.tolist(), strict=True):
            if not good:
                answers[i] |= {"status": "failed", "error": NOT_FINITE}
        name = query_name(index)
        self.stage.store.write(f"{name}.safetensors", tensor_bytes({k: v[finite] for k, v in tensors.items()}))
        return self.stage.mark(name, started, answers=answers)


class ScoreWorker(Scorer):
    """Scores a unit's blocks for a group of queries and publishes what is kept.

    Of consecutive blocks each query's ``attribute.top`` largest influences, of candidates all that are wanted:
    ``ordinals`` (Q, n) int64 and ``influence`` (Q, n) float32, nan where it is not wanted.
    """

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store, stage: Stage) -> None:
        super().__init__(config, blocks, device, curvature, stage)
        self.group: tuple[int, ...] = ()
        self.queries: dict[str, torch.Tensor] = {}

    def __call__(self, unit: Scoring) -> dict[str, Any]:
        """Do one unit; returns its marker."""
        started = time.monotonic()
        if unit.group != self.group:
            self.group, self.queries = unit.group, self._load(unit.group)
        pieces = []
        for batch in self._batches(unit) if self.queries else ():
            J = self.gradients(*self.trimmed(batch))
            pieces.append(influence(self.queries, J).cpu())
        scores = torch.cat(pieces, 1) if pieces else torch.zeros(0, unit.blocks)
        kept = self._largest(scores, unit.start) if unit.ordinals is None else _wanted(scores, unit)
        self.stage.store.write(f"{unit.name}.safetensors", tensor_bytes(kept))
        return self.stage.mark(unit.name, started, blocks=unit.blocks)

    def _batches(self, unit: Scoring) -> Iterator[Batch]:
        if unit.ordinals is None:
            return self.blocks.batches(unit.start, unit.stop, self.rows)
        return self.taken(unit.ordinals)

    def _largest(self, scores: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
        # Ties go by ordinal, whatever the unit: the order of equals must not depend on the sort.
        order = scores.abs().argsort(dim=1, descending=True, stable=True)[:, : self.config.attribute.top]
        return {"ordinals": order + start, "influence": scores.gather(1, order)}

    def _load(self, group: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """H⁻¹ J of a group's queries by site; nothing where all of them failed."""
        stored = [self.stage.store.read_tensors(f"{query_name(part)}.safetensors") for part in group]
        full = [tensors for tensors in stored if tensors]
        names = list(full[0]) if full else []
        # Each is let go when it was copied: together they may be half of what a worker has.
        return {name: torch.cat([tensors.pop(name) for tensors in full]).to(self.model.device) for name in names}


def _wanted(scores: torch.Tensor, unit: Scoring) -> dict[str, torch.Tensor]:
    kept = torch.full_like(scores, torch.nan)
    # What Ray hands over must not be written to, which torch does not know of.
    rows, places = torch.tensor(unit.wanted).long()
    kept[rows, places] = scores[rows, places]
    ordinals = torch.tensor(unit.ordinals).expand(scores.shape).contiguous()
    return {"ordinals": ordinals, "influence": kept}
