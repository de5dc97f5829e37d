"""Lexical matches from runs of equal words: weighted by rarity, with boilerplate removed.

A document's overlap with a field is the share of the field's words that the document's runs cover. Words are weighted
by inverse document frequency in the scanned corpus, log((1 + D) / (1 + d)), relative to a word in one document, but at
least by LEAST: where the leak itself makes its words common (in a small or templated corpus), one changed word must not
outweigh twenty copied ones.

An n-gram is boilerplate if at least ``scan.boilerplate`` documents from at least SOURCES sources contain it without
containing the field: their overlap is below the threshold, or the field has fewer than ``scan.words`` words and may be
a common phrase as a whole. A leak copied a thousand times is not boilerplate, since its documents contain all of it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stride_ray.contamination.items import Item
from stride_ray.contamination.lexical.ngrams import Field, fields_of
from stride_ray.contamination.lexical.search import RAW, Corpus, finished_searches, input_split_key
from stride_ray.runtime.options import ScanConfig
from stride_ray.runtime.run import Stage

MATCHES = pa.schema(
    [
        pa.field("set", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        *[RAW.field(name) for name in ("key", "field", "item_start", "item_stop")],
        *[RAW.field(name) for name in ("document_id", "source", "file", "place", "part", "start", "stop")],
        *[RAW.field(name) for name in ("excerpt", "excerpt_start")],
        pa.field("overlap", pa.float64(), nullable=False),
        pa.field("finding", pa.bool_(), nullable=False),
    ]
)
# Smallest weight of a word, as a share of the largest: 20 copied words of 21 are a finding, whichever word was changed.
LEAST = 0.15
# Minimum number of sources of boilerplate: repetition within one source may be a leak.
SOURCES = 3


@dataclass(frozen=True)
class Lexical:
    """Results of the lexical channel.

    Attributes:
        matches: MATCHES, a row per run, for all overlapping pairs of field and document; ``overlap`` is that of the
            pair, ``finding`` whether it reaches the threshold. Those without excerpts (search.MOST) are findings.
        overlaps: item key to its largest overlap.
        documents: number of documents read.
        rejected: number of rows rejected.
        rejects: the first of them, as sentences.
        boilerplate: number of n-grams left out as boilerplate.
        filtered: number of pairs of field and document that had only boilerplate in common.
        beyond: number of runs that have no excerpt (search.MOST).
        common: n-grams left out because too many fields contain them (ngrams.COMMON).
        short: keys of items with too few words to search for.
    """

    matches: pa.Table
    overlaps: dict[str, float]
    documents: int
    rejected: int
    rejects: tuple[str, ...]
    boilerplate: int
    filtered: int
    beyond: int
    common: int
    short: frozenset[str]


def lexical_matches(stage: Stage, corpus: Corpus, items: Sequence[Item], options: ScanConfig) -> Lexical:
    """Compute overlaps and findings from all runs that ``search`` found for these items in this corpus."""
    rows: list[dict[str, Any]] = []
    counts: dict[str, int] = defaultdict(int)
    holding: dict[str, int] = defaultdict(int)
    rejects: list[str] = []
    further: list[pa.Table] = []
    wanted = {item.key: item for item in items}
    keys = pa.array(list(wanted), pa.string())
    met = finished_searches(stage)
    for unit in corpus.units:
        held: dict[str, int] = {}
        markers = met.get(input_split_key(unit, corpus.columns), {})
        for name, marker in markers.items():
            if marker["rows"]:
                table = stage.store.read_table(f"{name}.parquet")
                table = table.filter(pc.is_in(table["key"], keys))
                shown = pc.not_equal(table["excerpt"], "")
                rows += table.filter(shown).to_pylist()
                further += [table.filter(pc.invert(shown))] if marker["beyond"] else []
            words = stage.store.read_table(f"{name}-words.parquet")
            held.update(zip(words["word"].to_pylist(), words["documents"].to_pylist(), strict=True))
            counts["beyond"] += marker["beyond"]
            counts["common"] = max(counts["common"], marker["common"])
        for word, number in held.items():
            holding[word] += number
        nothing: dict[str, Any] = {"documents": 0, "rejected": 0, "rejects": []}
        first = next(iter(markers.values()), nothing)
        counts["documents"] += first["documents"]
        counts["rejected"] += first["rejected"]
        rejects += first["rejects"]
    fields = {(f.key, f.name): f for item in items for f in fields_of(item, options.words, options.shortest)}
    weighed = _Weighing(fields, holding, counts["documents"], options)
    found = _matches_table(weighed.weigh(rows), wanted)
    beyond = [_to_matches(weighed.findings(table), wanted) for table in further]
    short = frozenset(wanted.keys() - {key for key, _ in fields})
    return Lexical(
        pa.concat_tables([found, *beyond]),
        weighed.overlaps,
        counts["documents"],
        counts["rejected"],
        tuple(rejects[:5]),
        weighed.boilerplate,
        weighed.filtered,
        counts["beyond"],
        counts["common"],
        short,
    )


class _Weighing:
    """Computes overlaps of fields and documents, and removes boilerplate."""

    def __init__(
        self, fields: dict[tuple[str, str], Field], holding: dict[str, int], documents: int, options: ScanConfig
    ) -> None:
        self.fields, self.options = fields, options
        self.holding, self.documents = holding, documents
        self.overlaps: dict[str, float] = {}
        # By field: its words' weights, and the positions of its n-grams that are boilerplate.
        self.weights_and_boilerplate: dict[tuple[str, str], tuple[np.ndarray, set[int]]] = {}
        self.boilerplate = self.filtered = 0

    def weigh(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return rows of RAW with ``overlap`` and ``finding`` added; rows that are only boilerplate are left out."""
        found: list[dict[str, Any]] = []
        by_field: dict[tuple[str, str], dict[tuple[str, str, int], list[dict[str, Any]]]] = {}
        for row in rows:
            documents = by_field.setdefault((row["key"], row["field"]), {})
            documents.setdefault((row["source"], row["file"], row["place"]), []).append(row)
        for name, documents in sorted(by_field.items()):
            found += self._weigh_field(self.fields[name], documents)
        return found

    def _weigh_field(
        self, field: Field, documents: dict[tuple[str, str, int], list[dict[str, Any]]]
    ) -> Iterable[dict[str, Any]]:
        weights = np.array([self._word_weight(word) for word in field.words.words])
        weights /= weights.sum()
        grams = {
            where: {place for run in runs for place in range(run["first_word"], run["stop_word"] - field.n + 1)}
            for where, runs in documents.items()
        }
        common = self._boilerplate(field, grams, weights)
        self.boilerplate += len(common)
        self.weights_and_boilerplate[field.key, field.name] = weights, common
        found: list[dict[str, Any]] = []
        for where, runs in sorted(documents.items()):
            left = grams[where] - common
            if not left:
                self.filtered += 1
                continue
            overlap = _overlap(left, field.n, weights)
            self.overlaps[field.key] = max(overlap, self.overlaps.get(field.key, 0.0))
            kept = [run for run in runs if left & set(range(run["first_word"], run["stop_word"] - field.n + 1))]
            found += [{**run, "overlap": overlap, "finding": overlap >= self.options.overlap} for run in kept]
        return found

    def findings(self, table: pa.Table) -> pa.Table:
        """Return the runs of findings among those without excerpts, with ``overlap`` and ``finding``.

        Args:
            table: rows of RAW in the order of the documents; their fields have been weighed.
        """
        names = ("file", "place", "key", "field", "first_word", "stop_word")
        runs = zip(*(table[name].to_pylist() for name in names), strict=True)
        kept: list[int] = []
        overlaps: list[float] = []
        for _, document in groupby(enumerate(runs), key=lambda each: each[1][:2]):
            by_field: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
            for row, (_, _, key, name, first, stop) in document:
                by_field.setdefault((key, name), []).append((row, first, stop))
            for (key, name), held in by_field.items():
                field, (weights, common) = self.fields[key, name], self.weights_and_boilerplate[key, name]
                left = {place for _, first, stop in held for place in range(first, stop - field.n + 1)} - common
                self.filtered += not left
                overlap = _overlap(left, field.n, weights)
                if left and overlap >= self.options.overlap:
                    copied = [row for row, first, stop in held if not left.isdisjoint(range(first, stop - field.n + 1))]
                    kept += copied
                    overlaps += [overlap] * len(copied)
                    self.overlaps[key] = max(overlap, self.overlaps.get(key, 0.0))
        found = table.take(pa.array(kept, pa.int64()))
        return found.append_column("overlap", pa.array(overlaps, pa.float64())).append_column(
            "finding", pa.array([True] * len(kept), pa.bool_())
        )

    def _boilerplate(self, field: Field, grams: dict[tuple[str, str, int], set[int]], weights: np.ndarray) -> set[int]:
        phrase = field.words.length < self.options.words
        holders: dict[int, set[tuple[str, str, int]]] = defaultdict(set)
        for where, places in grams.items():
            if phrase or _overlap(places, field.n, weights) < self.options.overlap:
                for place in places:
                    holders[place].add(where)
        return {
            place
            for place, wheres in holders.items()
            if len(wheres) >= self.options.boilerplate and len({source for source, *_ in wheres}) >= SOURCES
        }

    def _word_weight(self, word: str) -> float:
        """Return a word's weight, from LEAST to 1."""
        held = max(1, self.holding.get(word, 0))
        largest = float(np.log((1 + self.documents) / 2))
        return max(LEAST, float(np.log((1 + self.documents) / (1 + held))) / largest) if largest > 0 else 1.0


