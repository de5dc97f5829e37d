"""Choose documents from a ranking, batch by batch, and record the reason for each of them in a manifest.

Filters come first (taken in an earlier round, harmful), then the remaining budget, the source's quota, and
near-duplicates of selected documents. A document that does not fit is skipped; smaller ones after it may still fit.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import SelectConfig
from stride_ray.runtime.storage import Store, seal
from stride_ray.selection.database import PLAIN, Database
from stride_ray.selection.duplicates import Name, NearDuplicateIndex

MANIFEST = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("place", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("rank", pa.int64(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("best_rank", pa.int32()),
        pa.field("mean_influence", pa.float64()),
        pa.field("share_helped", pa.float64()),
        pa.field("near_duplicate_of", pa.string()),
        pa.field("near_duplicate_source", pa.string()),
        pa.field("round", pa.int32()),
    ]
)
# Sources in a summary.
SUMMARY_SOURCES = 50
# Reason codes: the first three are for documents that are kept. ``reasons`` has their texts in this order.
KEPT, KEPT_SMALL, KEPT_UNNAMED, EARLIER, BELOW, BOTTOM, NO_BUDGET, QUOTA, NEAR_DUPLICATE, NOT_DRAWN = range(10)


@dataclass
class Tally:
    """Totals of a selection.

    Attributes:
        documents, tokens: selected.
        sources: the same for those of the SUMMARY_SOURCES sources with the most selected tokens.
        stratum_tokens: selected tokens per stratum (ranking.rank_documents).
        reasons: number of documents per reason, as worded in the manifest.
        harmful: selected documents whose mean influence is below zero.
    """

    documents: int = 0
    tokens: int = 0
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    stratum_tokens: Counter[str | None] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    harmful: int = 0


class Chooser(Protocol):
    """Decides on the documents of a ranking, batch by batch."""

    def codes(self, batch: pa.Table) -> tuple[np.ndarray, list[Name | None] | None]:
        """Return the reason code of each document in the next batch (ranking.ORDERED), and its near-duplicate."""


class GreedyChooser:
    """Greedy choice: takes documents in rank order.

    Args:
        options: limits, filters, quotas; validated by ``check_options``.
        documents, tokens: totals of the pool, for limits given as shares of it.
        scored: number of documents that appear in an influence table, for ``drop = bottom``.
        folder: a local folder for the index of near-duplicates; None: it is kept in memory.
    """

    def __init__(
        self, options: SelectConfig, documents: int, tokens: int, scored: int, folder: str | None = None
    ) -> None:
        self.options = options
        self.documents, self.tokens = _limit(options.documents, documents), _limit(options.tokens, tokens)
        self.counts_tokens = self.tokens < math.inf
        self.whole = self.tokens if self.counts_tokens else self.documents
        self.quotas = read_quotas(options)
        self.left: dict[str, float] = {}
        self.taken = NearDuplicateIndex(options.near_duplicates, folder) if options.near_duplicates else None
        self.spared = scored - _share(options.drop_at, scored) if options.drop == "bottom" else scored
        self.named = 0
        self.passed_over = False

    def codes(self, batch: pa.Table) -> tuple[np.ndarray, list[Name | None] | None]:
        """See Chooser."""
        named = np.asarray(batch["mean_influence"].is_valid())
        codes = np.where(named, KEPT, KEPT_UNNAMED).astype(np.int8)
        if self.options.drop == "below":
            score = batch["score"].to_numpy(zero_copy_only=False)
            codes[named & (score < self.options.drop_at)] = BELOW
        elif self.options.drop == "bottom":
            codes[named & (self.named + np.cumsum(named) > self.spared)] = BOTTOM
            self.named += int(named.sum())
        codes[np.asarray(batch["taken_round"].is_valid())] = EARLIER
        if self.whole == math.inf and self.taken is None:
            return codes, None
        if self.documents < 1 or not (batch["tokens"].to_numpy() <= self.tokens).any():
            codes[codes <= KEPT_UNNAMED] = NO_BUDGET
            self.passed_over = True
            return codes, None
        return codes, self._take(batch, codes)

    def _take(self, batch: pa.Table, codes: np.ndarray) -> list[Name | None] | None:
        """Decide document by document, since each decision depends on those before; updates ``codes`` in place."""
        alike: list[Name | None] | None = [None] * batch.num_rows if self.taken is not None else None
        tokens = batch["tokens"].to_pylist()
        sources = batch["source"].to_pylist()
        for i in np.flatnonzero(codes <= KEPT_UNNAMED).tolist():
            size = tokens[i]
            cost = size if self.counts_tokens else 1
            if self.documents < 1 or size > self.tokens:
                codes[i] = NO_BUDGET
                self.passed_over = True
                continue
            if self.quotas and cost > self._room(sources[i]):
                codes[i] = QUOTA
                continue
            if self.taken is not None and alike is not None:
                stored = batch["signature"][i].as_py()
                alike[i] = self.taken.like(stored)
                if alike[i] is not None:
                    codes[i] = NEAR_DUPLICATE
                    continue
                self.taken.add((sources[i], batch["document_id"][i].as_py()), stored)
            if self.passed_over and codes[i] == KEPT:
                codes[i] = KEPT_SMALL
            self.documents -= 1
            self.tokens -= size
            if self.quotas:
                self.left[sources[i]] -= cost
        return alike

    def _room(self, source: str) -> float:
        """Return what is left of a source's quota: tokens if tokens are limited, else documents."""
        if source not in self.left:
            share = self.quotas.get(source, self.quotas.get("*", math.inf))
            self.left[source] = _share(share, self.whole) if share < math.inf else math.inf
        return self.left[source]


