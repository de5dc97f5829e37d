"""Job: is data selected by influence better training data? Tested on a benchmark's pool, for each domain in turn.

The benchmark folder contains pool.parquet (token_ids, domain, document, position), queries.parquet (token_ids, domain,
part), model/ and, if training started from a checkpoint, start/. The pool becomes a run, and the queries of each domain
are a target. For each target, documents with a share of the pool's tokens are selected by influence, at random and by
rival methods, and a model trained on each arm is evaluated on queries that were not used for selection. Selection does
not see the domains, except that --sources gives the random arm the same mix of domains as the selected one. With --part
development, halves of the target's development queries select and measure, for choosing between settings; without it,
development queries select and report queries measure. It prints tables and, on the last line, one JSON object. A rerun
of an interrupted command resumes where it stopped.

    python jobs/select_domains.py --benchmark FOLDER --out FOLDER [--share 0.2 --seeds 3 --set select.by=mean]
        [--rivals tfidf,dsir,less,dsdm]
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

from stride_ray.attribution.attribute import write_tables
from stride_ray.cli.arguments import assignment
from stride_ray.cli.exits import exit_status
from stride_ray.corpus.documents import TokenizedDocument
from stride_ray.corpus.queries import SCHEMA, row
from stride_ray.corpus.shard import shard
from stride_ray.evaluate.closed_loop.arms import LOSS, SELECTED, ClosedLoop, compare_arms
from stride_ray.evaluate.closed_loop.rivals import RIVALS, USUAL
from stride_ray.evaluate.retraining.lds import DEVELOPMENT, REPORT, mean_interval
from stride_ray.evaluate.retraining.retrain import read_array
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store

# Name of the run's only query set; tokens in a row of a benchmark's pool.
SET, BLOCK_TOKENS = "queries", 128


def prepare(folder: str, out: str, sources: bool, changes: dict[str, str]) -> tuple[Run, pa.Table]:
    """Attribute all queries on the benchmark's pool; returns the run and the queries' ids, domains and parts."""
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
    write_tables(
        run, pa.Table.from_pylist([{name: query[name] for name in SCHEMA.names} for query in queries], SCHEMA), SET
    )
    return run, pa.Table.from_pylist(
        [{name: query[name] for name in ("query_id", "domain", "part")} for query in queries]
    )


def joined(pool: pa.Table) -> pa.Table:
    """A benchmark's rows joined into documents, in order of their positions."""
    documents: dict[str, dict[str, Any]] = {}
    for each in pool.sort_by([("document", "ascending"), ("position", "ascending")]).to_pylist():
        name = each["document"]
        document = documents.setdefault(name, {"document": name, "domain": each["domain"], "token_ids": []})
        document["token_ids"] += each["token_ids"]
    return pa.Table.from_pylist(list(documents.values()))


def over_domains(found: dict[str, ClosedLoop], out: str) -> dict[str, dict[str, float]]:
    """Mean loss difference of the selected arm to each other arm over all domains' queries, with its interval."""
    pieces: dict[str, list[np.ndarray]] = {}
    for domain, each in found.items():
        store = Store(f"{out}/{domain}/_retrain/losses")
        losses = {
            arm: np.stack([read_array(store, f"{name}.npy") for name in names]) for arm, names in each.trainings.items()
        }
        for arm in losses.keys() - {SELECTED}:
            pieces.setdefault(arm, []).append(losses[SELECTED] - losses[arm])
    arms = [arm for arm in next(iter(found.values())).trainings if arm != SELECTED]
    return {arm: dataclasses.asdict(mean_interval(np.concatenate(pieces[arm], axis=1))) for arm in arms}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, select and train for every domain, and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", required=True, metavar="FOLDER", help="a benchmark with domains")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where everything goes; a rerun goes on there")
    parser.add_argument("--share", type=float, default=0.2, help="of the pool's tokens (default: 0.2)")
    parser.add_argument("--sources", action="store_true", help="tell the random arm the domains, as sources to match")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each arm (default: 3)")
    parser.add_argument(
        "--part", choices=(DEVELOPMENT,), help="select and measure on halves of the development queries"
    )
    parser.add_argument(
        "--rivals", default=",".join(USUAL), metavar="A,B,…", help=f"of {', '.join(RIVALS)} (default: %(default)s)"
    )
    parser.add_argument("--name", default="report", help="folder in OUT for this command's arms (default: report)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any option of the run")
    parsed = parser.parse_args(arguments)

    def work() -> None:
        changes = {"select.tokens": str(parsed.share), **dict(assignment(each) for each in parsed.set)}
        home = f"{parsed.out}/{'sources' if parsed.sources else 'plain'}"
        run, queries = prepare(parsed.benchmark, home, parsed.sources, changes)
        out, found, rivals = f"{home}/{parsed.name}", {}, list(filter(None, parsed.rivals.split(",")))
        for domain in sorted(set(queries["domain"].to_pylist())):
            mine = queries.filter(pc.equal(queries["domain"], domain))
            first, second = (
                mine.filter(pc.equal(mine["part"], part))["query_id"].to_pylist() for part in (DEVELOPMENT, REPORT)
            )
            if parsed.part:
                first, second = first[::2], first[1::2]
            arms = ({SET: first}, {SET: second})
            found[domain] = compare_arms(run, *arms, f"{out}/{domain}", parsed.seeds, rivals=rivals)
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
