"""Stage attribute: rank training blocks by influence on each query; write tables, a console summary and a page.

In estimated mode it runs respond, recover and rescore; in exact mode it scores every block (exact_influence).
"""

import sys
import textwrap
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stride_ray.attribution.recover import recover_estimates
from stride_ray.attribution.rescore import exact_influence, rescore
from stride_ray.attribution.respond import respond_table
from stride_ray.attribution.tables import TOKENS, tokens_name
from stride_ray.corpus.blocks import Blocks, unit_count
from stride_ray.corpus.documents import shown_name
from stride_ray.corpus.failures import FAILED_BLOCKS_FILE, failed_blocks_note
from stride_ray.corpus.queries import check_name, read_queries
from stride_ray.corpus.tokenization.decoding import token_texts, unpadded
from stride_ray.corpus.tokenization.tokenizer import load_saved_tokenizer
from stride_ray.operators.fit import fit
from stride_ray.report.page import attribution_page
from stride_ray.runtime.actor_pool import shared_actor_pool
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import COMMANDS, Run, Stage
from stride_ray.runtime.urls import redact_url

# Blocks shown per query and side, in the console and on the page; queries on the page.
CONSOLE_BLOCKS, PAGE_BLOCKS, PAGE_QUERIES = 3, 8, 1000
# By mode: the stage that holds the tables, the other mode, and the command-line flag.
TABLES = {"exact": "exact", "estimated": "influence"}
# Results of other verbs beside the tables, which the page shows.
TRUST_FILE, TIMELINE_FILE = "trust.json", "timeline.json"
OTHER_MODE = {"exact": "estimated", "estimated": "exact"}
FLAGS = {"exact": "--exact", "estimated": "--no-exact"}
# Points on a query's influence-by-rank curve; sources in a query's breakdown.
CURVE, SOURCES = 24, 6


def attribute(run: Run, queries: str, name: str, out: TextIO | None = None) -> dict[str, Any]:
    """Attribute every query to the training blocks that influenced the model on it.

    Example:
        >>> from stride_ray import Run, attribute
        >>> done = attribute(Run("mine"), "queries.jsonl", "asked", out=open("printed.txt", "w"))
        >>> done["mode"], done["page"].endswith("influence/asked/page.html")
        ('estimated', True)

    Args:
        run: with finished ``blocks/``.
        queries: JSON Lines or Parquet with text, prompt and completion, messages, or two completions to contrast
            (queries.read_queries).
        name: name of the query set; tables go to ``influence/<name>/`` or ``exact/<name>/``.
        out: stream for the console table; None: standard output.

    Returns:
        The summary of rescore or exact_influence, plus ``mode`` (exact or estimated) and ``page`` (the page's URL).

    Raises:
        StrideError: blocks are missing; also as read_queries and write_tables.
    """
    out = out or sys.stdout
    run.require("blocks")
    table = read_queries(queries, load_saved_tokenizer(run.store.child("blocks")))
    summary = write_tables(run, table, name)
    shown = shown_queries(run, name, PAGE_QUERIES, PAGE_BLOCKS)
    print_table(shown[:20], out)
    page = _write_page(run, name, shown)
    stage = run.stage(table_stage(run), name)
    gap = f", largest relative duality gap {summary['largest_gap']:.1e}" if summary.get("largest_gap") else ""
    unsolved = f" ({summary['unsolved']} whose solve took no step)" if summary["unsolved"] else ""
    how = "" if summary["exact"] == summary["rows"] else f"; the others are estimates{reliability_note(summary)}"
    note = failed_blocks_note(summary.get("not_finite", 0), stage.store.display_url(FAILED_BLOCKS_FILE))
    note += "\n" if note else ""
    print(
        f"\n{summary['queries']} queries ({summary['failed']} failed){unsolved}, {summary['rows']} influences, "
        f"median {summary['median_nonzeros']:g} blocks per query{gap}; {summary['exact']} of them are exact{how}.\n"
        f"{note}Tables: {stage.store.display_url('influence-*.parquet')}\nPage:   {page}",
        file=out,
    )
    return {**summary, "page": page}


