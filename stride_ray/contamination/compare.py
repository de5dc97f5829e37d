"""Compare two nights: which findings are new, resolved or changed."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stride_ray.contamination.verdicts import CLEAN
from stride_ray.corpus.documents import shown_name
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import redact_url

_KEPT = (
    *("set", "item_id", "key", "verdict", "question", "overlap", "documents", "first_document", "first_source", "q"),
    *("tied_document", "tied_source"),
)


@dataclass(frozen=True)
class Difference:
    """Changes from one scan to a later one, as lists of rows of the verdicts table, in table order.

    Attributes:
        new: findings (any verdict but clean) on items that were clean or absent.
        resolved: earlier findings on items that are now clean, or no longer evaluated (``gone`` is True).
        changed: findings in both scans with different verdicts; ``before`` is the earlier one.
    """

    new: list[dict[str, Any]]
    resolved: list[dict[str, Any]]
    changed: list[dict[str, Any]]


def difference(earlier: pa.Table | None, later: pa.Table) -> Difference:
    """Compare two verdict tables by item; without an earlier one, every finding is new."""
    old = {row["key"]: row for row in earlier.to_pylist()} if earlier is not None else {}
    now = {row["key"]: row for row in later.to_pylist()}
    found = {key: row for key, row in now.items() if row["verdict"] != CLEAN}
    new, changed = [], []
    for key, row in found.items():
        before = old.get(key, {}).get("verdict", CLEAN)
        kept = {name: row.get(name) for name in _KEPT}
        if before == CLEAN:
            new.append(kept)
        elif before != row["verdict"]:
            changed.append({**kept, "before": before})
    resolved = [
        {**{name: row.get(name) for name in _KEPT}, "gone": key not in now}
        for key, row in old.items()
        if row["verdict"] != CLEAN and key not in found
    ]
    return Difference(new, resolved, changed)


def compare(a: str, b: str) -> Difference:
    """Compare the dated folder ``a`` with the later ``b``.

    Raises:
        StrideError: one of them is not a finished scan.
    """
    tables = []
    for url in (a, b):
        store = Store(url)
        if not store.exists("manifest.json"):
            raise StrideError(
                f"{redact_url(url)} is not a finished scan: it has no manifest.json; give the dated folders, as in "
                "SCANS/nights/2026-01-31."
            )
        if not store.exists("verdicts.parquet"):
            raise StrideError(f"{redact_url(url)} has no verdicts.parquet; restore it, or compare another night.")
        tables.append(store.read_table("verdicts.parquet"))
    return difference(*tables)


def describe(found: Difference) -> str:
    """Format the difference for the console."""
    if not (found.new or found.resolved or found.changed):
        return "Nothing is new and nothing is resolved."
    lines = []
    for title, rows in (("new", found.new), ("changed", found.changed), ("resolved", found.resolved)):
        lines += [f"{len(rows)} {title}"] if rows else []
        lines += [f"  {line(row)}" for row in rows]
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    """Format a finding in one line: item, verdict, evidence."""
    text = f"{row['set']} / {row['item_id']}: {row['verdict']}"
    if row.get("gone"):
        return f"{text}; the item is no longer evaluated"
    evidence = []
    if row["verdict"] in ("lexical", "both"):
        first = shown_name(row.get("first_source") or "", row["first_document"])
        leaked = f"{row['leaked']}, " if row.get("leaked") else ""
        evidence.append(f"{leaked}{row['overlap']:.0%} in {row['documents']} document(s), first {first}")
    if row["verdict"] in ("influence", "both"):
        tied = shown_name(row.get("tied_source") or "", row["tied_document"])
        evidence.append(f"tied to a block of {tied}, q = {row['q']:.2g}")
    return f"{text} ({'; '.join(evidence)})"
