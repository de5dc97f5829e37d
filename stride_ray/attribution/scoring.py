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

from stride_ray.attribution.directions import read_directions
from stride_ray.corpus.blocks import Batch, Blocks
from stride_ray.corpus.queries import NOT_FINITE
from stride_ray.models.curvature.kfac import SITES, load_sites
from stride_ray.models.loading import load_measured_model
from stride_ray.models.pool_worker import ModelWorker
from stride_ray.models.sites import influence, site_gradients
from stride_ray.runtime.config import Config
from stride_ray.runtime.run import Stage
from stride_ray.runtime.storage import Store, tensor_bytes


@dataclass(frozen=True)
class ScoreUnit:
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


def query_name(part: int) -> str:
    """The name of some queries' H⁻¹J, and of their marker."""
    return f"queries-{part:05d}"


class QueryWorker:
    """Publishes H⁻¹ times some queries' directions, of those that did not fail."""

    def __init__(self, directions: Stage, device: str, curvature: Store, stage: Stage) -> None:
        self.directions, self.stage, self.device = directions, stage, device
        self.sites = load_sites(curvature, SITES, device)

    def __call__(self, unit: tuple[int, tuple[str | None, ...]]) -> dict[str, Any]:
        """Do one unit: the number of a part, and the errors of its queries that failed on the way here, else None."""
        started = time.monotonic()
        part, errors = unit
        answers, gradients = read_directions(self.directions, part)
        rows = [i for i, answer in enumerate(answers) if answer["status"] == "ok"]
        tensors, finite = dict[str, torch.Tensor](), torch.ones(len(rows), dtype=torch.bool)
        for site in self.sites if gradients else ():
            x = site.solved(gradients.pop(site.name).to(self.device)).flatten(1).cpu()
            tensors[site.name], finite = x, finite & x.isfinite().all(1)
        for i, whole in zip(rows, finite.tolist(), strict=True):
            error = errors[i] or (None if whole else NOT_FINITE)
            answers[i] |= {} if error is None else {"status": "failed", "error": error}
        kept = torch.tensor([answers[i]["status"] == "ok" for i in rows], dtype=torch.bool)
        name = query_name(part)
        self.stage.store.write(f"{name}.safetensors", tensor_bytes({k: x[kept] for k, x in tensors.items()}))
        return self.stage.mark(name, started, answers=answers)


class ScoreWorker(ModelWorker):
    """Scores a unit's blocks for a group of queries and publishes what is kept.

    Of consecutive blocks each query's ``attribute.top`` largest influences, of candidates all that are wanted:
    ``ordinals`` (Q, n) int64 and ``influence`` (Q, n) float32, nan where it is not wanted.
    """

    load = staticmethod(load_measured_model)

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store, stage: Stage) -> None:
        super().__init__(config, blocks, device)
        self.stage = stage
        self.sites = load_sites(curvature, SITES, self.model.device)
        self.group: tuple[int, ...] = ()
        self.queries: dict[str, torch.Tensor] = {}

    def __call__(self, unit: ScoreUnit) -> dict[str, Any]:
        """Do one unit; returns its marker."""
        started = time.monotonic()
        if unit.group != self.group:
            self.group, self.queries = unit.group, self._load(unit.group)
        pieces = []
        for batch in self._batches(unit) if self.queries else ():
            J = site_gradients(self.model, self.sites, *self.trimmed(batch))[0]
            pieces.append(influence(self.queries, J).cpu())
        scores = torch.cat(pieces, 1) if pieces else torch.zeros(0, unit.blocks)
        kept = self._largest(scores, unit.start) if unit.ordinals is None else _wanted(scores, unit)
        self.stage.store.write(f"{unit.name}.safetensors", tensor_bytes(kept))
        return self.stage.mark(unit.name, started, blocks=unit.blocks)

    def _batches(self, unit: ScoreUnit) -> Iterator[Batch]:
        if unit.ordinals is None:
            return self.blocks.batches(unit.start, unit.stop, self.rows)
        return self.batches_at(unit.ordinals)

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


def _wanted(scores: torch.Tensor, unit: ScoreUnit) -> dict[str, torch.Tensor]:
    kept = torch.full_like(scores, torch.nan)
    # What Ray hands over must not be written to, which torch does not know of.
    rows, places = torch.tensor(unit.wanted).long()
    kept[rows, places] = scores[rows, places]
    ordinals = torch.tensor(unit.ordinals).expand(scores.shape).contiguous()
    return {"ordinals": ordinals, "influence": kept}
