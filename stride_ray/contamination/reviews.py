"""Reviews: which alarms people found true or false, kept beside the nights and honoured by later ones.

A scan folder holds ``reviews/<digest>.jsonl``, a file per import. The last review of an item counts, by its time. An
item reviewed as a false alarm is clean until its verdict, or what leaked of it, is another one, or clearly more of it.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from stride_ray.corpus.readers import Rejected, rows
from stride_ray.corpus.splits import plan
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store

FOLDER = "reviews"
VERDICTS = TRUE, FALSE = ("true", "false")
# Verdicts (verdicts.py) that can be reviewed.
ALARMS = ("lexical", "influence", "both")
# Fields of a row: the item, the night's verdict, the review, and when it was made (ISO 8601, UTC).
FIELDS = ("set", "item_id", "key", "question", "night", "verdict", "leaked", "review", "at")
# A review holds while the overlap is at most this much above what it was about.
MORE = 0.1
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


class Review(NamedTuple):
    """An item's last review.

    Attributes:
        review: one of VERDICTS.
        verdict, leaked, overlap: what it was about: the item's ``alarm``, ``leaked`` and ``overlap`` on that night.
    """

    review: str
    verdict: str
    leaked: str
    overlap: float

    def holds(self, verdict: str, leaked: str, overlap: float) -> bool:
        """Whether it is about what there is now."""
        return (self.verdict, self.leaked) == (verdict, leaked) and overlap <= self.overlap + MORE


def import_reviews(store: Store, path: str) -> int:
    """Keep the reviews of a file, as a night's page saves them; returns their number.

    Args:
        store: the scan folder.
        path: JSON Lines with FIELDS and ``overlap``.

    Raises:
        StrideError: a row is no review; nothing is kept.
    """
    found = list[dict[str, Any]]()
    for unit in plan([path], 2**30):
        for row in rows(unit, None):
            if isinstance(row, Rejected):
                raise StrideError(f"{row.sentence()}; a file of reviews is saved by a night's page.")
            values = {name: row.values.get(name) for name in FIELDS}
            missing = [name for name, value in values.items() if not isinstance(value, str)]
            why = f"{missing[0]!r} is not a text" if missing else _fault(values, row.values.get("overlap"))
            if why:
                place = Rejected(row.file, row.number(), why).sentence()
                raise StrideError(f"{place}; a file of reviews is saved by a night's page.")
            found.append({**values, "overlap": float(row.values["overlap"])})
    data = review_lines(found)
    if found:
        store.write(f"{FOLDER}/{hashlib.sha256(data).hexdigest()[:16]}.jsonl", data)
    return len(found)


def _fault(values: dict[str, Any], overlap: Any) -> str:
    """What is wrong with a review whose fields are texts; empty if nothing is."""
    if values["review"] not in VERDICTS:
        return f"'review' is not one of {', '.join(VERDICTS)}"
    if isinstance(overlap, bool) or not isinstance(overlap, int | float):
        return "'overlap' is not a number"
    if not values["key"] or values["verdict"] not in ALARMS:
        return "it is not about an alarm"
    return "" if _TIME.fullmatch(values["at"]) else "'at' is not a time such as 2026-01-31T09:30:00Z"


def last_reviews(store: Store) -> list[dict[str, Any]]:
    """Each item's last review, as rows of FIELDS sorted by set and item: labels for whoever trains on them."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(store.names(FOLDER, ending=".jsonl")):
        for line in store.read(f"{FOLDER}/{name}").decode().splitlines():
            row = json.loads(line)
            if row["key"] not in found or row["at"] >= found[row["key"]]["at"]:
                found[row["key"]] = row
    return sorted(found.values(), key=lambda row: (row["set"], row["item_id"], row["key"]))


def review_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    """Reviews as JSON Lines, in ASCII: a question may have a lone surrogate."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def reviews_by_key(rows: Sequence[dict[str, Any]]) -> dict[str, Review]:
    """Reviews by item key."""
    return {row["key"]: Review(row["review"], row["verdict"], row["leaked"], row["overlap"]) for row in rows}
