"""The page of a night's scan: outcome, trend over nights, and the items that are not clean, with their evidence.

A page stays below 5 MB: items and excerpts beyond the byte budget are left out and counted.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stride_ray.contamination.compare import Difference, line
from stride_ray.contamination.items import Item
from stride_ray.contamination.lexical.channel import Lexical
from stride_ray.contamination.lexical.copies import COPY
from stride_ray.contamination.lexical.ngrams import fields_of
from stride_ray.contamination.lexical.search import AROUND
from stride_ray.contamination.summary import HEAD, NOTE, about, headline, set_rows
from stride_ray.contamination.verdicts import CLEAN
from stride_ray.report.page import embedded, render

# Byte budgets: rows of findings, rows of clean items, and everything including evidence.
FOUND_BYTES, CLEAN_BYTES, ALL_BYTES = 2_000_000, 1_000_000, 4_500_000
# Maximum documents per item, passages per document and field, and characters per passage and per item text.
DOCUMENTS, PASSAGES, PASSAGE, TEXT = 5, 3, 1200, 4000
_QUESTION = 120
# Columns of a row for the page's script; named as in verdicts.VERDICTS, but for item, mark, note, short.
_ROW = (
    *"key alarm review item mark note short set verdict leaked question overlap documents first_document".split(),
    *"first_source contrast p q loss memorised share ordinal tied_document tied_source error".split(),
)


def scan_page(
    facts: dict[str, Any],
    table: pa.Table,
    lexical: Lexical,
    items: Sequence[Item],
    found: Difference,
    history: Sequence[dict[str, Any]],
) -> str:
    """Render the page of a night.

    Args:
        facts: the night's manifest (nightly.scan).
        table: its verdicts.
        lexical: results of the lexical channel.
        items: all scanned items.
        found: difference from the last reported scan.
        history: manifests of earlier nights, oldest first.

    Returns:
        Self-contained HTML.
    """
    findings, clean = _page_rows(facts, table, lexical, found)
    kept, near = _rows_within(findings, FOUND_BYTES), _rows_within(clean, CLEAN_BYTES)
    rows = [[row[name] for name in _ROW] for row in (*kept, *near)]
    evidence = _Evidence(lexical, items, [row["key"] for row in (*kept, *near)], facts["options"])
    sets, trend = set_rows(facts), _trend([*history, facts])
    shown, left_out = evidence.within_budget(len(kept), ALL_BYTES - _json_bytes([rows, sets, trend]))
    data = {
        "columns": _ROW,
        "rows": rows,
        "evidence": shown,
        "trend": trend,
        "asked": facts["influence"] is not None,
        "since": facts["since"],
        "options": facts["options"],
        "night": facts["night"],
    }
    total = sum(row["mark"] != "resolved" for row in findings)
    return render(
        "scan",
        data,
        facts=facts,
        headline=headline(facts),
        level="none" if facts["new"] or facts["changed"] else "" if total else "good",
        note=NOTE,
        head=HEAD,
        sets=sets,
        about=about(facts),
        listed=(len(kept), len(findings)),
        clean=(len(near), len(clean)),
        left_out=left_out,
    )


def _page_rows(
    facts: dict[str, Any], table: pa.Table, lexical: Lexical, found: Difference
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows of findings (new, changed, unchanged, resolved) and of clean items, closest to a finding first."""
    now = {row["key"]: row for row in table.to_pylist()}
    marks: dict[str, tuple[str, str]] = {row["key"]: ("new", "") for row in found.new}
    marks |= {row["key"]: ("changed", f"{row['before']} in {facts['since']}") for row in found.changed}
    resolved = {row["key"]: row for row in found.resolved}
    for key, row in resolved.items():
        named = len(f"{row['set']} / {row['item_id']}: ")
        marks[key] = ("resolved", f"{line(row)[named:]} in {facts['since']}")
    places = {"new": 0, "changed": 1, "": 2}
    listed = [row for row in now.values() if row["verdict"] != CLEAN]
    listed.sort(key=lambda row: places[marks.get(row["key"], ("", ""))[0]])
    listed += [now.get(key) or {**row, "verdict": "gone"} for key, row in resolved.items()]
    clean = [row for key, row in now.items() if row["verdict"] == CLEAN and key not in resolved]
    clean.sort(key=lambda row: (-row["overlap"], 2.0 if row["q"] is None else row["q"]))

    def page_row(row: dict[str, Any]) -> dict[str, Any]:
        mark, note = marks.get(row["key"], (None, ""))
        values = {name: _json_value(row.get(name)) for name in _ROW}
        extra = {"key": row["key"], "item": row["item_id"], "mark": mark, "note": note}
        return {**values, **extra, "question": row["question"][:_QUESTION], "short": row["key"] in lexical.short}

    return [page_row(row) for row in listed], [page_row(row) for row in clean]


