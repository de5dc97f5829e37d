"""Job: tail-patch scores of an attributed query set; prints a table and, on the last line, one JSON object.

Exit status as for stride-ray: 0 done, 1 failed with a message on standard error, 130 interrupted.

    python jobs/tailpatch.py RUN --name NAME [--k 10] [--learning-rate 0.01] [--set attribute.exact=true]
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from stride_ray.cli.arguments import assignment
from stride_ray.cli.exits import exit_status
from stride_ray.evaluate.tailpatch import tail_patch
from stride_ray.runtime.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run directory, a path or fsspec URL")
    parser.add_argument("--name", required=True, help="of the query set")
    parser.add_argument("--k", type=int, default=10, help="blocks in a step (default: 10)")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of the step (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of the random blocks (default: 0)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any option of the run")
    parsed = parser.parse_args(arguments)

    def work() -> None:
        run = Run(parsed.run, changes=dict(assignment(each) for each in parsed.set))
        found = tail_patch(run, parsed.name, parsed.k, parsed.learning_rate, parsed.seed)
        print(found.as_table())
        print(json.dumps(dataclasses.asdict(found)).replace("NaN", "null"))

    return exit_status("tailpatch", work)


if __name__ == "__main__":
    sys.exit(main())