def reliability_note(summary: dict[str, Any]) -> str:
    """State the estimates' correlation with exact influence, the root of their reliability; empty if unknown."""
    if summary.get("reliability") is None:
        return ""
    correlation = summary["reliability"] ** 0.5
    return f"; over all blocks, estimates correlate with exact influence at about {correlation:.2f} (split halves)"


def write_tables(run: Run, table: pa.Table, name: str) -> dict[str, Any]:
    """Write ranked tables for tokenised queries (queries.SCHEMA); returns the last stage's summary and ``mode``.

    Fits the operators first if they are missing.

    Raises:
        StrideError: as fit, respond_table, recover_estimates and rescore, or exact_influence.
    """
    if run.config.attribute.exact:
        return {**exact_influence(run, table, name), "mode": "exact"}
    if not run.stage("operators").is_finished():
        fit(run)
    with shared_actor_pool(run.config, unit_count(len(Blocks(run.stage("blocks").store)))):
        respond_table(run, table, name)
        estimated = recover_estimates(run, name)
        return {"largest_gap": estimated["largest_gap"], **rescore(run, name), "mode": "estimated"}


def mode_of(run: Run) -> str:
    """Return the run's attribution mode: ``exact`` or ``estimated``."""
    return "exact" if run.config.attribute.exact else "estimated"


def write_page(run: Run, name: str) -> str:
    """Rewrite a query set's page, with the results of trust and timeline if there are any; returns its URL."""
    return _write_page(run, name, shown_queries(run, name, PAGE_QUERIES, PAGE_BLOCKS))


def _write_page(run: Run, name: str, shown: list[dict[str, Any]]) -> str:
    store = run.stage(table_stage(run), name).store
    store.write("page.html", render_page(run, name, shown).encode())
    return store.display_url("page.html")


def render_page(run: Run, name: str, shown: list[dict[str, Any]]) -> str:
    """Render a query set's page, with the results of trust and timeline if there are any.

    Args:
        run: with finished influence on this query set.
        name: of the query set.
        shown: its queries (shown_queries).
    """
    stage = run.stage(table_stage(run), name)
    facts = {
        **_provenance(run),
        **stage.manifest(),
        "mode": mode_of(run),
        "name": name,
        "run": redact_url(run.url),
        "tokens": any(row["tokens"] for query in shown for row in query["helping"] + query["harming"]),
    }
    facts["believable"] = reliability_note(facts)
    trust, timeline = (
        stage.store.read_json(file) if stage.store.exists(file) else None for file in (TRUST_FILE, TIMELINE_FILE)
    )
    return attribution_page(shown, facts, trust, timeline)


def table_stage(run: Run) -> str:
    """Return the stage that holds the tables: ``exact`` in exact mode, ``influence`` in estimated mode."""
    return TABLES[mode_of(run)]


def stored_queries(run: Run, name: str) -> pa.Table:
    """Read the queries (queries.SCHEMA) of a query set's tables."""
    return run.stage(table_stage(run), name).store.read_table("queries.parquet")


def _provenance(run: Run) -> dict[str, Any]:
    """Provenance for the page: ``model``, ``blocks``, ``how`` (the method), ``learned`` and ``verdict``."""
    if run.config.attribute.exact:
        facts = run.stage("curvature").manifest()
        how = f"every block scored at {len(facts['sites'])} sites of the model"
        return {
            "model": redact_url(run.config.model.path),
            "blocks": facts["blocks"],
            "how": how,
            "learned": True,
            "verdict": "",
        }
    facts = run.stage("operators").manifest()
    if facts.get("form") != "sites":
        return {**facts, "how": f"{facts['subsets']} subsets, {facts['method']} fit"}
    what = "for each block" if facts["rows"] == "blocks" else f"for each of {facts['subsets']} subsets of the blocks"
    size = f"{facts['row_bytes'] / 1024:.1f} KiB, one bit a coordinate"
    return {**facts, "how": f"operators {what} at {len(facts['sites'])} sites of the model, {size}"}


def read_influence(run: Run, name: str, table: str = "influence") -> pa.Table:
    """Read a whole table of a query set: ``influence``, ``documents``, ``sources`` or ``recovery``.

    Raises:
        StrideError: this set has no finished tables in the run's mode; the message names the command that makes them.
    """
    stage, parts = _finished_stage(run, name)
    return pa.concat_tables([stage.store.read_table(f"{table}-{part:05d}.parquet") for part in range(parts)])