def _overlap(places: set[int], n: int, weights: np.ndarray) -> float:
    """Total weight of the words covered by n-grams at these positions."""
    covered = np.zeros(len(weights), bool)
    for place in places:
        covered[place : place + n] = True
    return float(min(1.0, round(weights[covered].sum(), 9)))


def _to_matches(found: pa.Table, items: dict[str, Item]) -> pa.Table:
    """Convert rows of RAW with overlaps to MATCHES."""
    keys = found["key"].to_pylist()
    found = found.append_column("set", pa.array([items[key].set_name for key in keys], pa.string()))
    found = found.append_column("item_id", pa.array([items[key].item_id for key in keys], pa.string()))
    return found.select(MATCHES.names).cast(MATCHES)


def _matches_table(found: list[dict[str, Any]], items: dict[str, Item]) -> pa.Table:
    """Build the MATCHES table, sorted by set, item, field and position."""
    named = ({**row, "set": items[row["key"]].set_name, "item_id": items[row["key"]].item_id} for row in found)
    order = ("set", "item_id", "field", "file", "place", "start", "item_start")
    rows = sorted(named, key=lambda row: tuple(row[name] for name in order))
    return pa.Table.from_pylist([{name: row[name] for name in MATCHES.names} for row in rows], MATCHES)