def _json_value(value: Any) -> Any:
    """Make a value fit for JSON: floats with four digits, None if not finite."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def _rows_within(rows: list[dict[str, Any]], room: int) -> list[dict[str, Any]]:
    """Return the leading rows that fit into ``room`` bytes."""
    kept = []
    for row in rows:
        room -= _json_bytes([row[name] for name in _ROW])
        if room < 0:
            break
        kept.append(row)
    return kept


def _json_bytes(value: Any) -> int:
    return len(embedded(value).encode()) + 1


class _Evidence:
    """Evidence for the page's items, in page order: their texts, and excerpts of the documents that contain them."""

    def __init__(self, lexical: Lexical, items: Sequence[Item], keys: list[str], options: dict[str, Any]) -> None:
        self.keys, self.options = keys, options
        self.items = {item.key: item for item in items}
        self.matches: dict[str, list[dict[str, Any]]] = {}
        chosen = lexical.matches.filter(pc.is_in(lexical.matches["key"], pa.array(keys, pa.string())))
        for row in chosen.filter(pc.not_equal(chosen["excerpt"], "")).to_pylist():
            self.matches.setdefault(row["key"], []).append(row)

    def within_budget(self, findings: int, room: int) -> tuple[dict[int, dict[str, Any]], int]:
        """Return the evidence that fits the byte budget, filled round-robin; clean items come last.

        Every finding gets one document before any gets a second.

        Args:
            findings: number of leading rows that are findings.
            room: budget in bytes.

        Returns:
            Evidence by row index, and the number of documents left out for lack of room.
        """
        shown: dict[int, dict[str, Any]] = {}
        left_out = 0
        for group in (range(findings), range(findings, len(self.keys))):
            waiting = {i: self._documents(self.keys[i]) for i in group if self.keys[i] in self.items}
            for place in range(DOCUMENTS):
                for i, documents in waiting.items():
                    added = documents[place : place + 1]
                    content = added if place else {"texts": self._texts(self.keys[i]), "copies": added}
                    size = _json_bytes(content)
                    if size > room or (place and i not in shown):
                        left_out += len(added)
                        continue
                    room -= size
                    if isinstance(content, dict):
                        shown[i] = content
                    else:
                        shown[i]["copies"] += content
        return shown, left_out

    def _texts(self, key: str) -> list[list[str]]:
        """Return the item's [field name, text] pairs."""
        item = self.items[key]
        texts = {"question": item.question}
        texts |= {f"choice {i}": choice for i, choice in enumerate(item.choices, 1)}
        texts["answer"] = item.answer
        if any(row["field"] not in texts for row in self.matches.get(key, ())):
            fields = fields_of(item, self.options["words"], self.options["shortest"])
            copied = {row["field"] for row in self.matches[key]}
            texts |= {field.name: field.text for field in fields if field.name in copied}
        return [[name, _truncate(text, TEXT)] for name, text in texts.items() if text]

    def _documents(self, key: str) -> list[dict[str, Any]]:
        """Return the documents with the largest overlap with an item, findings first, with the matches per field."""
        documents: dict[tuple[str, str, int], dict[str, list[dict[str, Any]]]] = {}
        for row in self.matches.get(key, ()):
            fields = documents.setdefault((row["source"], row["file"], row["place"]), {})
            fields.setdefault(row["field"], []).append(row)

        def rank(where: tuple[str, str, int]) -> tuple[bool, float, tuple[str, str, int]]:
            runs = [runs[0] for runs in documents[where].values()]
            return all(run["kind"] != COPY for run in runs), -max(run["overlap"] for run in runs), where

        texts = dict(self._texts(key))
        return [self._document(documents[where], texts) for where in islice(sorted(documents, key=rank), DOCUMENTS)]

    @staticmethod
    def _document(fields: dict[str, list[dict[str, Any]]], texts: dict[str, str]) -> dict[str, Any]:
        first = next(iter(fields.values()))[0]
        held = []
        for name, runs in sorted(fields.items(), key=lambda each: -each[1][0]["overlap"]):
            spans = _utf16_spans(texts[name], _merge_spans((run["item_start"], run["item_stop"]) for run in runs))
            held.append(
                {
                    "field": name,
                    "overlap": _json_value(runs[0]["overlap"]),
                    "kind": runs[0]["kind"],
                    "spans": spans,
                    "passages": _passages(runs),
                }
            )
        return {
            **{name: first[name] for name in ("source", "file", "place")},
            "document": first["document_id"],
            "overlap": max(each["overlap"] for each in held),
            "fields": held,
        }