class RandomChooser:
    """Takes documents in the given (random) order up to a number of tokens per stratum, which is never exceeded.

    Args:
        tokens: number of tokens per stratum.
    """

    def __init__(self, tokens: Mapping[str | None, int]) -> None:
        self.left = dict(tokens)
        self.missing = sum(tokens.values())

    def codes(self, batch: pa.Table) -> tuple[np.ndarray, list[Name | None] | None]:
        """See Chooser."""
        codes = np.full(batch.num_rows, NOT_DRAWN, np.int8)
        codes[np.asarray(batch["taken_round"].is_valid())] = EARLIER
        if self.missing:
            strata, tokens = batch["stratum"].to_pylist(), batch["tokens"].to_pylist()
            for i in np.flatnonzero(codes == NOT_DRAWN).tolist():
                if tokens[i] <= self.left.get(strata[i], 0):
                    codes[i] = KEPT
                    self.left[strata[i]] -= tokens[i]
                    self.missing -= tokens[i]
        return codes, None


def write_manifest(
    chooser: Chooser, ordered: Iterable[pa.Table], words: list[str], number: int, store: Store, database: Database
) -> tuple[Tally, str]:
    """Decide on all documents and write ``manifest.parquet``, with rows in the order of the decisions.

    Args:
        chooser: a new one; it is stateful.
        ordered: batches of the documents (ranking.ORDERED).
        words: the reason text for each code.
        number: this selection's round, recorded for the documents that it takes.
        store: where the manifest goes.
        database: for the temporary file, and for sums over its rows: a source may have a single document.

    Returns:
        The totals, and the manifest's SHA-256.
    """
    tally, path, rank = Tally(), os.path.join(database.folder, "manifest.parquet"), 0
    with pq.ParquetWriter(path, MANIFEST, compression="zstd", write_page_checksum=True) as writer:
        for batch in ordered:
            codes, alike = chooser.codes(batch)
            like = alike or [None] * len(codes)
            kept = codes <= KEPT_UNNAMED
            _count(tally, batch, codes, kept, words)
            taken_round = batch["taken_round"].to_numpy(zero_copy_only=False)
            columns = {
                "kept": kept,
                "reason": pa.array(words).take(pa.array(codes)),
                "rank": np.arange(rank + 1, rank + 1 + len(codes)),
                "near_duplicate_of": pa.array([name and name[1] for name in like], pa.string()),
                "near_duplicate_source": pa.array([name and name[0] for name in like], pa.string()),
                "round": pa.array(np.where(kept, number, taken_round), from_pandas=True).cast(pa.int32()),
            }
            rows = [columns.get(name, batch[name] if name in batch.column_names else None) for name in MANIFEST.names]
            writer.write_table(pa.table(rows, schema=MANIFEST), row_group_size=max(1, len(codes)))
            rank += len(codes)
    seal(path)
    found = database.run(
        f"""SELECT source, count(*), sum(tokens)::BIGINT FROM read_parquet('{path}', {PLAIN}) WHERE kept
            GROUP BY source ORDER BY sum(tokens) DESC, source LIMIT {SUMMARY_SOURCES}"""
    )
    tally.sources = {source: {"documents": count, "tokens": tokens} for source, count, tokens in found.fetchall()}
    return tally, store.put("manifest.parquet", path)


