"""Output of the comparison: a Parquet table, Markdown and a plot.

All are generated from one ``Evaluation`` and one ``Entry`` per method; a failed method gets a row with the reason.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from stride_ray.evaluate.comparison.figures import image_bytes, new_figure
from stride_ray.evaluate.retraining.lds import ALL, CENTRED, RAW, REPORT, TARGETS, Evaluation, Interval
from stride_ray.evaluate.retraining.removal import Removal
from stride_ray.evaluate.retraining.results import RetrainingResults
from stride_ray.runtime.storage import Store

LEXICAL_BASELINE = "TF-IDF"
COLOURS = {"ours": "tab:red", "other methods": "tab:blue", "lexical": "tab:gray"}
SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("ours", pa.bool_()),
        ("default", pa.bool_()),
        ("paper", pa.bool_()),
        ("lexical", pa.bool_()),
        ("kind", pa.string()),
        ("part", pa.string()),
        ("target", pa.string()),
        ("queries", pa.int32()),
        ("lds", pa.float64()),
        ("lds_low", pa.float64()),
        ("lds_high", pa.float64()),
        ("std", pa.float64()),
        ("pearson", pa.float64()),
        ("kendall", pa.float64()),
        ("seconds", pa.float64()),
        ("peak_mb", pa.float64()),
        ("removal", pa.float64()),
        ("removal_low", pa.float64()),
        ("removal_high", pa.float64()),
        ("note", pa.string()),
    ]
)


@dataclass(frozen=True)
class Entry:
    """A method's properties and measurements besides its LDS.

    Attributes:
        method: its name; it counts as failed if the evaluation has no figures under that name.
        ours: STRIDE, in any setting.
        default: STRIDE with default options.
        paper: STRIDE as published in the paper.
        lexical: it uses tokens only and no model, or is combined with such a method.
        seconds: time to score every query; None if not measured.
        peak_mb: largest resident memory meanwhile, MiB.
        note: the reason of a failure, or a remark.
        removal: the effect of retraining without the blocks ranked first; None if not measured.
    """

    method: str
    ours: bool = False
    default: bool = False
    paper: bool = False
    lexical: bool = False
    seconds: float | None = None
    peak_mb: float | None = None
    note: str = ""
    removal: Removal | None = None


def protocol(name: str, truth: RetrainingResults, n_blocks: int, draws: int = 400) -> str:
    """Describe in a paragraph how the figures were computed; it accompanies them everywhere."""
    shares = [f"{size / n_blocks:.2g}" for size in truth.sizes]
    seeds, subsets, queries = truth.losses.shape
    return (
        f"{name}: pool of {n_blocks} blocks, {queries} queries; truth: {subsets} subsets, each a share "
        f"α = {'–'.join(dict.fromkeys(shares))} of the pool, {seeds} training seed(s) each, losses averaged over them. "
        f"LDS: Spearman correlation over the subsets of summed scores with minus the loss, mean over queries, with a "
        f"95 % bootstrap interval over queries and subsets together ({draws} draws, the same for all methods)."
    )


def as_table(evaluation: Evaluation, entries: Sequence[Entry]) -> pa.Table:
    """One row per method, kind, part and target (``SCHEMA``); figures are null for a failed method."""
    rows = []
    for entry in entries:
        known = {name: getattr(entry, name) for name in Entry.__dataclass_fields__ if name != "removal"}
        for kind, part in evaluation.cells:
            for target in TARGETS:
                row = {**known, "kind": kind, "part": part, "target": target}
                if entry.removal and (kind, part) == _removal_cell(evaluation):
                    rise = entry.removal.difference
                    row |= {"removal": rise.value, "removal_low": rise.low, "removal_high": rise.high}
                figure = evaluation.figures.get((entry.method, kind, part, target))
                if figure:
                    row |= {"lds": figure.lds.value, "lds_low": figure.lds.low, "lds_high": figure.lds.high}
                    row |= {name: getattr(figure, name) for name in ("std", "pearson", "kendall", "queries")}
                rows.append({name: _nan_to_null(row.get(name)) for name in SCHEMA.names})
    return pa.Table.from_pylist(rows, SCHEMA)


def as_markdown(evaluation: Evaluation, entries: Sequence[Entry], header: str) -> str:
    """The header, then per kind and part a table sorted by LDS: raw, against two rivals, centred; the ceiling last."""
    lines = [header, ""]
    lines += [
        "“−” and “÷” are paired: the same draws for both methods; – where the other method's LDS is not clearly above "
        "zero. The best rival is the best method that is not ours, in that table. Ours are in bold; "
        "the default is marked *. The ceiling is one seed's losses against another's. A centred target has each "
        "retraining's mean loss over all queries taken away."
    ]
    if removal := next((entry.removal for entry in entries if entry.removal), None):
        lines += [
            "",
            f"“Without its first {removal.share:.3g}”: how much more {removal.queries} queries cost, in nats, after "
            f"training without the {removal.blocks} of {removal.pool} blocks that the method ranks first than without "
            f"as many random ones; {removal.seeds} training(s) each, 95 % intervals over queries and trainings.",
        ]
    for kind, part in evaluation.cells:
        lines += ["", f"## {_title(kind, part)}", "", *_cell_lines(evaluation, entries, kind, part)]
    failed = [entry for entry in entries if entry.method not in evaluation.methods]
    if failed:
        lines += ["", "## Failed", "", *[f"- {entry.method}: {entry.note or 'no reason given'}" for entry in failed]]
    return "\n".join(lines) + "\n"


def best_rival(evaluation: Evaluation, entries: Sequence[Entry], kind: str = ALL, part: str = ALL) -> str | None:
    """The method other than ours with the highest raw LDS; None if there is none."""
    rivals = [each.method for each in _ranked(evaluation, entries, kind, part) if not each.ours]
    return rivals[0] if rivals else None


def plot(evaluation: Evaluation, entries: Sequence[Entry], form: str = "png", part: str | None = None) -> bytes:
    """Plot raw LDS with intervals, a panel per kind, ours in its own colour, the ceiling dashed.

    Args:
        evaluation: the figures.
        entries: the methods; failed ones are left out.
        form: png or svg; the output is byte-identical for the same figures.
        part: which part of the queries; None: report if there is one, else all.

    Raises:
        StrideError: matplotlib is not installed.
    """
    if part is None:
        part = REPORT if any(each == REPORT for _, each in evaluation.cells) else ALL
    kinds = [kind for kind, each in evaluation.cells if each == part]
    count = sum(entry.method in evaluation.methods for entry in entries)
    figure = new_figure(5.2 * len(kinds), 1.4 + 0.26 * max(count, 4), kept="the scores")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for height, entry in enumerate(reversed(_ranked(evaluation, entries, kind, part))):
            lds = evaluation.figure(entry.method, kind, part).lds
            colour = COLOURS["ours" if entry.ours else "lexical" if entry.lexical else "other methods"]
            ends = [[max(0, lds.value - lds.low)], [max(0, lds.high - lds.value)]]
            axes.errorbar([lds.value], [height], xerr=ends, fmt="o", color=colour, markersize=4, capsize=2)
        shown = [_name(entry) for entry in reversed(_ranked(evaluation, entries, kind, part))]
        axes.set_yticks(range(len(shown)), shown, fontsize=8)
        if ceiling := evaluation.ceiling(kind, part):
            axes.axvline(ceiling.value, linestyle="--", color="black", linewidth=1)
        axes.axvline(0, color="lightgray", linewidth=1, zorder=0)
        axes.set_title(_title(kind, part), fontsize=10)
        axes.set_xlabel("LDS with 95 % interval", fontsize=8)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker="o", label=label) for label, colour in COLOURS.items()]
    handles.append(Line2D([], [], color="black", linestyle="--", label="ceiling: one seed against another"))
    figure.legend(handles=handles, fontsize=8, ncols=4, loc="outside lower center")
    return image_bytes(figure, form)


def write_tables(store: Store, evaluation: Evaluation, entries: Sequence[Entry], header: str) -> list[str]:
    """Publish ``lds.parquet``, ``lds.md``, ``lds.png`` and ``lds.svg``; returns these names.

    Args:
        store: the folder.
        evaluation: the figures.
        entries: one per method, failed ones included.
        header: see ``protocol``.
    """
    store.write_table("lds.parquet", as_table(evaluation, entries))
    store.write("lds.md", as_markdown(evaluation, entries, header).encode())
    for form in ("png", "svg"):
        store.write(f"lds.{form}", plot(evaluation, entries, form))
    return ["lds.parquet", "lds.md", "lds.png", "lds.svg"]


def _cell_lines(evaluation: Evaluation, entries: Sequence[Entry], kind: str, part: str) -> list[str]:
    """Render one Markdown table."""
    ranked = _ranked(evaluation, entries, kind, part)
    rival = best_rival(evaluation, entries, kind, part)
    bar = next((entry.method for entry in ranked if entry.method == LEXICAL_BASELINE), None)
    others = [(f"best rival ({rival})", rival)] * (rival is not None) + [(LEXICAL_BASELINE, bar)] * (
        bar not in (None, rival)
    )
    heads = ["method", "LDS", "std"]
    heads += [f"{sign} {title}" for title, _ in others for sign in ("−", "÷")]
    heads += ["centred", "Pearson", "Kendall", "seconds", "MiB"]
    removals = [each.removal for each in entries if each.removal and (kind, part) == _removal_cell(evaluation)]
    heads += [f"without its first {removals[0].share:.3g}"] if removals else []
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for entry in ranked:
        figure = evaluation.figure(entry.method, kind, part, RAW)
        cells = [_name(entry, bold=True), interval_text(figure.lds), f"{figure.std:.3f}"]
        for _, other in others:
            paired = evaluation.paired(entry.method, other or "", kind, part)
            same = entry.method == other
            cells += ["", ""] if same else [interval_text(paired.difference, "+"), _ratio(paired.ratio)]
        cells += [interval_text(evaluation.figure(entry.method, kind, part, CENTRED).lds)]
        cells += [f"{figure.pearson:.3f}", f"{figure.kendall:.3f}"]
        cells += ["" if entry.seconds is None else f"{entry.seconds:.1f}"]
        cells += ["" if entry.peak_mb is None else f"{entry.peak_mb:.0f}"]
        if removals:
            cells += [interval_text(entry.removal.difference, "+", 4) if entry.removal else ""]
        lines.append("| " + " | ".join(cells) + " |")
    raw, centred = (evaluation.ceiling(kind, part, target) for target in TARGETS)
    if raw and centred:
        cells = ["ceiling", interval_text(raw), "", *[""] * (2 * len(others)), interval_text(centred), "", "", "", ""]
        cells += [""] * bool(removals)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _removal_cell(evaluation: Evaluation) -> tuple[str, str]:
    """The kind and part of the queries that removals are measured on."""
    return ALL, REPORT if any(part == REPORT for _, part in evaluation.cells) else ALL


def _ranked(evaluation: Evaluation, entries: Sequence[Entry], kind: str, part: str) -> list[Entry]:
    """Sort the entries that have figures by raw LDS, best first."""
    there = [entry for entry in entries if entry.method in evaluation.methods]
    return sorted(there, key=lambda entry: -evaluation.figure(entry.method, kind, part).lds.value)


def _name(entry: Entry, bold: bool = False) -> str:
    name = entry.method.replace("|", "\\|") if bold else entry.method
    name = f"**{name}**" if bold and entry.ours else name
    return f"{name} *" if entry.default else name


def _title(kind: str, part: str) -> str:
    kinds = "all queries" if kind == ALL else kind.replace("_", " ") + " queries"
    return kinds if part == ALL else f"{kinds}, {part}"


def interval_text(given: Interval, sign: str = "", digits: int = 3) -> str:
    """Format a figure with its interval, or alone if there were no draws."""
    form = f"{sign}.{digits}f"
    ends = "" if math.isnan(given.low) else f" [{given.low:{form}}, {given.high:{form}}]"
    return f"{given.value:{form}}{ends}"


def _ratio(given: Interval) -> str:
    """Format a ratio, or – if its denominator may be zero."""
    return "–" if math.isnan(given.low) else interval_text(given, digits=2)


def _nan_to_null(value: object) -> object:
    """Convert nan to null, so that a Parquet reader's mean over methods does not become nan."""
    return None if isinstance(value, float) and math.isnan(value) else value
