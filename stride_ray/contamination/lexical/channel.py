"""Lexical matches from runs of equal words: weighted by rarity, with boilerplate removed.

A document's overlap with a field is the share of the field's words that the document's runs cover. Words are weighted
by inverse document frequency in the scanned corpus, log((1 + D) / (1 + d)), relative to a word in one document, but at
least by LEAST: where the leak itself makes its words common (in a small or templated corpus), one changed word must not
outweigh twenty copied ones.

An n-gram is boilerplate if at least ``scan.boilerplate`` documents from at least SOURCES sources contain it without
containing the field: their overlap is below the threshold. A leak copied a thousand times is not boilerplate, since its
documents contain all of it. Which of the other matches are copies, copies.py decides.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stride_ray.contamination.items import Item
from stride_ray.contamination.lexical.copies import (
    COPY,
    SOURCES,
    Match,
    Public,
    Stretch,
    Where,
    covered,
    is_near,
    kind_of,
    public_text,
    role,
    site,
)
from stride_ray.contamination.lexical.ngrams import Field, fields_of
from stride_ray.contamination.lexical.search import RAW, Corpus, finished_searches, input_split_key
from stride_ray.contamination.lexical.words import joined, passages
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
        pa.field("kind", pa.string(), nullable=False),  # copies.KINDS
        pa.field("near", pa.bool_(), nullable=False),  # whether the document has the answer near, or the question
    ]
)
# Smallest weight of a word, as a share of the largest: 20 copied words of 21 are a finding, whichever word was changed.
LEAST = 0.15


@dataclass(frozen=True)
class Lexical:
    """Results of the lexical channel.

    Attributes:
        matches: MATCHES, a row per run, for all overlapping pairs of field and document; ``overlap`` is that of the
            pair, ``kind`` what it amounts to. Those without excerpts (search.MOST) are copies.
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
    answered = {item.key for item in items if joined(passages(item.answer)).words}
    weighed = _Weighing(fields, answered, holding, counts["documents"], options)
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


class _Known(NamedTuple):
    """What the matches with excerpts show of a field."""

    weights: np.ndarray
    boilerplate: frozenset[int]
    public: Public