def _finished_stage(run: Run, name: str) -> tuple[Stage, int]:
    """Return the finished stage with a query set's tables, and its number of parts; errors as read_influence."""
    check_name(name)
    mode = mode_of(run)
    command, other = COMMANDS[table_stage(run)], OTHER_MODE[mode]
    here, there = (run.stage(TABLES[each], name).is_finished() for each in (mode, other))
    if there and not here:
        raise StrideError(
            f"Query set {name!r} has only {other} influence, but attribute.exact = {str(mode == 'exact').lower()} (set "
            f"here or in run.toml): add {FLAGS[other]}, or run 'stride-ray {command} --name {name}' first."
        )
    stage = run.require(table_stage(run), name)
    return stage, stage.manifest()["parts"]


def shown_queries(run: Run, name: str, queries: int, blocks: int) -> list[dict[str, Any]]:
    """Collect the first queries of a set for display, each with its most helpful and most harmful blocks.

    Args:
        run: with finished influence on this query set.
        name: the query set.
        queries: maximum number of queries.
        blocks: maximum number of helpful blocks, and of harmful ones, per query.

    Returns:
        Per query: query_id, error, base_loss, nonzeros, gap, ``prompt`` (the text outside the loss mask),
        ``completion`` (the text inside it), ``contrast`` (the other completion, if any), and ``helping`` and
        ``harming``, rows of the influence table with the block's ``text`` and its ``share``, |influence| over the
        query's largest. Over all of the query's rows: ``curve``, at most CURVE evenly spaced pairs [0-based rank,
        influence]; ``half``, the number of top blocks that hold half of the positive influence; and ``sources``, the
        SOURCES largest as (source, share of the positive influence).
    """
    tokenizer = load_saved_tokenizer(run.store.child("blocks"))
    first_queries = stored_queries(run, name).slice(0, queries).to_pylist()
    split = token_influences(run, name, [query["query_id"] for query in first_queries])
    shown, ordinals = [], set[int]()
    for query, influence, recovery in _query_results(run, name, first_queries):
        values = influence["influence"].to_numpy()
        sides = {
            "helping": influence.slice(0, min(blocks, int((values > 0).sum()))).to_pylist(),
            "harming": influence.slice(max(0, len(values) - min(blocks, int((values < 0).sum())))).to_pylist()[::-1],
        }
        for row in (*sides["helping"], *sides["harming"]):
            row["share"] = abs(row["influence"]) / float(np.abs(values).max())
            row["tokens"] = split.get((row["query_id"], row["ordinal"]))
            ordinals.add(row["ordinal"])
        ids, mask = np.array(query["token_ids"], dtype=int), np.array(query["loss_mask"], dtype=bool)
        about = {key: recovery[key] for key in ("error", "base_loss", "nonzeros", "gap")}
        at = np.unique(np.linspace(0, len(values) - 1, CURVE).round().astype(int)) if len(values) else np.zeros(0, int)
        summed = np.cumsum(values[values > 0])
        shown.append(
            {
                "query_id": query["query_id"],
                **about,
                "prompt": tokenizer.decode(ids[~mask]) if len(ids) else "",
                "completion": tokenizer.decode(ids[mask]) if len(ids) else "",
                "contrast": _contrast_text(query, tokenizer),
                **sides,
                "curve": [[int(rank), float(values[rank])] for rank in at],
                "half": int(np.searchsorted(summed, summed[-1] / 2)) + 1 if len(summed) else 0,
                "sources": source_shares(influence["source"].to_pylist(), values),
            }
        )
    pool, listed = Blocks(run.stage("blocks").store), sorted(ordinals)
    known = pool.take(listed, ["token_ids", "spans"]).to_pylist()
    ids_of = dict(zip(listed, map(unpadded, known), strict=True))
    texts = {ordinal: tokenizer.decode(ids) for ordinal, ids in ids_of.items()}
    several = {ordinal for _, ordinal in split}
    pieces = {ordinal: token_texts(ids, tokenizer) for ordinal, ids in ids_of.items() if ordinal in several}
    for each in shown:
        for row in (*each["helping"], *each["harming"]):
            row["text"], row["pieces"] = texts[row["ordinal"]], pieces.get(row["ordinal"])
    return shown


