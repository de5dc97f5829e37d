"""Exact influence of blocks on queries: workers that multiply unsketched gradients at all sites.

A work unit is a group of queries and some blocks. The group's H⁻¹J stay in memory; the blocks' J are computed and
freed batch by batch.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from stride_ray.attribution.directions import read_directions
from stride_ray.attribution.tables import SPANS, TOKENS, block_spans, ends_of, tokens_name
from stride_ray.corpus.blocks import Batch, Blocks
from stride_ray.corpus.failures import NOT_FINITE, fail, finite_losses, finite_rows
from stride_ray.corpus.tokenization.tokenizer import load_saved_tokenizer
from stride_ray.models.curvature.kfac import SITES, load_sites
from stride_ray.models.loading import load_measured_model
from stride_ray.models.pool_worker import ModelWorker
from stride_ray.models.query_batches import padded
from stride_ray.models.sites import Site, influence, scale_negative, site_gradients
from stride_ray.models.token_influence import query_token_influence, token_influence
from stride_ray.runtime.config import Config
from stride_ray.runtime.run import Stage
from stride_ray.runtime.storage import Store, tensor_bytes


@dataclass(frozen=True)
class ScoreUnit:
    """A work unit: blocks to score for a group of queries.

    Attributes:
        name: of its file and done marker.
        group: the query parts of the group.
        start, stop: range of block ordinals, all of which are scored for all queries; unused with ``ordinals``.
        ordinals: (n,) ascending ordinals of candidate blocks, or None for a range.
        wanted: (2, pairs) the pairs to keep with ``ordinals``: row among the group's valid queries, index into
            ``ordinals``.
    """

    name: str
    group: tuple[int, ...]
    start: int = 0
    stop: int = 0
    ordinals: NDArray[np.int64] | None = None
    wanted: NDArray[np.int32] | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks whose gradients the unit computes."""
        return self.stop - self.start if self.ordinals is None else len(self.ordinals)


def query_name(part: int) -> str:
    """Name of the file with a part's H⁻¹J, and of its done marker."""
    return f"queries-{part:05d}"


class QueryWorker:
    """Writes H⁻¹ times the directions of a part's queries, without those that failed."""

    def __init__(self, directions: Stage, device: str, curvature: Store, stage: Stage) -> None:
        self.directions, self.stage, self.device = directions, stage, device
        self.sites = load_sites(curvature, SITES, device)

    def __call__(self, unit: tuple[int, tuple[str | None, ...]]) -> dict[str, Any]:
        """Process a part, given its index and each query's error from earlier stages or None; returns its marker."""
        started = time.monotonic()
        part, errors = unit
        answers, gradients = read_directions(self.directions, part)
        tensors = precondition(self.sites, answers, gradients, errors)
        self.stage.store.write(f"{query_name(part)}.safetensors", tensor_bytes(tensors))
        return self.stage.mark(query_name(part), started, answers=answers)


def precondition(
    sites: tuple[Site, ...],
    answers: list[dict[str, Any]],
    directions: dict[str, torch.Tensor],
    errors: Sequence[str | None],
) -> dict[str, torch.Tensor]:
    """H⁻¹ times the directions of some queries.

    Args:
        sites: with the preconditioner, on their device.
        answers: the queries' statuses; one whose H⁻¹J is not finite is marked failed here, as is one with an error.
        directions: by site (q, F, D) float32, of the queries without "failed"; emptied.
        errors: each query's error from an earlier stage, or None.

    Returns:
        By site (q, F·D) float32 on the CPU, of the queries that have not failed by now.
    """
    rows = [i for i, answer in enumerate(answers) if answer["status"] == "ok"]
    tensors, finite = dict[str, torch.Tensor](), torch.ones(len(rows), dtype=torch.bool)
    for site in sites if directions else ():
        x = site.precondition(directions.pop(site.name).to(site.W_in.device)).flatten(1).cpu()
        tensors[site.name], finite = x, finite & finite_rows([x])
    for i, whole in zip(rows, finite.tolist(), strict=True):
        error = errors[i] or (None if whole else NOT_FINITE)
        if error is not None:
            fail(answers[i], error)
    kept = torch.tensor([answers[i]["status"] == "ok" for i in rows], dtype=torch.bool)
    return {name: x[kept] for name, x in tensors.items()}


