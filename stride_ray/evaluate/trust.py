"""The trust panel: checks of an attribution that need no retraining, ending in a plain verdict.

For estimates from subsets: do two halves of the subsets agree on the top blocks, and more so than under membership
matrices that the responses were not made with? Otherwise there is only a sanity check: do different queries get
different blocks, and some that lexical search also finds, but not the very same? Passing is necessary but not
sufficient: only retraining (LDS) shows how well influence predicts it.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from stride_ray.attribution.attribute import (
    OTHER_MODE,
    TRUST_FILE,
    mode_of,
    read_influence,
    table_stage,
    write_page,
)
from stride_ray.corpus.blocks import Blocks
from stride_ray.evaluate.split_halves import TOP, Halves, halves_agreement
from stride_ray.evaluate.tailpatch import lexical_top, successful_queries, top_blocks
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run

# Thresholds of the verdict, see ``trust``.
CHANCE, AGREEING, SAME, LEXICAL = 0.05, 0.3, 0.5, 0.9


@dataclass(frozen=True)
class Trust:
    """The results of all checks.

    Attributes:
        mode: exact or estimated. ``queries``, ``failed``: number of queries, and how many of them failed.
        blocks: N.
        fit: the fit's own verdict; empty in exact mode, which has no fit. ``learned``: its result.
        halves: split-half agreement; None unless operators are of subsets.
        other_mode: mean overlap of the top TOP with the other mode's; None if that has no results for these queries.
        lexical: mean overlap with TF-IDF's top TOP. ``lexical_p``: one-sided binomial test of it against chance.
        chance: expected mean overlap with blocks drawn at random.
        between: mean overlap of different queries' top TOP; nan for one query. ``lexical_between``: TF-IDF's.
        level: good, plausible, weak or none. ``verdict``: a sentence.
    """

    mode: str
    queries: int
    failed: int
    blocks: int
    fit: str
    learned: bool
    halves: Halves | None
    other_mode: float | None
    lexical: float
    lexical_p: float
    chance: float
    between: float
    lexical_between: float
    level: str = ""
    verdict: str = ""

    def rows(self) -> list[tuple[str, str, str]]:
        """The checks as rows: name, result, value expected by chance."""
        rows = [("queries failed", f"{self.failed} of {self.queries}", "")]
        if self.halves is not None:
            h = self.halves
            what = f"({h.queries} queries), by chance: other membership matrices"
            rows.append((f"halves of the subsets, Spearman {what}", f"{h.spearman:.3f}", f"{h.control_spearman:.3f}"))
            rows.append((f"halves of the subsets, top {TOP} shared", f"{h.overlap:.1%}", f"{h.control_overlap:.1%}"))
        if self.other_mode is not None:
            what = f"top {TOP} shared with the {OTHER_MODE[self.mode]} answer"
            rows.append((what, f"{self.other_mode:.1%}", f"{self.chance:.1%}"))
        rows.append((f"top {TOP} shared with TF-IDF's", f"{self.lexical:.1%}", f"{self.chance:.1%}"))
        if np.isfinite(self.between):
            rows.append((f"top {TOP} shared by different queries", f"{self.between:.1%}", f"{self.chance:.1%}"))
            rows.append(("the same of TF-IDF's", f"{self.lexical_between:.1%}", f"{self.chance:.1%}"))
        return rows

    def as_table(self) -> str:
        """Format the panel as Markdown, with the verdict last."""
        rows = (f"| {check} | {found} | {chance} |" for check, found, chance in self.rows())
        lines = ["| check | found | by chance |", "|---|---|---|", *rows]
        return "\n".join([*lines, "", *([self.fit, ""] if self.fit else []), self.verdict])


def trust(run: Run, name: str) -> Trust:
    """Check a query set's influence, estimated or exact as set by ``attribute.exact``; its page shows the verdict.

    ``none``: no query has a helpful block; or, if estimated, the fit learned nothing, or halves of the subsets agree no
    better than chance (p above 0.05). ``weak``: half of the queries failed; or halves of the subsets share less than
    0.3 of the top ten; or, without subsets, the top ten overlap with TF-IDF's no more than by chance (p above 0.05) or
    to at least 0.9, or different queries share at least half of theirs and twice as much as TF-IDF's. Otherwise
    ``good`` if halves of the subsets agree, and ``plausible`` without subsets, where no check measures accuracy. The
    thresholds are conventions.

    Args:
        run: with finished influence for ``name``.
        name: the query set.

    Raises:
        StrideError: influence is not finished, or every query failed.
    """
    mode = mode_of(run)
    blocks = Blocks(run.require("blocks").store)
    queries = successful_queries(run, name)
    total = read_influence(run, name, "recovery").num_rows
    tops, lexical = top_blocks(run, name, TOP), lexical_top(blocks, queries, TOP)
    fit: dict[str, Any] = {"verdict": "", "learned": True}
    if mode == "estimated":
        fit = run.stage("operators").manifest()
    n_blocks = int(fit.get("blocks", len(blocks)))
    chance = min(TOP, n_blocks) / n_blocks
    shared, offered = _overlap_counts(tops, lexical)
    panel = Trust(
        mode=mode,
        queries=total,
        failed=total - len(queries),
        blocks=n_blocks,
        fit=fit["verdict"],
        learned=bool(fit["learned"]),
        halves=halves_agreement(run, name, n_blocks) if mode == "estimated" and fit.get("rows") != "blocks" else None,
        other_mode=_other_mode(run, name, tops),
        lexical=shared / max(offered, 1),
        lexical_p=float(binomtest(shared, offered, chance, "greater").pvalue) if offered else 1.0,
        chance=chance,
        between=_mean_query_overlap(tops),
        lexical_between=_mean_query_overlap(lexical),
    )
    level, why = _judged(panel, bool(tops))
    panel = replace(panel, level=level, verdict=f"Trust: {level}, because {why}.")
    told = {"level": panel.level, "verdict": panel.verdict, "rows": panel.rows()}
    run.stage(table_stage(run), name).store.write_json(TRUST_FILE, told)
    write_page(run, name)
    return panel


def _judged(panel: Trust, answered: bool) -> tuple[str, str]:
    """Return the level and the reason for it."""
    halves = panel.halves
    if not answered:
        return "none", "no query has a block of positive influence"
    if not panel.learned:
        return "none", "the operators do not distinguish members from non-members"
    if halves is not None and halves.p > CHANCE:
        return "none", f"two halves of the subsets agree no better than under membership by chance (p = {halves.p:.2g})"
    if 2 * panel.failed >= panel.queries:
        return "weak", f"{panel.failed} of {panel.queries} queries failed"
    if halves is not None:
        told = f"two halves of the subsets share {halves.overlap:.0%} of their top {TOP} blocks"
        return ("good" if halves.overlap >= AGREEING else "weak"), f"{told}, {halves.control_overlap:.0%} by chance"
    if panel.lexical_p > CHANCE:
        return "weak", f"the top {TOP} blocks share no more with lexical search than blocks drawn at random"
    if panel.lexical >= LEXICAL:
        why = f"the top {TOP} blocks share {panel.lexical:.0%} with lexical search"
        return "weak", f"{why}: counting words would find the same"
    if panel.between >= max(SAME, 2 * panel.lexical_between):
        return "weak", f"different queries share {panel.between:.0%} of their top {TOP} blocks"
    told = f"the top {TOP} blocks share {panel.lexical:.0%} with lexical search, {panel.chance:.1%} by chance"
    return "plausible", f"{told}, and different queries get different blocks: a sanity check, not a measure of accuracy"


def _overlap_counts(left: dict[str, NDArray], right: dict[str, NDArray]) -> tuple[int, int]:
    """Over queries present in both: blocks in both tops, and blocks in left's."""
    both = left.keys() & right.keys()
    return sum(len(np.intersect1d(left[q], right[q])) for q in both), sum(len(left[q]) for q in both)


def _mean_query_overlap(tops: dict[str, NDArray]) -> float:
    """Mean share of a query's top blocks that are in another query's, over all pairs; nan for fewer than two."""
    lengths = [len(top) for top in tops.values()]
    pairs = sum(lengths) * (len(tops) - 1)
    if not pairs:
        return float("nan")
    _, counts = np.unique(np.concatenate(list(tops.values())), return_counts=True)
    return float((counts * (counts - 1)).sum() / pairs)


def _other_mode(run: Run, name: str, tops: dict[str, NDArray]) -> float | None:
    """Mean overlap with the other mode's top blocks for the same queries; None if unavailable."""
    other = Run(run.url, run.config, {"attribute.exact": not run.config.attribute.exact})
    try:
        stages = [each.require(table_stage(each), name) for each in (run, other)]
        asked = [stage.store.read_json("stage.json")["keys"] for stage in stages]
    except StrideError:  # missing, or made with other settings
        return None
    if asked[0]["queries"] != asked[1]["queries"]:
        return None
    shared, offered = _overlap_counts(tops, top_blocks(other, name, TOP))
    return shared / offered if offered else None