def _contrast_text(query: dict[str, Any], tokenizer: Any) -> str:
    """The other completion of a contrast, as far as it carries loss; empty for a plain query."""
    ids = query["contrast_ids"] or []
    return str(
        tokenizer.decode([token for token, counts in zip(ids, query["contrast_mask"] or (), strict=True) if counts])
    )


def token_influences(run: Run, name: str, queries: list[str]) -> dict[tuple[str, int], list[float]]:
    """Influence by token (tables.TOKENS) of some queries of a set, by query id and block ordinal; read part by part."""
    stage, parts = _finished_stage(run, name)
    found, wanted = dict[tuple[str, int], list[float]](), pa.array(queries, pa.string())
    for file in (f"{tokens_name(part)}.parquet" for part in range(parts)):
        table = stage.store.read_table(file) if stage.store.exists(file) else TOKENS.empty_table()
        rows = table.filter(pc.is_in(table["query_id"], wanted)).to_pylist()
        found |= {(row["query_id"], row["ordinal"]): row["influence"] for row in rows}
    return found


def _query_results(
    run: Run, name: str, queries: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], pa.Table, dict[str, Any]]]:
    """Yield each of the first queries of a set, its rows of the influence table, and its row of the recovery table.

    Reads part by part, so that memory holds the rows of some queries instead of the whole table.
    """
    waiting = iter(queries)
    for influence, recovery in influence_parts(run, name):
        ranges = _row_ranges(influence["query_id"])
        # The recovery table has one row per query, in the order of the queries.
        for recovery_row in recovery.to_pylist():
            query = next(waiting, None)
            if query is None:
                return
            yield query, influence.slice(*ranges.get(query["query_id"], (0, 0))), recovery_row


def influence_parts(run: Run, name: str) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield the influence and recovery tables of a query set, part by part; errors as read_influence."""
    stage, parts = _finished_stage(run, name)
    for part in range(parts):
        yield tuple(stage.store.read_table(f"{table}-{part:05d}.parquet") for table in ("influence", "recovery"))


def _row_ranges(column: pa.ChunkedArray) -> dict[str, tuple[int, int]]:
    """Return each query's first row and row count in an influence table whose rows are contiguous by query."""
    if not len(column):
        return {}
    codes = column.combine_chunks().dictionary_encode()
    numbers = codes.indices.to_numpy()
    firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
    counts = np.diff(firsts, append=len(numbers))
    names = codes.dictionary.to_pylist()
    return {names[numbers[first]]: (int(first), int(count)) for first, count in zip(firsts, counts, strict=True)}


def source_shares(sources: list[str], values: np.ndarray) -> list[tuple[str, float]]:
    """Return (source, share of the positive influence) for the SOURCES largest, largest first."""
    sums: dict[str, float] = {}
    for source, value in zip(sources, values.tolist(), strict=True):
        sums[source] = sums.get(source, 0.0) + max(value, 0.0)
    total = sum(sums.values()) or 1.0
    largest = sorted(sums.items(), key=lambda item: (-item[1], item[0]))[:SOURCES]
    return [(source, value / total) for source, value in largest if value > 0]


def print_table(shown: list[dict[str, Any]], out: TextIO) -> None:
    """Print each query with its most helpful blocks and its most harmful block, one line per block."""
    for query in shown:
        title = " ".join((query["prompt"] + query["completion"]).split())
        title += f" rather than {' '.join(query['contrast'].split())}" if query["contrast"] else ""
        if query["error"]:
            print(f"\n{query['query_id']}: failed: {query['error']}", file=out)
            continue
        print(f"\n{query['query_id']}: {textwrap.shorten(title, 100)}", file=out)
        rows = [*query["helping"][:CONSOLE_BLOCKS], *query["harming"][:1]]
        for row in rows:
            text = textwrap.shorten(" ".join(row["text"].split()), 70) or row["text"].strip()[:70]
            where = shown_name(row["source"], row["document_id"])
            where = where if len(where) <= 32 else "…" + where[-31:]
            print(f"  {row['rank']:>4}  {row['influence']:+10.4g}  {where:<32}  {text}", file=out)
        if not rows:
            print("  no block has influence at this penalty", file=out)
