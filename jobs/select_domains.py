"""Job: is data selected by influence better to train on? On a benchmark's pool, for each of its domains in turn.

The folder holds pool.parquet (token_ids, domain, document, position), queries.parquet (token_ids, domain, part), model/
and start/. The pool becomes a run; each domain's queries are a target; documents with a share of the pool's tokens are
selected for it, by influence, at random and by TF-IDF, and training on each arm is measured on queries that did not
select. Nobody is told the domains, unless --sources makes the random arm's mix of them the selected one's. With --part
development each target's queries are halved, for choosing between settings; without it development queries select and
report queries measure. It prints a table and, on the last line, one JSON object. A command that was killed goes on
where it stopped.

    python jobs/select_domains.py --benchmark FOLDER --out FOLDER [--share 0.2 --seeds 3 --set select.by=mean]
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stride_ray.attribution.attribute import answer
from stride_ray.cli.arguments import assignment
from stride_ray.cli.exits import exit_status
from stride_ray.corpus.documents import TokenizedDocument
from stride_ray.corpus.queries import SCHEMA, row
from stride_ray.corpus.shard import shard
from stride_ray.evaluate.closed_loop import LOSS, ClosedLoop, compare_arms
from stride_ray.evaluate.retraining.lds import mean_interval
from stride_ray.evaluate.retraining.retrain import read_array
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store

DEVELOPMENT, REPORT = "development", "report"
# The run's one query set, and the length of a benchmark's rows.
SET, BLOCK_TOKENS = "queries", 128


def prepare(folder: str, out: str, sources: bool, changes: dict[str, str]) -> tuple[Run, pa.Table]:
    """The benchmark's pool as an attributed run, its rows joined to documents, and the queries with their ids."""
    given, store = Store(folder), Store(out)
    if not store.exists("pool.parquet"):
        store.write_table("pool.parquet", joined(given.read_table("pool.parquet")))
    start = {"model.start": f"{folder}/start"} if given.exists("start/config.json") else {}
    columns = {"token_ids": "token_ids", "id": "document"} | ({"source": "domain"} if sources else {})
    settings = {
        "corpus.input": [f"{out}/pool.parquet"],
        "corpus.columns": columns,
        "corpus.layout": "split",
        "corpus.block_tokens": BLOCK_TOKENS,
        "model.path": f"{folder}/model",
        **start,
        **changes,
    }
    run = Run(f"{out}/run", changes=settings)
    shard(run)
    queries = given.read_table("queries.parquet").to_pylist()
    for index, query in enumerate(queries):
        ids = np.array(query["token_ids"], dtype=np.int32)
        query |= row(f"q{index}", TokenizedDocument(f"q{index}", query["domain"], ids, None))
    answer(run, pa.Table.from_pylist([{name: query[name] for name in SCHEMA.names} for query in queries], SCHEMA), SET)
    return run, pa.Table.from_pylist(
        [{name: query[name] for name in ("query_id", "domain", "part")} for query in queries]
    )


def joined(pool: pa.Table) -> pa.Table:
    """A benchmark's rows as documents: the rows of one document in their order, one after the other."""
    documents: dict[str, dict[str, Any]] = {}
    for each in pool.sort_by([("document", "ascending"), ("position", "ascending")]).to_pylist():
        name = each["document"]
        document = documents.setdefault(name, {"document": name, "domain": each["domain"], "token_ids": []})
        document["token_ids"] += each["token_ids"]
    return pa.Table.from_pylist(list(documents.values()))


def over_domains(found: dict[str, ClosedLoop], out: str) -> dict[str, dict[str, float]]:
    """The selected arm's difference from each other over all domains' queries, with its interval, domains pooled."""
    pooled = {}
    for arm, folder in (("random", "selected-random"), ("TF-IDF", "tfidf")):
        pieces = []
        for domain, each in found.items():
            store = Store(f"{out}/{domain}/_retrain/losses")
            losses = [
                np.stack([read_array(store, f"{name}-seed-{seed}.npy") for seed in range(each.seeds)])
                for name in ("selected", folder)
            ]
            pieces.append(losses[0] - losses[1])
        pooled[arm] = dataclasses.asdict(mean_interval(np.concatenate(pieces, axis=1)))
    return pooled


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, select and train for every domain, print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", required=True, metavar="FOLDER", help="a benchmark with domains")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where everything goes; a rerun goes on there")
    parser.add_argument("--share", type=float, default=0.2, help="of the pool's tokens (default: 0.2)")
    parser.add_argument("--sources", action="store_true", help="tell the random arm the domains, as sources to match")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each arm (default: 3)")
    parser.add_argument(
        "--part", choices=(DEVELOPMENT,), help="select and measure on halves of the development queries"
    )
    parser.add_argument("--name", default="report", help="folder in OUT for this command's arms (default: report)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any option of the run")
    parsed = parser.parse_args(arguments)

    def work() -> None:
        changes = {"select.tokens": str(parsed.share), **dict(assignment(each) for each in parsed.set)}
        home = f"{parsed.out}/{'sources' if parsed.sources else 'plain'}"
        run, queries = prepare(parsed.benchmark, home, parsed.sources, changes)
        out, found = f"{home}/{parsed.name}", {}
        for domain in sorted(set(queries["domain"].to_pylist())):
            mine = queries.filter(pc.equal(queries["domain"], domain))
            first, second = (
                mine.filter(pc.equal(mine["part"], part))["query_id"].to_pylist() for part in (DEVELOPMENT, REPORT)
            )
            if parsed.part:
                first, second = first[::2], first[1::2]
            found[domain] = compare_arms(run, {SET: first}, {SET: second}, f"{out}/{domain}", parsed.seeds)
            print(f"{domain}\n{found[domain].as_table()}\n", flush=True)
        pooled = over_domains(found, out)
        for arm, each in pooled.items():
            print(
                f"All domains, selected minus {arm}: {each['value']:+.4f} ({each['low']:+.4f} to {each['high']:+.4f})"
            )
        losses = {domain: dataclasses.asdict(each) for domain, each in found.items()}
        print(json.dumps({"measure": LOSS, "domains": losses, "all": pooled}))

    return exit_status("select_domains", work)


if __name__ == "__main__":
    sys.exit(main())