class Scores(NamedTuple):
    """What a pass over n blocks finds for Q queries.

    Attributes:
        influence: (Q, n) float32 on the CPU; 0 for a block whose loss or gradient is not finite.
        losses: (n,) float32 on the CPU, the blocks' mean losses.
        not_finite: ordinals of the blocks that are not finite.
    """

    influence: torch.Tensor
    losses: torch.Tensor
    not_finite: list[int]


class BlockScorer(ModelWorker):
    """Multiplies H⁻¹J of queries, by site (Q, F·D) float32 on the model's device, with the gradients of blocks."""

    load = staticmethod(load_measured_model)

    def __init__(
        self, config: Config, blocks: Blocks, device: str, curvature: Store, sites: tuple[Site, ...] | None = None
    ) -> None:
        super().__init__(config, blocks, device)
        self.sites = load_sites(curvature, SITES, self.model.device) if sites is None else sites

    def scores(self, queries: dict[str, torch.Tensor], batches: Iterable[Batch]) -> "Scores":
        """Influence of the blocks on the queries, in order of the batches."""
        influences, losses, failed = [torch.zeros(len(next(iter(queries.values()))), 0)], [torch.zeros(0)], list[int]()
        for batch in batches:
            found, loss, good = self._score_batch(queries, batch)
            influences.append(found)
            losses.append(loss)
            failed += batch.ordinals[~good].tolist()
        return Scores(torch.cat(influences, 1), torch.cat(losses), failed)

    def _score_batch(
        self, queries: dict[str, torch.Tensor], batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Return influence (Q, B) and losses (B,) of a batch of blocks, and which of them are finite, (B,) bool."""
        ids, mask = self.trimmed(batch)
        gradients, losses = site_gradients(self.model, self.sites, ids, mask)
        good = finite_losses(losses, mask)

        def checked() -> Iterator[tuple[Site, torch.Tensor]]:
            nonlocal good
            for site, J in gradients:
                good = good & finite_rows([J])
                yield site, J

        scores = scale_negative(influence(queries, checked()), self.config.attribute.negative_scale)
        good = good & scores.isfinite().all(0)
        return scores.masked_fill(~good, 0.0).cpu(), losses.cpu(), good.cpu().numpy()

    def token_influence(self, query: dict[str, torch.Tensor], ordinals: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield blocks with their influence on one query by token, (T,) float32, which adds up to their influence."""
        for batch in self.batches_at(np.array(ordinals, dtype=np.int64)):
            found = token_influence(self.model, self.sites, query, *self.trimmed(batch))[0]
            sums = found.sum(1, keepdim=True)
            factors = torch.where(sums < 0, self.config.attribute.negative_scale, 1.0)
            yield from zip(batch.ordinals.tolist(), (found * factors).cpu().numpy(), strict=True)

    def query_token_influence(self, texts: list[dict[str, Any]], ordinals: list[int]) -> list[np.ndarray]:
        """Influence of some blocks together on the loss of each token of some texts, (T,) float32 each.

        As models.token_influence.query_token_influence.
        """
        sums = dict[str, torch.Tensor]()
        for batch in self.batches_at(np.array(ordinals, dtype=np.int64)):
            gradients, _ = site_gradients(self.model, self.sites, *self.trimmed(batch))
            for site, J in gradients:
                total = J.sum(0)
                sums[site.name] = sums[site.name].add_(total) if site.name in sums else total
        direction = {site.name: site.precondition(sums.pop(site.name)[None])[0] for site in self.sites}
        found = []
        for text in texts:
            ids, mask = padded([text], self.model.device)
            found.append(query_token_influence(self.model, self.sites, direction, ids, mask)[0].cpu().numpy())
        return found


class ScoreWorker(BlockScorer):
    """Scores a unit's blocks for a group of queries and writes the scores to keep.

    For a range of blocks these are the ``attribute.top`` largest scores of each query, for candidates all wanted pairs.
    The file holds ``ordinals`` (Q, n) int64 and ``influence`` (Q, n) float32, NaN for pairs that are not wanted. The
    done marker lists the blocks that are not finite (``not_finite``).
    """

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store, stage: Stage) -> None:
        super().__init__(config, blocks, device, curvature)
        self.stage = stage
        self.group: tuple[int, ...] = ()
        self.queries: dict[str, torch.Tensor] = {}

    def __call__(self, unit: ScoreUnit) -> dict[str, Any]:
        """Process one unit; returns its done marker."""
        started = time.monotonic()
        if unit.group != self.group:
            self.group, self.queries = unit.group, self._load_group(unit.group)
        none = Scores(torch.zeros(0, unit.blocks), torch.zeros(unit.blocks), [])
        scores = self.scores(self.queries, self._batches(unit)) if self.queries else none
        found = scores.influence
        kept = self._top_scores(found, unit.start) if unit.ordinals is None else wanted_scores(found, unit)
        self.stage.store.write(f"{unit.name}.safetensors", tensor_bytes(kept))
        return self.stage.mark(unit.name, started, blocks=unit.blocks, not_finite=scores.not_finite)

    def _batches(self, unit: ScoreUnit) -> Iterator[Batch]:
        if unit.ordinals is None:
            return self.blocks.batches(unit.start, unit.stop, self.rows)
        return self.batches_at(unit.ordinals)

    def _top_scores(self, scores: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
        # The stable sort breaks ties by ordinal, so the order does not depend on the unit.
        order = scores.abs().argsort(dim=1, descending=True, stable=True)[:, : self.config.attribute.top]
        return {"ordinals": order + start, "influence": scores.gather(1, order)}

    def _load_group(self, group: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Load H⁻¹ J of a group's queries by site; empty if all of them failed."""
        stored = [self.stage.store.read_tensors(f"{query_name(part)}.safetensors") for part in group]
        full = [tensors for tensors in stored if tensors]
        names = list(full[0]) if full else []
        # Free each tensor as it is copied: together they may take half of the worker's memory.
        return {name: torch.cat([tensors.pop(name) for tensors in full]).to(self.model.device) for name in names}


def wanted_scores(scores: torch.Tensor, unit: ScoreUnit) -> dict[str, torch.Tensor]:
    """Return the tensors to store for candidates: all scores (Q, n), NaN for pairs that are not wanted."""
    kept = torch.full_like(scores, torch.nan)
    # torch.tensor copies: arrays from Ray are read-only, which torch does not support.
    rows, places = torch.tensor(unit.wanted).long()
    kept[rows, places] = scores[rows, places]
    ordinals = torch.tensor(unit.ordinals).expand(scores.shape).contiguous()
    return {"ordinals": ordinals, "influence": kept}


class TokenWorker(BlockScorer):
    """Splits the influence of the blocks at both ends of a query's table among their tokens (tables.TOKENS, SPANS)."""

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store, stage: Stage) -> None:
        super().__init__(config, blocks, device, curvature)
        self.stage, self.answers = stage, stage.done()
        self.tokenizer = load_saved_tokenizer(blocks.store)

    def __call__(self, part: int) -> dict[str, Any]:
        """Process one part of the queries; returns its done marker."""
        started = time.monotonic()
        table = self.stage.store.read_table(f"influence-{part:05d}.parquet")
        stored = self.stage.store.read_tensors(f"{query_name(part)}.safetensors")
        answers = self.answers[query_name(part)]["answers"]
        names = [answer["query_id"] for answer in answers if answer["status"] == "ok"]
        rows, spans = list[dict[str, Any]](), list[dict[str, Any]]()
        for number, name in enumerate(names):
            query = {site: x[number : number + 1].to(self.model.device) for site, x in stored.items()}
            ends = ends_of(table.filter(pc.equal(table["query_id"], name)), self.config.attribute.tokens)
            split = dict(self.token_influence(query, ends))
            rows += [dict(zip(TOKENS.names, (name, *each), strict=True)) for each in split.items()]
            known = self.blocks.take(list(split), ["token_ids", "spans"]).to_pylist()
            spans += [{"query_id": name, **span} for span in block_spans(known, self.tokenizer, split)]
        self.stage.store.write_table(f"spans-{part:05d}.parquet", pa.Table.from_pylist(spans, SPANS))
        content = self.stage.store.write_table(f"{tokens_name(part)}.parquet", pa.Table.from_pylist(rows, TOKENS))
        return self.stage.mark(tokens_name(part), started, blocks=len(rows), sha256=content)