def _count(tally: Tally, batch: pa.Table, codes: np.ndarray, kept: np.ndarray, words: list[str]) -> None:
    for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
        tally.reasons[words[code]] += int(count)
    taken = batch.filter(pa.array(kept))
    tally.documents += taken.num_rows
    influence = taken["mean_influence"].to_numpy(zero_copy_only=False)
    tally.harmful += int((influence < 0).sum())
    if taken.num_rows:
        for row in taken.group_by("stratum").aggregate([("tokens", "sum")]).to_pylist():
            tally.tokens += row["tokens_sum"]
            tally.stratum_tokens[row["stratum"]] += row["tokens_sum"]


def reasons(options: SelectConfig, drawn: bool = False) -> list[str]:
    """Return the reason text for each code."""
    by = {"rank": "best rank", "mean": "mean influence", "share": "share of queries helped"}[options.by]
    limits = {"documents": options.documents, "tokens": options.tokens}
    asked = [
        f"{limit:.0f} {what}" if limit >= 1 else f"{100 * limit:g} % of the pool's {what}"
        for what, limit in limits.items()
        if limit
    ]
    return [
        "drawn at random" if drawn else f"taken by {by}",
        f"taken by {by}, fits the budget left by larger ones",
        "taken without influence on any query",
        "taken by an earlier selection",
        f"score below {options.drop_at:g}",
        f"among the worst {options.drop_at:g} of the documents that have a score",
        f"no room left for it in the {' and '.join(asked)} asked for",
        "no room left for it in its source's quota",
        "near-duplicate of a document taken before",
        "not drawn",
    ]


def check_options(options: SelectConfig) -> None:
    """Validate the options.

    Raises:
        StrideError: no size or filter is given, a value is out of range, or two options contradict each other.
    """
    sized = options.documents or options.tokens
    if not sized and options.drop == "none":
        raise StrideError("Say how much to take: select.documents, select.tokens, or what to drop with select.drop.")
    for key, size in (("documents", options.documents), ("tokens", options.tokens)):
        if size > 1 and size != int(size):
            raise StrideError(f"select.{key} is {size:g}, neither a share below 1 nor a whole number.")
    if options.drop == "below" and options.by == "rank":
        raise StrideError("A rank has no threshold; use select.by = mean or share, or select.drop = bottom.")
    if options.drop == "bottom" and not 0 < options.drop_at < 1:
        raise StrideError(f"select.drop_at is {options.drop_at:g}; as a share to drop it must lie between 0 and 1.")
    if options.drop != "none" and options.temperature:
        raise StrideError("select.temperature draws documents and select.drop filters them; use one of the two.")
    if options.quotas and not sized:
        raise StrideError("Quotas are shares of a size; give select.documents or select.tokens too.")
    if options.near_duplicates > 1:
        raise StrideError(f"select.near_duplicates is {options.near_duplicates:g}; it is a similarity, at most 1.")
    read_quotas(options)


def read_quotas(options: SelectConfig) -> dict[str, float]:
    """Parse the quotas: maximum share of the requested size per source, ``*`` for all other sources.

    Raises:
        StrideError: a quota is not a share from 0 to 1.
    """
    found = {}
    for source, text in options.quotas.items():
        try:
            found[source] = float(text)
        except ValueError:
            found[source] = math.nan
        if not 0 <= found[source] <= 1:
            raise StrideError(f"The quota of the source {source!r} is {text!r}; it must be a share from 0 to 1.")
    return found


def _limit(asked: float, whole: int) -> float:
    """Resolve a size option: 0 is no limit, below 1 a share of the whole, else a number."""
    return math.inf if not asked else _share(asked, whole) if asked < 1 else math.floor(asked)


def _share(part: float, whole: float) -> int:
    """The whole number of items in a share, exactly: 0.29 of 100 is 29, and the product of floats less than that."""
    return math.floor(Decimal(repr(part)) * int(whole))


def kept_places(manifest: pq.ParquetFile) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield part and place of a manifest's kept documents, in batches."""
    for batch in manifest.iter_batches(columns=["part", "place", "kept"]):
        table = pa.Table.from_batches([batch]).filter(batch["kept"])
        yield table["part"].to_numpy(), table["place"].to_numpy()