class _Weighing:
    """Computes overlaps of fields and documents, removes boilerplate, and decides what is a copy."""

    def __init__(
        self,
        fields: dict[tuple[str, str], Field],
        answered: set[str],
        holding: dict[str, int],
        documents: int,
        options: ScanConfig,
    ) -> None:
        self.fields, self.answered, self.options = fields, answered, options
        self.holding, self.documents = holding, documents
        self.overlaps: dict[str, float] = {}
        self.known: dict[tuple[str, str], _Known] = {}
        self.boilerplate = self.filtered = 0

    def weigh(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return rows of RAW with ``overlap`` and ``kind`` added; rows that are only boilerplate are left out."""
        found: list[dict[str, Any]] = []
        by_field: dict[tuple[str, str], dict[Where, list[dict[str, Any]]]] = {}
        stretches: dict[tuple[str, Where], list[Stretch]] = defaultdict(list)
        for row in rows:
            where = (row["source"], row["file"], row["place"])
            by_field.setdefault((row["key"], row["field"]), {}).setdefault(where, []).append(row)
            stretches[row["key"], where].append(Stretch(row["field"], row["part"], row["start"], row["stop"]))
        for (key, name), documents in sorted(by_field.items()):
            beside = {
                where: self._beside(key, name, stretches[key, where], any(run["near"] for run in runs))
                for where, runs in documents.items()
            }
            found += self._weigh_field(self.fields[key, name], documents, beside)
        return found

    def _beside(self, key: str, name: str, found: Sequence[Stretch], short: bool) -> tuple[bool | None, bool]:
        """Match.near and Match.material of a field in a document, given all runs of the item's fields there."""
        near = is_near(name, found, short, key in self.answered)
        return near, any(role(each.field) == "material" for each in found)

    def _weigh_field(
        self, field: Field, documents: dict[Where, list[dict[str, Any]]], beside: dict[Where, tuple[bool | None, bool]]
    ) -> Iterable[dict[str, Any]]:
        weights = np.array([self._word_weight(word) for word in field.words.words])
        weights /= weights.sum()
        all_grams = {where: _grams(field, [_words_of(run) for run in runs]) for where, runs in documents.items()}
        boilerplate = self._boilerplate(field, all_grams, weights)
        grams = {where: found - boilerplate for where, found in all_grams.items()}
        matches = {
            where: Match(left, beside[where][0], _overlap(field, left, weights), beside[where][1])
            for where, left in grams.items()
        }
        known = _Known(weights, boilerplate, public_text(field, matches, self.options.overlap))
        self.boilerplate += len(boilerplate)
        self.known[field.key, field.name] = known
        found: list[dict[str, Any]] = []
        for where, runs in sorted(documents.items()):
            if not grams[where]:
                self.filtered += 1
                continue
            overlap, kind = self._decide(field, matches[where], known)
            kept = [run for run in runs if not grams[where].isdisjoint(_grams(field, [_words_of(run)]))]
            found += [{**run, "overlap": overlap, "kind": kind, "near": bool(beside[where][0])} for run in kept]
        return found

    def _decide(self, field: Field, match: Match, known: _Known) -> tuple[float, str]:
        """Return a match's overlap and kind, and keep the item's largest overlap."""
        self.overlaps[field.key] = max(match.overlap, self.overlaps.get(field.key, 0.0))
        return match.overlap, kind_of(field, match, known.public, self.options.overlap, self.options.words)

    def findings(self, table: pa.Table) -> pa.Table:
        """Return the runs of copies among those without excerpts, with ``overlap`` and ``kind``.

        Args:
            table: rows of RAW in the order of the documents; their fields have been weighed.
        """
        names = ("file", "place", "key", "field", "first_word", "stop_word", "near", "part", "start", "stop")
        runs = zip(*(table[name].to_pylist() for name in names), strict=True)
        kept: list[int] = []
        overlaps: list[float] = []
        nears: list[bool] = []
        for _, document in groupby(enumerate(runs), key=lambda each: each[1][:2]):
            by_key: dict[str, dict[str, list[tuple[int, tuple[int, int], bool]]]] = {}
            stretches: dict[str, list[Stretch]] = defaultdict(list)
            for row, (_, _, key, name, first, stop, near, *at) in document:
                by_key.setdefault(key, {}).setdefault(name, []).append((row, (first, stop), near))
                stretches[key].append(Stretch(name, *at))
            for (key, name), held in (((k, n), h) for k, by_name in by_key.items() for n, h in by_name.items()):
                field, known = self.fields[key, name], self.known[key, name]
                left = _grams(field, [words for _, words, _ in held]) - known.boilerplate
                self.filtered += not left
                if not left:
                    continue
                near, material = self._beside(key, name, stretches[key], any(near for *_, near in held))
                match = Match(left, near, _overlap(field, left, known.weights), material)
                overlap, kind = self._decide(field, match, known)
                if kind == COPY:
                    copied = [row for row, words, _ in held if not left.isdisjoint(_grams(field, [words]))]
                    kept += copied
                    overlaps += [overlap] * len(copied)
                    nears += [bool(near)] * len(copied)
        found = table.take(pa.array(kept, pa.int64())).drop_columns(["near"])
        columns = {"overlap": pa.array(overlaps, pa.float64()), "near": pa.array(nears, pa.bool_())}
        for name, values in {**columns, "kind": pa.array([COPY] * len(kept), pa.string())}.items():
            found = found.append_column(name, values)
        return found

    def _boilerplate(self, field: Field, grams: dict[Where, frozenset[int]], weights: np.ndarray) -> frozenset[int]:
        holders: dict[int, set[Where]] = defaultdict(set)
        for where, places in grams.items():
            if _overlap(field, places, weights) < self.options.overlap:
                for place in places:
                    holders[place].add(where)
        return frozenset(
            place
            for place, wheres in holders.items()
            if len(wheres) >= self.options.boilerplate and len({site(source) for source, *_ in wheres}) >= SOURCES
        )

    def _word_weight(self, word: str) -> float:
        """Return a word's weight, from LEAST to 1."""
        held = max(1, self.holding.get(word, 0))
        largest = float(np.log((1 + self.documents) / 2))
        return max(LEAST, float(np.log((1 + self.documents) / (1 + held))) / largest) if largest > 0 else 1.0


def _words_of(run: dict[str, Any]) -> tuple[int, int]:
    return run["first_word"], run["stop_word"]


def _grams(field: Field, runs: Iterable[tuple[int, int]]) -> frozenset[int]:
    """Positions of the field's n-grams in runs of its words, (first, stop) each."""
    return frozenset(place for first, stop in runs for place in range(first, stop - field.n + 1))


def _overlap(field: Field, places: frozenset[int], weights: np.ndarray) -> float:
    """Total weight of the words covered by n-grams at these positions."""
    return float(min(1.0, round(weights[covered(field, places)].sum(), 9)))


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
