"""Job: how well attribution methods predict retraining (LDS) on one benchmark: scores, seconds, tables, a plot.

The benchmark folder contains pool.parquet, queries.parquet, model/, retraining results (from jobs/retrain.py) and, if
training started from a checkpoint, start/. A rerun of an interrupted command resumes where it stopped. The output, and
the JSON object on the last line, cover the report part of the queries (all queries, if there are no parts); lds.md in
the output folder contains the rest. With --removal, the models are also retrained without the blocks that each method
ranks first, and without random ones: a column of the table for the first share, and removal.md, removal.svg and
removal.parquet for all. Exit status as for stride-ray: 0 done, 1 failed with a message on standard error, 130
interrupted.

    python jobs/evaluate.py --benchmark FOLDER --out FOLDER [--methods tfidf,logra,stride] [--ablations]
        [--removal 0.01,0.05]
"""

import argparse
import json
import sys
from collections.abc import Sequence

from stride_ray.cli.arguments import add_compute, add_removal, compute_of, removal_of
from stride_ray.cli.exits import exit_status
from stride_ray.evaluate.comparison.compare import compare
from stride_ray.evaluate.comparison.units import method_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, compare the methods, print tables and one line of JSON; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Methods: {', '.join(method_names())}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--benchmark", required=True, metavar="FOLDER", help="the benchmark: a path or fsspec URL")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where results go; a rerun goes on there")
    parser.add_argument("--methods", metavar="A,B,…", help="only these (default: all but the ablations)")
    parser.add_argument("--ablations", action="store_true", help="STRIDE's ablations too, and rivals with more damping")
    add_removal(parser)
    add_compute(parser, "cores, or STRIDE's GPUs (default: all)")
    parsed = parser.parse_args(arguments)

    def work() -> None:
        done = compare(
            parsed.benchmark,
            parsed.out,
            methods=None if parsed.methods is None else [name.strip() for name in parsed.methods.split(",")],
            ablations=parsed.ablations,
            compute=compute_of(parsed),
            removal=removal_of(parsed),
        )
        print(done["summary"])
        print(json.dumps(done["result"]))

    return exit_status("evaluate", work)


if __name__ == "__main__":
    sys.exit(main())
