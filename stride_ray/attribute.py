"""Stage attribute: queries to ranked tables, a console table and a page, amortised (respond, recover) or exact."""

import sys
import textwrap
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stride_ray.blocks import Blocks
from stride_ray.exact import exact_influence
from stride_ray.influence import recover_influence
from stride_ray.queries import read_queries
from stride_ray.report.page import attribution_page
from stride_ray.respond import respond_table
from stride_ray.run import Run
from stride_ray.tokens import load_tokenizer

# Blocks shown per query and side, in the console and on the page; queries on the page.
CONSOLE_BLOCKS, PAGE_BLOCKS, PAGE_QUERIES = 3, 8, 200


def attribute(run: Run, queries: str, name: str, out: TextIO | None = None) -> dict[str, Any]:
    """Which training blocks made the model answer like this, for every query.

    Args:
        run: with finished ``operators/``; for exact, ``blocks/`` will do.
        queries: JSON Lines or Parquet with text, prompt and completion, or messages (queries.read_queries).
        name: of the query set; tables go to ``influence/<name>/`` or ``exact/<name>/``.
        out: where the console table is written; None: standard output.

    Returns:
        recover_influence's or exact_influence's summary with ``mode`` and ``page``, the page's URL.

    Raises:
        StrideError: as read_queries and answer.
    """
    out = out or sys.stdout
    run.require("blocks", "manifest.json", "stride-ray shard")
    table = read_queries(queries, load_tokenizer(run.store.child("blocks/tokenizer").url))
    summary = answer(run, table, name)
    shown = shown_queries(run, name, PAGE_QUERIES, PAGE_BLOCKS)
    print_table(shown[:20], out)
    stage = run.stage(table_stage(run), name)
    facts = {**_about(run), **summary, "name": name, "run": run.url}
    stage.store.write("page.html", attribution_page(shown, facts).encode())
    page = stage.store.name_of("page.html")
    gap = f", largest relative duality gap {summary['largest_gap']:.1e}" if "largest_gap" in summary else ""
    print(
        f"\n{summary['queries']} queries ({summary['failed']} failed), {summary['rows']} influences, "
        f"median {summary['median_nonzeros']:g} blocks a query{gap}.\n"
        f"Tables: {stage.store.name_of('influence-*.parquet')}\nPage:   {page}",
        file=out,
    )
    return {**summary, "page": page}


def answer(run: Run, table: pa.Table, name: str) -> dict[str, Any]:
    """Ranked tables for tokenised queries (queries.SCHEMA), as ``attribute.mode`` says; returns the stage's summary.

    Raises:
        StrideError: as respond_table and recover_influence, or exact_influence.
    """
    if run.config.attribute.mode == "exact":
        return {**exact_influence(run, table, name), "mode": "exact"}
    responded = respond_table(run, table, name)
    return {**recover_influence(run, name), "mode": responded["mode"]}


def table_stage(run: Run) -> str:
    """The stage with a query set's tables: ``exact`` or, amortised, ``influence``."""
    return "exact" if run.config.attribute.mode == "exact" else "influence"


def asked_queries(run: Run, name: str) -> pa.Table:
    """The queries (queries.SCHEMA) that a query set's tables answer."""
    stage = "exact" if run.config.attribute.mode == "exact" else "responses"
    return run.stage(stage, name).store.read_table("queries.parquet")


def _about(run: Run) -> dict[str, Any]:
    """What the page says of how its numbers came about: model, blocks, how, learned, verdict."""
    if run.config.attribute.mode == "exact":
        facts = run.stage("curvature").store.read_json("manifest.json")
        how = f"every block scored at {len(facts['sites'])} sites of the model"
        return {"model": run.config.model.path, "blocks": facts["blocks"], "how": how, "learned": True, "verdict": ""}
    facts = run.stage("operators").store.read_json("metadata.json")
    return {**facts, "how": f"{facts['subsets']} subsets, {facts['method']} fit"}