def _passages(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge overlapping excerpts of a document; keep the PASSAGES with the most copied text, in document order."""
    pieces: list[dict[str, Any]] = []
    for run in sorted(runs, key=lambda run: (run["part"], run["start"], run["stop"])):
        start, stop = run["excerpt_start"], run["excerpt_start"] + len(run["excerpt"])
        last = pieces[-1] if pieces else None
        if last and last["part"] == run["part"] and start <= last["stop"] and stop - last["start"] <= PASSAGE:
            last["text"] += run["excerpt"][last["stop"] - start :]
        else:
            last = {"part": run["part"], "start": start, "stop": stop, "text": run["excerpt"], "spans": []}
            pieces.append(last)
        last["spans"].append((run["start"], min(run["stop"], stop)))
        if stop >= last["stop"]:
            last["stop"], last["goes_on"] = stop, stop - run["stop"] >= AROUND or stop < run["stop"]
    best = sorted(pieces, key=lambda piece: -sum(b - a for a, b in _merge_spans(piece["spans"])))[:PASSAGES]
    return [_passage(piece) for piece in sorted(best, key=lambda piece: (piece["part"], piece["start"]))]


def _passage(piece: dict[str, Any]) -> dict[str, Any]:
    before, after = "…" if piece["start"] else "", "…" if piece["goes_on"] else ""
    text = before + piece["text"] + after
    shift = len(before) - piece["start"]
    spans = _utf16_spans(text, _merge_spans((a + shift, b + shift) for a, b in piece["spans"]))
    return {"part": piece["part"], "text": text, "spans": spans}


def _merge_spans(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort spans and merge those that overlap or touch."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _utf16_spans(text: str, spans: list[tuple[int, int]]) -> list[list[int]]:
    """Convert spans from characters to UTF-16 units, as browsers count; drop spans that start beyond the text."""
    last = len(text)
    return [[_utf16_length(text[:start]), _utf16_length(text[:stop])] for start, stop in spans if start < last]


def _utf16_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-16-le")) // 2


def _truncate(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} …"


def _trend(nights: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count findings per night and channel for the last night's sets; None if the set or channel was not scanned."""
    verdicts_by_night = [{each["name"]: each["verdicts"] for each in night["sets"]} for night in nights]
    sets = []
    for name in verdicts_by_night[-1]:
        counts: dict[str, list[int | None]] = {"lexical": [], "influence": []}
        for night, verdicts in zip(nights, verdicts_by_night, strict=True):
            for channel, values in counts.items():
                asked = name in verdicts and (channel == "lexical" or night["influence"] is not None)
                values.append(verdicts[name][channel] + verdicts[name]["both"] if asked else None)
        sets.append({"name": name, **counts})
    return {"nights": [night["night"] for night in nights], "sets": sets}
