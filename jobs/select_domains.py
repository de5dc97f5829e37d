"""Job: is data selected by influence better training data? Tested on a benchmark's pool, for each domain in turn.

The benchmark folder contains pool.parquet (token_ids, domain, document, position), queries.parquet (token_ids, domain,
part), model/ and, if training started from a checkpoint, start/; with loss_mask in both, only answers carry loss, and
unigram F1 of decoded answers is measured too (jobs/instruction_lds.py writes such folders). The pool becomes a run, and
the queries of each domain are a target. For each target, documents with a share of the pool's tokens are selected by
influence, at random and by rival methods, and a model trained on each arm is evaluated on queries that were not used
for selection. Selection does not see the domains, except that --sources gives the random arm the same mix of domains as
the selected one. With --part development, halves of the target's development queries select and measure, for choosing
between settings; without it, development queries select and report queries measure. It prints tables and, on the last
line, one JSON object. A rerun of an interrupted command resumes where it stopped.

    python jobs/select_domains.py --benchmark FOLDER --out FOLDER [--share 0.2 --seeds 3 --set select.by=mean]
        [--rivals tfidf,dsir,less,dsdm]
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from stride_ray.cli.arguments import assignment
from stride_ray.cli.exits import exit_status
from stride_ray.evaluate.closed_loop.arms import SELECTED, compare_arms
from stride_ray.evaluate.closed_loop.domains import SET, attribute_domains, halves, over_domains
from stride_ray.evaluate.closed_loop.rivals import RIVALS, USUAL
from stride_ray.evaluate.retraining.lds import DEVELOPMENT


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
        run, queries = attribute_domains(parsed.benchmark, home, parsed.sources, changes)
        out, found, rivals = f"{home}/{parsed.name}", {}, list(filter(None, parsed.rivals.split(",")))
        for domain in sorted(set(queries["domain"].to_pylist())):
            first, second = halves(queries, domain, bool(parsed.part))
            found[domain] = compare_arms(
                run, {SET: first}, {SET: second}, f"{out}/{domain}", parsed.seeds, rivals=rivals
            )
            print(f"{domain}\n{found[domain].as_table()}\n", flush=True)
        pooled = over_domains(found, out)
        for measure, arms in pooled.items():
            for arm, each in arms.items():
                print(f"All domains, {measure}, {SELECTED} minus {arm}: {each:+.4f}")
        domains = {domain: dataclasses.asdict(each) for domain, each in found.items()}
        everywhere = {
            measure: {arm: dataclasses.asdict(each) for arm, each in arms.items()} for measure, arms in pooled.items()
        }
        print(json.dumps({"measures": list(pooled), "domains": domains, "all": everywhere}))

    return exit_status("select_domains", work)


if __name__ == "__main__":
    sys.exit(main())