def read_influence(run: Run, name: str, table: str = "influence") -> pa.Table:
    """A query set's whole table: ``influence``, ``documents`` or ``recovery``."""
    verb = "attribute --exact" if run.config.attribute.mode == "exact" else "recover"
    stage = run.require(table_stage(run), "manifest.json", f"stride-ray {verb} --name {name}", name)
    parts = stage.store.read_json("manifest.json")["parts"]
    return pa.concat_tables([stage.store.read_table(f"{table}-{part:05d}.parquet") for part in range(parts)])


def shown_queries(run: Run, name: str, queries: int, blocks: int) -> list[dict[str, Any]]:
    """The first queries of a set with their text and their most helpful and most harmful blocks with theirs.

    Args:
        run: with finished influence of that name.
        name: the query set.
        queries: how many queries at most.
        blocks: how many blocks a side at most.

    Returns:
        Per query: query_id, error, base_loss, nonzeros, gap, ``prompt`` (tokens without loss), ``completion`` (the
        rest), ``helping`` and ``harming``: lists of rows of the influence table with ``text`` and ``share`` of the
        query's largest |influence|.
    """
    tokenizer = load_tokenizer(run.store.child("blocks/tokenizer").url)
    asked = asked_queries(run, name).slice(0, queries).to_pylist()
    recovery = {row["query_id"]: row for row in read_influence(run, name, "recovery").to_pylist()}
    influence = read_influence(run, name)
    pool = Blocks(run.stage("blocks").store)
    shown = []
    for query in asked:
        mine = influence.filter(pc.equal(influence["query_id"], query["query_id"])).to_pylist()
        helping = [row for row in mine[:blocks] if row["influence"] > 0]
        harming = [row for row in reversed(mine[-blocks:]) if row["influence"] < 0]
        largest = max((abs(row["influence"]) for row in mine), default=1.0)
        texts = block_texts(pool, [row["ordinal"] for row in helping + harming], tokenizer)
        for row, text in zip(helping + harming, texts, strict=True):
            row |= {"text": text, "share": abs(row["influence"]) / largest}
        ids, mask = np.array(query["token_ids"], dtype=int), np.array(query["loss_mask"], dtype=bool)
        about = {key: recovery[query["query_id"]][key] for key in ("error", "base_loss", "nonzeros", "gap")}
        shown.append(
            {
                "query_id": query["query_id"],
                **about,
                "prompt": tokenizer.decode(ids[~mask]) if len(ids) else "",
                "completion": tokenizer.decode(ids[mask]) if len(ids) else "",
                "helping": helping,
                "harming": harming,
            }
        )
    return shown


def block_texts(pool: Blocks, ordinals: list[int], tokenizer: Any) -> list[str]:
    """The text of some blocks, without padding."""
    if not ordinals:
        return []
    table = pool.take(ordinals, ["token_ids", "spans"])
    lengths = [sum(span["length"] for span in spans) for spans in table["spans"].to_pylist()]
    return [tokenizer.decode(ids[:length]) for ids, length in zip(table["token_ids"].to_pylist(), lengths, strict=True)]


def print_table(shown: list[dict[str, Any]], out: TextIO) -> None:
    """Queries with their most helpful and most harmful blocks, a line each."""
    for query in shown:
        title = " ".join((query["prompt"] + query["completion"]).split())
        print(f"\n{query['query_id']}: {textwrap.shorten(title, 100) or '(empty)'}", file=out)
        if query["error"]:
            print(f"  failed: {query['error']}", file=out)
            continue
        rows = [*query["helping"][:CONSOLE_BLOCKS], *query["harming"][:1]]
        for row in rows:
            text = textwrap.shorten(" ".join(row["text"].split()), 70) or row["text"].strip()[:70]
            where = row["document_id"] if len(row["document_id"]) <= 32 else "…" + row["document_id"][-31:]
            print(f"  {row['rank']:>4}  {row['influence']:+10.4g}  {where:<32}  {text}", file=out)
        if not rows:
            print("  no block has influence at this penalty", file=out)
