"""Precision and recall of scanners on a labelled set: a regular scan, and the rules of two others."""

import gzip
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stride_ray.contamination.items import read_set
from stride_ray.contamination.nightly import scan
from stride_ray.contamination.verdicts import CLEAN
from stride_ray.evaluate.leaks.labelled import CORPUS, KINDS, lines_of
from stride_ray.evaluate.leaks.rules import decon, harness
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store

# Kinds by what a scan should find.
GROUPS = {
    "verbatim": (
        *("verbatim", "verbatim on many sites", "question alone", "answer alone", "formatted"),
        *("short, with answer", "short question", "choices"),
    ),
    "reordered": ("reordered",),
    "paraphrase": ("paraphrase",),
}


@dataclass(frozen=True)
class Rule:
    """What a scanner finds on a labelled set.

    Attributes:
        name: of the scanner.
        found: by kind the number of items found.
        items: by kind the number of items.
        seconds: for the whole corpus.
    """

    name: str
    found: dict[str, int]
    items: dict[str, int]
    seconds: float

    def recall(self, kinds: Sequence[str]) -> float:
        """Share of the items of some kinds that are found."""
        return sum(self.found[kind] for kind in kinds) / sum(self.items[kind] for kind in kinds)

    @property
    def precision(self) -> float:
        """Share of leaked ones among the items found."""
        leaked = sum(count for kind, count in self.found.items() if KINDS[kind][0])
        return leaked / max(1, sum(self.found.values()))

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {"rule": self.name, "precision": self.precision, "found": self.found, "seconds": self.seconds}


def measure_rules(folder: Path) -> list[Rule]:
    """Measure a regular scan's lexical channel and the two other rules.

    Args:
        folder: as write_labelled writes it; the scan's own folder is temporary.
    """
    labels = {row["id"]: row["kind"] for row in map(json.loads, lines_of(folder / "labels.jsonl"))}
    documents = gzip.decompress((folder / CORPUS).read_bytes()).decode().splitlines()
    corpus = [json.loads(line)["text"] for line in documents]
    items = [json.loads(line) for line in lines_of(folder / "items.jsonl")]
    rules = {
        "stride-ray scan": lambda: scanned(folder),
        "lm-evaluation-harness": lambda: harness(corpus, items),
        "decon": lambda: decon(corpus, items),
    }
    totals = {kind: sum(each == kind for each in labels.values()) for kind in KINDS}
    found = []
    for name, rule in rules.items():
        started = time.monotonic()
        kinds = [labels[item] for item in rule()]
        seconds = round(time.monotonic() - started, 2)
        found.append(Rule(name, {kind: kinds.count(kind) for kind in KINDS}, totals, seconds))
    return found


def scanned(folder: Path) -> set[str]:
    """Ids of the items that a scan without the influence channel raises an alarm for."""
    columns = {"text": "text", "id": "id", "source": "source"}
    given = {"corpus.input": [str(folder / "corpus")], "corpus.columns": columns, "scan.influence": False}
    with tempfile.TemporaryDirectory() as out:
        run = Run(f"{out}/run", changes=given)
        night = scan(run, [read_set(str(folder / "items.jsonl"), "labelled")], f"{out}/nights")
        table = Store(f"{out}/nights").read_table(f"nights/{night['night']}/verdicts.parquet")
    return {row["item_id"] for row in table.select(["item_id", "verdict"]).to_pylist() if row["verdict"] != CLEAN}


def table(rules: Sequence[Rule]) -> str:
    """Items found by kind, precision and recall, as Markdown."""
    names = [rule.name for rule in rules]
    lines = [f"| kind | leaked | items | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for kind, (leaked, _) in KINDS.items():
        counts = " | ".join(str(rule.found[kind]) for rule in rules)
        lines.append(f"| {kind} | {'yes' if leaked else 'no'} | {rules[0].items[kind]} | {counts} |")
    for group, kinds in GROUPS.items():
        lines.append(f"| recall, {group} | | | {' | '.join(f'{rule.recall(kinds):.2f}' for rule in rules)} |")
    lines.append(f"| precision | | | {' | '.join(f'{rule.precision:.2f}' for rule in rules)} |")
    lines.append(f"| seconds | | | {' | '.join(f'{rule.seconds:.1f}' for rule in rules)} |")
    return "\n".join(lines)
